"""Optimisers, their parameter groups, and learning rates as closed forms of the step."""

from __future__ import annotations

import difflib
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from tessera.files import UserError
from tessera.models.base import Network
from tessera.spec.schema import OptimSpec

SHARDED = "_fsdp_wrapped_module."
POSITION_TABLES = ("relative_position_bias_table", "absolute_pos_embed", "pos_embed")


@dataclass(frozen=True)
class Group:
    """Parameters with one learning rate and one weight decay."""

    name: str
    lr: float
    weight_decay: float
    parameters: tuple[str, ...]


def parameter_groups(network: Network, optim: OptimSpec) -> list[Group]:
    """Trained parameters by (backbone or not, key of ``multipliers`` or none, decayed or not), empty groups left out.

    As published for Mask2Former: no decay on norms, embeddings and tables of positions. Raises UserError for a key that fits no
    parameter, and where none is trained.
    """
    backbone = network.backbone_parameters()
    undecayed = _undecayed(network)
    multiplied = _multiplied(network, optim.multipliers)
    found: dict[tuple[bool, str, bool], list[str]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            found.setdefault((name in backbone, multiplied.get(name, ""), name in undecayed), []).append(name)
    if not found:
        raise UserError("train.freeze leaves no parameter to train; freeze less")
    return [
        Group(
            ("backbone" if in_backbone else "head") + (f"[{key}]" if key else "") + ("_no_decay" if spared else ""),
            optim.lr * (optim.backbone_multiplier if in_backbone else 1.0) * optim.multipliers.get(key, 1.0),
            0.0 if spared else optim.weight_decay,
            tuple(names),
        )
        for (in_backbone, key, spared), names in sorted(found.items())
    ]


def build_optimizer(network: nn.Module, groups: list[Group], optim: OptimSpec) -> Optimizer:
    """``network`` may be wrapped by now: sharding puts its own prefix before a parameter's name."""
    parameters = {name.replace(SHARDED, ""): parameter for name, parameter in network.named_parameters()}
    arguments = [
        {
            "params": [parameters[name] for name in group.parameters],
            "name": group.name,
            "lr": group.lr,
            "initial_lr": group.lr,
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]
    if optim.type == "SGD":
        return SGD(arguments, lr=optim.lr, momentum=optim.momentum)
    return AdamW(arguments, lr=optim.lr)


class Schedule:
    """The factor on every group's ``initial_lr``: a function of the step alone, and of the plateau's drops where there are any."""

    def __init__(self, optim: OptimSpec, steps_per_epoch: int, num_epochs: int) -> None:
        self.optim = optim
        self.steps_per_epoch = steps_per_epoch
        self.total = steps_per_epoch * num_epochs
        self.drops = 0
        self.lowest = math.inf
        self.waited = 0

    def factor(self, step: int) -> float:
        """``step`` counts from 0: the number of optimiser steps done before the one this factor is for."""
        return self._warmup(step) * self._decay(step)

    def epoch_end(self, value: float | None) -> None:
        """ReduceOnPlateau: ``value`` of the monitored loss at the end of an epoch, None where it was not measured."""
        if self.optim.lr_scheduler != "ReduceOnPlateau" or value is None:
            return
        if value < self.lowest:
            self.lowest, self.waited = value, 0
            return
        self.waited += 1
        if self.waited > self.optim.patience:
            self.drops, self.waited = self.drops + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"drops": self.drops, "lowest": self.lowest, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drops, self.lowest, self.waited = int(state["drops"]), float(state["lowest"]), int(state["waited"])

    def _warmup(self, step: int) -> float:
        if step >= self.optim.warmup_iters:
            return 1.0
        done = step / self.optim.warmup_iters
        return self.optim.warmup_factor * (1 - done) + done

    def _decay(self, step: int) -> float:
        optim, epoch = self.optim, step // self.steps_per_epoch
        if optim.lr_scheduler == "MultiStep":
            return float(optim.gamma ** bisect_right(sorted(optim.milestones), epoch))
        if optim.lr_scheduler == "StepLR":
            return float(optim.gamma ** (epoch // optim.step_size))
        if optim.lr_scheduler == "WarmupPoly":
            floor = optim.min_lr / optim.lr
            return float(floor + (1 - floor) * max(0.0, 1 - step / self.total) ** optim.power)
        if optim.lr_scheduler == "ReduceOnPlateau":
            return float(optim.gamma**self.drops)
        return 1.0


def set_learning_rates(optimizer: Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def clip_gradients(parameters: list[Tensor], kind: str, limit: float, order: float) -> Tensor:
    """Clips in place as ``train.clip_grad_type`` says and returns the total norm of order ``order`` from before, as a scalar."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, norm_type=order)
    if kind == "full":
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    elif kind == "value":
        torch.nn.utils.clip_grad_value_(parameters, limit)
    return norm


def _multiplied(network: nn.Module, multipliers: Mapping[str, float]) -> dict[str, str]:
    """Parameter -> the longest key of ``multipliers`` (by components, then letters) that its dotted name holds as whole components."""
    names = [name for name, _ in network.named_parameters()]
    found: dict[str, str] = {}
    for key in sorted(multipliers, key=lambda key: (key.count("."), len(key), key)):
        fitting = [name for name in names if f".{key}." in f".{name}."]
        if not fitting:
            known = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
            close = difflib.get_close_matches(key, {*known, *names}, n=3) or known[:10]
            raise UserError(
                f"train.optim.multipliers: no parameter's name holds {key!r}; expected components of dotted names, such as "
                f"{', '.join(close)}"
            )
        found |= dict.fromkeys(fitting, key)
    return found


def _undecayed(network: nn.Module) -> set[str]:
    names = set()
    for prefix, module in network.named_modules():
        whole = "norm" in type(module).__name__.lower() or isinstance(module, nn.Embedding)
        for name, _ in module.named_parameters(prefix, recurse=False):
            if whole or name.rpartition(".")[2] in POSITION_TABLES:
                names.add(name)
    return names
