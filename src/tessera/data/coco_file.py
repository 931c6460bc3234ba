"""COCO files as tools write them: JSON to typed records, the records to columns, and what is wrong with a record, by file, record and key."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import struct
import sys
from array import array
from collections import Counter
from collections.abc import Collection, Iterable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Raw, Struct
from rich.progress import track

from tessera.data.columns import Texts
from tessera.data.reader import Findings, brief, relative_name, report_repeated
from tessera.files import UserError, open_input, reading_json

LISTS = ("images", "annotations")
IMAGE = np.dtype([(key, "<i8") for key in ("id", "height", "width", "objects", "name", "mask")])
"""Height and width are 0 where the file does not say; the others are where the image's objects, name and mask's name end."""
OBJECT = np.dtype(
    [
        ("id", "<i8"),
        ("category", "<i8"),
        ("box", "<f8", 4),
        ("area", "<f8"),
        ("start", "<i8"),
        ("length", "<u4"),
        ("crowd", "?"),
    ],
    align=True,
)
"""Category is -1 for what is no id, box and area NaN where none is given, or 0; the JSON of the segmentation is ``length`` bytes from ``start``."""
PACKED = struct.Struct("<qq5dqI?3x")
FEDERATED = "image in which not every object of a class is annotated (LVIS): what is found there and not annotated counts as a mistake"
_EXACT = 2**53
"""Below it a floating-point number is that whole number alone."""
_NOTHING = (b"null", b"[]")
_PIECE = 1 << 24
_SHOW_PROGRESS = 1 << 17
"""Annotations of a file from which on building its index shows progress."""

Whole = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Pixels = Annotated[int, Meta(gt=0, le=2**63 - 1)]
Number = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
Size = Annotated[float, Meta(ge=0, le=sys.float_info.max)]


class Image(Struct, gc=False):
    id: Whole
    file_name: Any = None
    coco_url: Any = None
    height: Pixels | None = None
    width: Pixels | None = None
    not_exhaustive_category_ids: Any = None


class Segment(Struct, gc=False, kw_only=True):
    id: Annotated[int, Meta(gt=0, le=2**63 - 1)]
    category_id: Whole
    bbox: tuple[Number, Number, Size, Size] | None = None
    area: Size | None = None
    iscrowd: Literal[0, 1] | bool | None = None


class Annotation(Segment, gc=False, kw_only=True):
    id: Whole
    image_id: Whole
    segmentation: Raw = Raw(b"")


class Panoptic(Struct, gc=False):
    image_id: Whole
    segments_info: list[Any]
    file_name: Any = None


_WHOLE = "a whole number of 0 or more"
_EXPECTED = {
    "id": _WHOLE,
    "category_id": _WHOLE,
    "bbox": "[x, y, width, height], four finite numbers, of which width and height are 0 or more (not two corners)",
    "area": "a finite number above 0 (or none, and it is measured)",
    "iscrowd": "0 or 1 (or none, which is 0)",
    "height": "pixels above 0",
    "width": "pixels above 0",
    "segments_info": "a list",
    "segment": "a whole number above 0 (0 is void)",
}
_DECODE = {kind: msgspec.json.Decoder(kind).decode for kind in (Image, Annotation, Panoptic, Segment)}
_FIELDS = {kind: msgspec.structs.fields(kind) for kind in _DECODE}
_NO_FAULTS: dict[str, Any] = {}


def read_coco(source: Path, digest: str) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """The columns and the facts of an index. Raises UserError where the file is no JSON, has a list twice, or not this sha256."""
    with reading_json(source):
        members = _members(source, digest)
        lacks = next((key for key in LISTS if not isinstance(members.get(key), list)), None)
        images, annotations = (members.pop(key) if isinstance(members.get(key), list) else [] for key in LISTS)
        found = Findings()
        listed = _images(images, found)
        first = next((value for value in map(_plain, annotations) if isinstance(value, dict)), None)
        kind = None if first is None else "segments" if "segments_info" in first else "annotations"
        objects = _Objects([name for _, name, _, _ in listed], {image[0]: place for place, image in enumerate(listed)})
        objects.take_all(annotations, Panoptic if kind == "segments" else Annotation, f"index {source.name}")
    del images, annotations  # and with them the content of the file
    columns = objects.columns(listed)
    used, counts = np.unique(columns["objects"]["category"], return_counts=True)
    return columns, {
        "kind": kind,
        "lacks": lacks,
        "categories": _whole_ids(members.get("categories")),
        "errors": found.errors + objects.errors(repeated_ids=kind == "annotations"),
        "warnings": found.warnings + objects.warnings,
        "used": [pair for pair in zip(used.tolist(), counts.tolist(), strict=True) if pair[0] >= 0],
        "boxes": objects.box_faults(),
        "boxless": bool(np.isnan(columns["objects"]["box"][:, 0]).any()),
    }


class _Key:
    """Unlike a text it is equal to no other, so that a key that comes twice is seen."""

    def __init__(self, text: str) -> None:
        self.text = text


def _members(source: Path, digest: str) -> dict[str, Any]:
    """What the object in the file holds; the records of ``LISTS`` undecoded where that can be. Nothing if there is no object."""
    with open_input(source) as stream:
        content = stream.read()
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f"{source}: has changed while it was read; run again")
    encoding = json.detect_encoding(content[:4])
    if encoding != "utf-8":
        content = content.decode(encoding).encode()
    _require_utf8(content)

    def once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        pairs = list(pairs)
        found = dict(pairs)
        if len(found) < len(pairs):
            for key in (*LISTS, "categories"):
                if sum(key == other for other, _ in pairs) > 1:
                    raise UserError(f"{source}: has two lists `{key}`; expected one")
        return found

    try:
        raw = msgspec.json.decode(content, type=dict[_Key, Raw], dec_hook=lambda _, text: _Key(text))
        found = once((key.text, value) for key, value in raw.items())
        wanted = {key: msgspec.json.decode(found[key], type=list[Raw]) for key in LISTS if key in found}
        return wanted | {"categories": _plain(found.get("categories"))}
    except (msgspec.MsgspecError, RecursionError) as error:
        # Python's own parser says line and column, and knows NaN and halves of surrogate pairs, which the records that have them are told of.
        text = content.decode()
        if "truncated" in str(error) and not text.rstrip().endswith("}"):  # not worth the gigabytes that it may take
            raise json.JSONDecodeError("ends too early", text, len(text)) from None
        value = json.loads(text, object_pairs_hook=once)
        return value if isinstance(value, dict) else {}


def _require_utf8(content: bytes) -> None:
    """Also where nothing is read from. In pieces: as text, a file with one character of another script takes four times its size."""
    if not content.isascii():
        pieces = (content[start : start + _PIECE] for start in range(0, len(content), _PIECE))
        try:
            for _ in codecs.iterdecode(pieces, "utf-8"):
                pass
        except UnicodeDecodeError:
            content.decode()  # says the place in the file


def _plain(value: Any) -> Any:
    return json.loads(bytes(value)) if isinstance(value, Raw) else value


def typed(item: Any, kind: type[Any]) -> tuple[Any, dict[str, Any]]:
    """The record, -1 or None in place of what is wrong, and that by key; no record where there is no object."""
    if isinstance(item, Raw):
        try:
            return _DECODE[kind](item), _NO_FAULTS
        except msgspec.MsgspecError:
            item = _plain(item)
    if not isinstance(item, dict):
        return None, _NO_FAULTS
    fields, faults = {}, {}
    for field in _FIELDS[kind]:
        value = fields[field.name] = whole(item.get(field.name))
        if field.type is Raw:
            fields[field.name] = Raw(b"" if value is None else json.dumps(value).encode())
        elif field.type is not Any:
            try:
                fields[field.name] = msgspec.convert(value, field.type)
            except (msgspec.ValidationError, UnicodeEncodeError):
                faults[field.name] = value
                fields[field.name] = -1 if field.name.endswith("id") else None
    return kind(**fields), faults


def _images(records: Collection[Any], found: Findings) -> list[tuple[int, str, int, int]]:
    """Id, file name (normalised), height and width, both 0 where one is absent; by id."""
    images = []
    for number, item in enumerate(records, 1):
        where = f"images, entry {number}"
        image, faults = typed(item, Image)
        if image is None:
            found.errors.append(f"{where}: is {brief(_plain(item))}, expected an object")
            continue
        name = image.file_name
        if name is None and isinstance(image.coco_url, str) and "/" in image.coco_url:
            # LVIS gives the address of an image in place of its name: folder and name are the last two parts of it.
            name = "/".join(image.coco_url.split("/")[-2:])
        name = relative_name(name, found, f"{where}: file_name")
        where = where if name is None else f"{where} ({name})"
        found.errors += [fault(where, key, value) for key, value in faults.items()]
        if name is not None and not faults:
            size = (image.height, image.width) if image.height and image.width else (0, 0)
            images.append((image.id, name, *size))
            found.warnings[FEDERATED] += bool(image.not_exhaustive_category_ids)
    report_repeated((image[0] for image in images), "image id", found)
    report_repeated((image[1] for image in images), "image file name", found)
    return sorted(images)


class _Objects:
    """Annotations in the order of the file; 80 bytes each, and the segmentation."""

    def __init__(self, names: list[str], places: dict[int, int]) -> None:
        """``names`` of the images in order, and at which place there an id is."""
        self.warnings: Counter[str] = Counter()
        self._names = names
        self._places = places
        self._masks: dict[int, str] = {}
        self._place_of_row = array("q")
        self._rows = bytearray()
        self._segmentations = bytearray()
        self._found = Findings()
        self._faults: dict[str, tuple[int, str]] = {}
        """Key -> how many records have it wrong, and what is wrong with the first."""
        self._boxes: dict[int, str] = {}
        """Row -> what is wrong with its box: whether that matters depends on who reads it."""
        self._strays = 0
        self._stray_ids: dict[str, None] = {}
        self._annotated: Counter[int] = Counter()

    def take_all(self, records: list[Any], kind: type[Any], title: str) -> None:
        starts = range(0, len(records), _SHOW_PROGRESS)
        chunks = (records[start : start + _SHOW_PROGRESS] for start in track(starts, title, disable=len(starts) < 2))
        for number, item in enumerate(chain.from_iterable(chunks), 1):
            record, faults = typed(item, kind)
            if record is None:
                self._found.errors.append(f"annotations, entry {number}: is {brief(_plain(item))}, expected an object")
                continue
            place = self._places.get(record.image_id)
            if place is None:
                self._strays += 1
                if len(self._stray_ids) < 6:
                    self._stray_ids[brief(faults.get("image_id", record.image_id))] = None
            elif kind is Annotation:
                self._add(place, record, faults, "annotation", bytes(record.segmentation))
            else:
                self._annotated[place] += 1
                if self._annotated[place] == 1:
                    self._segments(place, record, faults)

    def _segments(self, place: int, record: Panoptic, faults: dict[str, Any]) -> None:
        name = self._names[place]
        mask = relative_name(record.file_name, self._found, f"{name}: file_name of its annotation")
        if mask is not None:
            self._masks[place] = mask
        self._found.errors += [fault(name, key, value) for key, value in faults.items()]
        seen: set[int] = set()
        for item in record.segments_info or ():
            segment, wrong = typed(item, Segment)
            if segment is None or "id" in wrong:
                shown = brief(wrong.get("id"))
                self._found.errors.append(f"{name}: a segment has id {shown}, expected {_EXPECTED['segment']}")
            elif segment.id in seen:
                self._found.errors.append(f"{name}: segment id {segment.id} occurs more than once")
            else:
                seen.add(segment.id)
                self._add(place, segment, wrong, "segment")

    def _add(self, place: int, item: Segment, faults: dict[str, Any], noun: str, text: bytes = b"") -> None:
        where = f"{self._names[place]}, {noun} {brief(faults.get('id', item.id))}" if faults else ""
        for key, value in faults.items():
            message = fault(where, key, value)
            if key == "bbox":
                self._boxes[len(self._place_of_row)] = message
            else:
                count, first = self._faults.get(key, (0, message))
                self._faults[key] = count + 1, first
        if item.area == 0:
            self.warnings["annotation whose area is 0, taken as not given: it is measured"] += 1
        if 0 < len(text) < 16 and b"".join(text.split()) in _NOTHING:
            text = b""
        box = item.bbox or (math.nan,) * 4
        start = len(self._segmentations)
        self._rows += PACKED.pack(
            item.id, item.category_id, *box, item.area or math.nan, start, len(text), bool(item.iscrowd)
        )
        self._segmentations += text
        self._place_of_row.append(place)

    def columns(self, images: list[tuple[int, str, int, int]]) -> dict[str, npt.NDArray[Any]]:
        """``images`` as ``_images`` gives them; their objects in the order of the file."""
        places = np.frombuffer(self._place_of_row, np.int64)
        self._order = np.argsort(places, kind="stable")
        self._ids = np.frombuffer(self._rows, OBJECT)["id"].copy()
        table = np.zeros(len(images), IMAGE)
        for key, column in (("id", 0), ("height", 2), ("width", 3)):
            table[key] = [image[column] for image in images]
        names = Texts.of(self._names)
        masks = Texts.of(self._masks.get(place, "") for place in range(len(images)))
        table["name"], table["mask"] = names.ends, masks.ends
        table["objects"] = np.cumsum(np.bincount(places, minlength=len(images)))
        return {
            "images": table,
            "objects": np.frombuffer(self._rows, OBJECT)[self._order],
            "segmentations": np.frombuffer(self._segmentations, np.uint8),
            "names": names.buffer,
            "masks": masks.buffer,
        }

    def box_faults(self) -> dict[str, str]:
        """By row of the column ``objects``."""
        if not self._boxes:
            return {}
        rows = np.argsort(self._order)
        return {str(rows[row]): message for row, message in self._boxes.items()}

    def errors(self, repeated_ids: bool) -> list[str]:
        errors = []
        if self._strays:
            shown = ", ".join(list(self._stray_ids)[:5]) + (", ..." if len(self._stray_ids) > 5 else "")
            errors.append(f"{self._strays} annotation(s) belong to images that are not listed (image_id {shown})")
        errors += [
            first if count == 1 else f"{first}; so in {count} records, this being the first"
            for count, first in self._faults.values()
        ]
        errors += self._found.errors
        errors += [
            f"{self._names[place]}: has {count} panoptic annotations, expected one"
            for place, count in self._annotated.items()
            if count > 1
        ]
        if repeated_ids:
            values, counts = np.unique(self._ids, return_counts=True)
            repeated = (counts > 1) & (values >= 0)
            errors += [
                f"annotation id {value} occurs {count} times, expected once"
                for value, count in zip(values[repeated], counts[repeated], strict=True)
            ]
        return errors


def fault(where: str, key: str, value: Any) -> str:
    return f"{where}: {key} is {brief(value)}, expected {_EXPECTED[key]}"


def is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def whole(value: Any) -> Any:
    """1.0, as pandas writes whole numbers of a column with gaps, is 1; all else stays as it is."""
    return int(value) if type(value) is float and value.is_integer() and abs(value) < _EXACT else value


def _whole_ids(listed: Any) -> Any:
    if not isinstance(listed, list):
        return listed
    return [{**item, "id": whole(item["id"])} if isinstance(item, dict) and "id" in item else item for item in listed]
