"""Image and mask pairs: JSONL with the keys ``img`` and ``segm`` on each line, the mask holding a class id per pixel.

Names are relative to the split's ``images`` folder where it is set and holds the file of the first line, otherwise to the folder of
the JSONL; this is decided once for ``img`` and once for ``segm``, never line by line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tessera.data.columns import Texts
from tessera.data.reader import (
    Findings,
    SegmentationDataset,
    class_target,
    empty_target,
    relative_name,
    report_repeated,
    require_lossless,
)
from tessera.files import UserError, read_text, reading
from tessera.ops.image_size import open_image
from tessera.spec.schema import MAX_PIXELS
from tessera.structures import IGNORE, ClassCatalog, Target


class MaskPairs(SegmentationDataset):
    """Pixels of value ``ignore_id``, if any, and, unless a class has that id, 255 are ignored; any other unknown value is an error."""

    def __init__(
        self,
        annotations: Path,
        image_folder: Path | None,
        catalog: ClassCatalog,
        ignore_id: int | None,
        findings: Findings,
    ) -> None:
        self.source = annotations
        pairs = _pairs(annotations, findings)
        self.image_folder = _base([image for image, _ in pairs], image_folder, annotations.parent)
        self._mask_folder = _base([mask for _, mask in pairs], image_folder, annotations.parent)
        self.file_names = Texts.of(image for image, _ in pairs)
        self.image_ids = range(1, len(pairs) + 1)
        self._masks = Texts.of(mask for _, mask in pairs)
        always = () if 255 in catalog.from_dataset_id else (255,)
        self._ignored = sorted({*always, *(() if ignore_id is None else (ignore_id,))})
        self._table = np.full(65536, -1, np.int16)
        self._table[self._ignored] = IGNORE
        for category, label in catalog.from_dataset_id.items():
            if category < len(self._table):
                self._table[category] = label

    def annotated_size(self, index: int) -> tuple[int, int] | None:
        return None

    def mask_path(self, index: int) -> Path:
        return self._mask_folder / self._masks[index]

    def target(self, index: int, size: tuple[int, int], findings: Findings) -> Target:
        path = self.mask_path(index)
        ids = read_mask_ids(path, self.max_pixels)
        if ids.shape != size:
            findings.errors.append(
                f"{path}: the mask is {ids.shape[1]}x{ids.shape[0]} (width x height), its image {self.file_names[index]} is "
                f"{size[1]}x{size[0]} as displayed; expected equal sizes"
            )
            return empty_target(size, semantic=True)
        labels = self._table[ids]
        unknown = labels < 0
        if unknown.any():
            values, counts = np.unique(ids[unknown], return_counts=True)
            shown = ", ".join(
                f"{value} ({count} pixels)" for value, count in zip(values[:10], counts[:10], strict=True)
            )
            ignored = f"not ignored ({', '.join(map(str, self._ignored))})" if self._ignored else "none is ignored"
            findings.errors.append(
                f"{path}: holds value(s) {shown}{', ...' if len(values) > 10 else ''} that are no class of the label map and {ignored}; "
                "add the class or set dataset.ignore_id"
            )
            labels[unknown] = IGNORE
        return class_target(labels.astype(np.uint8))


def read_mask_ids(path: Path, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint16]:
    """(H, W) class ids of a mask: the index of a palette image, the value of an 8- or 16-bit one. Colours are refused, and JPEG."""
    with open_image(path, max_pixels) as image:
        require_lossless(path, image)
        if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
            raise UserError(
                f"{path}: has pixel format {image.mode}; expected one channel (8-bit, 16-bit or palette) that holds class ids"
            )
        values = np.array(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise UserError(f"{path}: has values {values.min()}..{values.max()}; expected class ids 0..65535")
    return values.astype(np.uint16)


def _pairs(path: Path, findings: Findings) -> list[tuple[str, str]]:
    with reading(path, "JSONL with `img` and `segm` on each line (split.annotations)"):
        # JSON may hold characters at which splitlines would cut.
        lines = read_text(path).split("\n")
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply, or too long a number"
            findings.errors.append(
                f'line {number}: is not JSON ({reason}); expected {{"img": "...", "segm": "..."}} (a COCO file needs type coco)'
            )
            if number == 1:
                break
            continue
        if not isinstance(value, dict) or "img" not in value or "segm" not in value:
            findings.errors.append(f"line {number}: expected an object with the keys `img` and `segm`")
            continue
        image = relative_name(value["img"], findings, f"line {number}: img")
        mask = relative_name(value["segm"], findings, f"line {number}: segm")
        if image is not None and mask is not None:
            pairs.append((image, mask))
    report_repeated((image for image, _ in pairs), "img", findings)
    return pairs


def _base(names: list[str], image_folder: Path | None, own_folder: Path) -> Path:
    if image_folder is not None and names and (image_folder / names[0]).exists():
        return image_folder
    return own_folder
