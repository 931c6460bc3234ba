"""Whole tensors out of a training and into it, however its parameters are spread over processes."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import Trainer
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel

PREFIX = "network."


def collect(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any] | None]:
    """State of the network (copies on the CPU), of the optimiser and of the loss scaler. Every process must call it."""
    root = trainer.model
    optimizer = trainer.optimizers[0]
    if isinstance(root, FullyShardedDataParallel):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: dict[str, Any] = get_model_state_dict(root, options=options)
        state = get_optimizer_state_dict(root, optimizer, options=options)
    else:
        weights = trainer.lightning_module.state_dict()
        state = optimizer.state_dict()
    network = {
        name.removeprefix(PREFIX): value.detach().cpu().clone()
        for name, value in weights.items()
        if name.startswith(PREFIX)
    }
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return network, state, None if scaler is None else scaler.state_dict()


def restore_optimizer(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    root = trainer.model
    optimizer = trainer.optimizers[0]
    if isinstance(root, FullyShardedDataParallel):
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
        set_optimizer_state_dict(root, optimizer, checkpoint["optimizer"], options=options)
    else:
        optimizer.load_state_dict(checkpoint["optimizer"])
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if isinstance(scaler, torch.amp.GradScaler) and checkpoint["scaler"]:
        scaler.load_state_dict(checkpoint["scaler"])
