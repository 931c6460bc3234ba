"""Arrays and texts in one file that every process maps into memory: opened at once however large it is, and shared, not copied.

The file ends in a JSON header (where each array lies, and whatever else its writer wants to say), the header's length and a magic number:
a file that was cut off has none of them.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, overload

import numpy as np
import numpy.typing as npt
import torch

T = TypeVar("T")
_TAIL = struct.Struct("<q8s")
_MAGIC = b"columns\n"
_ALIGNMENT = 64


class Writer:
    """Arrays one after the other into a stream; ``finish`` makes it a file that ``map_columns`` opens."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._places: dict[str, tuple[str, int, int]] = {}
        self._start = 0

    def write(self, data: bytes | npt.NDArray[Any]) -> None:
        """A piece of the array that ``end`` will name."""
        self._stream.write(data if isinstance(data, bytes) else data.tobytes())

    def end(self, name: str, dtype: str = "|u1") -> None:
        """What was written since the last call is the array ``name``."""
        end = self._stream.tell()
        self._places[name] = (dtype, self._start, end)
        self._stream.write(bytes(-end % _ALIGNMENT))
        self._start = self._stream.tell()

    def add(self, name: str, array: npt.NDArray[Any]) -> None:
        self.write(array)
        self.end(name, array.dtype.str)

    def finish(self, facts: dict[str, Any]) -> None:
        header = json.dumps({"arrays": self._places, **facts}).encode()
        self._stream.write(header + _TAIL.pack(len(header), _MAGIC))


def map_columns(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """The arrays by name, read-only, and the facts. Raises ValueError for what is no whole file of this kind, OSError for no file."""
    size = path.stat().st_size
    if size < _TAIL.size:
        raise ValueError("too short")
    with path.open("rb") as stream:
        stream.seek(-_TAIL.size, os.SEEK_END)
        length, magic = _TAIL.unpack(stream.read(_TAIL.size))
        if magic != _MAGIC or not 0 < length <= size - _TAIL.size:
            raise ValueError("has no end")
        stream.seek(-_TAIL.size - length, os.SEEK_END)
        facts = json.loads(stream.read(length))
    # Unlike numpy's memmap it keeps no file open, of which a process may have few: a dataset may have a thousand shards.
    content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    content.flags.writeable = False
    arrays = {name: content[start:end].view(dtype) for name, (dtype, start, end) in facts.pop("arrays").items()}
    return arrays, facts


class Column(Sequence[T]):
    """A sequence that makes its items when asked for them; equal to a list of the same items."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._item(place) for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"index {index} of {len(self)} items")
        return self._item(place)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def __iter__(self) -> Iterator[T]:
        return map(self._item, range(len(self)))

    def _item(self, index: int) -> T:
        raise NotImplementedError


class Numbers(Column[int]):
    def __init__(self, values: npt.NDArray[np.int64]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self.values, dtype, copy=copy)

    def _item(self, index: int) -> int:
        return int(self.values[index])


class Texts(Column[str]):
    """Texts one after the other in a buffer; text i ends before byte ``ends[i]``."""

    def __init__(self, buffer: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        self.buffer = buffer
        self.ends = ends

    @classmethod
    def of(cls, values: Iterable[str]) -> Texts:
        encoded = [value.encode("utf-8", "surrogatepass") for value in values]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def _item(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return self.buffer[start : int(self.ends[index])].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        content, start = self.buffer.tobytes(), 0
        for end in self.ends.tolist():
            yield content[start:end].decode("utf-8", "surrogatepass")
            start = end
