"""What every reader shares: the index of a split, kept small, and the way its records become samples."""

from __future__ import annotations

import contextlib
import re
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tessera.files import UserError, is_text, raise_all
from tessera.ops.image_size import read_image_size
from tessera.ops.images import read_image
from tessera.ops.masks import masks_to_boxes
from tessera.spec.schema import MAX_PIXELS
from tessera.structures import IGNORE, Sample, Target


@dataclass
class Findings:
    """What is wrong with annotations: errors stop a run, warnings count what training leaves out without harm."""

    errors: list[str] = field(default_factory=list)
    warnings: Counter[str] = field(default_factory=Counter)

    def raise_errors(self, title: str) -> None:
        """Raises one UserError with all errors, if any."""
        raise_all(title, self.errors)


class SegmentationDataset(Dataset[Sample], ABC):
    """One split of a dataset, indexed once; images and masks are read when asked for.

    ``file_names`` and ``image_ids`` are in the order of the indices: by image id (COCO), by line (mask pairs).
    """

    source: Path
    """The annotation file."""
    image_folder: Path
    file_names: Sequence[str]
    """Relative to the image folder, with forward slashes, unique."""
    image_ids: Sequence[int] | npt.NDArray[np.int64]
    categories: Sequence[tuple[int, str]] = ()
    """Dataset id and name, where the annotation file lists its classes; as listed, so that an id may come twice."""
    value_range: tuple[float, float] | None = None
    max_pixels: int = MAX_PIXELS
    has_masks: bool | None = True
    """False where there are annotations and none of them has a mask: they serve mode detection alone. None where there are none."""

    def __len__(self) -> int:
        return len(self.file_names)

    def __getitem__(self, index: int) -> Sample:
        return self.read(index)

    def image_path(self, index: int) -> Path:
        return self.image_folder / self.file_names[index]

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) as annotated, or from the image's header where the annotations do not say."""
        return self.annotated_size(index) or read_image_size(self.image_path(index), self.max_pixels)

    def image(self, index: int) -> Tensor:
        """(3, H, W) uint8 RGB."""
        return read_image(self.image_path(index), self.value_range, self.max_pixels)

    def read(self, index: int) -> Sample:
        """Raises UserError with every fault of the record; ``data.check`` finds all of them before a run."""
        # Taken before the files are read, it can only be older than what was read.
        stamp = self._stamp(index)
        image = self.image(index)
        findings = Findings()
        target = self.target(index, (image.shape[1], image.shape[2]), findings)
        findings.raise_errors(f"{self.source}, image {self.file_names[index]}")
        return Sample(image, target, int(self.image_ids[index]), self.file_names[index], stamp)

    def _stamp(self, index: int) -> int:
        found: list[int] = []
        for path in (self.image_path(index), self.mask_path(index)):
            if path is not None:
                with contextlib.suppress(OSError):  # said by who reads it
                    status = path.stat()
                    found += [status.st_size, status.st_mtime_ns]
        return hash(tuple(found))

    @abstractmethod
    def annotated_size(self, index: int) -> tuple[int, int] | None:
        """(height, width) that the annotations state."""

    @abstractmethod
    def target(self, index: int, size: tuple[int, int], findings: Findings) -> Target:
        """What is to be found in the image, whose real (height, width) is ``size``; faults are added to ``findings``."""

    def mask_path(self, index: int) -> Path | None:
        """The file that holds the masks of the image; None where the annotation file itself does."""
        return None

    def nothing_to_learn(self) -> str | None:
        """Why a training on these annotations would learn nothing, as far as that is known without opening masks; otherwise None."""
        return None

    def check_size(self, index: int, size: tuple[int, int], findings: Findings) -> None:
        """An image whose size differs from its annotation's is an error: its masks would be shifted."""
        stated = self.annotated_size(index)
        if stated is not None and stated != size:
            turned = " (the annotation fits the image before its EXIF rotation)" if stated == size[::-1] else ""
            findings.errors.append(
                f"{self.file_names[index]}: the image is {size[1]}x{size[0]} (width x height), annotated as "
                f"{stated[1]}x{stated[0]}{turned}; expected the size of the image as displayed"
            )


class View(SegmentationDataset):
    """Images of other readers, which may have other ids and names here."""

    @abstractmethod
    def place(self, index: int) -> tuple[SegmentationDataset, int]:
        """The reader of an image, and the image's index there."""

    def image_path(self, index: int) -> Path:
        reader, place = self.place(index)
        return reader.image_path(place)

    def mask_path(self, index: int) -> Path | None:
        reader, place = self.place(index)
        return reader.mask_path(place)

    def annotated_size(self, index: int) -> tuple[int, int] | None:
        reader, place = self.place(index)
        return reader.annotated_size(place)

    def read(self, index: int) -> Sample:
        reader, place = self.place(index)
        return replace(reader.read(place), image_id=int(self.image_ids[index]), file_name=self.file_names[index])

    def target(self, index: int, size: tuple[int, int], findings: Findings) -> Target:
        reader, place = self.place(index)
        return reader.target(place, size, findings)


def empty_target(size: tuple[int, int], semantic: bool, masks: bool = True) -> Target:
    """Nothing to be found; ``semantic``: with a map of ignored pixels; ``masks`` False: boxes alone were asked for."""
    return Target(
        labels=torch.zeros(0, dtype=torch.int64),
        masks=torch.zeros(0, *size, dtype=torch.bool) if masks else None,
        boxes=torch.zeros(0, 4),
        iscrowd=torch.zeros(0, dtype=torch.bool),
        areas=torch.zeros(0, dtype=torch.float64),
        semantic=torch.full(size, IGNORE, dtype=torch.uint8) if semantic else None,
        size=size,
    )


def report_box(box: list[float], size: tuple[int, int], findings: Findings) -> None:
    """Counts what is wrong with a well-formed box in an image of (height, width) ``size``."""
    x, y, width, height = box
    if width == 0 or height == 0:
        findings.warnings["box without area"] += 1
    elif x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0:
        findings.warnings["box outside its image"] += 1
    elif x < -1 or y < -1 or x + width > size[1] + 1 or y + height > size[0] + 1:
        findings.warnings["box that reaches out of the image"] += 1


def box_target(
    objects: list[dict[str, Any]], labels: dict[int, int], size: tuple[int, int], findings: Findings
) -> Target:
    """What metrics compare boxes with: every well-formed ``bbox`` as annotated, also where it has no area or leaves the image.

    ``objects`` have ``category_id``, ``bbox``, ``area`` (a number, or the box's own) and ``iscrowd``; ``labels`` leads from dataset
    to contiguous ids.
    """
    if not objects:
        return empty_target(size, semantic=False, masks=False)
    for item in objects:
        report_box(item["bbox"], size, findings)
    corners = torch.tensor([item["bbox"] for item in objects], dtype=torch.float64)
    corners[:, 2:] += corners[:, :2]
    areas = [item["area"] if is_number(item["area"]) else item["bbox"][2] * item["bbox"][3] for item in objects]
    return Target(
        labels=torch.tensor([labels[item["category_id"]] for item in objects]),
        masks=None,
        boxes=corners,
        iscrowd=torch.tensor([bool(item["iscrowd"]) for item in objects]),
        areas=torch.tensor(areas, dtype=torch.float64),
        size=size,
    )


def mask_target(
    objects: Sequence[dict[str, Any]],
    masks: Sequence[npt.NDArray[np.bool_]],
    labels: dict[int, int],
    semantic: npt.NDArray[np.uint8] | None = None,
) -> Target:
    """Objects, of which there are some, as in ``box_target``; ``bbox`` and ``area`` are those of the mask where they are None."""
    stacked = torch.from_numpy(np.stack(masks))
    boxes = masks_to_boxes(stacked).double()
    for place, item in enumerate(objects):
        if item["bbox"] is not None:
            x, y, width, height = item["bbox"]
            boxes[place] = torch.tensor([x, y, x + width, y + height], dtype=torch.float64)
    areas = [mask.sum() if item["area"] is None else item["area"] for item, mask in zip(objects, masks, strict=True)]
    return Target(
        labels=torch.tensor([labels[item["category_id"]] for item in objects]),
        masks=stacked,
        boxes=boxes,
        iscrowd=torch.tensor([item["iscrowd"] for item in objects]),
        areas=torch.tensor(areas, dtype=torch.float64),
        semantic=None if semantic is None else torch.from_numpy(semantic),
        size=(stacked.shape[1], stacked.shape[2]),
    )


def brief(value: Any) -> str:
    """As Python shows it, the beginning of it where that is long."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def is_number(value: Any) -> bool:
    """A finite one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def class_target(semantic: npt.NDArray[np.uint8]) -> Target:
    """The semantic target: one mask per class present in the (H, W) map of contiguous ids and IGNORE."""
    height, width = semantic.shape
    present, counts = np.unique(semantic, return_counts=True)
    kept = present != IGNORE
    if not kept.any():
        return empty_target((height, width), semantic=True)
    masks = torch.from_numpy(np.stack([semantic == label for label in present[kept]]))
    return Target(
        labels=torch.from_numpy(present[kept].astype(np.int64)),
        masks=masks,
        boxes=masks_to_boxes(masks),
        iscrowd=torch.zeros(len(masks), dtype=torch.bool),
        areas=torch.from_numpy(counts[kept].astype(np.float64)),
        semantic=torch.from_numpy(semantic),
        size=(height, width),
    )


def relative_name(value: Any, findings: Findings, where: str) -> str | None:
    """A file name that stays inside its folder, normalised, also where it has the backslashes of Windows; None, with an error, for any other."""
    if not isinstance(value, str) or not value.strip():
        findings.errors.append(f"{where} is {brief(value)}, expected a file name")
        return None
    path = PurePosixPath(value.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:|[a-z]+://", value):
        findings.errors.append(
            f"{where} is {brief(value)}, which is valid on one machine or leads out of its folder; expected a name relative to its folder "
            "without '..', so take off what stands before"
        )
        return None
    if not path.name:
        findings.errors.append(f"{where} is {brief(value)}, which names a folder, expected a file")
        return None
    if "\0" in value or not is_text(value):
        findings.errors.append(
            f"{where} is {brief(value)}, which is no text in UTF-8; expected a file name, so rename the file"
        )
        return None
    return path.as_posix()


def require_lossless(path: Path, image: Image.Image) -> None:
    """Raises UserError for a mask whose numbers were changed by compression, whatever the file is called."""
    if image.format in ("JPEG", "MPO"):
        raise UserError(
            f"{path}: is a JPEG, whose compression changes the numbers that a mask is made of; expected PNG, saved from the original mask"
        )


def report_repeated(values: Iterable[Any], what: str, findings: Findings) -> None:
    """Every value that occurs more than once is an error."""
    for value, count in Counter(values).items():
        if count > 1:
            findings.errors.append(f"{what} {value!r} occurs {count} times, expected once")
