"""The LightningModule: a thin adapter around the network, the criterion and the schedule that it is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from tessera.files import UserError
from tessera.models.base import Network
from tessera.spec.schema import TrainSpec
from tessera.structures import Batch, Target
from tessera.training.optim import (
    Schedule,
    build_optimizer,
    clip_gradients,
    parameter_groups,
    set_learning_rates,
)
from tessera.training.state import counter_seed


class TrainModule(LightningModule):
    """Takes its position from ``step``, which ``loop.Loop`` advances; what happens at a step depends on (seed, step, rank) alone."""

    def __init__(
        self,
        network: Network,
        criterion: Callable[[dict[str, Tensor], list[Target]], dict[str, Tensor]],
        train: TrainSpec,
        schedule: Schedule,
        seed: int,
        frozen: list[nn.Module],
    ) -> None:
        super().__init__()
        self.network = network
        self.criterion = criterion
        self.settings = train
        self.schedule = schedule
        self.seed = seed
        self.frozen = frozen
        self.groups = parameter_groups(network, train.optim)
        self.step = 0
        self.file_names: list[str] = []
        self.losses: dict[str, float] = {}
        """Means over processes at the last step: every loss, ``loss`` (their sum) and ``grad_norm`` (before clipping)."""

    def configure_optimizers(self) -> Optimizer:
        return build_optimizer(self.network, self.groups, self.settings.optim)

    def train(self, mode: bool = True) -> TrainModule:
        """Frozen modules stay in evaluation mode: their dropout and running statistics rest, too."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return to_device(batch, device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(counter_seed(self.seed, "step", self.step, self.global_rank))
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        set_learning_rates(optimizer, self.schedule.factor(self.step))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.file_names = [meta.file_name for meta in batch.metas]
        outputs = self.network(**self.network.inputs(batch))
        try:
            losses = self._losses(outputs, batch.targets)
        except FloatingPointError as error:
            # Only this process knows; the launcher ends the others.
            self._refuse_step(str(error), [self.file_names])
        self.losses = self._to_floats(losses)
        if not all(map(math.isfinite, self.losses.values())):
            self._refuse_step("the loss is not finite", self._all_file_names())
        return losses["loss"]

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        settings = self.settings
        order = settings.clip_grad_norm_type
        root = self.trainer.model
        if isinstance(root, FullyShardedDataParallel):
            limit = settings.clip_grad_norm if settings.clip_grad_type == "full" else float("inf")
            norm = root.clip_grad_norm_(limit, order)
            if settings.clip_grad_type == "value":
                torch.nn.utils.clip_grad_value_(root.parameters(), settings.clip_grad_norm)
        else:
            parameters: list[Tensor] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            norm = clip_gradients(parameters, settings.clip_grad_type, settings.clip_grad_norm, order)
        self.losses["grad_norm"] = float(norm)
        if not math.isfinite(self.losses["grad_norm"]) and settings.precision != "fp16":
            # Under fp16 the loss scaler skips such a step and lowers its scale, which is its way of working.
            self._refuse_step("the gradient is not finite", self._all_file_names())

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The network's outputs, under the precision of the training."""
        outputs: dict[str, Tensor] = self.network(**self.network.inputs(batch))
        return outputs

    def _losses(self, outputs: dict[str, Tensor], targets: list[Target] | None) -> dict[str, Tensor]:
        if targets is None:
            raise ValueError("the batch carries no targets; expected a loader made for training")
        losses = self.criterion(outputs, targets)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def _to_floats(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """Means over processes, brought to the CPU at once."""
        values = torch.stack([value.detach().float() for value in losses.values()])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(values)
            values /= torch.distributed.get_world_size()
        return dict(zip(losses, values.tolist(), strict=True))

    def _all_file_names(self) -> list[list[str]]:
        """Names in this step's batch on every process."""
        if not torch.distributed.is_initialized():
            return [self.file_names]
        names: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(names, self.file_names)
        return names

    def _refuse_step(self, reason: str, names: list[list[str]]) -> NoReturn:
        epoch, batch = divmod(self.step, self.schedule.steps_per_epoch)
        losses = ", ".join(f"{name} {value:.4g}" for name, value in self.losses.items())
        raise UserError(
            f"{reason} at epoch {epoch + 1}, batch {batch + 1} of {self.schedule.steps_per_epoch} (step {self.step + 1}), images "
            f"{', '.join(name for some in names for name in some)}: {losses or 'no loss yet'}. Training stopped and the last checkpoint is kept. "
            f"Lower train.optim.lr (now {self.settings.optim.lr}), add train.optim.warmup_iters (now "
            f"{self.settings.optim.warmup_iters}), or look at these images"
            + ("; fp16 overflows easily, train.precision=bf16 does not" if self.settings.precision == "fp16" else "")
        )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """``truths`` stay where they are: metrics are computed on the CPU."""
    targets = None if batch.targets is None else [move_target(target, device) for target in batch.targets]
    images = batch.images.to(device, non_blocking=True)
    return replace(batch, images=images, padding=batch.padding.to(device, non_blocking=True), targets=targets)


def move_target(target: Target, device: torch.device) -> Target:
    return Target(
        labels=target.labels.to(device),
        masks=None if target.masks is None else target.masks.to(device),
        boxes=target.boxes.to(device),
        iscrowd=target.iscrowd.to(device),
        areas=target.areas.to(device),
        semantic=None if target.semantic is None else target.semantic.to(device),
        size=target.size,
    )
