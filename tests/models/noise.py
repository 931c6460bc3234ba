from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def noisy(model: Module) -> Module:
    """In evaluation mode, with noise on all weights and statistics: mixed-up names would go unnoticed among tensors that start equal."""
    torch.manual_seed(0)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            noise = 0.1 * (value.abs().mean() or 1) * torch.randn_like(value)
            value += noise.abs() if name.endswith("running_var") else noise
    return model.eval()
