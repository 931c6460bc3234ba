"""Files that are malformed in ways that nobody thought of: structures of JSON, YAML, PNG and tar, changed at random places.

Whatever becomes of them, the answer is a clear error or a result: no traceback, no hang, no gigabytes, nothing written beside an error.
Every command runs in a fork of its own, which the kernel holds to the limits.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import struct
import sys
import tarfile
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tessera import cli
from tests.forks import FORKS
from tests.malformed.project import EXPERIMENT, RECIPE, content

SECONDS = 20
MEMORY = 2 << 30
"""Bytes of address space beyond what the process has when a command starts."""

at_random = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
"""The same examples everywhere, so that a failure is a failure of the change that it appears with."""


def answer(command: list[str], folder: Path) -> tuple[int, str]:
    """Exit code and what was printed; the code is that of the signal, negative, where the kernel ended it."""
    said = folder.parent / "said.txt"
    process = FORKS.Process(target=_run, args=(command, folder, said))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, said.read_text(encoding="utf-8")


def _run(command: list[str], folder: Path, said: Path) -> None:
    code: int | str | None = 0
    sys.stdout = sys.stderr = said.open("w", encoding="utf-8", errors="backslashreplace")
    try:
        os.chdir(folder)
        sys.argv = ["tessera", *command]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        cli.main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 70
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 71)


def judge(command: list[str], folder: Path, before: dict[str, str]) -> None:
    """``before``: what lay there, the malformed file included. What a success writes is removed."""
    code, said = answer(command, folder)
    assert code in (0, 1, 2), f"{command} ended with {code}\n{said[-3000:]}"
    assert "Traceback" not in said, said[-3000:]
    # A lock is no output: it stays by design.
    found = {name: digest for name, digest in content(folder).items() if not name.endswith(".lock")}
    if code:
        assert "error: " in said, said[-3000:]
        assert not said.rstrip().endswith("error:"), "an error without a text"
        assert found == before, f"{command} failed and left {found.items() ^ before.items()}"
    for name in sorted(found.keys() - before.keys(), reverse=True):
        (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()


@contextlib.contextmanager
def changed(path: Path, new: bytes) -> Iterator[None]:
    old = path.read_bytes()
    path.write_bytes(new)
    try:
        yield
    finally:
        path.write_bytes(old)


words = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    [
        "",
        ".",
        "..",
        "../..",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "C:\\x.png",
        "NaN",
        "1e400",
        "-0",
        "true",
        "x" * 300,
        "\u202e",
        "\x00",
        "\ud800",
        "${x}",
        "%s",
    ]
)
numbers = (
    st.integers()
    | st.floats()
    | st.sampled_from([-1, 0, 2**31, 2**32, 2**63, 2**64, 10**400, 1e308, 0.5, 255, 256, 65536, True, False])
)
junk = st.recursive(
    st.none() | numbers | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of every value inside."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in ((value, key), *places(value[key]))]


@st.composite
def restructured(draw: st.DrawFn, text: str) -> Any:
    """The JSON value after one to three changes at random places."""
    value = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        found = places(value)
        if not found:
            return draw(junk)
        container, key = draw(st.sampled_from(found))
        other, there = draw(st.sampled_from(found))
        match draw(st.sampled_from(["replace", "delete", "copy", "rename", "wrap", "text", "repeat"])):
            case "replace":
                container[key] = draw(junk)
            case "delete":
                del container[key]
            case "copy":
                container[key] = json.loads(json.dumps(other[there]))
            case "rename" if isinstance(container, dict):
                container[draw(words)] = container.pop(key)
            case "wrap":
                container[key] = [container[key]]
            case "text":
                container[key] = str(container[key])
            case _ if isinstance(container, list):
                container.insert(key, json.loads(json.dumps(container[key])))
            case _:
                container[key] = draw(junk)
    return value


@st.composite
def json_file(draw: st.DrawFn, text: str) -> bytes:
    """``text`` as somebody's tool might have written it, or as a damaged disk gives it back."""
    whole = json.dumps(draw(restructured(text)))
    match draw(st.sampled_from(["plain"] * 4 + ["cut", "encoded", "deep", "twice", "raw"])):
        case "cut":
            whole = whole[: draw(st.integers(0, len(whole)))]
        case "encoded":
            return whole.encode(draw(st.sampled_from(["utf-16", "utf-8-sig", "utf-32", "utf-7"])))
        case "deep":
            depth = draw(st.sampled_from([50, 1_000, 100_000]))
            whole = draw(st.sampled_from(["[", '{"a":'])) * depth + whole
        case "twice":
            whole += whole
        case "raw":
            place = draw(st.integers(0, len(whole)))
            return whole[:place].encode() + draw(st.binary(max_size=8)) + whole[place:].encode()
    return whole.encode()


JSON_FILES = {
    "data/demo/panoptic_train.json": ["check", "demo", "--out", "check.json"],
    "data/demo/instances_train.json": ["check", "objects", "--out", "check.json"],
    "data/demo/label_map.json": ["check", "pairs", "--out", "check.json"],
    f"results/{EXPERIMENT}/eval.json": ["compare", "demo"],
    f"results/{EXPERIMENT}/train.json": ["compare", "demo"],
}


@pytest.mark.parametrize("name", JSON_FILES)
@at_random
@given(data=st.data())
def test_json(name: str, project: Path, data: st.DataObject) -> None:
    text = (project / name).read_text()
    with changed(project / name, data.draw(json_file(text))):
        judge(JSON_FILES[name], project, content(project))


@at_random
@given(data=st.data())
def test_lines_of_json(project: Path, data: st.DataObject) -> None:
    path = project / "data/demo/train.jsonl"
    lines = path.read_text().splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    whole = [line.encode() for line in lines]
    whole[number] = data.draw(json_file(lines[number]))
    with changed(path, data.draw(st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\r"])).join(whole)):
        judge(["check", "pairs", "--out", "check.json"], project, content(project))


BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10))])
yaml_ends = st.sampled_from(
    [
        BOMB,
        "[" * 100_000,
        "{a: " * 100_000,
        "- " * 100_000,
        "train: {num_epochs: 010}",
        "train: {num_epochs: 1_0}",
        "train: &t {<<: *t}",
        "? [a, b]\n: c",
        "!!python/object/apply:os.system [touch owned]",
        "!!binary aGVsbG8=",
        "--- \nx: 1\n---\ny: 2",
        "%YAML 9.9\n---\nx: 1",
        "\tx: 1",
        "x: |\n y\n  z",
        "x: 2026-11-28",
        "x: \u2028",
        "model: {model: {model: 1}}",
        "\x00",
        "train: {num_epochs: " + "9" * 400 + "}",
        "train: {optim: {lr: 1e300}}",
    ]
)


@st.composite
def yaml_file(draw: st.DrawFn, text: str) -> bytes:
    value = draw(restructured(json.dumps(yaml.safe_load(text))))
    whole = yaml.safe_dump(value, allow_unicode=draw(st.booleans()), default_flow_style=draw(st.booleans()))
    match draw(st.sampled_from(["plain"] * 4 + ["end", "end", "cut", "encoded", "raw"])):
        case "end":
            whole += "\n" + draw(yaml_ends)
        case "cut":
            whole = whole[: draw(st.integers(0, len(whole)))]
        case "encoded":
            return whole.encode(draw(st.sampled_from(["utf-16", "utf-8-sig", "utf-32"])), "surrogatepass")
        case "raw":
            place = draw(st.integers(0, len(whole)))
            return (
                whole[:place].encode(errors="replace")
                + draw(st.binary(max_size=8))
                + whole[place:].encode(errors="replace")
            )
    return whole.encode("utf-8", "surrogatepass")


@pytest.mark.parametrize(
    "name", [RECIPE, "config/config.yaml", "config/datasets/demo.yaml", "config/models/mask2former.yaml"]
)
@at_random
@given(data=st.data())
def test_yaml(name: str, project: Path, data: st.DataObject) -> None:
    text = (project / name).read_text()
    with changed(project / name, data.draw(yaml_file(text))):
        judge(["spec", EXPERIMENT], project, content(project))


@at_random
@given(data=st.data())
def test_yaml_of_others(project: Path, data: st.DataObject) -> None:
    theirs = project / "tao.yaml"
    text = "model: {mode: panoptic, backbone: {type: swin}}\ndataset: {train: {type: coco_panoptic, batch_size: 2}}\ntrain: {num_epochs: 3}\n"
    theirs.write_bytes(data.draw(yaml_file(text)))
    judge(["import-spec", "tao.yaml", "--name", "theirs", "--model", "mask2former"], project, content(project))


ZEROS = {size: zlib.compress(bytes(size), 1) for size in (0, 10, 200_000_000)}
"""Packed: what a picture or a text may claim to hold."""

Chunk = tuple[bytes, bytes]


def chunks(png: bytes) -> list[Chunk]:
    found, place = [], 8
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        found.append((png[place + 4 : place + 8], png[place + 8 : place + 8 + length]))
        place += length + 12
    return found


sizes = st.sampled_from([0, 1, 63, 65, 10_000, 20_000, 2**16, 2**31 - 1, 2**31, 2**32 - 1])


@st.composite
def png_file(draw: st.DrawFn, png: bytes) -> bytes:
    parts = chunks(png)
    for _ in range(draw(st.integers(1, 2))):
        number = draw(st.integers(0, len(parts) - 1))
        kind, body = parts[number]
        match draw(
            st.sampled_from(["header", "size", "drop", "repeat", "cut", "bytes", "text", "kind", "palette", "pixels"])
        ):
            case "header" | "size" as what:
                width, height, *rest = (
                    struct.unpack(">IIBBBBB", parts[0][1]) if len(parts[0][1]) == 13 else (1, 1, 8, 0, 0, 0, 0)
                )
                if what == "size":
                    width, height = draw(st.tuples(sizes, sizes))
                else:
                    rest = [draw(st.sampled_from([0, 1, 2, 3, 4, 6, 7, 8, 16, 255])) for _ in rest]
                parts[0] = b"IHDR", struct.pack(">IIBBBBB", width, height, *rest)
            case "drop" if len(parts) > 1:
                del parts[number]
            case "repeat":
                parts.insert(draw(st.integers(0, len(parts))), (kind, body))
            case "cut":
                parts[number] = kind, body[: draw(st.integers(0, len(body)))]
            case "bytes":
                parts[number] = (
                    kind,
                    body[: len(body) // 2] + draw(st.binary(min_size=1, max_size=16)) + body[len(body) // 2 :],
                )
            case "text":
                bomb = ZEROS[200_000_000] if draw(st.booleans()) else b"x"
                parts.insert(
                    1,
                    draw(
                        st.sampled_from(
                            [(b"zTXt", b"a\0\0" + bomb), (b"iCCP", b"a\0\0" + bomb), (b"eXIf", b"MM\0*" + b"\xff" * 8)]
                        )
                    ),
                )
            case "kind":
                parts[number] = (
                    draw(st.sampled_from([b"IDAT", b"PLTE", b"tRNS", b"acTL", b"fdAT", b"fcTL", b"abcd", b"ABCD"])),
                    body,
                )
            case "palette":
                parts.insert(1, (b"PLTE", draw(st.binary(max_size=20))))
            case _:
                pixels = ZEROS[draw(st.sampled_from(sorted(ZEROS)))]
                parts = [part for part in parts if part[0] != b"IDAT"]
                parts.insert(1, (b"IDAT", pixels))
    whole = png[:8]
    for kind, body in parts:
        sum_ = zlib.crc32(kind + body) if draw(st.integers(0, 9)) else 0
        whole += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", sum_)
    return whole[: draw(st.integers(0, len(whole)))] if not draw(st.integers(0, 9)) else whole


PNG_FILES = {
    "data/demo/images/train/train_00001.png": "demo",
    "data/demo/panoptic/train/train_00001.png": "demo",
    "data/demo/masks/train/train_00001.png": "pairs",
}


@pytest.mark.parametrize("name", PNG_FILES)
@at_random
@given(data=st.data())
def test_png(name: str, project: Path, data: st.DataObject) -> None:
    with changed(project / name, data.draw(png_file((project / name).read_bytes()))):
        judge(["check", PNG_FILES[name], "--out", "check.json"], project, content(project))


@st.composite
def tar_file(draw: st.DrawFn) -> bytes:
    """Members with odd names, types, sizes and links; then perhaps a header of which a field is overwritten, with a right checksum."""
    stream = io.BytesIO()
    with tarfile.open(
        fileobj=stream,
        mode="w",
        format=draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])),
    ) as tar:
        for _ in range(draw(st.integers(0, 4))):
            body = draw(st.binary(max_size=40))
            member = tarfile.TarInfo(
                draw(
                    st.sampled_from(
                        ["a.png", "b/c.json", "../x", "/abs", "a.png/d", ".", "..", "n" * 300, "é", " ", "-x", "a\\b"]
                    )
                )
            )
            member.type = draw(
                st.sampled_from(
                    [
                        b"0",
                        b"0",
                        b"0",
                        b"1",
                        b"2",
                        b"3",
                        b"4",
                        b"5",
                        b"6",
                        b"7",
                        b"S",
                        b"x",
                        b"g",
                        b"L",
                        b"K",
                        b"?",
                        b"\0",
                    ]
                )
            )
            member.linkname = draw(st.sampled_from(["", "a.png", "../../x", "/etc/passwd", "b"]))
            member.mode = draw(st.sampled_from([0o644, 0, 0o4777, 0o777]))
            member.size = len(body)
            if draw(st.booleans()):
                member.pax_headers = draw(
                    st.sampled_from(
                        [
                            {"path": "../../y"},
                            {"size": "99999999999999"},
                            {"GNU.sparse.map": "0,1"},
                            {"comment": "c"},
                            {"mtime": "x"},
                            {
                                "GNU.sparse.major": "1",
                                "GNU.sparse.minor": "0",
                                "GNU.sparse.name": "s",
                                "GNU.sparse.realsize": "100000000000000",
                            },
                        ]
                    )
                )
            with contextlib.suppress(ValueError):
                tar.addfile(member, io.BytesIO(body))
    whole = bytearray(stream.getvalue())
    for _ in range(draw(st.integers(0, 2))):
        block = 512 * draw(st.integers(0, len(whole) // 512 - 1))
        offset, length = draw(
            st.sampled_from([(0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155)])
        )
        whole[block + offset : block + offset + length] = draw(
            st.binary(max_size=length) | st.sampled_from([b"\x80" + b"\xff" * 11, b"77777777777\0", b"-1", b""])
        )[:length].ljust(length, b"\0")
        whole[block + 148 : block + 156] = b" " * 8
        whole[block + 148 : block + 156] = b"%06o\0 " % sum(whole[block : block + 512])
    plain = bytes(whole[: draw(st.integers(0, len(whole)))] if not draw(st.integers(0, 4)) else whole)
    match draw(st.sampled_from(["tar", "tar", "gz", "cut gz", "bz2 by name"])):
        case "gz":
            return _gzip(plain)
        case "cut gz":
            packed = _gzip(plain)
            return packed[: draw(st.integers(0, len(packed)))]
    return plain


def _gzip(content: bytes) -> bytes:
    pack = zlib.compressobj(1, zlib.DEFLATED, 31)
    return pack.compress(content) + pack.flush()


@at_random
@given(data=st.data())
def test_tar(project: Path, data: st.DataObject) -> None:
    archive = data.draw(tar_file())
    name = data.draw(st.sampled_from(["a.tar", "a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz"]))
    (project / "data" / name).write_bytes(archive)
    given_ = {"dataset": {"fetch": {"images": {"address": name, "sha256": hashlib.sha256(archive).hexdigest()}}}}
    (project / "config/datasets/remote.yaml").write_text(yaml.safe_dump(given_))
    grid = yaml.safe_load((project / "config/config.yaml").read_text())
    (project / "config/config.yaml").write_text(
        yaml.safe_dump(grid | {"datasets": ["demo", "pairs", "objects", "remote"]})
    )
    (project / "data/remote").mkdir(exist_ok=True)
    try:
        judge(["fetch", "remote"], project, content(project))
    finally:
        shutil.rmtree(project / "data/remote")
        (project / "data" / name).unlink()
