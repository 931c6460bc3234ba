"""Which parameters of a backbone matter to a network that reads some of its maps only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_PROBE = (64, 96)
"""Height and width."""


def freeze_unread(backbone: nn.Module, maps: Sequence[int]) -> None:
    """Takes the gradient from parameters that lead to none of the ``maps`` (indices), such as the norms of the others.

    An optimiser would decay them, and distributed training would wait for their gradients for ever.
    """
    training = backbone.training
    backbone.eval()
    with torch.enable_grad():
        features = backbone(torch.zeros(1, 3, *_PROBE))
    backbone.train(training)
    read = _leaves([features[index] for index in maps])
    for parameter in backbone.parameters():
        parameter.requires_grad_(parameter in read)


def _leaves(outputs: Sequence[Tensor]) -> set[Tensor]:
    """What gradients of the outputs would end in, without computing any."""
    found: set[Tensor] = set()
    waiting: list[Any] = [output.grad_fn for output in outputs]
    seen: set[Any] = {None}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return found
