"""Several annotation files as one split, such as the shards of a converted dataset."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tessera.data.columns import Column
from tessera.data.reader import Findings, SegmentationDataset, View, report_repeated


class JoinedDataset(View):
    """The images of the readers one after the other.

    Image ids: a reader whose ids meet those of an earlier one has them all raised by the largest id so far plus 1; otherwise they
    stay. File names are relative to the folder that all image folders have in common.
    """

    def __init__(self, readers: Sequence[SegmentationDataset], findings: Findings) -> None:
        """Raises nothing: images that occur twice are errors in ``findings``."""
        self.source = _common([reader.source.parent for reader in readers])
        self.image_folder = _common([reader.image_folder for reader in readers])
        self.readers = list(readers)
        self.value_range, self.max_pixels = readers[0].value_range, readers[0].max_pixels
        told = [reader.has_masks for reader in readers if reader.has_masks is not None]
        self.has_masks = any(told) if told else None
        self._ends = np.cumsum([len(reader) for reader in readers])
        self.image_ids = _distinct([np.asarray(reader.image_ids, np.int64) for reader in readers])
        self.file_names = _Names(self)
        # Of a million names the hashes alone are held at once; the names only where some of them may be equal.
        if _repeats(np.fromiter(map(hash, self.file_names), np.int64, len(self.image_ids))):
            report_repeated(self.file_names, "image file name", findings)

    def nothing_to_learn(self) -> str | None:
        reasons = [reader.nothing_to_learn() for reader in self.readers]
        told = list(dict.fromkeys(reason for reason in reasons if reason is not None))
        return "; ".join(told) if None not in reasons else None

    def place(self, index: int) -> tuple[SegmentationDataset, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.readers[number], index - (int(self._ends[number - 1]) if number else 0)

    def prefix(self, reader: SegmentationDataset) -> str:
        """What leads from the common image folder to the reader's."""
        folder = reader.image_folder.relative_to(self.image_folder).as_posix()
        return "" if folder == "." else f"{folder}/"


class _Names(Column):
    def __init__(self, joined: JoinedDataset) -> None:
        self._joined = joined

    def __len__(self) -> int:
        return len(self._joined.image_ids)

    def __iter__(self) -> Iterator[str]:
        for reader in self._joined.readers:
            prefix = self._joined.prefix(reader)
            yield from (prefix + name for name in reader.file_names)

    def _item(self, index: int) -> str:
        reader, place = self._joined.place(index)
        return self._joined.prefix(reader) + reader.file_names[place]


def _distinct(ids: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """All ids one after the other; those of a reader are raised where some of them are taken."""
    together = np.concatenate(ids)
    if not _repeats(together):
        return together
    taken: set[int] = set()
    largest = -1
    raised = []
    for own in ids:
        if not taken.isdisjoint(own.tolist()):
            own = own + largest + 1
        taken.update(own.tolist())
        largest = max(largest, int(own.max(initial=-1)))
        raised.append(own)
    return np.concatenate(raised)


def _repeats(values: npt.NDArray[np.int64]) -> bool:
    ordered = np.sort(values)
    return bool((ordered[1:] == ordered[:-1]).any())


def _common(folders: Sequence[Path]) -> Path:
    return Path(os.path.commonpath(folders))
