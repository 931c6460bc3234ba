"""COCO instance annotations: boxes, polygons of several parts, compressed and plain run lengths, crowd regions, sparse category ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from tessera.data.coco_file import is_whole
from tessera.data.coco_index import CocoDataset
from tessera.data.reader import (
    Findings,
    box_target,
    empty_target,
    is_number,
    mask_target,
    report_box,
)
from tessera.ops.rle import decode_counts
from tessera.structures import Target

_FARTHEST = 10
"""A polygon may leave its image by this many of the image's longer sides; beyond, it is not in pixels of this image."""


class CocoInstances(CocoDataset):
    """Every annotated object is kept, overlapping ones too; those of classes outside ``catalog`` (stuff) are left out.

    Mode instance: annotations without a usable mask are left out with a warning: no mask, a polygon of fewer than three points. A mask
    without a pixel is kept, empty: no loss sees it, and COCO's evaluation counts it as missed. Mode detection: boxes alone, as
    annotated; masks are not even looked at.
    """

    def target(self, index: int, size: tuple[int, int], findings: Findings) -> Target:
        self.check_size(index, size, findings)
        boxes_only = self._mode == "detection"
        objects = self._index.objects(index, masks=not boxes_only)
        objects = [item for item in objects if item["category_id"] in self._labels]
        if boxes_only:
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
        return mask_target(kept, masks, self._labels) if kept else empty_target(size, semantic=False)


class _MaskError(Exception):
    """What is wrong with a mask."""


def parse_segmentation(
    value: Any, size: tuple[int, int], where: str, findings: Findings
) -> npt.NDArray[np.bool_] | None:
    """Polygons or run lengths to (H, W); None for what is no mask (a warning) or malformed (an error)."""
    mask: npt.NDArray[np.bool_] | None = None
    try:
        if value is None or value == []:
            findings.warnings["annotation without a mask, left out"] += 1
        elif isinstance(value, list):
            mask = _polygons(value, size, findings)
        elif isinstance(value, dict):
            mask = _run_lengths(value, size)
        else:
            raise _MaskError(f"segmentation is {type(value).__name__}, expected polygons or run lengths")
    except _MaskError as error:
        findings.errors.append(f"{where}: {error}")
    if mask is not None and not mask.any():
        findings.warnings["annotation whose mask has no pixel, which no mask can match"] += 1
    return mask


def _polygons(parts: list[Any], size: tuple[int, int], findings: Findings) -> npt.NDArray[np.bool_] | None:
    usable = []
    for part in parts:
        if not isinstance(part, list) or len(part) % 2 or not all(is_number(value) for value in part):
            raise _MaskError("a polygon is not a list of x, y pairs of finite numbers, as [x1, y1, x2, y2, ...]")
        farthest = max(map(abs, part), default=0)
        if farthest > _FARTHEST * max(size):
            # pycocotools walks along every pixel of the outline, and crashes where their number leaves 32 bits.
            raise _MaskError(
                f"a polygon reaches to {farthest:g}, the image is {size[1]}x{size[0]} (width x height); expected pixels"
            )
        if len(part) < 6:
            findings.warnings["polygon with fewer than three points, left out"] += 1
        else:
            usable.append([float(value) for value in part])
    if not usable:
        return None
    merged = coco_mask.merge(coco_mask.frPyObjects(usable, *size))
    mask: npt.NDArray[np.bool_] = coco_mask.decode(merged).astype(bool)
    return mask


def _run_lengths(rle: dict[str, Any], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    if rle.get("size") != list(size):
        raise _MaskError(f"run lengths are for [height, width] {rle.get('size')}, the image has {list(size)}")
    counts = rle.get("counts")
    if isinstance(counts, str):
        # pycocotools neither checks the text nor the sum; it would write past the mask. Its own expansion tells.
        counts = _expand(counts)
    elif not isinstance(counts, list) or not all(is_whole(count) and count >= 0 for count in counts):
        raise _MaskError("counts of run lengths are neither text nor a list of whole numbers")
    if sum(counts) != size[0] * size[1]:
        raise _MaskError(
            f"run lengths cover {sum(counts)} pixels, the image has {size[0] * size[1]}; is the file cut off?"
        )
    return decode_counts(counts, *size)


def _expand(text: str) -> list[int]:
    """COCO's compressed counts to plain ones.

    Five bits a character from "0" upwards, bit 6 says that more follow, and from the third run on each is the difference to the
    run two before (pycocotools, maskApi.c, rleFrString).
    """
    damaged = _MaskError("compressed run lengths are damaged")
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise damaged
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        if value < 0:
            raise damaged
        counts.append(value)
        value = shift = 0
    if shift:
        raise damaged
    return counts
