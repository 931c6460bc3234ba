"""A real training that takes seconds: a Mask2Former of a few thousand parameters on eight generated scenes.

``python -m tests.training.toy <root> <name> <changes as JSON> [<log>]`` runs it as a process of its own, for tests that kill it.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from tessera.data.demo import write_demo
from tessera.log import start_log
from tessera.spec.schema import Spec, read_spec
from tessera.training.train import train

REPOSITORY = Path(__file__).parents[2]
SPEC = {
    "model": {
        "backbone": {
            "name": "swin_tiny",
            "swin": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2},
            "drop_path_rate": 0.2,
        },
        "pixel_decoder": {"hidden_dim": 32, "layers": 1, "nheads": 2, "points": 2, "dim_feedforward": 32, "dropout": 0.1},
        "decoder": {"num_object_queries": 8, "layers": 2, "nheads": 2, "dim_feedforward": 32, "dropout": 0.1},
        "loss": {"train_num_points": 64},
    },
    "dataset": {
        "name": "demo",
        "generator": {"train_images": 9, "val_images": 2, "test_images": 1, "height": 64, "width": 64, "max_objects": 2},
        "label_map": "demo/label_map.json",
        "train": {"batch_size": 2, "num_workers": 0},
        "val": {"batch_size": 2, "num_workers": 0},
        "augmentation": {
            "train_min_size": [64],
            "train_crop_size": [64, 64],
            "test_min_size": 64,
            "test_max_size": 64,
        },
    },
    "train": {"num_epochs": 2, "threads": 1, "optim": {"lr": 1e-3, "warmup_iters": 3, "milestones": [1]}},
}  # fmt: skip
STEPS = 4
"""Per epoch: nine scenes, two at a time."""


def make_spec(root: Path, changes: dict[str, object] | None = None) -> Spec:
    """The spec above with ``{"a.b": value}`` changed; its data lies in ``root/data`` and is made when it is missing."""
    plain = json.loads(json.dumps(SPEC))
    for split in ("train", "val", "test"):
        plain["dataset"].setdefault(split, {}).update(
            images=f"demo/images/{split}",
            annotations=f"demo/panoptic_{split}.json",
            panoptic=f"demo/panoptic/{split}",
        )
    plain["data_root"] = str(root / "data")
    for key, value in (changes or {}).items():
        *parents, last = key.split(".")
        section = plain
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    plain["model"].setdefault("name", "mask2former")
    spec = read_spec(plain)
    if not (root / "data/demo").exists():
        write_demo(root / "data/demo", spec.dataset.generator)
    return spec


def run(root: Path, changes: dict[str, object] | None = None, name: str = "toy") -> Path:
    """Trains in this process; the folder of the results."""
    train(make_spec(root, changes), name, root / "results" / name, root / "checkpoints")
    return root / "results" / name


def command(
    root: Path, changes: dict[str, object] | None = None, name: str = "toy", module: str = __name__
) -> list[str]:
    return [sys.executable, "-m", module, str(root), name, json.dumps(changes or {})]


def start(
    root: Path,
    changes: dict[str, object] | None = None,
    name: str = "toy",
    module: str = __name__,
    threads: int = 1,
    log: Path | None = None,
    **options,
) -> subprocess.Popen:
    """The same as a process of its own, its stderr readable line by line."""
    return subprocess.Popen(
        [*command(root, changes, name, module), *([str(log)] if log else [])],
        cwd=REPOSITORY,
        env=os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)),
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def read_until(process: subprocess.Popen, text: str) -> list[str]:
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} did not come: {''.join(lines)}")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state"]


def assert_same_results(one: Path, other: Path) -> None:
    first, second = weights(one / "model.pth"), weights(other / "model.pth")
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} tensors differ, such as {different[0]}"
    assert (one / "metrics.csv").read_text() == (other / "metrics.csv").read_text()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if len(sys.argv) > 4:
        start_log(Path(sys.argv[4]))
    run(Path(sys.argv[1]), json.loads(sys.argv[3]), sys.argv[2])
