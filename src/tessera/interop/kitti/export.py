"""The way back: COCO annotations to KITTI label files, without loss of class and box."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any

from tessera.data.catalog import compare_names, full_catalog, split_sources
from tessera.data.coco_index import open_index
from tessera.data.reader import Findings, brief
from tessera.files import UserError, atomic_folder, read_text
from tessera.interop.kitti.convert import DIGITS, EXACT
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
    found = Findings()
    index = open_index(path, segments=False)
    index.report(names, found)
    index.report_boxes(names, found)
    if found.errors:
        findings.errors += [f"{path}: {error}" for error in found.errors]
        return 0, 0
    labels: dict[int, list[str]] = {number: [] for number in index.image_ids}
    boxes = 0
    # Read once more, because here numbers keep their digits. 1.0 and 1 are one key.
    for item in json.loads(read_text(path), parse_float=Decimal)["annotations"]:
        corners = _corners(item["bbox"])
        if corners is None:
            findings.errors.append(
                f"{path}, annotation {item['id']}: bbox is {brief(item['bbox'])}, expected corners of {DIGITS} digits at most"
            )
        else:
            labels[item["image_id"]].append(
                kitti_row(CROWD if item.get("iscrowd") else names[item["category_id"]], corners)
            )
            boxes += 1
    for name, rows in zip(index.file_names, labels.values(), strict=True):
        label = folder / PurePosixPath(name).with_suffix(".txt")
        if label.exists():
            findings.errors.append(f"{path}: {name}: another image has the label file {label.name} already")
            continue
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("".join(rows), encoding="utf-8")
    return len(labels), boxes


def _corners(box: list[Any]) -> list[str] | None:
    """Of ``[x, y, width, height]``; None where sums are not exact."""
    x, y, width, height = (Decimal(side) for side in box)
    try:
        return [f"{side:f}" for side in (x, y, EXACT.add(x, width), EXACT.add(y, height))]
    except ArithmeticError:
        return None
