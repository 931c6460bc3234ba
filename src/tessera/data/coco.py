"""COCO instance annotations: boxes, polygons of several parts, compressed and plain run lengths, crowd regions, sparse category ids."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as coco_mask

from tessera.data.coco_file import is_whole
from tessera.data.coco_index import CocoDataset
from tessera.data.reader import (
    Findings,
    annotated_boxes,
    box_target,
    empty_target,
    is_number,
    report_box,
)
from tessera.ops.rle import decode_counts
from tessera.spec.networks import Mode
from tessera.structures import ClassCatalog, Target

_FARTHEST = 10
"""A polygon may leave its image by this many of the image's longer sides; beyond, it is not in pixels of this image."""


class CocoInstances(CocoDataset):
    """Every annotated object is kept, overlapping ones too; those of classes outside ``catalog`` (stuff) are left out.

    Mode instance: annotations without a usable mask are left out with a warning: no mask, a polygon of fewer than three points. A mask
    without a pixel is kept, empty: no loss sees it, and COCO's evaluation counts it as missed. Mode detection: boxes alone, as
    annotated; masks are not even looked at.
    """

    def __init__(
        self,
        annotations: Path,
        image_folder: Path,
        catalog: ClassCatalog,
        known: Collection[int],
        mode: Mode,
        findings: Findings,
    ) -> None:
        """``known``: every category id of the dataset, stuff included; any other id is an error."""
        super().__init__(annotations, image_folder, False, catalog, known, mode, findings)
        self.has_masks = None if self._index.kind is None else self._index.has_masks
        self._boxes_only = mode == "detection"

    def target(self, index: int, size: tuple[int, int], findings: Findings) -> Target:
        self.check_size(index, size, findings)
        objects = self._index.objects(index, masks=not self._boxes_only)
        objects = [item for item in objects if item["category_id"] in self._labels]
        if self._boxes_only:
            return box_target([item for item in objects if item["bbox"]], self._labels, size, findings)
        kept = []
        masks = []
        for item in objects:
            where = f"{self.file_names[index]}, annotation {item['id']}"
            # Box metrics compare with it; what the losses see is made from the mask.
            if item["fault"] is not None:
                findings.errors.append(item["fault"])
            elif item["bbox"] is not None:
                report_box(item["bbox"], size, findings)
            mask = parse_segmentation(item["segmentation"], size, where, findings)
            if mask is not None:
                kept.append(item)
                masks.append(mask)
        if not kept:
            return empty_target(size, semantic=False)
        stacked = torch.from_numpy(np.stack(masks))
        return Target(
            labels=torch.tensor([self._labels[item["category_id"]] for item in kept]),
            masks=stacked,
            boxes=annotated_boxes(kept, stacked),
            iscrowd=torch.tensor([bool(item["iscrowd"]) for item in kept]),
            areas=torch.tensor(
                [_area(item, mask) for item, mask in zip(kept, masks, strict=True)], dtype=torch.float64
            ),
            size=size,
        )


def parse_segmentation(
    value: Any, size: tuple[int, int], where: str, findings: Findings
) -> npt.NDArray[np.bool_] | None:
    """Polygons or run lengths to (H, W); None for what is no mask (a warning) or malformed (an error)."""
    mask: npt.NDArray[np.bool_] | None = None
    if value is None or value == []:
        findings.warnings["annotation without a mask, left out"] += 1
    elif isinstance(value, list):
        mask = _polygons(value, size, where, findings)
    elif isinstance(value, dict):
        mask = _run_lengths(value, size, where, findings)
    else:
        findings.errors.append(f"{where}: segmentation is {type(value).__name__}, expected polygons or run lengths")
    if mask is not None and not mask.any():
        findings.warnings["annotation whose mask has no pixel, which no mask can match"] += 1
    return mask


def _polygons(parts: list[Any], size: tuple[int, int], where: str, findings: Findings) -> npt.NDArray[np.bool_] | None:
    usable = []
    for part in parts:
        if not isinstance(part, list) or len(part) % 2 or not all(is_number(value) for value in part):
            findings.errors.append(
                f"{where}: a polygon is not a list of x, y pairs of finite numbers, as [x1, y1, x2, y2, ...]"
            )
            return None
        farthest = max(map(abs, part), default=0)
        if farthest > _FARTHEST * max(size):
            # pycocotools walks along every pixel of the outline, and crashes where their number leaves 32 bits.
            findings.errors.append(
                f"{where}: a polygon reaches to {farthest:g}, the image is {size[1]}x{size[0]} (width x height); expected pixels"
            )
            return None
        if len(part) < 6:
            findings.warnings["polygon with fewer than three points, left out"] += 1
        else:
            usable.append([float(value) for value in part])
    if not usable:
        return None
    merged = coco_mask.merge(coco_mask.frPyObjects(usable, *size))
    mask: npt.NDArray[np.bool_] = coco_mask.decode(merged).astype(bool)
    return mask


def _run_lengths(
    rle: dict[str, Any], size: tuple[int, int], where: str, findings: Findings
) -> npt.NDArray[np.bool_] | None:
    if rle.get("size") != list(size):
        findings.errors.append(
            f"{where}: run lengths are for [height, width] {rle.get('size')}, the image has {list(size)}"
        )
        return None
    counts = rle.get("counts")
    if isinstance(counts, str):
        # pycocotools neither checks the text nor the sum; it would write past the mask. Its own expansion tells.
        lengths = _expand(counts)
        if lengths is None:
            findings.errors.append(f"{where}: compressed run lengths are damaged")
            return None
    elif isinstance(counts, list) and all(is_whole(count) and count >= 0 for count in counts):
        lengths = counts
    else:
        findings.errors.append(f"{where}: counts of run lengths are neither text nor a list of whole numbers")
        return None
    if sum(lengths) != size[0] * size[1]:
        findings.errors.append(
            f"{where}: run lengths cover {sum(lengths)} pixels, the image has {size[0] * size[1]}; is the file cut off?"
        )
        return None
    return decode_counts(lengths, *size)


def _expand(text: str) -> list[int] | None:
    """COCO's compressed counts to plain ones; None where they cannot be right.

    Five bits a character from "0" upwards, bit 6 says that more follow, and from the third run on each is the difference to the
    run two before (pycocotools, maskApi.c, rleFrString).
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        if value < 0:
            return None
        counts.append(value)
        value = shift = 0
    return None if shift else counts


def _area(item: dict[str, Any], mask: npt.NDArray[np.bool_]) -> float:
    return float(mask.sum()) if item["area"] is None else float(item["area"])
