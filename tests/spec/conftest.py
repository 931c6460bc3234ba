from collections.abc import Callable
from pathlib import Path

import pytest

BASE = {
    "config.yaml": """
models: [mask2former]
backbones: [swin, resnet18]
datasets: [demo, street]
variants: [small, long, [small, long]]
seeds: [0, 3]
""",
    "models/mask2former.yaml": "model: {name: mask2former}\n",
    "backbones/swin.yaml": "model:\n  backbone:\n    name: swin_tiny\n",
    "backbones/resnet18.yaml": "model:\n  backbone:\n    name: resnet18\n",
    "datasets/demo.yaml": "dataset:\n  generator: {}\n",
    "datasets/street.yaml": "dataset:\n  type: mask_pairs\n  train: {annotations: street/train.jsonl}\nmodel: {mode: semantic}\n",
    "variants/small.yaml": "train:\n  num_epochs: 3\n  optim: {milestones: [1, 2]}\n",
    "variants/long.yaml": "train:\n  num_epochs: 100\n",
}

Project = Callable[..., Path]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Writes a small configuration, changed and extended by the given files; None removes one."""

    def write(files: dict[str, str | None] | None = None) -> Path:
        for name, text in (BASE | (files or {})).items():
            path = tmp_path / "config" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if text is None:
                path.unlink(missing_ok=True)
            else:
                path.write_text(text)
        return tmp_path

    return write
