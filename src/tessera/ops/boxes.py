"""Boxes: corner format has its far edge exclusive, so that width is x2 - x1."""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre-size boxes to corner boxes; the unit (pixels or fractions) is kept."""
    cx, cy, width, height = boxes.unbind(-1)
    return torch.stack((cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) corner boxes to centre-size boxes; the unit (pixels or fractions) is kept."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), dim=-1)


def scale_boxes(boxes: Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """(N, 4) corner boxes of an image of (height, width) ``size`` as they lie in it after resizing to ``new_size``."""
    y, x = (new / old for new, old in zip(new_size, size, strict=True))
    return boxes * boxes.new_tensor([x, y, x, y])


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, 4) corner boxes cut at the edges of an image of (height, width) ``size``, in float32; what lies outside loses its area."""
    height, width = size
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height])).to(torch.float32)
