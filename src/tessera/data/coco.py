"""COCO instance annotations: boxes, polygons of several parts, compressed and plain run lengths, crowd regions, sparse category ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as coco_mask

from tessera.data.coco_index import (
    category_names,
    hashable_id,
    index_coco,
    is_whole,
    read_coco,
    report_unknown_categories,
)
from tessera.data.reader import (
    Findings,
    Records,
    SegmentationDataset,
    box_target,
    empty_target,
    is_number,
    parse_box,
    report_box,
    report_repeated,
)
from tessera.ops.masks import decode_rle, masks_to_boxes
from tessera.spec.networks import Mode
from tessera.structures import ClassCatalog, Target

_FARTHEST = 10
"""A polygon may leave its image by this many of the image's longer sides; beyond, it is not in pixels of this image."""


class CocoInstances(SegmentationDataset):
    """Every annotated object is kept, overlapping ones too; those of classes outside ``catalog`` (stuff) are left out.

    Mode instance: annotations without a usable mask are left out with a warning: no mask, a polygon of fewer than three points, no
    pixel. Mode detection: boxes alone, as annotated; masks are not even looked at.
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
        self.source = annotations
        self.image_folder = image_folder
        content = read_coco(annotations, segments=False)
        self.categories = category_names(content)
        index = index_coco(content, findings)
        every = [item for group in index.annotations.values() for item in group]
        report_unknown_categories(Counter(hashable_id(item.get("category_id")) for item in every), known, findings)
        report_repeated((hashable_id(item["id"]) for item in every if "id" in item), "annotation id", findings)
        faulty = [item.get("id") for item in every if not is_whole(item.get("id")) or item["id"] < 1]
        if faulty:
            findings.errors.append(
                f"{len(faulty)} annotation(s) have an id that is not a whole number above 0 (the first: {faulty[0]!r}); "
                "COCO's own evaluation takes id 0 for unmatched"
            )
        self.file_names = [image["file_name"] for image in index.images]
        self.image_ids = [image["id"] for image in index.images]
        self.has_masks = not every or any(item.get("segmentation") for item in every)
        self._boxes_only = mode == "detection"
        self._labels = catalog.from_dataset_id
        self._records = Records(
            {
                "size": [image["height"], image["width"]],
                "objects": self._objects(index.annotations.get(image["id"], []), image["file_name"], findings),
            }
            for image in index.images
        )

    def _objects(self, annotations: list[dict[str, Any]], name: str, findings: Findings) -> list[dict[str, Any]]:
        found = [item for item in annotations if hashable_id(item.get("category_id")) in self._labels]
        keys = ["id", "category_id", "bbox", "area", "iscrowd"]
        if self._boxes_only:
            # Their form is checked now: an image is first read in the middle of an epoch.
            found = [item for item in found if parse_box(item.get("bbox"), _where(name, item), findings) is not None]
        else:
            keys.append("segmentation")
        return [{key: item.get(key) for key in keys} for item in found]

    def annotated_size(self, index: int) -> tuple[int, int] | None:
        height, width = self._records[index]["size"]
        return None if height is None else (height, width)

    def target(self, index: int, size: tuple[int, int], findings: Findings) -> Target:
        self.check_size(index, size, findings)
        objects = self._records[index]["objects"]
        if self._boxes_only:
            return box_target(objects, self._labels, size, findings)
        kept = []
        masks = []
        for item in objects:
            where = _where(self.file_names[index], item)
            # Boxes are informative here, since tight ones are made from the masks; a wrong one hints at other trouble.
            box = None if item["bbox"] is None else parse_box(item["bbox"], where, findings)
            if box is not None:
                report_box(box, size, findings)
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
            boxes=masks_to_boxes(stacked),
            iscrowd=torch.tensor([bool(item["iscrowd"]) for item in kept]),
            areas=torch.tensor(
                [_area(item, mask) for item, mask in zip(kept, masks, strict=True)], dtype=torch.float64
            ),
            size=size,
        )


def parse_segmentation(
    value: Any, size: tuple[int, int], where: str, findings: Findings
) -> npt.NDArray[np.bool_] | None:
    """Polygons or run lengths to (H, W); None for what has no pixel (a warning) or is malformed (an error)."""
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
        findings.warnings["annotation whose mask has no pixel, left out"] += 1
        return None
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
    return decode_rle({"size": list(size), "counts": lengths})


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


def _where(file_name: str, annotation: dict[str, Any]) -> str:
    return f"{file_name}, annotation {annotation.get('id')}"


def _area(item: dict[str, Any], mask: npt.NDArray[np.bool_]) -> float:
    return float(item["area"]) if is_number(item["area"]) else float(mask.sum())
