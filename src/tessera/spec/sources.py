"""Which files a split consists of. Lists and patterns mean the same to readers, checks and lineages, because all of them ask here."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tessera.spec.schema import ConvertSpec, SplitSpec


CONVERTED = "converted"
"""Folder in data/<dataset>/ that holds what convert makes: shards/, dropped.csv and manifest.json."""


@dataclass(frozen=True)
class Source:
    """One annotation file with the folders that belong to it, relative to the data root."""

    annotations: str
    images: str | None
    panoptic: str | None


def sources(split: SplitSpec, data_root: str | Path) -> list[Source]:
    """One per annotation file: in the order of the list, the files of a pattern by name.

    A pattern that matches no file stays as it is, so that whoever opens it reports it.
    """
    entries = as_list(split.annotations)
    images, panoptic = (_per_entry(value, len(entries)) for value in (split.images, split.panoptic))
    return [
        Source(name, images[number], panoptic[number])
        for number, entry in enumerate(entries)
        for name in _matched(entry, Path(data_root))
    ]


def source_folder(source: str, name: str) -> str:
    """Where a KITTI source has its images or labels (``convert.image_dir_name``, ``convert.label_dir_name``), relative to the data root."""
    return PurePosixPath(name.replace("{source}", source) if "{source}" in name else f"{source}/{name}").as_posix()


def kitti_sources(convert: ConvertSpec) -> dict[str, list[str]]:
    """By split."""
    return {"train": convert.input_source, "val": convert.val_source, "test": convert.test_source}


def as_list(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else value


def is_pattern(name: str) -> bool:
    return glob.has_magic(name)


def _per_entry(value: str | list[str] | None, count: int) -> list[str] | list[None]:
    if value is None:
        return [None] * count
    return [value] * count if isinstance(value, str) else value


def _matched(entry: str, root: Path) -> list[str]:
    if not is_pattern(entry) or (root / entry).exists():
        return [entry]
    # Path.glob raises on patterns such as a**b, which here match nothing.
    found = glob.glob(entry, root_dir=root, recursive=True)  # noqa: PTH207
    return sorted(Path(name).as_posix() for name in found if not (root / name).is_dir()) or [entry]
