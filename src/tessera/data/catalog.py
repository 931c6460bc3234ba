"""The classes of a dataset: label maps, or the categories of the COCO files where there is no label map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tessera.data.coco_index import open_index
from tessera.data.converted import require_whole
from tessera.data.label_map import fold_name, parse_label_map, read_label_map, unused
from tessera.data.reader import Findings
from tessera.files import UserError
from tessera.spec.checks import MODES
from tessera.spec.lineage import annotation_root
from tessera.spec.networks import Mode
from tessera.spec.schema import DatasetSpec
from tessera.spec.sources import Source, is_pattern, sources
from tessera.structures import LARGEST_PIXEL_ID, ClassCatalog


def require_mode(dataset: DatasetSpec, mode: Mode) -> None:
    """Raises UserError when annotations of this type do not hold what the mode needs."""
    allowed = MODES[dataset.type]
    if mode not in allowed:
        others = [name for name, modes in MODES.items() if mode in modes]
        raise UserError(
            f"dataset {dataset.name}: its type is {dataset.type}, which serves mode {' or '.join(allowed)}, but model.mode is {mode}. "
            f"Set model.mode to {allowed[0]}, or choose a dataset of type {' or '.join(others)}."
        )


def load_catalog(dataset: DatasetSpec, data_root: str, mode: Mode) -> ClassCatalog:
    """The classes that a model of this mode tells apart: all, or the things alone in the modes instance and detection.

    Raises UserError where they leave nothing to tell apart: no thing in those modes, one class alone in mode semantic.
    """
    require_mode(dataset, mode)
    catalog = full_catalog(dataset, data_root)
    if mode in ("instance", "detection"):
        catalog = catalog.things()
        if not len(catalog):
            raise UserError(
                f"dataset {dataset.name}: no class has isthing 1, so a model of mode {mode} has nothing to find; set isthing in the label map"
            )
    elif len(catalog) > 255:
        raise UserError(
            f"dataset {dataset.name}: {len(catalog)} classes; expected at most 255, because 255 marks ignored pixels"
        )
    largest = max(catalog.categories, key=lambda category: category.id)
    if mode in ("semantic", "panoptic") and largest.id > LARGEST_PIXEL_ID:
        raise UserError(
            f"dataset {dataset.name}: the class {largest.name!r} has the id {largest.id}; pictures of classes, as inference writes them, hold "
            f"ids up to {LARGEST_PIXEL_ID}. Give it a smaller one in the annotations and the label map"
        )
    if mode == "semantic" and len(catalog) < 2:
        advice = ""
        if dataset.type == "mask_pairs" and dataset.ignore_id == 0 and 0 not in catalog.from_dataset_id:
            advice = '; where mask value 0 is the background, add {"id": 0, "name": "background"} to the label map and set dataset.ignore_id: null'
        raise UserError(
            f"dataset {dataset.name}: {catalog.names[0]!r} is its only class, so a model of mode semantic has nothing to tell apart: every "
            f"pixel that is not ignored is {catalog.names[0]!r}. Expected at least two classes{advice}"
        )
    return catalog


def full_catalog(dataset: DatasetSpec, data_root: str) -> ClassCatalog:
    """All classes, things and stuff, whatever the mode."""
    return _catalog_and_source(dataset, data_root)[0]


def compare_names(
    dataset: DatasetSpec, data_root: str, named: Iterable[tuple[int, str]], source: Path | str, findings: Findings
) -> None:
    """Every id of ``named`` (id and name, from ``source``) that the label map or the train annotations name otherwise is an error: its
    objects would be counted as those of another class. Case and white space do not count."""
    catalog, first = _catalog_and_source(dataset, data_root)
    names = {category.id: category.name for category in catalog.categories}
    for number, name in named:
        known = names.get(number, name)
        if fold_name(known) != fold_name(name) and unused(number) not in (known, name):
            findings.errors.append(
                f"category {number} is {known!r} in {first} and {name!r} in {source}; names of one id must agree: correct the one that is "
                "wrong"
            )


def _catalog_and_source(dataset: DatasetSpec, data_root: str) -> tuple[ClassCatalog, Path]:
    """All classes, and the file that names them."""
    if dataset.label_map is not None:
        path = Path(data_root) / dataset.label_map
        catalog = read_label_map(path, dataset.contiguous_id, dataset.num_classes)
    elif dataset.type == "mask_pairs":
        raise UserError(
            f"dataset {dataset.name}: dataset.label_map is not set; mask pairs need one, because masks hold numbers only"
        )
    elif dataset.train.annotations is None:
        raise UserError(
            f"dataset {dataset.name}: neither dataset.label_map nor dataset.train.annotations is set, so its classes are unknown"
        )
    else:
        categories, path = _listed_categories(dataset, data_root)
        catalog = parse_label_map(categories, path, dataset.contiguous_id, dataset.num_classes)
    if dataset.type == "mask_pairs" and dataset.ignore_id in catalog.from_dataset_id:
        raise UserError(
            f"{path}: the class {catalog.categories[catalog.from_dataset_id[dataset.ignore_id]].name!r} has the id {dataset.ignore_id}, and "
            f"dataset.ignore_id is {dataset.ignore_id}: pixels of that value are unlabeled. Where they are of the class, set "
            "dataset.ignore_id: null (255 stays ignored); otherwise take the class out of the label map"
        )
    return catalog, path


def split_sources(dataset: DatasetSpec, split: str, data_root: str) -> list[Source]:
    """The annotation files of a split, relative to ``annotation_root``. Raises UserError for a pattern that no file matches, for a file
    that comes twice, and for shards that are not as they were made."""
    require_whole(dataset, data_root)
    data_root = annotation_root(dataset, data_root)
    found = sources(getattr(dataset, split), data_root)
    for name, count in Counter(source.annotations for source in found).items():
        if is_pattern(name) and not (Path(data_root) / name).exists():
            raise UserError(
                f"{Path(data_root) / name}: no file matches this pattern (dataset.{split}.annotations of {dataset.name})"
            )
        if count > 1:
            raise UserError(
                f"dataset {dataset.name}: dataset.{split}.annotations leads to {name} {count} times, expected once"
            )
    return found


def _listed_categories(dataset: DatasetSpec, data_root: str) -> tuple[list[Any], Path]:
    """The categories of all train annotation files in order of first appearance, and the file to name in messages.

    Entries of equal id must be equal in name; ``compare_names`` holds the other files against them.
    """
    merged: list[Any] = []
    named: dict[Any, tuple[Any, Path]] = {}
    files = split_sources(dataset, "train", data_root)
    root = Path(annotation_root(dataset, data_root))
    for source in files:
        path = root / source.annotations
        listed = open_index(path).listed
        if not isinstance(listed, list):
            raise UserError(
                f"{path}: has no list `categories`; expected a COCO file, or set dataset.label_map to name the classes"
            )
        if len(files) == 1:
            return listed, path
        for entry in listed:
            identity, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
            known, first = named.setdefault(repr(identity), (name, path))
            if fold_name(str(known)) != fold_name(str(name)):
                raise UserError(
                    f"category {identity} is {known!r} in {first} and {name!r} in {path}; "
                    "files of one split must agree on their categories, or dataset.label_map must name the classes"
                )
            if first == path:
                merged.append(entry)
    return merged, root / files[0].annotations
