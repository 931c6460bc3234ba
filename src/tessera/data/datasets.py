"""One door to all readers: the spec says which type a dataset is, the mode says what is read from it."""

from __future__ import annotations

from pathlib import Path

from tessera.data.catalog import full_catalog, require_mode
from tessera.data.coco import CocoInstances
from tessera.data.mask_pairs import MaskPairs
from tessera.data.panoptic import CocoPanoptic
from tessera.data.reader import Findings, SegmentationDataset
from tessera.files import UserError
from tessera.spec.schema import DatasetSpec, Mode
from tessera.structures import ClassCatalog

__all__ = ["SegmentationDataset", "index_dataset", "open_dataset"]


def open_dataset(
    dataset: DatasetSpec, split: str, catalog: ClassCatalog, mode: Mode, data_root: str
) -> SegmentationDataset:
    """``split``: train, val or test. ``catalog``: the classes of the mode, as ``catalog.load_catalog`` gives them.

    Raises UserError where mode and type do not fit, where a file is missing, and with all faults of the annotations at once.
    """
    findings = Findings()
    opened = index_dataset(dataset, split, catalog, mode, data_root, findings)
    findings.raise_errors(str(opened.source))
    if not len(opened):
        raise UserError(
            f"{opened.source}: lists no image (dataset {dataset.name}, split {split}); expected at least one"
        )
    return opened


def index_dataset(
    dataset: DatasetSpec, split: str, catalog: ClassCatalog, mode: Mode, data_root: str, findings: Findings
) -> SegmentationDataset:
    """``open_dataset`` that collects the faults of the annotations instead of raising them."""
    require_mode(dataset, mode)
    section = getattr(dataset, split)
    root = Path(data_root)
    annotations = root / _required(section.annotations, dataset, f"{split}.annotations")
    images = None if section.images is None else root / section.images
    if dataset.type == "mask_pairs":
        return MaskPairs(annotations, images, catalog, dataset.ignore_id, findings)
    images = root / _required(section.images, dataset, f"{split}.images")
    known = full_catalog(dataset, data_root).from_dataset_id
    if dataset.type == "coco":
        return CocoInstances(annotations, images, catalog, known, findings)
    panoptic = root / _required(section.panoptic, dataset, f"{split}.panoptic")
    return CocoPanoptic(annotations, images, panoptic, catalog, known, mode, findings)


def _required(value: str | None, dataset: DatasetSpec, key: str) -> str:
    if value is None:
        raise UserError(f"dataset {dataset.name}: dataset.{key} is not set, which type {dataset.type} needs")
    return value
