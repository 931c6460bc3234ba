"""The way back: COCO annotations to KITTI label files, without loss of class and box."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any

from tessera.data.catalog import compare_names, full_catalog, split_sources
from tessera.data.coco_index import open_index
from tessera.data.kitti import DIGITS, EXACT
from tessera.data.reader import Findings, relative_name
from tessera.files import UserError, atomic_folder, read_json
from tessera.ops.kitti import kitti_names, kitti_row
from tessera.spec.lineage import SPLITS, annotation_root
from tessera.spec.schema import DatasetSpec

CROWD = "DontCare"
"""KITTI's class of regions whose objects are not told apart."""


def export_kitti(dataset: DatasetSpec, data_root: str, out: Path) -> dict[str, tuple[int, int]]:
    """Writes ``<out>/<split>/<file name of the image>.txt`` for every image, empty where it has no box; split -> images and boxes.

    A box keeps its digits: corners are exact sums of the decimal numbers in the file. Crowd regions become ``DontCare``; masks are lost.
    Raises UserError where ``out`` exists, where two images would share a label file, and with all faults of the annotations at once.
    """
    if dataset.type != "coco":
        raise UserError(
            f"dataset {dataset.name}: its type is {dataset.type}; only boxes of type coco have KITTI labels"
        )
    if out.exists():
        raise UserError(f"{out}: exists already; name a folder that is to be made")
    catalog = full_catalog(dataset, data_root)
    names = dict(zip(catalog.from_dataset_id, kitti_names(catalog), strict=True))
    counts: dict[str, tuple[int, int]] = {}
    findings = Findings()
    with atomic_folder(out) as folder:
        for split in SPLITS:
            if getattr(dataset, split).annotations is None:
                continue
            images = boxes = 0
            for source in split_sources(dataset, split, data_root):
                path = Path(annotation_root(dataset, data_root)) / source.annotations
                compare_names(dataset, data_root, open_index(path).categories(), path, findings)
                added = _export(path, folder / split, names, findings)
                images, boxes = images + added[0], boxes + added[1]
            counts[split] = (images, boxes)
        findings.raise_errors(f"dataset {dataset.name}")
        if not sum(boxes for _, boxes in counts.values()):
            raise UserError(f"dataset {dataset.name}: has no box, so there is nothing to write")
    return counts


def _export(path: Path, folder: Path, names: dict[int, str], findings: Findings) -> tuple[int, int]:
    """The label files of one annotation file; its images and boxes."""
    content = _read(path)
    labels: dict[int, list[str]] = {}
    files: dict[int, str] = {}
    for image in content["images"]:
        number = image.get("id")
        name = relative_name(image.get("file_name"), findings, f"{path}: file_name")
        if not isinstance(number, int) or number in files:
            findings.errors.append(
                f"{path}: the image {name} has the id {number!r}, expected a whole number of its own"
            )
        elif name is not None:
            files[number] = name
            labels[number] = []
    boxes = 0
    for item in content["annotations"]:
        where = f"{path}, annotation {item.get('id')}"
        number, category, corners = item.get("image_id"), item.get("category_id"), _corners(item.get("bbox"))
        rows = labels.get(number) if isinstance(number, int) else None
        if rows is None:
            findings.errors.append(f"{where}: no image has the id {item.get('image_id')!r}")
        elif category not in names:
            findings.errors.append(f"{where}: category_id {category!r} is not among the {len(names)} classes")
        elif corners is None:
            findings.errors.append(
                f"{where}: bbox is {item.get('bbox')!r}, expected [x, y, width, height] with sides of 0 or more, "
                f"and corners of {DIGITS} digits at most"
            )
        else:
            rows.append(kitti_row(CROWD if item.get("iscrowd") else names[category], corners))
            boxes += 1
    for number, rows in labels.items():
        label = folder / PurePosixPath(files[number]).with_suffix(".txt")
        if label.exists():
            findings.errors.append(f"{path}: {files[number]}: another image has the label file {label.name} already")
            continue
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("".join(rows), encoding="utf-8")
    return len(labels), boxes


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """A COCO file whose numbers keep their digits."""
    read_json(path)
    content = json.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
    for key in ("images", "annotations"):
        listed = content.get(key) if isinstance(content, dict) else None
        if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
            raise UserError(f"{path}: has no list `{key}` of objects; expected a COCO file")
    return {key: content[key] for key in ("images", "annotations")}


def _corners(box: Any) -> list[str] | None:
    """Of ``[x, y, width, height]`` in decimal numbers whose sums are exact; None for anything else."""
    if not isinstance(box, list) or len(box) != 4 or not all(_is_decimal(side) for side in box):
        return None
    x, y, width, height = (Decimal(side) for side in box)
    if width < 0 or height < 0:
        return None
    try:
        return [f"{side:f}" for side in (x, y, EXACT.add(x, width), EXACT.add(y, height))]
    except ArithmeticError:
        return None


def _is_decimal(value: Any) -> bool:
    return isinstance(value, int | Decimal) and not isinstance(value, bool)
