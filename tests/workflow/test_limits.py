"""Every stage that reads data under the limits that containers and shells come with: it works, or says within seconds which one is too low."""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from tessera.data.demo import write_demo
from tessera.files import digest_file
from tessera.spec.schema import DemoSpec
from tests.forks import FORKS
from tests.malformed.project import EXPERIMENT, MODEL, RECIPE, TINY, merged, write_config
from tests.workflow.project import wait_until

SECONDS = 60
"""Within which a stage must end here, whether it works or not."""
CLONE_NEWNS = 0x20000
WORKERS = {split: {"num_workers": 2} for split in ("train", "val", "test")}
STAGES = {
    "train": ["train", EXPERIMENT],
    "evaluate": ["evaluate", EXPERIMENT],
    "parity": ["parity", EXPERIMENT],
    "infer": ["infer", EXPERIMENT],
    "check": ["check", "demo", "--out", "check.json"],
}
Confine = Callable[[], None]
"""Called in a stage's process before the stage."""


def make_project(root: Path, dataset: dict[str, Any], scenes: DemoSpec, enlarged: int = 1) -> Path:
    write_config(root)
    write_scenes(root / "data/demo", scenes, enlarged)
    path = root / "config/datasets/demo.yaml"
    content = yaml.safe_load(path.read_text())
    del content["dataset"]["generator"]
    path.write_text(yaml.safe_dump(content))
    recipe = merged(TINY, {"dataset": dataset, "train": {"num_epochs": 1, "iters_per_epoch": 4, "verbose": True}})
    (root / RECIPE).write_text(yaml.safe_dump(recipe))
    return root


def write_scenes(folder: Path, scenes: DemoSpec, enlarged: int) -> None:
    """Enlarging is faster than generating them large."""
    write_demo(folder, scenes, False)
    size = (scenes.width * enlarged, scenes.height * enlarged)
    for path in [*folder.glob("images/*/*.png"), *folder.glob("panoptic/*/*.png")]:
        Image.open(path).resize(size, Image.Resampling.NEAREST).save(path, compress_level=1)
    for path in folder.glob("panoptic_*.json"):
        value = json.loads(path.read_text())
        for image in value["images"]:
            image |= {"height": size[1], "width": size[0]}
        for segment in (segment for image in value["annotations"] for segment in image["segments_info"]):
            segment |= {"area": segment["area"] * enlarged**2, "bbox": [side * enlarged for side in segment["bbox"]]}
        path.write_text(json.dumps(value))


def start(root: Path, command: list[str], *confine: Confine) -> Any:
    """A stage as a process of its own; what it prints goes to said.txt."""
    process = FORKS.Process(target=_run, args=(root, command, confine))
    process.start()
    return process


def end(root: Path, process: Any) -> tuple[int, str]:
    """Exit code and what was printed."""
    process.join(SECONDS)
    code = process.exitcode
    process.kill()
    process.join()
    assert code is not None, f"hangs: {(root / 'said.txt').read_text()}"
    return code, (root / "said.txt").read_text()


def run(root: Path, command: list[str], *confine: Confine) -> tuple[int, str]:
    return end(root, start(root, command, *confine))


def _run(root: Path, command: list[str], confine: tuple[Confine, ...]) -> None:
    from tessera.cli import main

    os.chdir(root)
    sys.stdout = sys.stderr = (root / "said.txt").open("w")
    os.dup2(sys.stderr.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for limit in confine:
        limit()
    sys.argv = ["tessera", *command]
    main()


def shm(options: str) -> Confine:
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small /dev/shm")
    return partial(_mount, options)


def _mount(options: str) -> None:
    if ctypes.CDLL(None).unshare(CLONE_NEWNS):
        raise PermissionError("unshare")
    for command in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", options, "tmpfs", "/dev/shm"]):
        subprocess.run(["mount", *command], check=True)


def open_files(count: int) -> Confine:
    return partial(resource.setrlimit, resource.RLIMIT_NOFILE, (count, count))


def test_batches_larger_than_a_small_shm(tmp_path: Path) -> None:
    """Docker's default; some 75 MB of training images and as many of truths are under way."""
    dataset = merged(
        WORKERS,
        {
            "train": {"batch_size": 4},
            "test": {"batch_size": 6},
            "augmentation": {"train_min_size": [512], "train_max_size": 512, "train_crop_size": [512, 512]},
        },
    )
    scenes = DemoSpec(train_images=4, val_images=1, test_images=12, height=64, width=64)
    root = make_project(tmp_path, dataset, scenes, enlarged=16)
    for verb in ("train", "evaluate"):
        code, said = run(root, STAGES[verb], shm("size=64m"))
        assert code == 0, said


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scenes = DemoSpec(train_images=4, val_images=2, test_images=24, height=64, width=64)
    root = make_project(tmp_path_factory.mktemp("limits"), merged(WORKERS, {"test": {"batch_size": 12}}), scenes)
    for command in (STAGES["train"], ["export", EXPERIMENT]):
        code, said = run(root, command)
        assert code == 0, said
    return root


@pytest.mark.parametrize("limit", ["size=64m", 64, 256, 1024])
def test_every_stage_works(project: Path, tmp_path: Path, limit: str | int) -> None:
    confine = shm(limit) if isinstance(limit, str) else open_files(limit)
    digest = digest_file(project / MODEL)
    for command in STAGES.values():
        again = (
            ["--checkpoints", str(tmp_path)] if command[0] == "train" else []
        )  # which would otherwise have nothing to do
        code, said = run(project, [*command, *again], confine)
        assert code == 0, said
    assert digest_file(project / MODEL) == digest


@pytest.mark.parametrize("verb", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (
            32,
            r"num_workers=2.*: 32 open files are allowed \(`ulimit -n`\), .* raise the limit with `ulimit -n 1024` .*num_workers: 0",
        ),
        (
            "size=4k",
            r"num_workers=2.*\(No space left on device\): /dev/shm has 4 kB, . kB of it free.*--shm-size.*num_workers: 0",
        ),
    ],
)
def test_too_little_for_loader_processes(
    project: Path, tmp_path: Path, verb: str, limit: str | int, message: str
) -> None:
    again = ["--checkpoints", str(tmp_path)] if verb == "train" else []
    confine = shm(limit) if isinstance(limit, str) else open_files(limit)
    started = time.monotonic()
    code, said = run(project, [*STAGES[verb], *again], confine)
    assert code == 1
    assert re.search(message, said), said
    assert said.count("\n") == 1, said
    assert time.monotonic() - started < 30


def hang(after: int) -> Confine:
    """Images after so many of a process are never read, as on a disk that hangs."""
    return partial(_hang, after)


def _hang(after: int) -> None:
    from tessera.data import reader

    original, seen = reader.read_image, []

    def read(path: Path, *options: Any) -> torch.Tensor:
        seen.append(path)
        if len(seen) > after:
            Path("hangs").touch()
            while True:
                time.sleep(1000)
        return original(path, *options)

    reader.read_image = read


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_for_a_batch(project: Path, signum: int) -> None:
    code, said, seconds = stopped(project, STAGES["evaluate"], hang(1), signum)
    assert code == (-signum if signum == signal.SIGTERM else 130), said
    assert "Traceback" not in said
    assert seconds < 20


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_of_a_training(project: Path, tmp_path: Path, signum: int) -> None:
    """What was learnt is saved; once the disk is back, it ends with the same weights."""
    digest = digest_file(project / MODEL)
    command = [*STAGES["train"], "--checkpoints", str(tmp_path)]
    code, said, seconds = stopped(project, command, hang(3), signum, "step 2: ")
    assert code == 128 + signum, said
    assert "stopped while waiting for a batch that does not come" in said and "Traceback" not in said
    assert seconds < 20
    code, said = run(project, command)
    assert code == 0 and "continuing from step 2" in said, said
    assert digest_file(project / MODEL) == digest


def stopped(root: Path, command: list[str], confine: Confine, signum: int, until: str = "") -> tuple[int, str, float]:
    """What ``end`` gives, and how long it lived after the signal."""
    (root / "hangs").unlink(missing_ok=True)
    process = start(root, command, confine)
    wait_until(lambda: (root / "hangs").exists() and until in (root / "said.txt").read_text())
    time.sleep(1)
    started = time.monotonic()
    os.kill(process.pid, signum)
    return *end(root, process), time.monotonic() - started
