"""COCO files of any size: read once, checked, and kept as an index that every later process opens at once and shares.

The index of a file lies in data/.index (the environment variable TESSERA_INDEX names another folder), under the sha256 of the file. It
holds what the file says, whatever mode or classes somebody reads it with, faults included. It may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import tempfile
from array import array
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from tessera.data.columns import Numbers, Texts, Writer, map_columns
from tessera.data.json_stream import members
from tessera.data.reader import (
    Findings,
    SegmentationDataset,
    brief,
    is_number,
    parse_box,
    relative_name,
    report_repeated,
)
from tessera.files import UserError, atomic_path, only_process, read_json
from tessera.spec.digests import MISSING, UNREADABLE, file_digest
from tessera.spec.networks import Mode
from tessera.structures import ClassCatalog

FORMAT = 2
"""Raised when what is kept of a file changes; an index of another format is made again."""
FOLDER = "TESSERA_INDEX"
"""Environment variable: folder of the indices in place of data/.index."""

_IMAGE = np.dtype([("id", "<i8"), ("height", "<i8"), ("width", "<i8"), ("objects", "<i8")])
"""Height and width are 0 where the file does not say; ``objects`` is where the image's objects end."""
_OBJECT = np.dtype(
    [
        ("id", "<i8"),
        ("category", "<i8"),
        ("box", "<f8", 4),
        ("area", "<f8"),
        ("start", "<i8"),
        ("length", "<u4"),
        ("crowd", "|u1"),
        ("box_state", "|u1"),
        ("", "|u1", 2),
    ]
)
"""``category`` is -1 for what is no id, ``area`` NaN where none is given, or 0; the JSON of the segmentation is ``length`` bytes from ``start``."""
_PACKED = struct.Struct("<qq5dqIBBxx")
_NO_BOX, _GOOD_BOX, _FAULTY_BOX = range(3)
_LIMIT = 2**63
_EXACT = 2**53
"""Below it a floating-point number is that whole number alone."""
_CHUNK = 1 << 16
_LISTS = ("images", "annotations")
"""The long ones."""
FEDERATED = "image in which not every object of a class is annotated (LVIS): what is found there and not annotated counts as a mistake"
_SHOW_PROGRESS = 1 << 24
"""Bytes of a file from which on building its index shows progress."""


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
        self._images = arrays["images"].view(_IMAGE)
        self._objects = arrays["objects"].view(_OBJECT)
        self._segmentations = arrays["segmentations"]
        self.image_ids = Numbers(self._images["id"])
        self.file_names = Texts(arrays["names"], arrays["name_ends"])
        self._masks = Texts(arrays["masks"], arrays["mask_ends"])
        self.kind: str | None = facts["kind"]
        """``segments`` (panoptic) or ``annotations`` (instance); None where there are none of either."""
        self.lacks: str | None = facts["lacks"]
        """The first of the lists `images` and `annotations` that the file does not have."""
        self.listed: Any = facts["categories"]
        """``categories`` as the file has them, unchecked; ids such as 1.0 are whole numbers."""
        self.has_masks: bool = facts["has_masks"]
        """False where there are annotations and none has a segmentation."""
        self._faults: dict[str, Any] = facts["faults"]
        self._warnings: dict[str, int] = facts["warnings"]

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
        first, end = self._rows(index)
        found = []
        rows = _PACKED.iter_unpack(self._objects[first:end].tobytes())
        for number, (identity, category, x, y, width, height, area, start, length, crowd, state) in enumerate(
            rows, first
        ):
            item: dict[str, Any] = {
                "id": identity,
                "category_id": category,
                "bbox": [x, y, width, height] if state == _GOOD_BOX else None,
                "area": None if math.isnan(area) else area,
                "iscrowd": bool(crowd),
                "fault": self._faults["boxes"].get(str(number)) if state == _FAULTY_BOX else None,
            }
            if masks:
                item["segmentation"] = self._segmentation(start, length)
            found.append(item)
        return found

    def report(self, known: Collection[int], findings: Findings) -> None:
        """All that is wrong with the file, boxes aside; ``known``: every category id of the dataset, any other is an error."""
        findings.warnings.update(self._warnings)
        findings.errors += self._faults["images"]
        if self.kind == "segments":
            findings.errors += self._faults["annotations"]
        _report_unknown_categories(self._faults["categories"], known, findings)
        if self.kind != "segments":
            findings.errors += self._faults["annotations"]

    def report_boxes(self, labels: Collection[int], findings: Findings) -> None:
        """Every missing or malformed box of the categories ``labels`` is an error; for who reads nothing but boxes."""
        if not self._faults["boxless"]:
            return
        faulty = (self._objects["box_state"] != _GOOD_BOX) & np.isin(self._objects["category"], list(labels))
        rows = np.flatnonzero(faulty)
        places = np.searchsorted(self._images["objects"], rows, side="right")
        noun = "segment" if self.kind == "segments" else "annotation"
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            fault = self._faults["boxes"].get(str(row))
            if fault is None:
                parse_box(None, f"{self.file_names[place]}, {noun} {self._objects['id'][row]}", findings)
            else:
                findings.errors.append(fault)

    def count(self, categories: Collection[int]) -> Amounts:
        """Of the objects of these categories."""
        rows = self._objects[np.isin(self._objects["category"], list(categories))]
        single = rows[rows["crowd"] == 0]
        # Two bytes are an empty list.
        return Amounts(
            len(rows),
            len(rows) - len(single),
            int((single["length"] > 2).sum()),
            int((single["box_state"] == _GOOD_BOX).sum()),
        )

    def categories(self) -> list[tuple[int, str]]:
        """Dataset id and name as the file lists them; entries without both are left out, since a label map may say more."""
        entries = [item for item in self.listed if isinstance(item, dict)] if isinstance(self.listed, list) else []
        return [(item["id"], str(item["name"])) for item in entries if is_whole(item.get("id")) and "name" in item]

    def _rows(self, index: int) -> tuple[int, int]:
        ends = self._images["objects"]
        return int(ends[index - 1]) if index else 0, int(ends[index])

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
        segments: bool,
        catalog: ClassCatalog,
        known: Collection[int],
        mode: Mode,
        findings: Findings,
    ) -> None:
        """``segments``: panoptic annotations; ``known``: every category id of the dataset, any other is an error."""
        self.source = annotations
        self.image_folder = image_folder
        self._mode = mode
        self._labels = catalog.from_dataset_id
        self._attach(open_index(annotations, segments))
        self._index.report(known, findings)
        if mode == "detection":
            # Now rather than in the middle of an epoch, when an image is first read.
            self._index.report_boxes(self._labels, findings)

    def annotated_size(self, index: int) -> tuple[int, int] | None:
        return self._index.size(index)

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


def open_index(source: Path, segments: bool | None = None) -> CocoIndex:
    """The index of a COCO file, made first where there is none, an incomplete one or one of another format.

    ``segments``: the annotations must (panoptic) or must not (instance) have ``segments_info``; None for who reads ``listed`` alone.
    Raises UserError where the file is of the other kind, or no COCO file.
    """
    digest = file_digest(source)
    if digest in (MISSING, UNREADABLE):
        read_json(source)
    folder = Path(os.environ.get(FOLDER) or "data/.index")
    path = folder / f"{digest}.columns"
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
        raise _no_coco(source, found.lacks)
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


def _no_coco(source: Path, key: str | None) -> UserError:
    return UserError(
        f"{source}: has no list `{key}`; expected a COCO file (is dataset.type right? JSONL of image and mask is mask_pairs)"
    )


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
    with (
        atomic_path(path) as temporary,
        temporary.open("wb") as stream,
        tempfile.TemporaryFile(dir=path.parent) as rows,
    ):
        size = source.stat().st_size
        with Progress(disable=size < _SHOW_PROGRESS) as bar:
            task = bar.add_task(f"index {source.name}", total=size)
            builder = _Builder(stream, rows)
            read = hashlib.sha256()

            def passed(piece: bytes) -> None:
                read.update(piece)
                bar.advance(task, len(piece))

            early = _take(source, builder, passed)
            if read.hexdigest() != digest:
                raise UserError(f"{source}: has changed while it was read; run again")
            if early:
                builder.join()
                bar.reset(task)
                for key, number, value in members(source, _LISTS, lambda piece: bar.advance(task, len(piece))):
                    if key == "annotations" and number:
                        builder.annotation(number, value)
        builder.finish()


def _take(source: Path, builder: _Builder, passed: Any) -> bool:
    """All of a file but annotations before the images, by which they are told; True where there are such."""
    seen: set[str] = set()
    early, empty = False, True
    for key, number, value in members(source, _LISTS, passed):
        empty = False
        if not number and key in seen:
            raise UserError(f"{source}: has two lists `{key}`; expected one")
        if number == 0 or key == "categories":
            seen.add(key)
        if key == "categories":
            builder.listed = _whole_ids(value)
        elif key == "annotations" and number == 0:
            early = "images" not in seen
            if not early:
                builder.join()
        elif key == "images" and number:
            builder.image(number, value)
        elif key == "annotations" and number and not early:
            builder.annotation(number, value)
    builder.lacks = next((key for key in _LISTS if key not in seen), None)
    if empty:
        raise _no_coco(source, builder.lacks)
    if builder.lacks == "annotations":
        builder.join()
    return early


class _Builder:
    """Takes all images, then all annotations. Grows by about 40 bytes an object and 400 an image; all else goes to disk."""

    def __init__(self, stream: BinaryIO, rows: BinaryIO) -> None:
        """``rows``: a temporary file for the objects as they come, before they are put in the order of the images."""
        self.listed: Any = None
        self.lacks: str | None = None
        self._writer = Writer(stream)
        self._rows = rows
        self._buffer: list[bytes] = []
        self._images: list[tuple[int, str, int, int]] = []
        self._names: list[str] = []
        self._places: dict[int, int] = {}
        self._found = Findings()
        """Faults of images."""
        self._odd: dict[str, tuple[int, str]] = {}
        """Field of annotations -> how many have it wrong, and what is wrong with the first."""
        self._warnings: Counter[str] = Counter()
        self._faults: list[tuple[int, int, str]] = []
        """Faults of annotations: place of the image, order within it, message."""
        self._boxes: list[tuple[int, str]] = []
        """Number of the row, and what is wrong with its box."""
        self._place_of_row = array("q")
        self._segment_bytes = 0
        self._kind: str | None = None
        self._has_masks = False
        self._boxless = 0
        self._categories: Counter[tuple[str, Any]] = Counter()
        self._strays = 0
        self._stray_ids: dict[str, None] = {}
        self._masks: dict[int, str] = {}
        self._annotated: Counter[int] = Counter()
        self._faulty_ids: list[Any] = []
        self._encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode

    def image(self, number: int, value: Any) -> None:
        parsed = _image(value, number, self._found)
        if parsed is not None:
            self._images.append(parsed)
            if value.get("not_exhaustive_category_ids"):
                self._warnings[FEDERATED] += 1

    def join(self) -> None:
        """All images are there: annotations can be told by them."""
        report_repeated((image[0] for image in self._images), "image id", self._found)
        report_repeated((image[1] for image in self._images), "image file name", self._found)
        self._images.sort(key=lambda image: image[0])
        self._names = [image[1] for image in self._images]
        # Of images with one id the last; the file is refused anyway.
        self._places = {image[0]: place for place, image in enumerate(self._images)}

    def annotation(self, number: int, value: Any) -> None:
        if not isinstance(value, dict):
            self._found.errors.append(f"annotations, entry {number}: is {type(value).__name__}, expected an object")
            return
        if self._kind is None:
            self._kind = "segments" if "segments_info" in value else "annotations"
        owner = whole(value.get("image_id"))
        place = self._places.get(owner) if type(owner) is int else None
        if place is None:
            self._strays += 1
            if len(self._stray_ids) < 6:
                self._stray_ids[brief(owner)] = None
        elif self._kind == "segments":
            self._panoptic(place, value)
        else:
            self._instance(place, value)

    def _instance(self, place: int, item: dict[str, Any]) -> None:
        identity = whole(item.get("id"))
        if not is_whole(identity) or not 0 <= identity < _LIMIT:
            self._faulty_ids.append(identity)
            identity = -1
        segmentation = item.get("segmentation")
        text = b"" if segmentation is None else self._encode(segmentation).encode()
        self._has_masks = self._has_masks or bool(segmentation)
        where = f"{self._names[place]}, annotation {item.get('id')}"
        self._row(place, identity, item, where, text)

    def _panoptic(self, place: int, value: dict[str, Any]) -> None:
        name = self._names[place]
        self._annotated[place] += 1
        if self._annotated[place] > 1:
            return
        found = Findings()
        mask = relative_name(value.get("file_name"), found, f"{name}: file_name of its annotation")
        if mask is not None:
            self._masks[place] = mask
        infos = value.get("segments_info")
        if not isinstance(infos, list):
            found.errors.append(f"{name}: segments_info is {type(infos).__name__}, expected a list")
            infos = []
        seen: set[int] = set()
        for item in infos:
            identity = whole(item.get("id")) if isinstance(item, dict) else None
            if not is_whole(identity) or not 1 <= identity < _LIMIT:
                found.errors.append(
                    f"{name}: a segment has id {brief(identity)}, expected a whole number above 0 (0 is void)"
                )
            elif identity in seen:
                found.errors.append(f"{name}: segment id {identity} occurs more than once")
            else:
                seen.add(identity)
                where = f"{name}, segment {identity}"
                self._row(place, identity, item, where, b"")
        self._faults += [(place, order, message) for order, message in enumerate(found.errors, 1)]

    def _row(self, place: int, identity: int, item: dict[str, Any], where: str, text: bytes) -> None:
        category = whole(item.get("category_id"))
        if type(category) is int:
            self._categories["int", category] += 1
        else:
            hashable = category if category is None or isinstance(category, float | str) else repr(category)
            self._categories[type(category).__name__, hashable] += 1
        crowd, area = item.get("iscrowd"), item.get("area")
        if crowd is not None and crowd not in (0, 1):
            self._report_odd("iscrowd", crowd, "0 or 1 (or none, which is 0)", where)
        if area is None:
            area = math.nan
        elif not is_number(area) or area < 0:
            self._report_odd("area", area, "a finite number above 0 (or none, and it is measured)", where)
            area = math.nan
        elif not area:
            self._warnings["annotation whose area is 0, taken as not given: it is measured"] += 1
            area = math.nan
        value = item.get("bbox")
        box, state = [0.0, 0.0, 0.0, 0.0], _NO_BOX
        if value is not None:
            found = Findings()
            parsed = parse_box(value, where, found)
            if parsed is None:
                state = _FAULTY_BOX
                self._boxes.append((len(self._place_of_row), found.errors[0]))
            else:
                box, state = parsed, _GOOD_BOX
        self._boxless += state != _GOOD_BOX
        known = category if type(category) is int and 0 <= category < _LIMIT else -1
        self._buffer.append(
            _PACKED.pack(identity, known, *box, area, self._segment_bytes, len(text), bool(crowd), state)
        )
        self._place_of_row.append(place)
        if len(self._buffer) == _CHUNK:
            self._flush()
        if text:
            self._writer.write(text)
            self._segment_bytes += len(text)

    def _report_odd(self, key: str, value: Any, expected: str, where: str) -> None:
        count, first = self._odd.get(key, (0, f"{where}: {key} is {brief(value)}, expected {expected}"))
        self._odd[key] = count + 1, first

    def _flush(self) -> None:
        self._rows.write(b"".join(self._buffer))
        self._buffer.clear()

    def finish(self) -> None:
        self._flush()
        self._rows.flush()
        writer = self._writer
        writer.end("segmentations")
        # A map may not be empty.
        filled = bool(self._place_of_row)
        places = np.frombuffer(self._place_of_row, np.int64) if filled else np.zeros(0, np.int64)
        rows: npt.NDArray[Any] = np.memmap(self._rows, _OBJECT, "r") if filled else np.zeros(0, _OBJECT)
        if self._kind == "annotations":
            self._check_ids(rows["id"])
        order = np.argsort(places, kind="stable")
        for start in range(0, len(order), _CHUNK):
            writer.write(rows[order[start : start + _CHUNK]])
        writer.end("objects")
        images = np.zeros(len(self._images), _IMAGE)
        for key, column in (("id", 0), ("height", 2), ("width", 3)):
            images[key] = [image[column] for image in self._images]
        images["objects"] = np.cumsum(np.bincount(places, minlength=len(images)))
        writer.write(images)
        writer.end("images")
        for key, texts in (
            ("name", Texts.of(self._names)),
            ("mask", Texts.of(self._masks.get(place, "") for place in range(len(images)))),
        ):
            writer.add(f"{key}s", texts.buffer)
            writer.add(f"{key}_ends", texts.ends)
        writer.finish(
            {
                "format": FORMAT,
                "kind": self._kind,
                "lacks": self.lacks,
                "categories": self.listed,
                "has_masks": self._has_masks or not len(places),
                "faults": self._all_faults(order),
                "warnings": self._warnings,
            }
        )

    def _all_faults(self, order: npt.NDArray[np.int64]) -> dict[str, Any]:
        if self._strays:
            shown = ", ".join(list(self._stray_ids)[:5]) + (", ..." if len(self._stray_ids) > 5 else "")
            self._found.errors.append(
                f"{self._strays} annotation(s) belong to images that are not listed (image_id {shown})"
            )
        self._found.errors += [
            first if count == 1 else f"{first}; so in {count} records, this being the first"
            for count, first in self._odd.values()
        ]
        self._faults += [
            (place, 0, f"{self._names[place]}: has {count} panoptic annotations, expected one")
            for place, count in self._annotated.items()
            if count > 1
        ]
        new_row = np.empty(len(order) if self._boxes else 0, np.int64)
        new_row[order[: len(new_row)]] = np.arange(len(new_row))
        return {
            "images": self._found.errors,
            "annotations": [message for _, _, message in sorted(self._faults)],
            "categories": [[value, count] for (_, value), count in self._categories.items()],
            "boxes": {str(new_row[row]): message for row, message in self._boxes},
            "boxless": self._boxless,
        }

    def _check_ids(self, ids: npt.NDArray[np.int64]) -> None:
        """Repeated ones in the order of the file, then those that are no ids."""
        values, first, counts = np.unique(ids, return_index=True, return_counts=True)
        repeated = np.flatnonzero((counts > 1) & (values >= 0))
        for place in repeated[np.argsort(first[repeated])].tolist():
            message = f"annotation id {values[place]} occurs {counts[place]} times, expected once"
            self._faults.append((0, len(self._faults), message))
        if self._faulty_ids:
            message = (
                f"{len(self._faulty_ids)} annotation(s) have an id that is not a whole number of 0 or more (the first: "
                f"{brief(self._faulty_ids[0])})"
            )
            self._faults.append((0, len(self._faults), message))


def _report_unknown_categories(found: Iterable[tuple[Any, int]], known: Collection[int], findings: Findings) -> None:
    """``found``: category id, and how many records have it. Ids outside the classes are one error each, with the count."""
    for category, count in sorted(found, key=lambda item: str(item[0])):
        if not is_whole(category) or category < 0:
            findings.errors.append(
                f"category_id {brief(category)} in {count} record(s), expected a whole number of 0 or more"
            )
        elif category not in known:
            findings.errors.append(
                f"category_id {category} in {count} record(s) is not among the {len(known)} classes "
                "(label map, or the categories of the train annotations); add the class or correct the annotations"
            )


def is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def whole(value: Any) -> Any:
    """1.0, as pandas writes whole numbers of a column with gaps, is 1; all else stays as it is."""
    if type(value) is float and value.is_integer() and abs(value) < _EXACT:
        return int(value)
    return value


def _whole_ids(listed: Any) -> Any:
    if not isinstance(listed, list):
        return listed
    return [{**item, "id": whole(item["id"])} if isinstance(item, dict) and "id" in item else item for item in listed]


def _image(image: Any, number: int, findings: Findings) -> tuple[int, str, int, int] | None:
    """Id, file name (normalised), height and width, both 0 where one is absent."""
    where = f"images, entry {number}"
    if not isinstance(image, dict):
        findings.errors.append(f"{where}: is {type(image).__name__}, expected an object")
        return None
    identity = whole(image.get("id"))
    if not is_whole(identity) or not 0 <= identity < _LIMIT:
        findings.errors.append(f"{where}: id is {brief(identity)}, expected a whole number of 0 or more")
        return None
    name = relative_name(_file_name(image), findings, f"{where}: file_name")
    if name is None:
        return None
    sides = []
    for key in ("height", "width"):
        value = whole(image.get(key))
        if value is not None and (not is_whole(value) or not 0 < value < _LIMIT):
            findings.errors.append(f"{where} ({name}): {key} is {brief(value)}, expected pixels above 0")
            return None
        sides.append(value or 0)
    height, width = sides if 0 not in sides else (0, 0)
    return identity, name, height, width


def _file_name(image: dict[str, Any]) -> Any:
    """LVIS gives the address of an image in place of its name: folder and name are the last two parts of it."""
    name, address = image.get("file_name"), image.get("coco_url")
    if name is None and isinstance(address, str) and "/" in address:
        return "/".join(address.split("/")[-2:])
    return name
