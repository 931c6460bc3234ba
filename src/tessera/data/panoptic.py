"""COCO panoptic annotations: a JSON of segments and a PNG per image whose colour is the segment id (R + 256 G + 65536 B)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tessera.data.coco_index import (
    CocoIndex,
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
    class_target,
    empty_target,
    is_number,
    parse_box,
    relative_name,
)
from tessera.files import UserError
from tessera.ops.image_size import open_image
from tessera.ops.masks import masks_to_boxes
from tessera.spec.networks import Mode
from tessera.structures import IGNORE, ClassCatalog, Target


class CocoPanoptic(SegmentationDataset):
    """Panoptic mode: a mask per segment and the semantic map. Semantic mode: a mask per class and the map. Instance mode: things alone.
    Detection mode: the things' boxes as the JSON has them; the PNG files are not opened.

    Left out with a warning: segments of the JSON without a pixel in the PNG, and pixels whose id the JSON does not list (void).
    An image without annotation has nothing to be found, and every pixel of it is void.
    """

    def __init__(
        self,
        annotations: Path,
        image_folder: Path,
        panoptic_folder: Path,
        catalog: ClassCatalog,
        known: Collection[int],
        mode: Mode,
        findings: Findings,
    ) -> None:
        """``catalog``: the classes of the mode; ``known``: every category id of the dataset, any other is an error."""
        self.source = annotations
        self.image_folder = image_folder
        self._panoptic_folder = panoptic_folder
        self._mode = mode
        self._labels = catalog.from_dataset_id
        content = read_coco(annotations, segments=True)
        self.categories = category_names(content)
        index = index_coco(content, findings)
        self.file_names = [image["file_name"] for image in index.images]
        self.image_ids = [image["id"] for image in index.images]
        self._records = Records(self._index(index, known, findings))

    def annotated_size(self, index: int) -> tuple[int, int] | None:
        height, width = self._records[index]["size"]
        return None if height is None else (height, width)

    def mask_path(self, index: int) -> Path | None:
        name = self._records[index]["file_name"]
        return None if name is None or self._mode == "detection" else self._panoptic_folder / name

    def target(self, index: int, size: tuple[int, int], findings: Findings) -> Target:
        self.check_size(index, size, findings)
        record = self._records[index]
        if record["file_name"] is None:
            findings.warnings["image without a panoptic annotation, taken as void"] += 1
            return self._nothing(size)
        if self._mode == "detection":
            return box_target(record["segments"], self._labels, size, findings)
        path = self._panoptic_folder / record["file_name"]
        ids = read_panoptic_ids(path)
        if ids.shape != size:
            findings.errors.append(
                f"{path}: is {ids.shape[1]}x{ids.shape[0]} (width x height), its image {self.file_names[index]} is {size[1]}x{size[0]}"
            )
            return self._nothing(size)
        return self._target(ids, record["segments"], findings)

    def _nothing(self, size: tuple[int, int]) -> Target:
        return empty_target(size, self._mode in ("panoptic", "semantic"), self._mode != "detection")

    def _target(self, ids: npt.NDArray[np.int32], segments: list[dict[str, Any]], findings: Findings) -> Target:
        present, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
        pixels = dict(zip(present.tolist(), counts.tolist(), strict=True))
        listed = {segment["id"] for segment in segments}
        absent = len(listed - pixels.keys())
        if absent:
            findings.warnings["segment without a pixel in the panoptic PNG, left out"] += absent
        unlisted = len(pixels.keys() - listed - {0})
        if unlisted:
            findings.warnings["segment of the panoptic PNG that the JSON does not list, taken as void"] += unlisted

        found = [item for item in segments if item["id"] in pixels and hashable_id(item["category_id"]) in self._labels]
        labels = {item["id"]: self._labels[item["category_id"]] for item in found}
        semantic: npt.NDArray[np.uint8] | None = None
        if self._mode in ("panoptic", "semantic"):
            table = np.array([labels.get(value, IGNORE) for value in present.tolist()], np.uint8)
            semantic = table[inverse].reshape(ids.shape)
        if self._mode == "semantic" and semantic is not None:
            return class_target(semantic)
        if not found:
            return empty_target(ids.shape, semantic=semantic is not None)
        masks = torch.from_numpy(np.stack([ids == item["id"] for item in found]))
        return Target(
            labels=torch.tensor([labels[item["id"]] for item in found]),
            masks=masks,
            boxes=masks_to_boxes(masks),
            iscrowd=torch.tensor([item["iscrowd"] for item in found], dtype=torch.bool),
            areas=torch.tensor(
                [pixels[item["id"]] if item["area"] is None else item["area"] for item in found], dtype=torch.float64
            ),
            semantic=None if semantic is None else torch.from_numpy(semantic),
            size=(ids.shape[0], ids.shape[1]),
        )

    def _index(self, index: CocoIndex, known: Collection[int], findings: Findings) -> list[dict[str, Any]]:
        categories: Counter[Any] = Counter()
        records = []
        for image in index.images:
            name = image["file_name"]
            annotations = index.annotations.get(image["id"], [])
            if len(annotations) > 1:
                findings.errors.append(f"{name}: has {len(annotations)} panoptic annotations, expected one")
            record: dict[str, Any] = {"size": [image["height"], image["width"]], "file_name": None, "segments": []}
            if annotations:
                record["file_name"] = relative_name(
                    annotations[0].get("file_name"), findings, f"{name}: file_name of its annotation"
                )
                record["segments"] = self._segments(annotations[0].get("segments_info"), name, categories, findings)
            records.append(record)
        report_unknown_categories(categories, known, findings)
        return records

    def _segments(self, value: Any, name: str, categories: Counter[Any], findings: Findings) -> list[dict[str, Any]]:
        if not isinstance(value, list):
            findings.errors.append(f"{name}: segments_info is {type(value).__name__}, expected a list")
            return []
        segments = []
        seen: set[int] = set()
        for item in value:
            identity = item.get("id") if isinstance(item, dict) else None
            if not is_whole(identity) or identity < 1:
                findings.errors.append(
                    f"{name}: a segment has id {identity!r}, expected a whole number above 0 (0 is void)"
                )
                continue
            if identity in seen:
                findings.errors.append(f"{name}: segment id {identity} occurs more than once")
                continue
            seen.add(identity)
            category = hashable_id(item.get("category_id"))
            categories[category] += 1
            segment = {
                "id": identity,
                "category_id": item.get("category_id"),
                "area": float(item["area"]) if is_number(item.get("area")) else None,
                "iscrowd": bool(item.get("iscrowd", 0)),
            }
            if self._mode == "detection":
                if category not in self._labels:
                    continue
                segment["bbox"] = parse_box(item.get("bbox"), f"{name}, segment {identity}", findings)
                if segment["bbox"] is None:
                    continue
            segments.append(segment)
        return segments


def read_panoptic_ids(path: Path) -> npt.NDArray[np.int32]:
    """(H, W) segment ids of a panoptic PNG; 0 is void."""
    with open_image(path) as image:
        if image.mode not in ("RGB", "RGBA", "P"):
            raise UserError(
                f"{path}: has pixel format {image.mode}; expected RGB, the colour being the segment id (R + 256 G + 65536 B)"
            )
        channels = np.array(image.convert("RGB"), dtype=np.int32)
    ids: npt.NDArray[np.int32] = channels[..., 0] + 256 * channels[..., 1] + 65536 * channels[..., 2]
    return ids
