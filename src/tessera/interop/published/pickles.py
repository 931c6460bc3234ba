"""Pickles of numpy arrays, as detectron2 publishes weights (``.pkl``), read without running anything that stands in them.

A pickle is a program that names functions and has them called. Here it may name a handful, each of them answered by a stand-in below
that only keeps what it is given; numpy's own are not called either, because they trust the type that a file claims for its bytes.
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera.files import UserError, open_input, reading

TYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")
"""Numbers that torch has, too."""


class _Type:
    """``numpy.dtype``."""

    def __init__(self, name: object, *_flags: object) -> None:
        self.name = _text(name)
        self.order = "<"

    def __setstate__(self, state: tuple[object, ...]) -> None:
        """(version, byte order, ...)."""
        self.order = _text(state[1])

    def numpy(self) -> np.dtype[Any]:
        if self.name not in TYPES:
            raise _RefusedError(f"an array of type {self.name[:40]!r}, expected one of {', '.join(TYPES)}")
        return np.dtype(self.name).newbyteorder(">" if self.order == ">" else "<")


@dataclass
class _Array:
    """``numpy.ndarray`` and its scalars."""

    shape: object = ()
    type: object = None
    data: object = b""
    fortran: object = False

    def __setstate__(self, state: tuple[object, ...]) -> None:
        """(version, shape, type, whether columns come first, bytes)."""
        _, self.shape, self.type, self.fortran, self.data = state

    def tensor(self) -> Tensor:
        if not isinstance(self.type, _Type) or not isinstance(self.shape, tuple):
            raise _RefusedError("an array without a type or a shape")
        kind = self.type.numpy()
        # Python 2 wrote bytes as text.
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data
        if not isinstance(data, bytes | bytearray):
            raise _RefusedError(f"an array whose values are a {type(data).__name__}, expected bytes")
        array = np.frombuffer(bytes(data), kind).reshape(self.shape, order="F" if self.fortran else "C")
        return torch.from_numpy(array.astype(kind.newbyteorder("="), order="C", copy=True))


class _RefusedError(Exception):
    """What the file holds that it may not hold."""


def _reconstruct(*_start: object) -> _Array:
    """An array whose content comes with ``__setstate__``."""
    return _Array()


def _scalar(kind: object, data: object) -> _Array:
    return _Array((), kind, data)


def _frombuffer(data: object, kind: object, shape: object, order: object) -> _Array:
    return _Array(shape, kind, data, order == "F")


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """Protocol 2 of Python 3 writes bytes as text."""
    if not isinstance(text, str) or encoding != "latin1":
        raise _RefusedError(f"bytes in the encoding {str(encoding)[:40]!r}, expected latin1")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """And none at all as a call without arguments."""
    return b""


def _text(value: object) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


_KNOWN: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": collections.OrderedDict,
    "_codecs.encode": _encode,
    "__builtin__.bytes": _no_bytes,
    "numpy.ndarray": _Array,
    "numpy.dtype": _Type,
    **{
        f"numpy.{core}.{name}": stand_in
        for core in ("core", "_core")  # before and since numpy 2
        for name, stand_in in (
            ("multiarray._reconstruct", _reconstruct),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _frombuffer),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[f"{module}.{name}"]
        except KeyError:
            raise _RefusedError(f"{module[:80]}.{name[:80]}") from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The named arrays below ``model`` (or ``state_dict``), or of the whole file where it holds nothing else.

    Raises UserError when the file is missing or cut off, when it names anything but arrays and dictionaries, and when there are no
    named arrays in it. Nothing in the file is executed.
    """
    with reading(path, "a pickle of numpy arrays"):
        stream = open_input(path)
    try:
        with stream:
            content = _Unpickler(stream, encoding="latin1").load()
    except _RefusedError as refused:
        raise UserError(
            f"{path}: names {refused}, which a file of weights does not need; expected a pickle of numpy arrays alone, as detectron2 "
            "writes them. Nothing in it was executed"
        ) from None
    except Exception as error:  # a damaged or hostile file makes the unpickler raise anything
        raise UserError(
            f"{path}: is no whole pickle ({type(error).__name__}); is it cut off? Nothing in it was executed"
        ) from None
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    return _tensors(content, path)


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path}: holds no named arrays; expected those of a detectron2 model, below the key `model`")
    found = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, _Array):
            kind = "array" if isinstance(value, _Array) else type(value).__name__
            raise UserError(f"{path}: entry {str(name)[:80]!r} is a {kind}, expected a name and an array")
        try:
            found[name] = value.tensor()
        except (_RefusedError, ValueError, TypeError) as error:
            raise UserError(f"{path}: entry {name[:80]!r} cannot be read: {error}; is the file damaged?") from None
    return found
