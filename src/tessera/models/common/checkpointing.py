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
    """Batch norms compute as they did but do not count the recomputed batch a second time."""
    norms = [
        m
        for m in module.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training and m.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
