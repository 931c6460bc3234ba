"""The index of a COCO file of any size: made once, and opened at once by every later process, which share it.

It lies in data/.index (the environment variable TESSERA_INDEX names another folder), under the sha256 of the file. It holds what the file
says, whatever mode or classes somebody reads it with, faults included. It may be deleted at any time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tessera.data.coco_file import PACKED, fault, is_whole, read_coco
from tessera.data.columns import Texts, map_columns, save_columns
from tessera.data.reader import Findings, SegmentationDataset
from tessera.files import UserError, only_process, read_json
from tessera.spec.digests import MISSING, UNREADABLE, file_digest
from tessera.spec.networks import Mode
from tessera.structures import ClassCatalog

FORMAT = 3
"""Raised when what is kept of a file changes; an index of another format is made again."""
FOLDER = "TESSERA_INDEX"
"""Environment variable: folder of the indices in place of data/.index."""


class Amounts(NamedTuple):
    objects: int
    crowd: int
    masks: int
    """Of those that are no crowd."""
    boxes: int
    """The same."""


class CocoIndex:
    """The content of one COCO file; images by ascending id, the objects of each in the order of the file."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError where ``path`` is no whole index of this format, OSError where there is none."""
        self.path = path
        arrays, facts = map_columns(path)
        if facts.get("format") != FORMAT:
            raise ValueError("another format")
        self._images, self._objects, self._segmentations = (
            arrays[key] for key in ("images", "objects", "segmentations")
        )
        self.image_ids = self._images["id"]
        self.file_names = Texts(arrays["names"], self._images["name"])
        self._masks = Texts(arrays["masks"], self._images["mask"])
        self.kind: str | None = facts["kind"]
        """``segments`` (panoptic) or ``annotations`` (instance); None where there are none of either."""
        self.lacks: str | None = facts["lacks"]
        """The first of the lists `images` and `annotations` that the file does not have."""
        self.listed: Any = facts["categories"]
        """``categories`` as the file has them, unchecked; ids such as 1.0 are whole numbers."""
        self.has_masks = bool(len(self._segmentations)) or not len(self._objects)
        """False where there are annotations and none has a segmentation."""
        self._facts = facts

    def __len__(self) -> int:
        return len(self._images)

    def __reduce__(self) -> tuple[Any, ...]:
        return CocoIndex, (self.path,)

    def size(self, index: int) -> tuple[int, int] | None:
        """(height, width) where the file says it."""
        height, width = int(self._images["height"][index]), int(self._images["width"][index])
        return (height, width) if height else None

    def mask_name(self, index: int) -> str | None:
        """File of the image's segments; None where the image has no panoptic annotation."""
        return self._masks[index] or None

    def objects(self, index: int, masks: bool = False) -> list[dict[str, Any]]:
        """``id``, ``category_id``, ``bbox`` (x, y, width, height, or None), ``area`` (or None), ``iscrowd``, ``fault`` (what is wrong with
        the box, or None) and, with ``masks``, ``segmentation`` as the file has it."""
        ends = self._images["objects"]
        first, end = int(ends[index - 1]) if index else 0, int(ends[index])
        found = []
        rows = PACKED.iter_unpack(self._objects[first:end].tobytes())
        for row, (identity, category, *box, area, start, length, crowd) in enumerate(rows, first):
            item: dict[str, Any] = {
                "id": identity,
                "category_id": category,
                "bbox": None if math.isnan(box[0]) else box,
                "area": None if math.isnan(area) else area,
                "iscrowd": crowd,
                "fault": self._facts["boxes"].get(str(row)),
            }
            if masks:
                item["segmentation"] = self._segmentation(start, length)
            found.append(item)
        return found

    def report(self, known: Collection[int], findings: Findings) -> None:
        """All that is wrong with the file, boxes aside; ``known``: every category id of the dataset, any other is an error."""
        findings.warnings.update(self._facts["warnings"])
        findings.errors += self._facts["errors"]
        findings.errors += [
            f"category_id {category} in {count} record(s) is not among the {len(known)} classes "
            "(label map, or the categories of the train annotations); add the class or correct the annotations"
            for category, count in self._facts["used"]
            if category not in known
        ]

    def report_boxes(self, labels: Collection[int], findings: Findings) -> None:
        """Every missing or malformed box of the categories ``labels`` is an error; for who reads nothing but boxes."""
        if not self._facts["boxless"]:
            return  # without a look at the objects, which would take memory
        boxless = np.isnan(self._objects["box"][:, 0]) & np.isin(self._objects["category"], list(labels))
        rows = np.flatnonzero(boxless)
        places = np.searchsorted(self._images["objects"], rows, side="right")
        noun = "segment" if self.kind == "segments" else "annotation"
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            where = f"{self.file_names[place]}, {noun} {self._objects['id'][row]}"
            findings.errors.append(self._facts["boxes"].get(str(row)) or fault(where, "bbox", None))

    def count(self, categories: Collection[int]) -> Amounts:
        """Of the objects of these categories."""
        rows = self._objects[np.isin(self._objects["category"], list(categories))]
        single = rows[~rows["crowd"]]
        boxes = len(single) - int(np.isnan(single["box"][:, 0]).sum())
        return Amounts(len(rows), len(rows) - len(single), int((single["length"] > 0).sum()), boxes)

    def categories(self) -> list[tuple[int, str]]:
        """Dataset id and name as the file lists them; entries without both are left out, since a label map may say more."""
        entries = [item for item in self.listed if isinstance(item, dict)] if isinstance(self.listed, list) else []
        return [(item["id"], str(item["name"])) for item in entries if is_whole(item.get("id")) and "name" in item]

    def _segmentation(self, start: int, length: int) -> Any:
        try:
            return json.loads(self._segmentations[start : start + length].tobytes()) if length else None
        except ValueError:
            raise UserError(f"{self.path}: is damaged; delete it, and it is made again") from None


class CocoDataset(SegmentationDataset):
    """What the readers of COCO files have in common. A copy of one in another process opens the index anew and shares its memory."""

    def __init__(
        self,
        annotations: Path,
        image_folder: Path,
        catalog: ClassCatalog,
        known: Collection[int],
        mode: Mode,
        findings: Findings,
        panoptic_folder: Path | None = None,
    ) -> None:
        """``catalog``: the classes of the mode; ``known``: every category id of the dataset, any other is an error; ``panoptic_folder``: of the
        PNG files, where the annotations are panoptic."""
        self.source = annotations
        self.image_folder = image_folder
        self._mode = mode
        self._labels = catalog.from_dataset_id
        self._panoptic_folder = panoptic_folder
        self._attach(open_index(annotations, panoptic_folder is not None))
        if panoptic_folder is None:
            self.has_masks = None if self._index.kind is None else self._index.has_masks
        self._index.report(known, findings)
        if mode == "detection":
            # Now rather than in the middle of an epoch, when an image is first read.
            self._index.report_boxes(self._labels, findings)

    def annotated_size(self, index: int) -> tuple[int, int] | None:
        return self._index.size(index)

    def mask_path(self, index: int) -> Path | None:
        name = self._index.mask_name(index)
        if name is None or self._panoptic_folder is None or self._mode == "detection":
            return None
        return self._panoptic_folder / name

    def nothing_to_learn(self) -> str | None:
        found = self._index.count(self._labels)
        if not found.objects:
            listed = self._index.kind is not None
            return f"it lists no {'annotation of any of the classes' if listed else 'annotation'}, so no image has an object"
        if found.objects == found.crowd and self._mode != "semantic":
            return (
                f"all {found.crowd} annotations are crowd (iscrowd 1, as brush masks are often exported), so no image has an object; set iscrowd "
                "to 0 where an annotation is of one object"
            )
        needed, what = (found.boxes, "bbox") if self._mode == "detection" else (found.masks, "segmentation")
        if self._index.kind == "annotations" and not needed:
            return f"none of its {found.objects - found.crowd} annotations that are no crowd has a {what}"
        return None

    def _attach(self, index: CocoIndex) -> None:
        self._index = index
        self.categories = index.categories()
        self.file_names = index.file_names
        self.image_ids = index.image_ids

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("file_names", "image_ids")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._attach(self._index)


def open_index(source: Path, segments: bool | None = None, folder: Path | None = None) -> CocoIndex:
    """The index of a COCO file, made first where there is none, an incomplete one or one of another format.

    ``segments``: the annotations must (panoptic) or must not (instance) have ``segments_info``; None for who reads ``listed`` alone.
    ``folder``: of the indices, for who keeps none.
    Raises UserError where the file is of the other kind, or no COCO file.
    """
    digest = file_digest(source)
    if digest in (MISSING, UNREADABLE):
        read_json(source)
    folder = folder or Path(os.environ.get(FOLDER) or "data/.index")
    path = folder / digest
    found = _whole(path)
    if found is None:
        _require_writable(folder)
        lockless = f"set the environment variable {FOLDER} to a folder elsewhere"
        with only_process(folder / f"lock-{digest[0]}", lockless=lockless):
            found = _whole(path)
            if found is None:
                _build(source, digest, path)
                found = CocoIndex(path)
    if segments is not None and found.lacks is not None:
        raise UserError(
            f"{source}: has no list `{found.lacks}`; expected a COCO file (is dataset.type right? JSONL of image and mask is mask_pairs)"
        )
    if segments is not None and found.kind is not None and (found.kind == "segments") != segments:
        if segments:
            raise UserError(
                f"{source}: holds COCO instance annotations (no `segments_info`), but dataset.type is coco_panoptic. "
                "Set dataset.type to coco and model.mode to instance or detection, or give the panoptic JSON."
            )
        raise UserError(
            f"{source}: holds COCO panoptic annotations (`segments_info`), but dataset.type is coco. "
            "Set dataset.type to coco_panoptic and the split's `panoptic` folder, or give the instance JSON."
        )
    return found


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK) else "no permission"
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise UserError(
            f"{folder}: the index of the annotations cannot be written there ({reason}); set the environment variable {FOLDER} to a "
            "folder that can be"
        )


def _whole(path: Path) -> CocoIndex | None:
    try:
        return CocoIndex(path)
    except (OSError, ValueError, KeyError):
        return None


def _build(source: Path, digest: str, path: Path) -> None:
    columns, facts = read_coco(source, digest)
    save_columns(path, columns, {"format": FORMAT, **facts})
