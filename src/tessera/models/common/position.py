"""Sine position encodings (DETR, appendix A.4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 10000.0


def sine_position(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """(height * width, channels) in float32 on the device of ``like``: the row in the first half of the channels, the column in the second.

    Pixel i of n is at 2 pi (i + 1) / n, without the half-pixel shift of Deformable DETR, as Mask2Former has it.
    """
    rows, columns = (
        torch.arange(1, size + 1, device=like.device, dtype=torch.float32) / (size + 1e-6) for size in (height, width)
    )
    return encode_places(rows.unsqueeze(0), columns.unsqueeze(0), channels).squeeze(0)


def centred_sine_position(valid: Tensor, height: int, width: int, channels: int) -> Tensor:
    """(B, height * width, channels): pixel i of n valid ones is at 2 pi (i + 1/2) / n, as Deformable DETR has it.

    valid (B, 2), float32: columns and rows of each image that are no padding.
    """
    rows, columns = (
        (torch.arange(size, device=valid.device, dtype=torch.float32) + 0.5) / (valid[:, axis : axis + 1] + 1e-6)
        for size, axis in ((height, 1), (width, 0))
    )
    return encode_places(rows, columns, channels)


def encode_places(rows: Tensor, columns: Tensor, channels: int) -> Tensor:
    """Rows (B, h) and columns (B, w), as fractions of the image, to (B, h * w, channels): rows in the first half of the channels."""
    half = channels // 2
    exponent = 2 * torch.div(torch.arange(half, device=rows.device), 2, rounding_mode="floor") / half
    periods = TEMPERATURE**exponent
    grid = (
        _encode(rows, periods).unsqueeze(2).expand(-1, -1, columns.shape[1], -1),
        _encode(columns, periods).unsqueeze(1).expand(-1, rows.shape[1], -1, -1),
    )
    return torch.cat(grid, dim=3).flatten(1, 2)


def _encode(places: Tensor, periods: Tensor) -> Tensor:
    angle = (places * (2 * math.pi)).unsqueeze(-1) / periods
    return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(-2)
