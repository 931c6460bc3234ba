"""Opens every file of a dataset before a run does, and lists everything that is wrong at once."""

from __future__ import annotations

import filecmp
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from rich.progress import Progress

from tessera.data.catalog import load_catalog
from tessera.data.converted import require_whole
from tessera.data.datasets import SegmentationDataset, index_dataset, unannotated_images
from tessera.data.label_map import fold_name
from tessera.data.panoptic import ABSENT, APART, UNLISTED
from tessera.data.reader import Findings
from tessera.data.transforms import has_pixels, resize_target, select
from tessera.files import UserError
from tessera.ops.image_size import read_image_size
from tessera.ops.images import read_image
from tessera.spec.checks import MODES
from tessera.spec.networks import Mode
from tessera.spec.schema import DatasetSpec
from tessera.structures import IGNORE, ClassCatalog, Target

SPLITS = ("train", "val", "test")
_THREADS = 2
_SHOWN = 3
"""Images named in a warning."""
_MUCH = 0.5
"""A share of ignored pixels that is worth a warning."""


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
    mapped: int = 0
    """Pixels of which the annotations say the class, or that it does not count."""
    ignored: int = 0
    """Those of them that do not count."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Warning -> the first images that it is about."""

    def add(self, target: Target) -> None:
        self.images += 1
        if target.semantic is not None:
            self.mapped += target.semantic.numel()
            self.ignored += int((target.semantic == IGNORE).sum())
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

    def note(self, file_name: str, warnings: Iterable[str]) -> None:
        for text in warnings:
            shown = self.examples.setdefault(text, [])
            if len(shown) < _SHOWN:
                shown.append(file_name)


def check_dataset(
    dataset: DatasetSpec, data_root: str, progress: bool = True, say: Callable[[str], object] = print
) -> dict[str, Any]:
    """Counts per split and class, and warnings (with how often each occurred), for ``check.json``. ``say`` is given a line for each warning,
    with the first images that it is about, also where errors follow.

    COCO files without any mask in the train split are checked for what they serve, mode detection.

    Raises one UserError with every error found: missing, unreadable or truncated files, sizes that differ, ids outside the
    classes, names that differ for one id, repeated ids and file names, damaged masks, PNG and JSON that do not belong together, splits
    without an image, and train or val without anything to be found. Warnings are what training does without: annotations without a
    pixel, images in two splits, classes that never occur.
    """
    mode: Mode = MODES[dataset.type][0]
    require_whole(dataset, data_root, contents=True)
    catalog = load_catalog(dataset, data_root, mode)
    everything = Findings()
    splits: dict[str, Any] = {}
    images: dict[str, dict[str, Path]] = {}
    examples: dict[str, list[str]] = {}
    _shared_names(catalog, everything)
    for split in SPLITS:
        if getattr(dataset, split).annotations is None:
            if split == "train":
                everything.errors.append("train: dataset.train.annotations is not set; there is nothing to train on")
            continue
        findings = Findings()
        try:
            if split == "test" and (listed := unannotated_images(dataset, split, data_root)) is not None:
                everything.warnings["test: without annotations: its images can be inferred on, not evaluated"] = len(
                    listed
                )
                unreadable = _unreadable([path for path, _, _ in listed], dataset)
                everything.errors += [f"test: {error}" for error in unreadable]
                images[split] = {PurePosixPath(name).name: path for path, name, _ in listed}
                splits[split] = {"images": len(listed)}
                continue
            reader = index_dataset(dataset, split, catalog, mode, data_root, findings)
            if split == "train" and reader.has_masks is False:
                mode, findings = "detection", Findings()
                reader = index_dataset(dataset, split, catalog, mode, data_root, findings)
        except UserError as error:
            everything.errors.append(f"{split}: {error}")
            continue
        images[split] = {
            PurePosixPath(name).name: reader.image_path(index) for index, name in enumerate(reader.file_names)
        }
        totals = _inspect_split(reader, split, findings, progress)
        splits[split] = _summary(totals, catalog, findings, masks=mode != "detection")
        if totals.images and not findings.errors:
            _judge(totals, reader, split, catalog, mode, findings)
        everything.errors += [f"{split}: {error}" for error in findings.errors]
        everything.warnings.update({f"{split}: {text}": count for text, count in findings.warnings.items()})
        examples |= {f"{split}: {text}": files for text, files in totals.examples.items()}
    _compare_splits(images, everything)
    for text, count in sorted(everything.warnings.items()):
        shown = examples.get(text, [])
        more = ", ..." if len(shown) == _SHOWN and count > _SHOWN else ""
        say(f"warning: {text}: {count}" + (f" ({', '.join(shown)}{more})" if shown else ""))
    everything.raise_errors(f"dataset {dataset.name} below {data_root}")
    modes = [name for name in MODES[dataset.type] if name != "semantic" or len(catalog) > 1]
    return {
        "dataset": dataset.name,
        "type": dataset.type,
        "modes": [mode] if mode == "detection" else modes,
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
        results = pool.map(partial(_inspect, reader), range(len(reader)))
        try:
            for index, (target, found) in enumerate(results):
                findings.errors += found.errors
                findings.warnings.update(found.warnings)
                totals.note(reader.file_names[index], found.warnings)
                if target is not None:
                    totals.add(target)
                bar.advance(task)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # else the pool goes through all images before it ends
            raise
    return totals


def _tried(findings: Findings, call: Callable[..., Any], *arguments: Any) -> Any:
    """What the call returns; None, with an error, where it raises UserError."""
    try:
        return call(*arguments)
    except UserError as error:
        findings.errors.append(str(error))
        return None


def _unreadable(paths: Sequence[Path], dataset: DatasetSpec) -> list[str]:
    def faults(path: Path) -> list[str]:
        findings = Findings()
        _tried(findings, read_image, path, dataset.value_range, dataset.max_pixels)
        return findings.errors

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(itertools.chain.from_iterable(pool.map(faults, paths)))


def _inspect(reader: SegmentationDataset, index: int) -> tuple[Target | None, Findings]:
    """The target, if it could be made, and all that is wrong with the image and its masks."""
    findings = Findings()
    image = _tried(findings, reader.image, index)

    def target() -> Target | None:
        size = reader.annotated_size(index) if image is None else tuple(image.shape[1:])
        mask_path = reader.mask_path(index)
        if size is None and mask_path is not None:
            size = read_image_size(mask_path, reader.max_pixels)
        return None if size is None else reader.target(index, size, findings)

    return _tried(findings, target), findings


def _summary(totals: _Totals, catalog: ClassCatalog, findings: Findings, masks: bool) -> dict[str, Any]:
    absent = [key for label, key in enumerate(catalog.keys) if not totals.objects[label]]
    if absent and totals.images:
        shown = ", ".join(absent[:10]) + (", ..." if len(absent) > 10 else "")
        findings.warnings[f"class that never occurs ({shown})"] = len(absent)
    return {
        "images": totals.images,
        "images_without_objects": totals.empty_images,
        "objects": sum(totals.objects.values()),
        "crowd_regions": totals.crowd,
        **({"ignored_pixels": round(totals.ignored / totals.mapped, 4)} if totals.mapped else {}),
        "classes": {
            key: {
                "objects": totals.objects[label],
                "images": totals.containing[label],
                **({"pixels": totals.pixels[label]} if masks else {}),
            }
            for label, key in enumerate(catalog.keys)
        },
    }


def _judge(
    totals: _Totals, reader: SegmentationDataset, split: str, catalog: ClassCatalog, mode: Mode, findings: Findings
) -> None:
    """Whether the split serves what it is for."""
    ignored = totals.ignored / totals.mapped if totals.mapped else 0
    if ignored > _MUCH:
        text = f"images of whose pixels {ignored:.1%} are ignored (void, or the value of dataset.ignore_id)"
        findings.warnings[text] = totals.images
    apart = sum(findings.warnings[text] for text in APART)
    segments = sum(totals.objects.values()) + totals.crowd + findings.warnings[ABSENT] + findings.warnings[UNLISTED]
    present = [label for label, count in totals.objects.items() if count]
    if mode == "panoptic" and apart > segments / 2:
        findings.errors.append(
            f"{reader.source}: of the {segments} segments in it and its PNG files {apart} do not meet in id and area (the warnings say how); "
            "are the PNG files those of other images, black, or once saved as JPEG?"
        )
    elif not present:
        reason = reader.nothing_to_learn()
        if reason is None:
            nothing = (
                "pixel that is not ignored" if mode == "semantic" else "object (the warnings say what was left out)"
            )
            reason = f"none of its {totals.images} images has a{'n' if mode != 'semantic' else ''} {nothing}"
        if split == "test":
            findings.warnings["images in none of which anything is to be found: no metric is defined on them"] = (
                totals.images
            )
        else:
            findings.errors.append(f"{reader.source}: {reason}")
    elif split == "train" and mode == "semantic" and len(present) == 1:
        findings.errors.append(
            f"{reader.source}: every pixel that is not ignored ({ignored:.1%} are) is {catalog.keys[present[0]]!r}, so there is nothing to tell "
            "apart; expected pixels of two classes or more. Where an ignored value is a class, such as the background, add it to the label map "
            "and set dataset.ignore_id: null"
        )


def _shared_names(catalog: ClassCatalog, findings: Findings) -> None:
    ids: dict[str, list[str]] = {}
    for category in catalog.categories:
        ids.setdefault(fold_name(category.name), []).append(f"{category.name} ({category.id})")
    for shared in ids.values():
        if len(shared) > 1:
            findings.warnings[f"classes of one name, told apart by their ids: {', '.join(shared)}"] = len(shared)


def _compare_splits(images: dict[str, dict[str, Path]], findings: Findings) -> None:
    """``images``: split -> name without folders -> file."""
    for first, second in itertools.combinations(images, 2):
        shared = [
            name
            for name in sorted(images[first].keys() & images[second].keys())
            if _equal(images[first][name], images[second][name])
        ]
        if shared:
            text = f"{first} and {second}: image of the same name and content in both (the first: {shared[0]})"
            findings.warnings[text] = len(shared)


def _equal(first: Path, second: Path) -> bool:
    """False also where one cannot be read, which is an error already."""
    try:
        return filecmp.cmp(first, second, shallow=False)
    except OSError:
        return False
