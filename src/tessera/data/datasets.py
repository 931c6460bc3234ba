"""One door to all readers: the spec says which type a dataset is, the mode says what is read from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tessera.data.catalog import compare_names, full_catalog, require_mode, split_sources
from tessera.data.coco import CocoInstances
from tessera.data.coco_index import open_index
from tessera.data.joined import JoinedDataset
from tessera.data.listed import ListedImages, listed_places
from tessera.data.mask_pairs import MaskPairs
from tessera.data.panoptic import CocoPanoptic
from tessera.data.reader import Findings, SegmentationDataset
from tessera.files import UserError
from tessera.spec.lineage import annotation_root
from tessera.spec.networks import Mode
from tessera.spec.schema import DatasetSpec
from tessera.spec.sources import Source
from tessera.structures import ClassCatalog

__all__ = ["SegmentationDataset", "index_dataset", "open_dataset", "unannotated_images"]


def open_dataset(
    dataset: DatasetSpec, split: str, catalog: ClassCatalog, mode: Mode, data_root: str
) -> SegmentationDataset:
    """``split``: train, val or test. ``catalog``: the classes of the mode, as ``catalog.load_catalog`` gives them.

    Raises UserError where mode and type do not fit, where a file is missing, and with all faults of the annotations at once.
    """
    findings = Findings()
    opened = index_dataset(dataset, split, catalog, mode, data_root, findings)
    if mode != "detection" and opened.has_masks is False:
        findings.errors.append(
            "none of its annotations has a mask (`segmentation`); segmentation needs masks, boxes are not enough: they serve a model "
            "of mode detection"
        )
    findings.raise_errors(str(opened.source))
    if not len(opened):
        raise UserError(
            f"{opened.source}: lists no image (dataset {dataset.name}, split {split}); expected at least one"
        )
    return opened


def unannotated_images(dataset: DatasetSpec, split: str, data_root: str) -> list[tuple[Path, str, int]] | None:
    """File, name and id of the images of a split whose COCO file has no list `annotations`, as test servers give it out; None for any other
    split. The ``panoptic`` folder need not be there."""
    section = getattr(dataset, split)
    if dataset.type == "mask_pairs" or section.annotations is None or section.images is None:
        return None
    chosen = split_sources(dataset, split, data_root)
    path = Path(annotation_root(dataset, data_root)) / chosen[0].annotations
    if len(chosen) > 1 or (index := open_index(path)).lacks != "annotations":
        return None
    findings = Findings()
    index.report((), findings)
    findings.raise_errors(str(path))
    places: Sequence[int] = range(len(index))
    if section.names is not None:
        names = Path(data_root) / section.names
        places = listed_places(names, index.file_names, findings)
        findings.raise_errors(str(names))
    folder = Path(data_root) / section.images
    return [
        (folder / index.file_names[place], index.file_names[place], int(index.image_ids[place])) for place in places
    ]


def index_dataset(
    dataset: DatasetSpec, split: str, catalog: ClassCatalog, mode: Mode, data_root: str, findings: Findings
) -> SegmentationDataset:
    """``open_dataset`` that collects the faults of the annotations instead of raising them, except that there is no mask at all."""
    require_mode(dataset, mode)
    section = getattr(dataset, split)
    _require(section.annotations, dataset, f"{split}.annotations")
    if dataset.type != "mask_pairs":
        _require(section.images, dataset, f"{split}.images")
    if dataset.type == "coco_panoptic":
        _require(section.panoptic, dataset, f"{split}.panoptic")
    root, annotated = Path(data_root), Path(annotation_root(dataset, data_root))
    known = () if dataset.type == "mask_pairs" else full_catalog(dataset, data_root).from_dataset_id
    # The catalogue may be that of a model which another dataset, or this one with other names, trained.
    model = [(category.id, category.name) for category in catalog.categories]
    compare_names(dataset, data_root, model, "the model", findings)

    def reader(source: Source, found: Findings) -> SegmentationDataset:
        annotations = annotated / source.annotations
        images = None if source.images is None else root / source.images
        opened: SegmentationDataset
        if images is None or dataset.type == "mask_pairs":
            opened = MaskPairs(annotations, images, catalog, dataset.ignore_id, found)
        else:
            folder = None if source.panoptic is None or dataset.type == "coco" else root / source.panoptic
            kind = CocoInstances if folder is None else CocoPanoptic
            opened = kind(annotations, images, catalog, known, mode, found, folder)
        compare_names(dataset, data_root, opened.categories, annotations, found)
        opened.value_range, opened.max_pixels = dataset.value_range, dataset.max_pixels
        return opened

    chosen = split_sources(dataset, split, data_root)
    if len(chosen) == 1 and section.names is None:
        return reader(chosen[0], findings)
    readers = []
    for source in chosen:
        own = Findings()
        readers.append(reader(source, own))
        findings.errors += [f"{annotated / source.annotations}: {error}" for error in own.errors]
        findings.warnings.update(own.warnings)
    whole = readers[0] if len(chosen) == 1 else JoinedDataset(readers, findings)
    return whole if section.names is None else ListedImages(whole, root / section.names, findings)


def _require(value: Any, dataset: DatasetSpec, key: str) -> None:
    if value is None:
        raise UserError(f"dataset {dataset.name}: dataset.{key} is not set, which type {dataset.type} needs")
