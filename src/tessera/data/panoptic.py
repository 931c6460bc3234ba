"""COCO panoptic annotations: a JSON of segments and a PNG per image whose colour is the segment id (R + 256 G + 65536 B)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tessera.data.coco_index import CocoDataset
from tessera.data.reader import (
    Findings,
    box_target,
    class_target,
    empty_target,
    mask_target,
    require_lossless,
)
from tessera.files import UserError
from tessera.ops.image_size import open_image
from tessera.spec.schema import MAX_PIXELS
from tessera.structures import IGNORE, Target

ABSENT = "segment without a pixel in the panoptic PNG, which nothing can match"
UNLISTED = "segment of the panoptic PNG that the JSON does not list, taken as void"
OTHER_AREA = "segment whose area in the JSON is not the number of its pixels, by more than a fifth"
APART = (ABSENT, UNLISTED, OTHER_AREA)
"""Warnings that a JSON and PNG files which do not belong together give."""


class CocoPanoptic(CocoDataset):
    """Panoptic mode: a mask per segment and the semantic map. Semantic mode: a mask per class and the map. Instance mode: things alone.
    Detection mode: the things' boxes as the JSON has them; the PNG files are not opened.

    Pixels whose id the JSON does not list are void, with a warning. Segments of the JSON without a pixel in the PNG are kept, empty, with
    a warning: no loss sees them, and the published evaluation counts them as missed. An image without annotation has nothing to be
    found, and every pixel of it is void. ``data.check`` refuses a split in which most segments are among those or have another area.
    """

    def target(self, index: int, size: tuple[int, int], findings: Findings) -> Target:
        self.check_size(index, size, findings)
        segments, path = self._index.objects(index), self.mask_path(index)
        if self._index.mask_name(index) is None:
            findings.warnings["image without a panoptic annotation, taken as void"] += 1
            return self._nothing(size)
        if path is None:
            boxes = [item for item in segments if item["category_id"] in self._labels and item["bbox"]]
            return box_target(boxes, self._labels, size, findings)
        ids = read_panoptic_ids(path, self.max_pixels)
        if ids.shape != size:
            findings.errors.append(
                f"{path}: is {ids.shape[1]}x{ids.shape[0]} (width x height), its image {self.file_names[index]} is {size[1]}x{size[0]}"
            )
            return self._nothing(size)
        return self._target(ids, segments, findings)

    def _nothing(self, size: tuple[int, int]) -> Target:
        return empty_target(size, self._mode in ("panoptic", "semantic"), self._mode != "detection")

    def _target(self, ids: npt.NDArray[np.int32], segments: list[dict[str, Any]], findings: Findings) -> Target:
        present, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
        pixels = dict(zip(present.tolist(), counts.tolist(), strict=True))
        listed = {segment["id"] for segment in segments}
        absent = len(listed - pixels.keys())
        if absent:
            findings.warnings[ABSENT] += absent
        unlisted = len(pixels.keys() - listed - {0})
        if unlisted:
            findings.warnings[UNLISTED] += unlisted
        other = sum(_differs(item["area"], pixels[item["id"]]) for item in segments if item["id"] in pixels)
        if other:
            findings.warnings[OTHER_AREA] += other

        found = [item for item in segments if item["category_id"] in self._labels]
        labels = {item["id"]: self._labels[item["category_id"]] for item in found}
        semantic: npt.NDArray[np.uint8] | None = None
        if self._mode in ("panoptic", "semantic"):
            table = np.array([labels.get(value, IGNORE) for value in present.tolist()], np.uint8)
            semantic = table[inverse].reshape(ids.shape)
        if self._mode == "semantic" and semantic is not None:
            return class_target(semantic)
        if not found:
            return empty_target(ids.shape, semantic=semantic is not None)
        return mask_target(found, [ids == item["id"] for item in found], self._labels, semantic)


def _differs(area: float | None, pixels: int) -> bool:
    return area is not None and abs(area - pixels) > 0.2 * max(area, pixels)


def read_panoptic_ids(path: Path, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.int32]:
    """(H, W) segment ids of a panoptic PNG; 0 is void."""
    with open_image(path, max_pixels) as image:
        require_lossless(path, image)
        if image.mode not in ("RGB", "RGBA", "P"):
            raise UserError(
                f"{path}: has pixel format {image.mode}; expected RGB, the colour being the segment id (R + 256 G + 65536 B)"
            )
        channels = np.array(image.convert("RGB"), dtype=np.int32)
    ids: npt.NDArray[np.int32] = channels[..., 0] + 256 * channels[..., 1] + 65536 * channels[..., 2]
    return ids
