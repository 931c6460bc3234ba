"""Runs killed with -9 anywhere and started again: the same weights, bit for bit, nothing half-written and no litter.

``python -m tests.workflow.test_kill 41`` makes all kills of ``PLAN``, or as many of them as it says, and prints a line for each.
"""

from __future__ import annotations

import contextlib
import ctypes
import fnmatch
import gzip
import itertools
import json
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch

from tessera.files import TEMPORARY
from tessera.spec.compose import load_grid
from tessera.tables.verify import verify
from tests.workflow.small import ENVIRONMENT, TINY, make_project, run, start

RESULTS = "results/mask2former_swin"


def tree(folder: Path) -> set[str]:
    """Logs aside, and curves, of which every start writes a file of its own, and what Snakemake planned, which stays for jobs that go on."""
    places = ("data", "checkpoints", "results", ".snakemake/locks", ".snakemake/incomplete")
    files = (path for place in places for path in (folder / place).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in files if "tensorboard" not in path.parts}


# Whom a kill hits: process ids of what works in the folder, none as long as there is no such process.


def processes(folder: Path) -> dict[int, tuple[bytes, bytes]]:
    """The command of each and of its parent, by process id."""
    commands, parents = {}, {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if (entry / "cwd").resolve() == folder.resolve():
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                commands[int(entry.name)] = (entry / "cmdline").read_bytes()
    return {pid: (command, commands.get(parents[pid], b"")) for pid, command in commands.items()}


def started(folder: Path, word: bytes) -> list[int]:
    """Not forks, which have the command of their parent."""
    return [pid for pid, (own, parent) in processes(folder).items() if word in own and own != parent]


def stage(folder: Path, snakemake: int) -> list[int]:
    victims = [snakemake, *started(folder, b"/tessera\0")]
    random.shuffle(victims)
    return victims if len(victims) > 1 else []


def group(folder: Path, snakemake: int) -> list[int]:
    return [-snakemake]


def loader(folder: Path, snakemake: int) -> list[int]:
    return [pid for pid, (own, parent) in processes(folder).items() if own and own == parent][:1]


def ranks(folder: Path, snakemake: int) -> list[int]:
    found = started(folder, b"spawn_main")
    return found if len(found) == 2 else []


def rank(folder: Path, snakemake: int) -> list[int]:
    return ranks(folder, snakemake)[random.randint(0, 1) :][:1]


@dataclass(frozen=True)
class Part:
    """Of the workflow: its last target, and what is deleted of a whole project for it to be made again, with what later parts made."""

    target: str
    made: tuple[str, ...]


TRAIN = Part(f"{RESULTS}/train.json", ("results", "checkpoints"))
EVALUATE = Part(f"{RESULTS}/eval.json", (f"{RESULTS}/eval*",))
EXPORT = Part(f"{RESULTS}/onnx_eval.json", (f"{RESULTS}/*onnx*", f"{RESULTS}/export.json"))
INFER = Part(f"{RESULTS}/inference/index.json", (f"{RESULTS}/inference",))

BEGUN, HALF, RENAMED = 0x100, 0x2, 0x80
"""Of inotify: IN_CREATE of the temporary name, IN_MODIFY of it, IN_MOVED_TO the final one."""
CHECKPOINTS = [f"checkpoints/mask2former_swin/*/{name}.pth" for name in ("*_latest", "model_epoch_*", "*_best")]
LINKED = (CHECKPOINTS[1], f"{RESULTS}/inference")
"""Another name of a written file, and a folder: never seen half-written."""
WRITES = {
    TRAIN: [*CHECKPOINTS, *(f"{RESULTS}/{name}" for name in ("metrics.csv", "model.pth", "train.json"))],
    EVALUATE: [
        f"{RESULTS}/eval{name}.json{end}" for name, end in ((".predictions", ".gz"), (".statistics", ".gz"), ("", ""))
    ],
    EXPORT: [f"{RESULTS}/{name}" for name in ("model.onnx", "export.json", "onnx_parity.json", "onnx_eval.json")],
    INFER: [f"{RESULTS}/inference"],
}
Victims = Callable[[Path, int], list[int]]
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
PLAN: list[tuple[Victims, int, Part, str]] = [
    *((victims, KILL, TRAIN, write) for victims in (stage, group) for write in ("", *WRITES[TRAIN])),
    *(
        (victims, KILL, part, write)
        for part in (EVALUATE, EXPORT, INFER)
        for victims, write in zip(itertools.cycle((stage, group)), ("", *WRITES[part]), strict=False)
    ),
    *(
        (victims, signum, TRAIN, write)
        for victims, signum in ((loader, KILL), (ranks, KILL), (rank, STOP), (rank, KILL))
        for write in ("", "", *CHECKPOINTS[:2])
    ),
]
"""Whom, by what signal, and the write that is waited for; "" is a random moment."""
random.Random(0).shuffle(PLAN)


def moments_of(folder: Path, write: str, process: subprocess.Popen[bytes], phase: int) -> Iterator[None]:
    """Comes back as soon as one of that kind is in that phase, again and again until the process has ended."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = libc.inotify_init1(os.O_CLOEXEC)
    place, _, name = write.rpartition("/")
    (path,) = folder.glob(place)
    assert libc.inotify_add_watch(handle, os.fsencode(path), phase) > 0, os.strerror(ctypes.get_errno())
    wanted = name if phase == RENAMED else f".{Path(name).stem}.tessera-*{Path(name).suffix}"
    try:
        while process.poll() is None:
            if not select.select([handle], [], [], 0.5)[0]:
                continue
            events, start = os.read(handle, 1 << 16), 0
            while start < len(events):
                *_, length = struct.unpack_from("iIII", events, start)
                found = events[start + 16 : start + 16 + length].rstrip(b"\0").decode()
                start += 16 + length
                if fnmatch.fnmatchcase(found, wanted):
                    yield
    finally:
        os.close(handle)


def random_moments(process: subprocess.Popen[bytes], seconds: float) -> Iterator[None]:
    """The first one random."""
    time.sleep(random.uniform(0, seconds))
    while process.poll() is None:
        yield
        time.sleep(0.05)


def kill(folder: Path, victims: Victims, signum: int, part: Part, write: str, seconds: float) -> str:
    """The moment, in words. Then all stand still until the victims have been found."""
    process = start(folder, part.target)
    if write:
        phase = random.choice([BEGUN, RENAMED, *([] if write in LINKED else [HALF])])
        moment = f"{Path(write).name} {({BEGUN: 'begun', HALF: 'half-written', RENAMED: 'renamed'})[phase]}"
        several = random.randint(0, 5) if write in CHECKPOINTS[:2] else 0
        came = itertools.islice(moments_of(folder, write, process, phase), several, None)
    else:
        while not victims(folder, process.pid) and process.poll() is None:
            time.sleep(0.1)
        moment, came = "random moment", random_moments(process, seconds)
    for _ in came:
        os.killpg(process.pid, signal.SIGSTOP)
        found = victims(folder, process.pid)
        for victim in found if signum == signal.SIGKILL else ():
            os.kill(victim, signum)
        os.killpg(process.pid, signal.SIGCONT)
        for victim in found if signum == signal.SIGSTOP else ():
            os.kill(victim, signum)
        if found:
            break
    else:
        raise AssertionError(
            f"{moment} never came for a {victims.__name__}: {(folder / 'snakemake.log').read_text()[-4000:]}"
        )
    if signum == signal.SIGSTOP:
        before: set[str] = set()
        while before != (before := tree(folder)):  # as long as the other rank ends its step and writes
            time.sleep(5)
        assert process.poll() is None and part.target not in before, "the other rank ended, or went on alone"
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(120)
    deadline = time.monotonic() + 30
    while left := processes(folder):
        assert time.monotonic() < deadline, f"outlive the kill: {left}"
        time.sleep(0.1)
    return moment


READERS: dict[str, Callable[[Path], object]] = {
    ".json": lambda path: json.loads(path.read_text()),
    ".gz": lambda path: json.loads(gzip.decompress(path.read_bytes())),
    ".pth": lambda path: torch.load(path, weights_only=True),
    ".onnx": lambda path: onnx.checker.check_model(str(path), full_check=True),
    ".csv": lambda path: path.read_text().index("\n", -1),
}


def temporary(name: str) -> bool:
    return any(TEMPORARY.fullmatch(part) for part in Path(name).parts)


def assert_nothing_half_written(folder: Path) -> int:
    """Whatever bears its name can be read, and ``tessera verify`` finds nothing broken, and all that is half-written; how many that are."""
    for name in tree(folder):
        if not temporary(name) and (read := READERS.get(Path(name).suffix)):
            read(folder / name)
    told = set()
    if (folder / RESULTS).is_dir():
        with contextlib.chdir(folder):
            for finding in verify(load_grid(), Path(RESULTS), Path("results")):
                assert finding.verdict != "broken" or "nothing that a stage recorded" in str(finding), finding
                told.add(finding.path.as_posix())
    found = {name for name in tree(folder) if temporary(name)}
    for name in found:
        assert not name.startswith(RESULTS) or any(name.startswith(path) for path in told - {RESULTS}), name
    return len(found)


def assert_same(folder: Path, whole: Path, files: set[str]) -> str:
    """What was found the same; ``files`` are those that an unkilled run leaves. Where a checkpoint had one name and not yet its second one,
    training goes on behind it: the numbered name of that step is left out."""
    found, expected = (
        torch.load(place / RESULTS / "model.pth", weights_only=True)["state"] for place in (folder, whole)
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    starts = [one["step"] for one in json.loads((folder / RESULTS / "train.json").read_text())["starts"]]
    left_out = {
        name for name in files - tree(folder) if name.endswith(tuple(f"_step_{step:05}.pth" for step in starts[1:]))
    }
    assert tree(folder) == files - left_out, f"litter {tree(folder) - files}, missing {files - tree(folder)}"
    for name in files:
        if name.endswith((".csv", ".predictions.json.gz", ".png")):
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert_nothing_half_written(folder)
    return f"starts {starts}, the same {len(expected)} tensors and files" + f" but {len(left_out)}" * bool(left_out)


class Whole:
    """A project whose run nobody disturbed; by part the files that are there then, and the seconds that it took."""

    def __init__(self, folder: Path, ranks: int, *parts: Part) -> None:
        changes = {
            "train": TINY["train"] | {"num_gpus": ranks, "num_epochs": 6 // ranks, "validation_interval": 2},
            "dataset": TINY["dataset"] | {"train": {"batch_size": 4 // ranks, "num_workers": 1}},
            # So little a network is never sure, and predictions without a segment would always be the same.
            "postprocess": {"object_mask_threshold": 0.0, "overlap_threshold": 0.0},
        }
        self.folder = make_project(folder, changes)
        self.seconds, self.files = {}, {}
        for part in parts:
            began = time.monotonic()
            run(folder, part.target)
            self.seconds[part] = time.monotonic() - began
            self.files[part] = tree(folder)


def kill_and_run_again(whole: Whole, folder: Path, victims: Victims, signum: int, part: Part, write: str) -> str:
    """What happened, in a line."""
    shutil.copytree(whole.folder, folder, symlinks=True)
    parts = list(whole.files)
    for pattern in (name for later in parts[parts.index(part) :] for name in later.made):
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in whole.files[part]:  # the folders of the writes that are waited for
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    moment = kill(folder, victims, signum, part, write, 0.5 * whole.seconds[part] if victims in (group, stage) else 6)
    half = assert_nothing_half_written(folder)
    if any(folder.glob(".snakemake/locks/*")):
        subprocess.run(["snakemake", "--unlock"], cwd=folder, env=ENVIRONMENT, check=True, capture_output=True)
    run(folder, part.target)
    return f"{moment}: {half} temporary names left, {assert_same(folder, whole.folder, whole.files[part])}"


@pytest.mark.slow
def test_killed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    part = Part(EVALUATE.target, TRAIN.made)
    whole = Whole(tmp_path / "whole", 1, part)
    assert "[0, " in kill_and_run_again(whole, tmp_path / "killed", stage, signal.SIGKILL, part, CHECKPOINTS[1])


def main(count: int) -> int:
    """Prints every kill, and their number by victims. What failed is left for a look."""
    root = Path(tempfile.mkdtemp())
    wholes = {1: Whole(root / "one", 1, TRAIN, EVALUATE, EXPORT, INFER), 2: Whole(root / "two", 2, TRAIN)}
    counts: Counter[str] = Counter()
    for number, (victims, signum, part, write) in enumerate(itertools.islice(itertools.cycle(PLAN), count), 1):
        name = f"{signal.Signals(signum).name} of {victims.__name__}"
        whole, folder = wholes[2 if victims in (rank, ranks) else 1], root / str(number)
        try:
            print(f"{number}: {name}, {kill_and_run_again(whole, folder, victims, signum, part, write)}", flush=True)
        except Exception as error:  # of any kind: the other kills are made all the same
            name += ", failed"
            print(f"{number}: {name}: {folder}: {write} {type(error).__name__}: {error}", flush=True)
        else:
            shutil.rmtree(folder)
        counts[name] += 1
    print(dict(counts))
    return int(any("failed" in name for name in counts))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
