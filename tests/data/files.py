"""Tiny datasets on disk, written by the tests that read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tessera.data.catalog import load_catalog
from tessera.data.datasets import SegmentationDataset, open_dataset
from tessera.spec.networks import Mode
from tessera.spec.schema import DatasetSpec, SplitSpec

LABEL_MAP = [
    {"id": 2, "name": "sky", "isthing": 0},
    {"id": 7, "name": "car", "isthing": 1},
    {"id": 90, "name": "cat", "isthing": 1},
]


def save(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_coco(
    root: Path,
    annotations: Sequence[dict[str, Any]],
    sizes: Sequence[tuple[int, int]] = ((10, 16),),
    label_map: Sequence[dict[str, Any]] = LABEL_MAP,
) -> DatasetSpec:
    """Images 1, 2, ... named 1.png, 2.png, ...; ``annotations`` of image 1 unless they say otherwise."""
    return _write(root, "coco", [{"image_id": 1, **item} for item in annotations], sizes, label_map)


def write_panoptic(
    root: Path,
    maps: Sequence[np.ndarray],
    segments: Sequence[list[dict[str, Any]]],
    label_map: Sequence[dict[str, Any]] = LABEL_MAP,
) -> DatasetSpec:
    """``maps`` hold segment ids."""
    for number, ids in enumerate(maps, 1):
        colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
        save(root / f"panoptic/{number}.png", colors)
    annotations = [
        {"image_id": number, "file_name": f"{number}.png", "segments_info": infos}
        for number, infos in enumerate(segments, 1)
    ]
    return _write(root, "coco_panoptic", annotations, [ids.shape for ids in maps], label_map)


def write_pairs(
    root: Path, masks: Sequence[Any], label_map: Sequence[dict[str, Any]] = LABEL_MAP, **keys: Any
) -> DatasetSpec:
    """``masks``: arrays, or Pillow images where the pixel format matters."""
    lines = []
    for number, mask in enumerate(masks, 1):
        image = mask if isinstance(mask, Image.Image) else Image.fromarray(np.asarray(mask))
        (root / "masks").mkdir(parents=True, exist_ok=True)
        image.save(root / f"masks/{number}.png")
        save(root / f"images/{number}.png", photo(image.height, image.width, number))
        lines.append(json.dumps({"img": f"images/{number}.png", "segm": f"masks/{number}.png"}))
    (root / "a.jsonl").write_text("\n".join(lines) + "\n")
    write(root / "map.json", list(label_map))
    split = SplitSpec(annotations="a.jsonl")
    return DatasetSpec(name="tiny", type="mask_pairs", label_map="map.json", train=split, val=split, test=split, **keys)


def opened(dataset: DatasetSpec, root: Path, mode: Mode) -> SegmentationDataset:
    return open_dataset(dataset, "train", load_catalog(dataset, str(root), mode), mode, str(root))


def _write(
    root: Path,
    kind: Any,
    annotations: Sequence[dict[str, Any]],
    sizes: Sequence[tuple[int, int]],
    label_map: Sequence[dict[str, Any]],
) -> DatasetSpec:
    images = []
    for number, (height, width) in enumerate(sizes, 1):
        save(root / f"images/{number}.png", photo(height, width, number))
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
    write(root / "map.json", list(label_map))
    write(root / "a.json", {"images": images, "annotations": list(annotations), "categories": list(label_map)})
    split = SplitSpec(images="images", annotations="a.json", panoptic="panoptic" if kind == "coco_panoptic" else None)
    return DatasetSpec(name="tiny", type=kind, label_map="map.json", train=split, val=split, test=split)
