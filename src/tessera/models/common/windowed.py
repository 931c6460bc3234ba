"""What the window transformers (Swin, GC ViT) share: cutting maps into windows, stochastic depth, initialisation.

Shapes: B images, h x w tokens, C channels, nW windows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pad_to_windows(x: Tensor, window: int) -> Tensor:
    """(B, h, w, C) with zeros below and to the right, up to whole windows."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % window, 0, -x.shape[1] % window))


def partition(x: Tensor, window: int) -> Tensor:
    """(B, h, w, C), whole windows, to (B, nW, window * window, C), row by row."""
    rows, columns = x.shape[1] // window, x.shape[2] // window
    x = torch.unflatten(torch.unflatten(x, 2, (columns, window)), 1, (rows, window))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def join(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """What ``partition`` cut, back to (B, height, width, C)."""
    rows, columns = height // window, width // window
    x = torch.unflatten(torch.unflatten(x, 2, (window, window)), 1, (rows, columns))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Per stage and block: growing linearly from 0 to ``last`` over the blocks of all stages (Huang et al. 2016)."""
    blocks = sum(depths)
    rates = iter([last * block / max(1, blocks - 1) for block in range(blocks)])
    return [[next(rates) for _ in range(depth)] for depth in depths]


def initialise(module: nn.Module) -> None:
    """For ``nn.Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
