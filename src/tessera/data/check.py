"""Opens every file of a dataset before a run does, and lists everything that is wrong at once."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from rich.progress import Progress

from tessera.data.catalog import load_catalog
from tessera.data.converted import require_whole
from tessera.data.datasets import SegmentationDataset, index_dataset
from tessera.data.reader import Findings
from tessera.data.transforms import has_pixels, resize_target, select
from tessera.files import UserError
from tessera.ops.image_size import read_image_size
from tessera.ops.images import read_image
from tessera.spec.checks import MODES
from tessera.spec.networks import Mode
from tessera.spec.schema import DatasetSpec
from tessera.structures import ClassCatalog, Target

SPLITS = ("train", "val", "test")
_THREADS = 2


@dataclass
class _Totals:
    images: int = 0
    empty_images: int = 0
    """Images in which nothing is to be found."""
    crowd: int = 0
    objects: Counter[int] = field(default_factory=Counter)
    """Per contiguous class id, crowd regions not counted. In semantic datasets one per image and class."""
    pixels: Counter[int] = field(default_factory=Counter)
    containing: Counter[int] = field(default_factory=Counter)
    """Images that hold the class."""

    def add(self, target: Target) -> None:
        self.images += 1
        self.crowd += int(target.iscrowd.sum())
        shown = select(target, ~target.iscrowd)
        if shown.size is not None:
            trained = resize_target(shown, shown.size)
            shown = select(shown, has_pixels(trained))
        labels = shown.labels.tolist()
        self.empty_images += not labels
        self.objects.update(labels)
        self.containing.update(set(labels))
        if shown.masks is not None:
            for label, mask in zip(labels, shown.masks.numpy(), strict=True):
                self.pixels[label] += int(np.count_nonzero(mask))


def check_dataset(dataset: DatasetSpec, data_root: str, progress: bool = True) -> dict[str, Any]:
    """Counts per split and class, and warnings (with how often each occurred), for ``check.json``.

    COCO files without any mask in the train split are checked for what they serve, mode detection.

    Raises one UserError with every error found: missing, unreadable or truncated files, sizes that differ, ids outside the
    classes, repeated ids and names, damaged masks, empty splits. Warnings are what training does without: annotations without a
    pixel, images in two splits, classes that never occur.
    """
    mode: Mode = MODES[dataset.type][0]
    require_whole(dataset, contents=True)
    catalog = load_catalog(dataset, data_root, mode)
    everything = Findings()
    splits: dict[str, Any] = {}
    names: dict[str, set[str]] = {}
    for split in SPLITS:
        if getattr(dataset, split).annotations is None:
            if split == "train":
                everything.errors.append("train: dataset.train.annotations is not set; there is nothing to train on")
            continue
        findings = Findings()
        try:
            reader = index_dataset(dataset, split, catalog, mode, data_root, findings)
            if split == "train" and reader.has_masks is False:
                mode, findings = "detection", Findings()
                reader = index_dataset(dataset, split, catalog, mode, data_root, findings)
        except UserError as error:
            everything.errors.append(f"{split}: {error}")
            continue
        names[split] = {PurePosixPath(name).name for name in reader.file_names}
        totals = _inspect_split(reader, split, findings, progress)
        splits[split] = _summary(totals, catalog, findings, masks=mode != "detection")
        everything.errors += [f"{split}: {error}" for error in findings.errors]
        everything.warnings.update({f"{split}: {text}": count for text, count in findings.warnings.items()})
    _compare_splits(names, everything)
    everything.raise_errors(f"dataset {dataset.name} below {data_root}")
    return {
        "dataset": dataset.name,
        "type": dataset.type,
        "modes": [mode] if mode == "detection" else list(MODES[dataset.type]),
        "classes": catalog.to_json(),
        "splits": splits,
        "warnings": dict(sorted(everything.warnings.items())),
    }


def _inspect_split(reader: SegmentationDataset, split: str, findings: Findings, progress: bool) -> _Totals:
    totals = _Totals()
    if not len(reader):
        findings.errors.append(f"{reader.source} lists no usable image; expected at least one")
    with ThreadPoolExecutor(_THREADS) as pool, Progress(disable=not progress) as bar:
        task = bar.add_task(f"check {split}", total=len(reader))
        # The results come in the order of the images, so that the report does too.
        for target, found in pool.map(partial(_inspect, reader), range(len(reader))):
            findings.errors += found.errors
            findings.warnings.update(found.warnings)
            if target is not None:
                totals.add(target)
            bar.advance(task)
    return totals


def _inspect(reader: SegmentationDataset, index: int) -> tuple[Target | None, Findings]:
    """The target, if it could be made, and all that is wrong with the image and its masks."""
    findings = Findings()
    size: tuple[int, int] | None = None
    try:
        image = read_image(reader.image_path(index))
        size = (image.shape[1], image.shape[2])
    except UserError as error:
        findings.errors.append(str(error))
    try:
        if size is None:
            size = reader.annotated_size(index)
        mask_path = reader.mask_path(index)
        if size is None and mask_path is not None:
            size = read_image_size(mask_path)
        return (None if size is None else reader.target(index, size, findings)), findings
    except UserError as error:
        findings.errors.append(str(error))
    return None, findings


def _summary(totals: _Totals, catalog: ClassCatalog, findings: Findings, masks: bool) -> dict[str, Any]:
    absent = [name for label, name in enumerate(catalog.names) if not totals.objects[label]]
    if absent and totals.images:
        shown = ", ".join(absent[:10]) + (", ..." if len(absent) > 10 else "")
        findings.warnings[f"class that never occurs ({shown})"] = len(absent)
    return {
        "images": totals.images,
        "images_without_objects": totals.empty_images,
        "objects": sum(totals.objects.values()),
        "crowd_regions": totals.crowd,
        "classes": {
            name: {
                "objects": totals.objects[label],
                "images": totals.containing[label],
                **({"pixels": totals.pixels[label]} if masks else {}),
            }
            for label, name in enumerate(catalog.names)
        },
    }


def _compare_splits(names: dict[str, set[str]], findings: Findings) -> None:
    present = list(names)
    for position, first in enumerate(present):
        for second in present[position + 1 :]:
            shared = sorted(names[first] & names[second])
            if shared:
                findings.warnings[f"{first} and {second}: image of the same name in both (the first: {shared[0]})"] = (
                    len(shared)
                )
