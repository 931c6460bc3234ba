"""A copy of the workflow that really trains, evaluates and exports, in seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).parents[2]
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


def make_project(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """``changes``: sections of the main job's spec that are others than ``TINY`` has."""
    for name in ("rules", "profiles", "config", "envs"):
        shutil.copytree(PROJECT / name, folder / name)
    shutil.copy(PROJECT / "Snakefile", folder / "Snakefile")
    (folder / "config/experiments/mask2former_swin-demo.yaml").write_text(yaml.safe_dump(TINY | (changes or {})))
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
