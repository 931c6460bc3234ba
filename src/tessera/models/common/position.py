"""Sine position encodings (DETR, appendix A.4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sine_position(height: int, width: int, channels: int, like: Tensor, temperature: float = 10000.0) -> Tensor:
    """(height * width, channels) in float32 on the device of ``like``: the row in the first half of the channels, the column in the second.

    Pixel i of n is at 2 pi (i + 1) / n, without the half-pixel shift of Deformable DETR, as Mask2Former has it.
    """
    half = channels // 2
    exponent = 2 * torch.div(torch.arange(half, device=like.device), 2, rounding_mode="floor") / half
    periods = temperature**exponent
    rows = _encode(height, periods, like.device)
    columns = _encode(width, periods, like.device)
    grid = (rows.unsqueeze(1).expand(-1, width, -1), columns.unsqueeze(0).expand(height, -1, -1))
    return torch.cat(grid, dim=2).flatten(0, 1)


def _encode(size: int, periods: Tensor, device: torch.device) -> Tensor:
    place = torch.arange(1, size + 1, device=device, dtype=torch.float32) / (size + 1e-6) * (2 * math.pi)
    angle = place.unsqueeze(1) / periods
    return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=2).flatten(1)
