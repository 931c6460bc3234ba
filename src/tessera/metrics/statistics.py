"""What each image contributes to the metrics, as one compressed JSON file: every metric of any resample of the images follows from it.

``{"format", "mode", "classes", "things", "counted", "image_ids", "limits", "parts": {name: {column: [...]}}}``. A part is a table by columns;
``image`` is an index into ``image_ids``, which ascend, and ``label`` one into ``classes``. ``counted`` are the labels that take part in means.
The parts, as far as the mode has them:

- ``semantic``: ``image``, ``label``, and the pixels ``hits``, ``truth``, ``predicted`` of the class
- ``panoptic``: ``image``, ``label``, ``iou`` (summed over matches), ``tp``, ``fp``, ``fn``
- ``segm``, ``bbox``: the predictions of an image and class that count, best first: ``image``, ``label``, ``score``, and for each range of
  sizes ``matched_<range>`` and ``ignored_<range>``, whose bit t speaks of COCO's t-th IoU threshold (0.50, 0.55, ..., 0.95)
- ``segm_truth``, ``bbox_truth``: ``image``, ``label``, and for each range of sizes how many objects there are to be found

Tables and ``verify`` read this file, so this module needs no torch.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tessera.files import UserError, canonical_json, missing, open_input, workflow_command, write_bytes
from tessera.spec.schema import EvaluateSpec

FORMAT = 2

SIZES = ("all", "small", "medium", "large")
"""COCO's ranges of object size, in its order."""

THRESHOLDS = 10
"""IoU 0.50:0.95."""

KINDS = {"segm": "", "bbox": "box_"}
"""Of average precision: the part, as COCO calls it, and what the metrics' names begin with."""


@dataclass(frozen=True)
class Average:
    """One of COCO's numbers: an average precision or recall."""

    recall: bool = False
    """Average recall instead of precision."""
    thresholds: tuple[int, ...] = tuple(range(THRESHOLDS))
    size: str = "all"
    most: int = 100
    """Predictions of an image and class that count."""


@dataclass(frozen=True)
class Limits:
    """What COCO's average precision is limited to; the defaults are COCO's."""

    detections: tuple[int, ...] = (1, 10, 100)
    """Predictions of an image and class that count: recall is averaged for each number, all else is of the last. They ascend."""
    borders: tuple[float, float] = (32.0, 96.0)
    """Sides of the squares in pixels: objects of less area than the first are small, of more than the second large, on a border both."""

    @classmethod
    def of(cls, settings: EvaluateSpec) -> Limits:
        return cls(tuple(settings.max_detections), settings.size_borders)

    @property
    def marks(self) -> tuple[str, str]:
        """What a name carries that depends on the number of detections, and what on the borders: nothing where they are COCO's."""
        last = self.detections[-1]
        small, large = self.borders
        return "" if last == 100 else f"@{last}", "" if self.borders == (32, 96) else f"@{small:g}-{large:g}"

    def averages(self) -> dict[str, Average]:
        """By name, in COCO's order: with its limits ``AP`` to ``ARl``; ``AP@300``, ``APs@16-64``, ``APs@300@16-64`` with others."""
        most, sizes = self.marks
        last = self.detections[-1]
        by_size = dict(zip("sml", SIZES[1:], strict=True))
        return {
            f"AP{most}": Average(most=last),
            f"AP50{most}": Average(thresholds=(0,), most=last),
            f"AP75{most}": Average(thresholds=(5,), most=last),
            **{f"AP{letter}{most}{sizes}": Average(size=size, most=last) for letter, size in by_size.items()},
            **{f"AR{number}": Average(recall=True, most=number) for number in self.detections},
            **{
                f"AR{letter}{most}{sizes}": Average(recall=True, size=size, most=last)
                for letter, size in by_size.items()
            },
        }


def base_name(metric: str) -> str:
    """Without the limits that it carries where they are not COCO's."""
    return metric.partition("@")[0]


COLUMNS: dict[str, tuple[str, ...]] = {
    "semantic": ("image", "label", "hits", "truth", "predicted"),
    "panoptic": ("image", "label", "iou", "tp", "fp", "fn"),
} | {
    name: columns
    for kind in KINDS
    for name, columns in (
        (kind, ("image", "label", "score", *(f"{flag}_{size}" for size in SIZES for flag in ("matched", "ignored")))),
        (f"{kind}_truth", ("image", "label", *SIZES)),
    )
}

FRACTIONAL = ("score", "iou")
"""Columns of float64; the others are int64."""

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Statistics:
    mode: str
    classes: list[str]
    things: list[int]
    """Labels of the countable classes."""
    counted: list[int]
    image_ids: list[int]
    parts: dict[str, Columns]
    limits: Limits = Limits()

    def __len__(self) -> int:
        return len(self.image_ids)


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Byte-identical for equal statistics."""
    parts = {name: {key: values.tolist() for key, values in part.items()} for name, part in statistics.parts.items()}
    write_compressed(path, {"format": FORMAT, **asdict(statistics), "parts": parts})


def write_compressed(path: Path, document: Mapping[str, Any]) -> None:
    """JSON, byte-identical for equal content: sorted keys, and no time in the gzip header."""
    write_bytes(path, gzip.compress(canonical_json(document).encode(), compresslevel=6, mtime=0))


def read_statistics(path: Path, data_root: str = "data") -> Statistics:
    """Raises UserError when the file is missing, cut off or something else; ``data_root`` is told to make it again with."""
    try:
        with open_input(path) as stream:
            return _taken_apart(json.loads(gzip.decompress(stream.read())))
    except FileNotFoundError:
        command = workflow_command(path, data_root=data_root)
        raise UserError(f"{missing(path)}; evaluate writes it: `{command}`") from None
    except (
        OSError,
        EOFError,
        zlib.error,
        ArithmeticError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise UserError(
            f"{path}: cannot be read as statistics of this version ({reason}); "
            f"evaluate again: `{workflow_command(path, again=True, data_root=data_root)}`"
        ) from None


def _taken_apart(document: Any) -> Statistics:
    """Raises what a foreign document brings with it."""
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    for key, type_ in (("classes", str), ("things", int), ("counted", int), ("image_ids", int)):
        if not isinstance(document[key], list) or not all(type(value) is type_ for value in document[key]):
            raise ValueError(f"{key} is no list of {type_.__name__}")
    images, classes = len(document["image_ids"]), len(document["classes"])
    if not set(document["things"] + document["counted"]) <= set(range(classes)):
        raise ValueError("things or counted speak of classes that are not listed")
    parts = {name: _columns(name, part, images, classes) for name, part in dict(document["parts"]).items()}
    for kind in KINDS:
        if (kind in parts) != (f"{kind}_truth" in parts):
            raise ValueError(f"only one of {kind} and {kind}_truth is there")
    limits = Limits(*(tuple(document["limits"][key]) for key in ("detections", "borders")))
    if not all(isinstance(value, int | float) for value in (*limits.detections, *limits.borders)):
        raise ValueError("limits are no numbers")
    return Statistics(**{**document, "parts": parts, "limits": limits})


def _columns(name: str, part: Mapping[str, Sequence[float]], images: int, classes: int) -> Columns:
    if tuple(sorted(part)) != tuple(sorted(COLUMNS[name])):
        raise ValueError(f"{name} has the columns {', '.join(sorted(part))}, expected {', '.join(COLUMNS[name])}")
    found = {key: np.array(part[key], np.float64 if key in FRACTIONAL else np.int64) for key in COLUMNS[name]}
    if len({values.shape for values in found.values()}) != 1 or found["image"].ndim != 1:
        raise ValueError(f"the columns of {name} are not equally long")
    for key, listed, count in (("image", "images", images), ("label", "classes", classes)):
        if found[key].size and not 0 <= found[key].min() <= found[key].max() < count:
            raise ValueError(f"{name} speaks of {listed} that are not listed")
    return found


def as_columns(name: str, rows: Sequence[Sequence[float]]) -> Columns:
    """From one tuple per line, in the order of ``COLUMNS``."""
    values = list(zip(*rows, strict=True)) or [()] * len(COLUMNS[name])
    return {
        key: np.array(column, np.float64 if key in FRACTIONAL else np.int64)
        for key, column in zip(COLUMNS[name], values, strict=True)
    }
