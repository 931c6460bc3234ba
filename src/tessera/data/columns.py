"""Arrays in a folder that every process maps into memory: opened at once however large they are, and shared, not copied."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tessera.files import atomic_folder

_FACTS = "facts.json"


def save_columns(folder: Path, arrays: dict[str, npt.NDArray[Any]], facts: dict[str, Any]) -> None:
    """An ``.npy`` file of each array, and the facts; all of it or nothing."""
    with atomic_folder(folder) as made:
        for name, array in arrays.items():
            with (made / f"{name}.npy").open("wb") as stream:
                np.save(stream, array)
                os.fsync(stream.fileno())
        (made / _FACTS).write_text(json.dumps(facts))


def map_columns(folder: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """The arrays by name, read-only, and the facts. Raises ValueError for what is damaged, OSError for what is not there."""
    facts = json.loads((folder / _FACTS).read_text())
    return {path.stem: _map(path) for path in folder.glob("*.npy")}, facts


def _map(path: Path) -> npt.NDArray[Any]:
    """``np.load(path, mmap_mode="r")`` that keeps no file open, of which a process may have few: a dataset may have a thousand shards."""
    with path.open("rb") as stream:
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        start = stream.tell()
    content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
    content.flags.writeable = False
    return content[start:].view(dtype).reshape(shape)


class Column(Sequence[str]):
    """A sequence that makes its texts when asked for them."""

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        return self._item(range(len(self))[index])

    def _item(self, index: int) -> str:
        raise NotImplementedError


class Texts(Column):
    """Texts one after the other in a buffer; text i ends before byte ``ends[i]``."""

    def __init__(self, buffer: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        self.buffer = buffer
        self.ends = ends

    @classmethod
    def of(cls, values: Iterable[str]) -> Texts:
        encoded = [value.encode() for value in values]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def _item(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return self.buffer[start : int(self.ends[index])].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        content, start = self.buffer.tobytes(), 0
        for end in self.ends.tolist():
            yield content[start:end].decode()
            start = end
