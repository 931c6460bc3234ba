"""Archives from the data root and from a real S3 server (moto) on this machine."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from rich.progress import Progress

from tessera.files import UserError, only_process
from tessera.interop.storage import fetch, fetch_dataset, s3
from tessera.spec.schema import ArchiveSpec, DatasetSpec
from tests.s3 import free_port, serving

BUCKET = "pictures"
CONTENT = {"a.png": b"first", "deep/er/b.png": b"second" * 1000}


def pack(files: dict[str, bytes], mode: str = "w:gz", **special: tarfile.TarInfo) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in special.values():
            tar.addfile(member)
    return stream.getvalue()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def dataset(address: str, sha256: str | None, folder: str = "images") -> DatasetSpec:
    return DatasetSpec(name="photos", fetch={folder: ArchiveSpec(address=address, sha256=sha256)})


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "root").mkdir()
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def unpacked(project: Path, folder: str = "images") -> dict[str, bytes]:
    place = project / "data/photos" / folder
    return {
        path.relative_to(place).as_posix(): path.read_bytes()
        for path in sorted(place.rglob("*"))
        if path.is_file() and path.name != ".fetched.json"
    }


def leftovers(project: Path) -> list[str]:
    home = project / "data/photos"
    return sorted(path.name for path in home.glob(".*") if path.name != ".fetch.lock")


@pytest.mark.parametrize(
    ("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz"), (".TAR.XZ", "w:xz")]
)
def test_a_local_archive_is_unpacked(suffix: str, mode: str, project: Path) -> None:
    content = pack(CONTENT, mode)
    (project.parent / f"root/x{suffix}").write_bytes(content)
    fetch_dataset(dataset(f"x{suffix}", digest(content)), "../root", progress=False)
    assert unpacked(project) == CONTENT
    manifest = json.loads((project / "data/photos/fetch.json").read_text())
    expected = {"address": f"x{suffix}", "sha256": digest(content), "files": 2, "bytes": 6005}
    assert manifest == {"dataset": "photos", "archives": {"images": expected}}
    assert leftovers(project) == []


def test_what_is_whole_stays_and_what_is_not_is_made_again(project: Path) -> None:
    content = pack(CONTENT)
    archive = project.parent / "root/x.tar.gz"
    archive.write_bytes(content)
    spec = dataset("x.tar.gz", digest(content))
    fetch_dataset(spec, "../root", progress=False)
    image = project / "data/photos/images/a.png"
    before = image.stat().st_ino
    archive.rename(archive.with_name("moved"))
    (project / "data/photos/fetch.json").unlink()
    fetch_dataset(spec, "../root", progress=False)
    assert image.stat().st_ino == before and (project / "data/photos/fetch.json").exists()
    archive.with_name("moved").rename(archive)
    image.unlink()
    (left := project / f"data/photos/.images.tessera-{'0' * 24}").mkdir()
    os.utime(left, (0, 0))
    fetch_dataset(spec, "../root", progress=False)
    assert unpacked(project) == CONTENT and leftovers(project) == []
    changed = pack({"c.png": b"new"})
    archive.write_bytes(changed)
    fetch_dataset(dataset("x.tar.gz", digest(changed)), "../root", progress=False)
    assert unpacked(project) == {"c.png": b"new"}


def test_a_plain_file_is_copied(project: Path) -> None:
    (project.parent / "root/deep").mkdir()
    (project.parent / "root/deep/train.json").write_bytes(b"{}")
    fetch_dataset(dataset("deep/train.json", digest(b"{}"), "annotations"), "../root", progress=False)
    assert unpacked(project, "annotations") == {"train.json": b"{}"}


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


def header(name: str, kind: bytes, size: int) -> bytes:
    """That declares a size, whatever follows."""
    made = tarfile.TarInfo(name)
    made.type, made.size = kind, size
    return made.tobuf(tarfile.GNU_FORMAT)


def attributes(kind: bytes = tarfile.XHDTYPE, **values: str) -> bytes:
    """A pax header."""
    body = b""
    for key, value in values.items():
        record = f" {key.replace('_', '.')}={value}\n".encode()
        body += str(len(record) + len(str(len(record) + 3))).encode() + record
    return header("attributes", kind, len(body)) + body.ljust(-(-len(body) // 512) * 512, b"\0")


HUGE = 10**14
SPARSE_1_0 = attributes(
    GNU_sparse_major="1", GNU_sparse_minor="0", GNU_sparse_name="a.png", GNU_sparse_realsize=str(HUGE)
)
BOMBS: dict[str, tuple[bytes, str]] = {
    "sparse": (header("a.png", b"S", 512), r"member 'a\.png' is a sparse file.*pack it without --sparse"),
    "sparse 0.1": (
        attributes(GNU_sparse_map="0,1", GNU_sparse_size=str(HUGE)) + header("a.png", b"0", 1) + b"x".ljust(512, b"\0"),
        r"member 'a\.png' is a sparse file",
    ),
    "sparse 1.0": (SPARSE_1_0 + header("a.png", b"0", 512) + b"9" * 512, r"is a sparse file"),
    "declared": (
        header("a.png", b"0", HUGE),
        r"member 'a\.png' has 100000000000000 bytes, but the disk of .* has room for",
    ),
    "several": (
        b"".join(header(f"{n}.png", b"0", 0) for n in range(9)) + header("a.png", b"0", HUGE),
        r"member 'a\.png' has 100000000000000 bytes",
    ),
    "attributes of 16 GB": (
        header("a", tarfile.XHDTYPE, 1 << 34),
        r"a header of 17179869184 bytes, expected at most 1048576",
    ),
    "attributes for all of 16 GB": (header("a", tarfile.XGLTYPE, 1 << 34), r"a header of 17179869184 bytes"),
    "name of 16 GB": (header("a", tarfile.GNUTYPE_LONGNAME, 1 << 34), r"a header of 17179869184 bytes"),
    "negative": (header("a.png", b"0", -512), r"a header of -512 bytes"),
    "negative by attribute": (
        attributes(size="-1024") + header("a.png", b"0", 0),
        r"cannot be unpacked \(member 'a\.png' declares -1024 bytes\)",
    ),
    "attributes without end": (attributes(comment="x") * 3000, r"cannot be unpacked"),
    "attributes for all without end": (
        b"".join(attributes(tarfile.XGLTYPE, **{f"k{n}": "x"}) + header(f"{n}.png", b"0", 0) for n in range(200)),
        r"more than 100 attributes for all members",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("compressed", [False, True])
def test_bombs_are_refused_before_they_take_room(name: str, compressed: bool, project: Path) -> None:
    content, message = BOMBS[name]
    content = gzip.compress(content + bytes(1024)) if compressed else content + bytes(1024)
    (project.parent / "root/x.tar").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message):
            fetch_dataset(dataset("x.tar", digest(content)), "../root", progress=False)
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()
    assert leftovers(project) == [] and not (project / "data/photos/images").exists()


def test_members_and_what_stands_behind_the_end_are_limited(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_MOST_MEMBERS", 3)
    monkeypatch.setattr(fetch, "_LONGEST_END", 100_000)
    many = pack({f"{number}.png": b"x" for number in range(4)})
    for content, message in (
        (many, "has more members than the disk of .* can hold"),
        (gzip.compress(pack({"a.png": b"x"}, "w") + bytes(200_000)), "more than 100000 bytes behind its end"),
    ):
        (project.parent / "root/x.tar.gz").write_bytes(content)
        with pytest.raises(UserError, match=message):
            fetch_dataset(dataset("x.tar.gz", digest(content)), "../root", progress=False)
        assert leftovers(project) == [] and not (project / "data/photos/images").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pack({"../outside.png": b"x"}), r"member '\.\./outside.png' would be written outside the dataset"),
        (pack({"a/../../../outside.png": b"x"}), "would be written outside"),
        (pack({"/tmp/outside.png": b"x"}), "would be written outside"),
        (pack({}, link=member("a", tarfile.SYMTYPE, "/etc")), "'a' is neither a file nor a folder"),
        (pack(CONTENT, link=member("b", tarfile.LNKTYPE, "a.png")), "'b' is neither a file nor a folder"),
        (pack({}, pipe=member("p", tarfile.FIFOTYPE)), "'p' is neither"),
        (pack({}), "holds no file"),
        (pack({"a.png": bytes(range(256)) * 9})[:150], "cannot be unpacked"),
        (b"no archive at all", "cannot be unpacked"),
    ],
    ids=lambda value: value if isinstance(value, str) else "archive",  # its bytes hold the time
)
def test_hostile_and_damaged_archives_leave_nothing(content: bytes, message: str, project: Path) -> None:
    (project.parent / "root/x.tar.gz").write_bytes(content)
    with pytest.raises(UserError, match=message):
        fetch_dataset(dataset("x.tar.gz", digest(content)), "../root", progress=False)
    assert not (project / "data/photos/images").exists() and not (project / "data/photos/fetch.json").exists()
    assert leftovers(project) == [] and not list(project.parent.rglob("outside.png"))


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_archives_of_several_streams_are_unpacked_whole(compress: Callable[[bytes], bytes], project: Path) -> None:
    """As bgzip, pbzip2, pixz and plain ``cat`` make them; one stream ends with a file, the next within one."""
    plain = pack(CONTENT, "w")
    content = b"".join(compress(plain[start:end]) for start, end in ((0, 1024), (1024, 4000), (4000, None)))
    (project.parent / "root/x.tar.gz").write_bytes(content)
    fetch_dataset(dataset("x.tar.gz", digest(content)), "../root", progress=False)
    assert unpacked(project) == CONTENT


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_an_archive_cut_off_anywhere_is_refused(mode: str, project: Path) -> None:
    content = pack(CONTENT, mode)
    # A plain one is whole from the block of zeros after its last member on: two headers, 512 and 6144 bytes of content, the block.
    whole = 512 + 512 + 512 + 6144 + 512 if mode == "w" else len(content)
    lengths = {*range(0, whole, 97), *range(0, whole, 512), 513, 1023} if mode == "w" else range(0, whole, 3)
    for length in (*lengths, whole - 1):
        (project.parent / "root/x.tar").write_bytes(content[:length])
        with pytest.raises(UserError, match=r"x\.tar: cannot be unpacked \(.+\); expected a whole tar archive"):
            fetch_dataset(dataset("x.tar", digest(content[:length])), "../root", progress=False)
    assert not (project / "data/photos/images").exists() and leftovers(project) == []
    (project.parent / "root/x.tar").write_bytes(content[:whole])
    fetch_dataset(dataset("x.tar", digest(content[:whole])), "../root", progress=False)
    assert unpacked(project) == CONTENT


def test_a_damaged_header_or_checksum_is_refused(project: Path) -> None:
    plain, packed = bytearray(pack(CONTENT, "w")), bytearray(pack({"a.png": os.urandom(500)}))
    plain[1024 + 150] ^= 1  # Of the second member.
    packed[-6] ^= 1  # Of the checksum behind everything else.
    for damaged, reason in ((plain, "bad checksum, where a member or the end should be"), (packed, "CRC check failed")):
        content = bytes(damaged)
        (project.parent / "root/x.tar").write_bytes(content)
        with pytest.raises(UserError, match=rf"x\.tar: cannot be unpacked \({reason}"):
            fetch_dataset(dataset("x.tar", digest(content)), "../root", progress=False)


def test_names_that_no_folder_can_hold(project: Path) -> None:
    for content in (
        pack({"a" * 300: b""}),
        pack({"a": b"", "a/b": b""}),
        pack({"a\0b\u20ac": b""}),
    ):
        (project.parent / "root/x.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.tar: cannot be unpacked \(.*a"):
            fetch_dataset(dataset("x.tar", digest(content)), "../root", progress=False)


def test_digests_are_required_and_told(project: Path) -> None:
    content = pack(CONTENT)
    (project.parent / "root/x.tar.gz").write_bytes(content)
    with pytest.raises(UserError, match=f"fetch lacks the sha256.*\n.*fetch.images.*\n    sha256: {digest(content)}"):
        fetch_dataset(dataset("x.tar.gz", None), "../root", progress=False)
    with pytest.raises(UserError, match=f"its sha256 is {digest(content)}, declared is {'0' * 64}"):
        fetch_dataset(dataset("x.tar.gz", "0" * 64), "../root", progress=False)
    with pytest.raises(UserError, match=r"\.\./root/y\.tar\.gz: no such file; put the archive there"):
        fetch_dataset(dataset("y.tar.gz", "0" * 64), "../root", progress=False)
    assert unpacked(project) == {}


def test_what_something_else_made_is_not_replaced(project: Path) -> None:
    content = pack(CONTENT)
    (project.parent / "root/x.tar.gz").write_bytes(content)
    own = project / "data/photos/images/own.png"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"own")
    with pytest.raises(UserError, match=r"data/photos/images: exists and was not made by `tessera fetch`"):
        fetch_dataset(dataset("x.tar.gz", digest(content)), "../root", progress=False)
    assert own.read_bytes() == b"own"


def test_a_mark_of_another_form(project: Path) -> None:
    content = pack(CONTENT)
    (project.parent / "root/x.tar.gz").write_bytes(content)
    fetch_dataset(dataset("x.tar.gz", digest(content)), "../root", progress=False)
    for mark in ("[]", "{}", '{"sha256": "0", "files": null, "bytes": 1}'):
        (project / "data/photos/images/.fetched.json").write_text(mark)
        with pytest.raises(
            UserError, match=r"\.fetched\.json: expected sha256, files and bytes, .* delete data/photos/images,"
        ):
            fetch_dataset(dataset("x.tar.gz", digest(content)), "../root", progress=False)


def test_what_was_added_to_a_fetched_folder_is_not_lost(project: Path) -> None:
    content = pack(CONTENT)
    (project.parent / "root/x.tar.gz").write_bytes(content)
    spec = dataset("x.tar.gz", digest(content))
    fetch_dataset(spec, "../root", progress=False)
    (project / "data/photos/images/.DS_Store").write_bytes(b"of no importance")
    image = project / "data/photos/images/a.png"
    before = image.stat().st_ino
    fetch_dataset(spec, "../root", progress=False)
    assert image.stat().st_ino == before
    own = project / "data/photos/images/deep/own.json"
    own.write_bytes(b"own")
    for declared in (digest(content), "0" * 64):
        with pytest.raises(
            UserError, match="photos/images: holds 3 files, but 2 were unpacked there; move the others away"
        ):
            fetch_dataset(dataset("x.tar.gz", declared), "../root", progress=False)
    assert own.read_bytes() == b"own"


def test_a_folder_that_is_a_link_is_filled_where_it_leads(project: Path) -> None:
    home, scratch = project / "data/photos", project.parent / "scratch/deep"
    home.mkdir(parents=True)
    (home / "images").symlink_to(scratch)
    for content in (CONTENT, {"c.png": b"new"}):
        packed = pack(content)
        (project.parent / "root/x.tar.gz").write_bytes(packed)
        (left := scratch.with_name(f".deep.tessera-{'0' * 24}")).mkdir(parents=True)
        os.utime(left, (0, 0))
        fetch_dataset(dataset("x.tar.gz", digest(packed)), "../root", progress=False)
        assert (home / "images").is_symlink() and unpacked(project) == content
        assert [path.name for path in scratch.parent.iterdir()] == ["deep"] and leftovers(project) == []


def test_only_one_at_a_time(project: Path) -> None:
    code = (
        "from tessera.interop.storage import fetch_dataset; from tessera.spec.schema import *; "
        "fetch_dataset(DatasetSpec(name='photos', fetch={'a': ArchiveSpec(address='x')}), '.')"
    )
    with only_process(project / "data/photos/.fetch.lock"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=project)
    assert done.returncode and "another `tessera fetch photos` is at work" in done.stderr


def test_a_full_disk(project: Path) -> None:
    """A real one of 1 MB."""
    small = project / "data"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        content = pack({"a.png": os.urandom(2_000_000)}, "w")
        (project.parent / "root/x.tar").write_bytes(content)
        with pytest.raises(
            UserError, match=r"x\.tar: member 'a\.png' has 2000000 bytes, but the disk of .* has room for"
        ):
            fetch_dataset(dataset("x.tar", digest(content)), "../root", progress=False)
        assert leftovers(project) == [] and not (small / "photos/images").exists()
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize(
    ("fetch", "message"),
    [
        ({"../up": "a.tar"}, "expected folders below data/photos/"),
        ({".hidden": "a.tar"}, "expected folders below"),
        ({"a": "a.tar", "a/b": "b.tar"}, "'a/b' lies in 'a'"),
        ({"a": "https://example.org/a.tar"}, "expected s3://bucket/key or a path inside the data root"),
        ({"a": "s3://bucket"}, "expected s3://bucket/key"),
        ({"a": "s3://bucket/folder/"}, "expected s3://bucket/key"),
        ({"a": "/root/a.tar"}, "not absolute"),
        ({"a": "a.ZIP"}, "expected a tar archive"),
        ({"a": "a.tar.zst"}, "expected a tar archive"),
    ],
)
def test_addresses_and_folders_are_checked_with_the_spec(fetch: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DatasetSpec(name="photos", fetch={folder: ArchiveSpec(address=address) for folder, address in fetch.items()})


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """Port of an S3 server."""
    port = free_port()
    with serving(port):
        yield port


class Proxy:
    """Passes everything on to the server; ``cuts`` says after how many bytes of its answer each next connection is cut."""

    def __init__(self, server: int) -> None:
        self.cuts: list[int] = []
        self.asked: list[bytes] = []
        """Head of every request."""
        self._server = server
        self.port = 0
        self.open()

    def open(self) -> None:
        """At the same port as before."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._server)) as server:
            asked = client.recv(65536)
            self.asked.append(asked)
            server.sendall(asked.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
            left = self.cuts.pop(0) if self.cuts else 1 << 40
            while left > 0 and (piece := server.recv(min(left, 65536))):
                client.sendall(piece)
                left -= len(piece)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # Closed already.
            self._listener.shutdown(
                socket.SHUT_RDWR
            )  # Or the thread that waits for a connection would accept one more.
        self._listener.close()


@pytest.fixture
def store(server: int, project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Client of an S3 server with one empty bucket, and the environment that leads there; ``.proxy`` stands between for ``fetch``."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_CONFIG_FILE": "/nowhere",
        "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3, "PAUSE", 0.0)
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{server}")
    client.create_bucket(Bucket=BUCKET)
    client.proxy = Proxy(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{client.proxy.port}")
    yield client
    client.proxy.close()
    for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    client.delete_bucket(Bucket=BUCKET)


PHOTOS = {f"{number}.bin": bytes([number]) * 40_000 + os.urandom(40_000) for number in range(10)}
ADDRESS = f"s3://{BUCKET}/sets/photos.tar"


def put(store: Any, content: bytes) -> str:
    store.put_object(Bucket=BUCKET, Key="sets/photos.tar", Body=content)
    return digest(content)


def ranges(store: Any) -> list[int]:
    """First byte that each request asked for."""
    found = []
    for head in store.proxy.asked:
        lines = {key.lower(): value for key, _, value in (line.partition(b": ") for line in head.split(b"\r\n"))}
        found.append(int(lines.get(b"range", b"bytes=0-")[6:-1]))
    return found


def test_an_object_is_fetched_checked_and_unpacked(store: Any, project: Path) -> None:
    spec = dataset(ADDRESS, put(store, pack(PHOTOS, "w")))
    fetch_dataset(spec, "nowhere", progress=False)
    assert unpacked(project) == PHOTOS and leftovers(project) == [] and ranges(store) == [0]


def test_a_cut_connection_goes_on_where_it_stopped(store: Any, project: Path) -> None:
    spec = dataset(ADDRESS, put(store, pack(PHOTOS, "w")))
    store.proxy.cuts = [300_000, 300, 0, 200_000]
    fetch_dataset(spec, "nowhere", progress=False)
    assert unpacked(project) == PHOTOS
    first, *others = ranges(store)
    assert first == 0 and len(others) == 4 and others == sorted(others) and 290_000 < others[0] == others[2] < others[3]


def test_a_server_that_goes_away_and_comes_back(store: Any, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter([store.proxy.close, int, int, store.proxy.open])
    monkeypatch.setattr("time.sleep", lambda _: next(steps)())
    spec = dataset(ADDRESS, put(store, pack(PHOTOS, "w")))
    store.proxy.cuts = [300_000]
    fetch_dataset(spec, "nowhere", progress=False)
    assert unpacked(project) == PHOTOS and list(steps) == [] and ranges(store)[1] > 290_000


def kill_itself(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("at", "function", "holds"),
    [
        (Progress, "advance", "old"),  # A piece of the download was written.
        (fetch, "_extract_member", "old"),
        (fetch, "write_json", "old"),  # Of the mark.
        (Path, "rename", "old"),
        (shutil, "rmtree", "new"),  # Of the former folder.
    ],
)
def test_kill_9(at: Any, function: str, holds: str, store: Any, project: Path) -> None:
    """While downloading, unpacking and replacing: the old folder or the new one is there whole, and the next call finishes."""
    contents = {"old": CONTENT, "new": PHOTOS}
    fetch_dataset(dataset(ADDRESS, put(store, pack(CONTENT, "w"))), "nowhere", progress=False)
    spec = dataset(ADDRESS, put(store, pack(PHOTOS, "w")))

    def killed() -> None:
        setattr(at, function, kill_itself)
        fetch_dataset(spec, "nowhere", progress=False)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and unpacked(project) == contents[holds] and leftovers(project)
    fetch_dataset(spec, "nowhere", progress=False)
    assert unpacked(project) == PHOTOS and leftovers(project) == []


def test_a_key_longer_than_a_file_name(store: Any, project: Path) -> None:
    key, content = "/".join(["é" * 50] * 8) + ".tar", pack(CONTENT, "w")
    store.put_object(Bucket=BUCKET, Key=key, Body=content)
    fetch_dataset(dataset(f"s3://{BUCKET}/{key}", digest(content)), "nowhere", progress=False)
    assert unpacked(project) == CONTENT


def test_a_dead_connection_is_given_up_and_a_later_call_goes_on(store: Any, project: Path) -> None:
    spec = dataset(ADDRESS, put(store, pack(PHOTOS, "w")))
    store.proxy.cuts = [500_000, *[0] * 50]
    with pytest.raises(UserError, match=r"cut off after \d+ bytes, and 5 attempts brought no more"):
        fetch_dataset(spec, "nowhere", progress=False)
    assert not (project / "data/photos/images").exists()
    store.proxy.cuts.clear()
    store.proxy.asked.clear()
    fetch_dataset(spec, "nowhere", progress=False)
    assert unpacked(project) == PHOTOS and ranges(store)[0] > 490_000 and leftovers(project) == []


def test_a_changed_object_is_fetched_from_its_beginning(store: Any, project: Path) -> None:
    put(store, pack({name: content[::-1] for name, content in PHOTOS.items()}, "w"))
    store.proxy.cuts = [500_000, *[0] * 50]
    with pytest.raises(UserError, match="cut off"):
        fetch_dataset(dataset(ADDRESS, "0" * 64), "nowhere", progress=False)
    store.proxy.cuts.clear()
    store.proxy.asked.clear()
    fetch_dataset(dataset(ADDRESS, put(store, pack(PHOTOS, "w"))), "nowhere", progress=False)
    assert unpacked(project) == PHOTOS
    assert ranges(store)[0] > 490_000 and ranges(store)[1:] == [0], (
        "the range was refused, for the object is another one"
    )


@pytest.mark.parametrize("length", [100, 400_000, None])
def test_a_damaged_beginning_costs_a_second_download_and_no_more(length: int | None, store: Any, project: Path) -> None:
    """As a power cut leaves it: the length is right, the bytes are not; or all of them are there."""
    content = pack(PHOTOS, "w")
    spec = dataset(ADDRESS, put(store, content))
    downloads = project / "data/photos/.downloads"
    downloads.mkdir(parents=True)
    name = digest(ADDRESS.encode())
    (downloads / f"{name}.part").write_bytes(b"\0" * (length or len(content)))
    etag = store.head_object(Bucket=BUCKET, Key="sets/photos.tar")["ETag"]
    (downloads / f"{name}.json").write_text(json.dumps({"etag": etag, "size": len(content)}))
    fetch_dataset(spec, "nowhere", progress=False)
    assert unpacked(project) == PHOTOS and leftovers(project) == []


def test_wrong_digest_and_no_digest(store: Any, project: Path) -> None:
    found = put(store, pack(PHOTOS, "w"))
    with pytest.raises(UserError, match=f"{ADDRESS}: its sha256 is {found}, declared is 0000"):
        fetch_dataset(dataset(ADDRESS, "0" * 64), "nowhere", progress=False)
    assert leftovers(project) == [".downloads"] and not list((project / "data/photos/.downloads").iterdir())
    with pytest.raises(UserError, match=f"sha256: {found}"):
        fetch_dataset(dataset(ADDRESS, None), "nowhere", progress=False)
    store.proxy.asked.clear()
    fetch_dataset(dataset(ADDRESS, found), "nowhere", progress=False)
    assert unpacked(project) == PHOTOS and store.proxy.asked == [], (
        "what was fetched to learn the digest need not come again"
    )


def test_clear_words_for_what_s3_refuses(store: Any, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, b"content")

    def said(address: str) -> str:
        with pytest.raises(UserError) as caught:
            fetch_dataset(dataset(address, "0" * 64), "nowhere", progress=False)
        return str(caught.value)

    assert "there is no bucket 'nowhere'" in said("s3://nowhere/a.tar")
    assert "the bucket 'pictures' has no such object" in said(f"s3://{BUCKET}/b.tar")
    monkeypatch.setattr(s3.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
    assert "7 bytes are still to come" in said(ADDRESS)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    assert "Could not connect" in said(ADDRESS) and "AWS_ENDPOINT_URL" in said(ADDRESS)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    assert "Invalid endpoint" in said(ADDRESS)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # It remembers credentials.
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{store.proxy.port}")
    assert "no credentials for S3" in said(ADDRESS) and "AWS_PROFILE" in said(ADDRESS)
