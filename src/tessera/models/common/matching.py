"""Bipartite matching between predictions and targets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Matches = list[list[tuple[Tensor, Tensor]]]
"""``matches[layer][image]``: indices of predictions and of the targets they are matched with, int64, sorted by target."""


def assign(costs: Sequence[Tensor]) -> Matches:
    """Cheapest one-to-one assignment for every image and layer; ``costs`` has one (layers, Q, N) tensor per image.

    All costs come to the CPU in one transfer. Raises FloatingPointError if one is not finite, which means that the predictions
    are not.
    """
    device = costs[0].device
    flat = torch.cat([cost.flatten() for cost in costs]).float().cpu()
    if not bool(flat.isfinite().all()):
        raise FloatingPointError(
            "the matching cost of predictions and targets is not finite: the network's outputs hold NaN or infinity"
        )
    pieces = torch.split(flat, [cost.numel() for cost in costs])
    on_cpu = [piece.view(cost.shape) for piece, cost in zip(pieces, costs, strict=True)]
    matches: Matches = [[] for _ in range(costs[0].shape[0])]
    for image in on_cpu:
        for layer, cost in enumerate(image.numpy()):
            predictions, targets = (torch.from_numpy(index) for index in linear_sum_assignment(cost))
            order = targets.argsort()
            matches[layer].append((predictions[order].to(device), targets[order].to(device)))
    return matches


_alone = False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Losses of images that the other processes do not see at the same time: nothing is averaged over processes."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def mean_count(targets: int, device: torch.device) -> Tensor:
    """What losses summed over matched pairs are divided by: the number of targets, averaged over all processes (see ``alone``), at least 1."""
    count = torch.tensor(float(targets), device=device)
    if not _alone and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count /= torch.distributed.get_world_size()
    return count.clamp(min=1)
