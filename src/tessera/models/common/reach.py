"""Which parameters of a backbone matter to a network that reads some of its maps only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

_PROBE = (64, 96)
"""Height and width."""


def freeze_unread(backbone: nn.Module, maps: Sequence[int]) -> None:
    """Takes the gradient from parameters that lead to none of the ``maps`` (indices), such as the norms of the others.

    An optimiser would decay them, and distributed training would wait for their gradients for ever.
    """
    parameters = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    training = backbone.training
    backbone.eval()
    with torch.enable_grad():
        features = backbone(torch.zeros(1, 3, *_PROBE))
        found = torch.autograd.grad(sum(features[index].sum() for index in maps), parameters, allow_unused=True)
    backbone.train(training)
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.requires_grad_(gradient is not None)
