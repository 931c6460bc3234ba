"""Several annotation files as one split, such as the shards of a converted dataset."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tessera.data.reader import Findings, SegmentationDataset, report_repeated
from tessera.structures import Sample, Target


class JoinedDataset(SegmentationDataset):
    """The images of the readers one after the other.

    Image ids: a reader whose ids meet those of an earlier one has them all raised by the largest id so far plus 1; otherwise they
    stay. File names are relative to the folder that all image folders have in common.
    """

    def __init__(self, readers: Sequence[SegmentationDataset], findings: Findings) -> None:
        """Raises nothing: categories that disagree and images that occur twice are errors in ``findings``."""
        self.source = _common([reader.source.parent for reader in readers])
        self.image_folder = _common([reader.image_folder for reader in readers])
        self.categories = {}
        self.file_names, self.image_ids = [], []
        self._places: list[tuple[int, int]] = []
        self._readers = list(readers)
        self.has_masks = any(reader.has_masks for reader in readers)
        taken: set[int] = set()
        named: dict[int, Path] = {}
        for number, reader in enumerate(readers):
            for identity, name in reader.categories.items():
                known = self.categories.setdefault(identity, name)
                named.setdefault(identity, reader.source)
                if known != name:
                    findings.errors.append(
                        f"category {identity} is {known!r} in {named[identity]} and {name!r} in {reader.source}; "
                        "files of one split must agree on their categories"
                    )
            shift = max(taken) + 1 if not taken.isdisjoint(reader.image_ids) else 0
            ids = [identity + shift for identity in reader.image_ids]
            taken.update(ids)
            self.image_ids += ids
            folder = reader.image_folder.relative_to(self.image_folder)
            self.file_names += [(folder / name).as_posix() for name in reader.file_names]
            self._places += [(number, index) for index in range(len(reader))]
        report_repeated(self.file_names, "image file name", findings)

    def image_path(self, index: int) -> Path:
        reader, place = self._at(index)
        return reader.image_path(place)

    def mask_path(self, index: int) -> Path | None:
        reader, place = self._at(index)
        return reader.mask_path(place)

    def annotated_size(self, index: int) -> tuple[int, int] | None:
        reader, place = self._at(index)
        return reader.annotated_size(place)

    def read(self, index: int) -> Sample:
        reader, place = self._at(index)
        return replace(reader.read(place), image_id=self.image_ids[index], file_name=self.file_names[index])

    def target(self, index: int, size: tuple[int, int], findings: Findings) -> Target:
        reader, place = self._at(index)
        return reader.target(place, size, findings)

    def _at(self, index: int) -> tuple[SegmentationDataset, int]:
        number, place = self._places[index]
        return self._readers[number], place


def _common(folders: Sequence[Path]) -> Path:
    return Path(os.path.commonpath(folders))
