"""Activation checkpointing: recompute activations in the backward pass instead of keeping them (Chen et al. 2016)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def run(module: nn.Module, *inputs: Any, recompute: bool) -> Any:
    """``module(*inputs)``, recomputed in the backward pass if asked and gradients flow: the same numbers, random ones included."""
    if not recompute or not torch.is_grad_enabled():
        return module(*inputs)
    return run_checkpointed(module, *inputs)


def run_checkpointed(module: nn.Module, *inputs: Any) -> Any:
    def contexts() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
        return contextlib.nullcontext(), _frozen_statistics(module)

    forward: Callable[..., Any] = module
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms do everything that they did, but do not count the recomputed batch a second time."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
