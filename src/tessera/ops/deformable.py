"""Multi-scale deformable attention (Deformable DETR, section 4.1) in plain PyTorch: runs everywhere, exports everywhere.

Shapes: B images, Q queries, M heads, D channels per head, L levels, K points, S = sum of the levels' h * w.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor


def multi_scale_deformable_sample(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sum of bilinear samples of all levels.

    value (B, S, M, D), the levels' pixels one level after the other; shapes (h, w) per level, numbers rather than a tensor, so
    that an exported graph can keep them free; locations (B, Q, M, L, K, 2) as (x, y), in [0, 1] inside a level, zeros outside;
    weights (B, Q, M, L, K). Returns (B, Q, M * D).
    """
    return _attend(value, shapes, locations, weights, _sample_grid)


def multi_scale_deformable_gather(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """The same numbers without GridSample, whose TensorRT kernels are silently wrong in some versions (TensorRT issue 4813)."""
    return _attend(value, shapes, locations, weights, _sample_gather)


def _attend(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    sample: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    maps = value.permute(0, 2, 3, 1).reshape(batch * heads, channels, -1)
    points = locations.transpose(1, 2).flatten(0, 1).unbind(2)  # per level B*M, Q, K, 2
    shares = weights.transpose(1, 2).flatten(0, 1).unsqueeze(1).unbind(3)  # per level B*M, 1, Q, K
    total: Tensor | None = None
    start = 0
    for level, (height, width) in enumerate(shapes):
        stop = start + height * width
        level_map = maps[:, :, start:stop].reshape(batch * heads, channels, height, width)
        part = (sample(level_map, points[level]) * shares[level]).sum(-1)
        total = part if total is None else total + part
        start = stop
    assert total is not None
    return total.reshape(batch, heads * channels, queries).transpose(1, 2)


def _sample_grid(maps: Tensor, points: Tensor) -> Tensor:
    """(N, D, h, w) at (N, Q, K, 2): (N, D, Q, K)."""
    return F.grid_sample(maps, 2 * points - 1, mode="bilinear", padding_mode="zeros", align_corners=False)


def _sample_gather(maps: Tensor, points: Tensor) -> Tensor:
    count, channels, height, width = maps.shape
    queries, samples = points.shape[1:3]
    x = points[..., 0] * width - 0.5
    y = points[..., 1] * height - 0.5
    left, top = x.floor(), y.floor()
    flat = maps.flatten(2)
    value: Tensor | None = None
    for row in (top, top + 1):
        for column in (left, left + 1):
            inside = (row >= 0) & (row <= height - 1) & (column >= 0) & (column <= width - 1)
            share = (1 - (x - column).abs()) * (1 - (y - row).abs()) * inside.to(maps.dtype)
            index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
            index = index.reshape(count, 1, queries * samples).expand(-1, channels, -1)
            tap = flat.gather(2, index).reshape(count, channels, queries, samples) * share.unsqueeze(1)
            value = tap if value is None else value + tap
    assert value is not None
    return value
