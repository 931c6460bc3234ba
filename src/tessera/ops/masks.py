"""Masks: to boxes, nearest-neighbour resizing. Far edges are exclusive."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def mask_to_box(mask: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """(H, W) to the tight (x1, y1, x2, y2); zeros for an empty mask."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def masks_to_boxes(masks: Tensor) -> Tensor:
    """(N, H, W) bool to (N, 4) float32, tight, corner format in pixels; zeros for an empty mask."""
    count, height, width = masks.shape
    if not count:
        return torch.zeros(0, 4, device=masks.device)
    # On the CPU the maximum of bytes takes a tenth of the time that any() of booleans takes.
    values = masks.view(torch.uint8)
    edges = []
    for occupied, size in ((values.amax(dim=1) > 0, width), (values.amax(dim=2) > 0, height)):
        places = torch.arange(size, device=masks.device)
        first = torch.where(occupied, places, size).amin(dim=1)
        last = torch.where(occupied, places + 1, 0).amax(dim=1)
        edges.append((torch.where(last > 0, first, 0), last))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], dim=1).to(torch.float32)


def resize_nearest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., H, W) of any type to (..., *size); pixel centres are aligned, as in the bilinear resizing of images."""
    if maps.shape[-2:] == size:
        return maps
    rows = nearest_index(maps.shape[-2], size[0]).to(maps.device)
    columns = nearest_index(maps.shape[-1], size[1]).to(maps.device)
    return maps.index_select(-2, rows).index_select(-1, columns)


def nearest_index(source: int, target: int) -> Tensor:
    """(target,) int64: the source row or column whose centre is nearest to each target centre, in exact integer arithmetic."""
    return (2 * torch.arange(target) + 1) * source // (2 * target)
