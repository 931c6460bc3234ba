"""A small valid project, and the ways in which the cases break a copy of it."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import yaml
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
EXPERIMENT = "mask2former_swin"
FOLDER = f"results/{EXPERIMENT}"
MODEL, GRAPH, EVALUATION = f"{FOLDER}/model.pth", f"{FOLDER}/model.onnx", f"{FOLDER}/eval.json"
RECIPE = f"config/experiments/{EXPERIMENT}-demo.yaml"
ALIEN = "owned-by-a-pickle"
"""Would be created by the code that hostile files carry."""

TINY: dict[str, Any] = {
    "model": {
        "backbone": {"swin": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}},
        "pixel_decoder": {"hidden_dim": 32, "layers": 1, "nheads": 2, "points": 2, "dim_feedforward": 32},
        "decoder": {"layers": 1, "num_object_queries": 8, "nheads": 2, "dim_feedforward": 32},
        "loss": {"train_num_points": 64},
    },
    "dataset": {
        "train": {"batch_size": 2, "num_workers": 0},
        "val": {"batch_size": 2, "num_workers": 0},
        "test": {"batch_size": 2, "num_workers": 0},
        "augmentation": {"train_min_size": [64], "train_crop_size": [64, 64], "test_min_size": 64},
    },
    "train": {"num_epochs": 2},
    "export": {"input_height": 64, "input_width": 64},
    "parity": {"images": 2},
}
GRID = {
    "models": ["mask2former"],
    "backbones": ["swin"],
    "datasets": ["demo", "pairs", "objects"],
    "experiments": [EXPERIMENT],
    "tables": {"demo": {"experiments": [EXPERIMENT]}, "twice": {"experiments": [EXPERIMENT, EXPERIMENT]}},
}
SPLITS = ("train", "val", "test")
PAIRS = {
    "dataset": {
        "type": "mask_pairs",
        "label_map": "demo/label_map.json",
        **{split: {"annotations": f"demo/{split}.jsonl"} for split in SPLITS},
    },
    "model": {"mode": "semantic"},
}
OBJECTS = {
    "dataset": {
        "type": "coco",
        "label_map": "demo/label_map.json",
        **{
            split: {"annotations": f"demo/instances_{split}.json", "images": f"demo/images/{split}"} for split in SPLITS
        },
    },
    "model": {"mode": "instance"},
}

Break = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    id: str
    command: str
    """Words of the command line after `tessera`."""
    first: str
    """In the first line of the message: the file or the key."""
    words: tuple[str, ...] = ()
    """Anywhere in the message: the record, what was found, what to do."""
    broken: tuple[Break, ...] = ()
    """Done in this order to a copy of the valid project."""
    code: int = 1
    lines: int = 1
    """Of the message; a report of several problems has more."""


def write_config(folder: Path) -> None:
    for name in ("models/mask2former.yaml", "backbones/swin.yaml"):
        path = folder / "config" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / "config" / name, path)
    demo = yaml.safe_load((REPOSITORY / "config/datasets/demo.yaml").read_text())
    demo["dataset"]["generator"] = {"train_images": 3, "val_images": 2, "test_images": 2, "height": 64, "width": 64}
    for name, value in {
        "config.yaml": GRID,
        "datasets/demo.yaml": demo,
        "datasets/pairs.yaml": PAIRS,
        "datasets/objects.yaml": OBJECTS,
        f"experiments/{EXPERIMENT}-demo.yaml": TINY,
    }.items():
        path = folder / "config" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(value))


def content(folder: Path) -> dict[str, str]:
    """Every file and folder with the digest of its content. A lock is no output: it says who trains, and stays by design."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] in ("logs", "checkpoints") and (path.is_dir() or path.name == "lock"):
            continue
        if path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "no file"
    return found


def text(name: str, value: str | bytes) -> Break:
    """Replaces the file."""

    def apply(project: Path) -> None:
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value.encode() if isinstance(value, str) else value)

    return apply


def recipe(value: dict[str, Any]) -> Break:
    """The experiment's file, changed in these keys."""
    return text(RECIPE, yaml.safe_dump(merged(TINY, value)))


def merged(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in update.items():
        found[key] = merged(found[key], value) if isinstance(value, dict) and key in found else value
    return found


def cut(name: str, share: float = 0.5) -> Break:
    def apply(project: Path) -> None:
        path = project / name
        os.truncate(path, int(path.stat().st_size * share))

    return apply


def flip(name: str, share: float = 0.5) -> Break:
    """Other bits in 64 bytes, as a bad disk or copy leaves them."""

    def apply(project: Path) -> None:
        path = project / name
        data = bytearray(path.read_bytes())
        start = int(len(data) * share)
        data[start : start + 64] = bytes(byte ^ 0xA5 for byte in data[start : start + 64])
        path.write_bytes(bytes(data))

    return apply


def remove(name: str) -> Break:
    def apply(project: Path) -> None:
        path = project / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return apply


def folder(name: str) -> Break:
    """A folder of that name in place of the file."""

    def apply(project: Path) -> None:
        (project / name).unlink(missing_ok=True)
        (project / name).mkdir(parents=True)

    return apply


def fifo(name: str) -> Break:
    """What no reader may wait at."""

    def apply(project: Path) -> None:
        (project / name).unlink()
        os.mkfifo(project / name)

    return apply


def dangling(name: str) -> Break:
    """A link whose target is gone."""

    def apply(project: Path) -> None:
        (project / name).unlink()
        (project / name).symlink_to("gone/elsewhere")

    return apply


def edit(name: str, change: Callable[[Any], Any]) -> Break:
    """The JSON file after ``change``, which alters the value in place or returns another."""

    def apply(project: Path) -> None:
        path = project / name
        value = json.loads(path.read_text())
        changed = change(value)
        path.write_text(json.dumps(value if changed is None else changed))

    return apply


def put(key: str, value: Any) -> Callable[[Any], None]:
    """Sets ``a.0.b`` of a JSON value."""

    def change(whole: Any) -> None:
        *path, last = key.split(".")
        for step in path:
            whole = whole[int(step)] if isinstance(whole, list) else whole[step]
        whole[int(last) if isinstance(whole, list) else last] = value

    return change


def picture(name: str, pixels: np.ndarray, kind: str | None = None) -> Break:
    def apply(project: Path) -> None:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(project / name, kind)

    return apply


def weights(change: Callable[[dict[str, Any]], Any], name: str = MODEL) -> Break:
    """The model file after ``change`` of its content."""

    def apply(project: Path) -> None:
        value = torch.load(project / MODEL, weights_only=True)
        changed = change(value)
        torch.save(value if changed is None else changed, project / name)

    return apply


def header(change: Callable[[Any], Any]) -> Break:
    """The ONNX file after ``change`` of the header's text."""

    def apply(project: Path) -> None:
        graph = onnx.load(project / GRAPH)
        (entry,) = [entry for entry in graph.metadata_props if entry.key == "tessera"]
        changed = change(entry.value)
        del graph.metadata_props[:]
        if changed is not None:
            onnx.helper.set_model_props(graph, {"tessera": changed})
        onnx.save(graph, project / GRAPH)

    return apply


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(ALIEN),)


def bare_pickle(name: str) -> Break:
    return text(name, pickle.dumps(Hostile()))


def zipped_pickle(name: str) -> Break:
    """As ``torch.save`` writes it: a header of plain values, and code where the tensors belong."""

    def apply(project: Path) -> None:
        torch.save({"header": {"format": 1}, "state": Hostile()}, project / name)

    return apply
