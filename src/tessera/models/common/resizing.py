"""Maps of a network back at the size of the original image."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tessera.structures import ImageMeta


def to_original(maps: Tensor, meta: ImageMeta, input_size: tuple[int, int]) -> Tensor:
    """(N, h, w) of one image resized to the padded input (H, W), cropped, and resized to (N, *original_size)."""
    height, width = meta.resized_size
    padded = bilinear(maps.unsqueeze(0), input_size)
    return bilinear(padded[..., :height, :width], meta.original_size).squeeze(0)


def bilinear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, N, h, w) to (B, N, *size)."""
    if tuple(maps.shape[-2:]) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
