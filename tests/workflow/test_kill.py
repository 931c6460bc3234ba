"""A training killed with -9, and Snakemake with it, then started again: the same weights, bit for bit.

``python tests/workflow/test_kill.py 5`` does it at five random moments and prints them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import yaml

PROJECT = Path(__file__).parents[2]
TARGETS = ["results/mask2former_swin/eval.json", "results/mask2former_swin/onnx_eval.json"]
STEPS = 24
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
"""The commands of the environment that runs the test, whether it is activated or not."""

TINY = {
    "model": {
        "backbone": {"swin": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}},
        "pixel_decoder": {"hidden_dim": 32, "layers": 1, "nheads": 2, "points": 2, "dim_feedforward": 32},
        "decoder": {"layers": 2, "num_object_queries": 8, "nheads": 2, "dim_feedforward": 32, "dropout": 0.1},
        "loss": {"train_num_points": 64},
    },
    "dataset": {
        "train": {"batch_size": 4, "num_workers": 1},
        "augmentation": {"train_min_size": [64], "train_crop_size": [64, 64], "test_min_size": 64},
    },
    "train": {
        "num_epochs": 6,
        "threads": 1,
        "checkpoint_interval": 1,
        "keep_checkpoints": None,
        "checkpoint_interval_unit": "step",
        "validation_interval": 6,
        "optim": {"lr": 1.0e-3, "lr_scheduler": "WarmupPoly", "warmup_iters": 4},
    },
    "export": {"input_height": 64, "input_width": 64},
    "parity": {"images": 2, "tolerance": 0.01},
}


def make_project(folder: Path) -> Path:
    """A copy of the workflow whose main job is so small that it trains in seconds."""
    for name in ("rules", "profiles", "config", "envs"):
        shutil.copytree(PROJECT / name, folder / name)
    shutil.copy(PROJECT / "Snakefile", folder / "Snakefile")
    (folder / "config/experiments/mask2former_swin-demo.yaml").write_text(yaml.safe_dump(TINY))
    demo = folder / "config/datasets/demo.yaml"
    dataset = yaml.safe_load(demo.read_text())
    dataset["dataset"]["generator"] = {"train_images": 16, "val_images": 2, "test_images": 3, "height": 64, "width": 64}
    demo.write_text(yaml.safe_dump(dataset))
    return folder


def start(folder: Path, *targets: str) -> subprocess.Popen[bytes]:
    """Snakemake in a session of its own, so that a kill hits it alone."""
    with (folder / "snakemake.log").open("ab") as log:
        return subprocess.Popen(
            ["snakemake", "--cores", "1", *targets],
            cwd=folder,
            env=ENVIRONMENT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def run(folder: Path, *targets: str) -> None:
    assert start(folder, *targets).wait() == 0, (folder / "snakemake.log").read_text()[-4000:]


def trainer(folder: Path) -> int:
    """Process id of `tessera train` that works in ``folder``."""
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            inside = (entry / "cwd").resolve() == folder.resolve()
        except (OSError, ValueError):
            continue
        if inside and b"train" in words and words[1].endswith(b"tessera"):
            return int(entry.name)
    raise AssertionError("no training process found")


def kill_during_training(folder: Path, step: int) -> None:
    """-9 to the training and to Snakemake, as soon as the checkpoint of ``step`` exists."""
    process = start(folder, *TARGETS)
    deadline = time.monotonic() + 300
    while not list(folder.glob(f"checkpoints/*/*/*step_{step:05d}.pth")):
        assert process.poll() is None, (folder / "snakemake.log").read_text()[-4000:]
        assert time.monotonic() < deadline, f"step {step} never came"
        time.sleep(0.02)
    victims = [process.pid, trainer(folder)]
    random.shuffle(victims)
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    subprocess.run(["snakemake", "--unlock"], cwd=folder, env=ENVIRONMENT, check=True, capture_output=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    content = torch.load(folder / "results/mask2former_swin/model.pth", weights_only=True)
    return content["state"]


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.slow
def test_killed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, killed = make_project(tmp_path / "whole"), make_project(tmp_path / "killed")
    run(whole, *TARGETS)
    kill_during_training(killed, random.randint(2, STEPS - 4))
    run(killed, *TARGETS)
    assert_same_weights(weights(killed), weights(whole))
    starts = json.loads((killed / "results/mask2former_swin/train.json").read_text())["starts"]
    assert len(starts) == 2
    for name in ("metrics.csv", "eval.predictions.json.gz"):
        relative = f"results/mask2former_swin/{name}"
        assert (killed / relative).read_bytes() == (whole / relative).read_bytes(), name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        reference = make_project(Path(root) / "whole")
        run(reference, *TARGETS)
        for number in range(int(sys.argv[1])):
            project = make_project(Path(root) / str(number))
            moment = random.randint(2, STEPS - 4)
            kill_during_training(project, moment)
            run(project, *TARGETS)
            assert_same_weights(weights(project), weights(reference))
            print(
                f"killed at step {moment} of {STEPS}: the same {len(weights(project))} tensors, bit for bit", flush=True
            )
