"""Random truths and predictions, with the shapes and accidents of real ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.metrics.statistics import Limits
from tessera.ops.masks import masks_to_boxes
from tessera.ops.rle import decode_masks
from tessera.structures import (
    IGNORE,
    Category,
    ClassCatalog,
    ImageMeta,
    Instances,
    Panoptic,
    Predictions,
    Segment,
    Target,
)

NAMES = tuple(Limits().averages())
"""COCO's twelve numbers in its order."""


def make_catalog(things: int, stuff: int) -> ClassCatalog:
    """Sparse dataset ids, things and stuff alternating at first."""
    flags = [index % 2 == 0 for index in range(2 * min(things, stuff))]
    flags += [things > stuff] * abs(things - stuff)
    return ClassCatalog(
        tuple(
            Category(3 * index + 2, f"class_{index}", (40 * index % 256, 90, 160), flag)
            for index, flag in enumerate(flags)
        )
    )


def random_target(catalog: ClassCatalog, size: tuple[int, int], count: int, generator: torch.Generator) -> Target:
    """``count`` rectangles painted over each other, about one in six crowd; what stays free is void."""
    ids = torch.zeros(size, dtype=torch.int64)
    for number in range(1, count + 1):
        top, left, bottom, right = _rectangle(size, generator)
        ids[top:bottom, left:right] = number
    present = [number for number in range(1, count + 1) if (ids == number).any()]
    masks = torch.stack([ids == number for number in present]) if present else torch.zeros(0, *size, dtype=torch.bool)
    labels = torch.randint(0, len(catalog), (len(present),), generator=generator)
    iscrowd = torch.rand(len(present), generator=generator) < 1 / 6
    return make_target(labels, masks, iscrowd)


def make_target(labels: Tensor, masks: Tensor, iscrowd: Tensor | None = None) -> Target:
    semantic = torch.full(masks.shape[1:], IGNORE, dtype=torch.uint8)
    for label, mask in zip(labels, masks, strict=True):
        semantic[mask] = label.to(torch.uint8)
    return Target(
        labels=labels,
        masks=masks,
        boxes=masks_to_boxes(masks),
        iscrowd=torch.zeros(len(labels), dtype=torch.bool) if iscrowd is None else iscrowd,
        areas=masks.sum((1, 2)).double(),
        semantic=semantic,
    )


def disturbed_panoptic(truth: Target, catalog: ClassCatalog, generator: torch.Generator) -> Panoptic:
    """Most segments shifted a little, some dropped, relabelled, or invented; ids with gaps."""
    size = truth.masks.shape[1:]
    ids = torch.zeros(size, dtype=torch.int32)
    labels = {}
    number = 0
    for label, mask in zip(truth.labels.tolist(), truth.masks, strict=True):
        if torch.rand((), generator=generator) < 0.15:
            continue
        number += int(torch.randint(1, 4, (), generator=generator))
        moved = mask.roll(tuple(torch.randint(-2, 3, (2,), generator=generator).tolist()), (0, 1))
        ids[moved] = number
        wrong = torch.rand((), generator=generator) < 0.2
        labels[number] = int(torch.randint(0, len(catalog), (), generator=generator)) if wrong else label
    for _ in range(int(torch.randint(0, 3, (), generator=generator))):
        number += 1
        top, left, bottom, right = _rectangle((size[0], size[1]), generator)
        ids[top:bottom, left:right] = number
        labels[number] = int(torch.randint(0, len(catalog), (), generator=generator))
    present = set(ids.unique().tolist())
    return Panoptic(ids, [Segment(key, label, 0.9) for key, label in labels.items() if key in present])


def disturbed_instances(truth: Target, catalog: ClassCatalog, generator: torch.Generator) -> Instances:
    """Shifted copies of the true things, duplicates and inventions; coarse scores, so that many are equal."""
    size = truth.masks.shape[1:]
    masks, labels = [], []
    for label, mask in zip(truth.labels.tolist(), truth.masks, strict=True):
        if label not in catalog.thing_ids:
            continue
        for _ in range(int(torch.randint(0, 3, (), generator=generator))):
            masks.append(mask.roll(tuple(torch.randint(-3, 4, (2,), generator=generator).tolist()), (0, 1)))
            labels.append(label)
    for _ in range(int(torch.randint(0, 4, (), generator=generator))):
        mask = torch.zeros(size, dtype=torch.bool)
        top, left, bottom, right = _rectangle((size[0], size[1]), generator)
        mask[top:bottom, left:right] = True
        masks.append(mask)
        labels.append(catalog.thing_ids[int(torch.randint(0, len(catalog.thing_ids), (), generator=generator))])
    stacked = torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.bool)
    scores = torch.randint(1, 8, (len(masks),), generator=generator) / 8
    order = scores.argsort(descending=True, stable=True)
    return Instances(
        scores[order], torch.tensor(labels, dtype=torch.int64)[order], masks_to_boxes(stacked)[order], stacked[order]
    )


def make_meta(image_id: int, size: tuple[int, int]) -> ImageMeta:
    return ImageMeta(image_id, f"folder/image_{image_id}.png", size, size)


def read_predictions(path: Path) -> dict[int, Predictions]:
    """By image id, decoded from the file that an evaluation leaves, by nothing but its description."""
    document = json.loads(gzip.decompress(path.read_bytes()))
    assert document["format"] == 1
    return {record["image_id"]: _decoded(record, document["mode"]) for record in document["images"]}


def _decoded(record: dict[str, Any], mode: str) -> Predictions:
    size = tuple(record["original_size"])

    def masks(items: list[dict[str, Any]]) -> Tensor:
        return torch.from_numpy(decode_masks([{"size": list(size), "counts": item["counts"]} for item in items], size))

    def painted(items: list[dict[str, Any]], key: str, dtype: torch.dtype) -> Tensor:
        values = torch.tensor([item[key] for item in items], dtype=dtype)[:, None, None]
        return (masks(items) * values).sum(0, dtype=dtype)

    found = Predictions(ImageMeta(record["image_id"], record["file_name"], size, tuple(record["resized_size"])))
    if "semantic" in record:
        found.semantic = painted(record["semantic"]["segments"], "label", torch.int64)
    if "instances" in record:
        items = record["instances"]
        found.instances = Instances(
            torch.tensor([item["score"] for item in items]),
            torch.tensor([item["label"] for item in items], dtype=torch.int64),
            torch.tensor([item["box"] for item in items], dtype=torch.float32).reshape(-1, 4),
            None if mode == "detection" else masks(items),
        )
    if "panoptic" in record:
        items = record["panoptic"]["segments"]
        segments = [Segment(item["id"], item["label"], item["score"]) for item in items]
        found.panoptic = Panoptic(painted(items, "id", torch.int32), segments)
    return found


def _rectangle(size: tuple[int, int], generator: torch.Generator) -> tuple[int, int, int, int]:
    """Never empty."""
    spans = []
    for side in size:
        first, second = sorted(torch.randint(0, side + 1, (2,), generator=generator).tolist())
        spans.append((min(first, side - 1), max(second, min(first, side - 1) + 1)))
    return spans[0][0], spans[1][0], spans[0][1], spans[1][1]
