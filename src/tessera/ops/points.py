"""Values of masks at points, and the points where a mask is least certain (PointRend, section 3.1).

Points are (x, y) in [0, 1], (0, 0) the outer corner of the first pixel; values are bilinear, zero outside.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_logits(maps: Tensor, points: Tensor) -> Tensor:
    """Values of (K, C, h, w) float maps at (K, P, 2) points, shared by the C maps of a row: (K, C, P)."""
    grid = (2 * points - 1).unsqueeze(2)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False).squeeze(3)


def sample_masks(masks: Tensor, index: Tensor, points: Tensor) -> Tensor:
    """Values of bool masks at points, without a float copy of any mask.

    masks (M, H, W) bool; index (K,) says which mask a row of points (K, P, 2) belongs to. Returns (K, P) float32.
    """
    height, width = masks.shape[-2:]
    x = points[..., 0] * width - 0.5
    y = points[..., 1] * height - 0.5
    left, top = x.floor(), y.floor()
    right_share, lower_share = x - left, y - top
    columns = (left.long(), left.long() + 1)
    rows = (top.long(), top.long() + 1)
    flat = masks.flatten()
    start = (index * (height * width)).unsqueeze(1)
    value = points.new_zeros(points.shape[:-1])
    for row, row_share in zip(rows, (1 - lower_share, lower_share), strict=True):
        inside_row = (row >= 0) & (row < height)
        row_start = start + row.clamp(0, height - 1) * width
        for column, column_share in zip(columns, (1 - right_share, right_share), strict=True):
            inside = inside_row & (column >= 0) & (column < width)
            taken = flat[row_start + column.clamp(0, width - 1)] & inside
            value += taken * (row_share * column_share)
    return value


@torch.no_grad()
def uncertain_points(maps: Tensor, count: int, oversample_ratio: float, importance_sample_ratio: float) -> Tensor:
    """Points at which to compare (K, h, w) logit maps with their targets: (K, count, 2).

    ``importance_sample_ratio * count`` of them are those of ``oversample_ratio * count`` uniform candidates whose logit is
    nearest zero; the rest are uniform. Random numbers come from torch's global generator.
    """
    rows = maps.shape[0]
    important = int(importance_sample_ratio * count)
    candidates = torch.rand(rows, int(count * oversample_ratio), 2, device=maps.device)
    certainty = sample_logits(maps.unsqueeze(1), candidates).squeeze(1).abs()
    chosen = certainty.topk(important, dim=1, largest=False, sorted=False).indices
    uniform = torch.rand(rows, count - important, 2, device=maps.device)
    return torch.cat((candidates.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 2)), uniform), dim=1)
