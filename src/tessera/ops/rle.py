"""COCO's run lengths: masks as short strings, or as lists of numbers, that every COCO tool reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

if TYPE_CHECKING:
    from torch import Tensor


class Rle(TypedDict):
    size: list[int]
    """[height, width]."""
    counts: str


def encode_masks(masks: Tensor | np.ndarray) -> list[Rle]:
    """(N, H, W) bool to N encodings."""
    array = masks if isinstance(masks, np.ndarray) else masks.cpu().numpy()
    count, height, width = array.shape
    if not count:
        return []
    # The encoder wants (H, W, N) in Fortran order, which is (N, W, H) in C order seen from behind.
    columns = np.ascontiguousarray(array.transpose(0, 2, 1)).view(np.uint8)
    encoded = coco_mask.encode(columns.transpose(2, 1, 0))
    return [{"size": [height, width], "counts": rle["counts"].decode("ascii")} for rle in encoded]


def decode_masks(rles: Sequence[Rle], size: tuple[int, int]) -> np.ndarray:
    """(N, H, W) bool; ``size`` is (H, W) and says the shape when there is nothing to decode."""
    if not rles:
        return np.zeros((0, *size), bool)
    return np.ascontiguousarray(coco_mask.decode(list(rles)).transpose(2, 0, 1)).astype(bool)


def decode_counts(counts: Sequence[int], height: int, width: int) -> npt.NDArray[np.bool_]:
    """Run lengths down the columns, starting with zeros, to (H, W). They must add up to H x W."""
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, np.asarray(counts, dtype=np.int64)).reshape(width, height).T
