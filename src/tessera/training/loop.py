"""What happens after every step: epochs, validation, checkpoints, stopping.

To Lightning the whole training is one epoch over ``stream.Stream``; the position is the step number alone. So a restart at any step
is a start with other counters, and nothing depends on how a version of Lightning resumes inside an epoch.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from tessera.files import UserError
from tessera.spec.networks import Mode
from tessera.spec.schema import TrainSpec
from tessera.structures import Batch
from tessera.training.checkpoint import Folder
from tessera.training.interrupt import NoBatchCame, StopRequest, TrainingStopped
from tessera.training.module import TrainModule, to_device
from tessera.training.progress import Progress, describe
from tessera.training.sharding import collect, restore_optimizer
from tessera.training.state import METRIC, State
from tessera.training.validation import Validation


class Loop(Callback):
    def __init__(
        self,
        train: TrainSpec,
        mode: Mode,
        state: State,
        restored: dict[str, Any] | None,
        folder: Folder,
        identity: dict[str, Any],
        validate: Validation | None,
        progress: Progress,
        stop: StopRequest,
    ) -> None:
        """``restored`` is the checkpoint that ``state`` came from; ``identity`` goes into every checkpoint as it is."""
        self.train = train
        self.metric = METRIC[mode]
        self.state = state
        self.restored = restored
        self.folder = folder
        self.identity = identity
        self.validate = validate
        self.progress = progress
        self.stop = stop
        self.steps_per_epoch = folder.steps_per_epoch
        self.best_weights = restored.get("best") if restored else None
        self._clock = time.monotonic()
        self._inside = False
        """A step was made, and what belongs to it, such as its validation, was not yet."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, TrainModule)
        require_same_start(self.state.step, self.folder)
        module.step = self.state.step
        if self.restored is not None:
            restore_optimizer(trainer, self.restored)
            module.schedule.load_state_dict(self.state.schedule)
        module.train()
        self.stop.install()
        self._clock = time.monotonic()
        self.progress.start(self.state.step)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module, TrainModule)
        state, train = self.state, self.train
        self._inside = True
        state.add(module.losses)
        module.step = state.step
        rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
        epoch, inside = divmod(state.step, self.steps_per_epoch)
        ended = inside == 0
        self.progress.step(state.step, module.losses, rates)
        if ended:
            means = state.close_epoch(self.steps_per_epoch)
            lr = train.optim.lr * module.schedule.factor(state.step - 1)
            state.record({"epoch": epoch, "lr": lr, **{f"train_{name}": value for name, value in means.items()}})
        better = False
        if self.validate is not None and self._due(
            train.validation_interval, train.validation_interval_unit, ended, epoch
        ):
            better = self._validate(trainer, module, epoch if ended else epoch + 1)
        if ended:
            row = state.rows[-1]
            module.schedule.epoch_end(row.get(train.optim.monitor_name))
            self.progress.epoch(epoch, row)
        stopping = self._stop_requested()
        finished = epoch == train.num_epochs and ended
        due = self._due(train.checkpoint_interval, train.checkpoint_interval_unit, ended, epoch)
        if due or better or stopping or finished:
            name = self.folder.name(state.step, train.checkpoint_interval_unit) if due else None
            self._save(trainer, module, name, better)
        if stopping and not finished:
            raise TrainingStopped(
                stopping,
                f"stopped after step {state.step} (epoch {epoch if ended else epoch + 1} of {train.num_epochs}); saved "
                f"{self.folder.latest}. The same command continues from there",
            )
        self._inside = False

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Saves what one process has done since the last checkpoint, between two steps; several would have to agree on it."""
        assert isinstance(module, TrainModule)
        between = isinstance(exception, NoBatchCame) and not self._inside
        if between and trainer.world_size == 1 and self.state.step > self.state.starts[-1]["step"]:
            self._save(trainer, module, None, False)

    def _due(self, interval: int, unit: str, ended: bool, epoch: int) -> bool:
        return self.state.step % interval == 0 if unit == "step" else ended and epoch % interval == 0

    def _validate(self, trainer: Trainer, module: TrainModule, epoch: int) -> bool:
        """Whether it was the best so far. The processes share out the images, and each looks with what will be saved: with the first one's
        running statistics."""
        assert self.validate is not None
        module.eval()
        if torch.distributed.is_initialized():
            for buffer in module.buffers():
                whole = buffer.contiguous()
                torch.distributed.broadcast(whole, 0)
                buffer.copy_(whole)

        def forward(batch: Batch) -> dict[str, Tensor]:
            batch = to_device(batch, module.device)
            if isinstance(trainer.model, FullyShardedDataParallel):
                outputs: Any = trainer.strategy.validation_step(batch, 0)
            else:
                # Past DDP, which would have the processes wait for each other's buffers.
                with trainer.precision_plugin.val_step_context():
                    outputs = module.validation_step(batch, 0)
            return dict(outputs)

        row = self.validate(forward)
        module.train()
        self.state.record({"epoch": epoch, **row})
        self.progress.validation(self.state.step, row, self.validate.picture)
        if self.state.step % self.steps_per_epoch:
            self.progress.say(f"step {self.state.step} of epoch {epoch}: {describe(row, self.metric)}")
        better = self.state.consider(f"val_{self.metric}", row, epoch)
        if better and self.train.select == "best":
            self.best_weights = collect(trainer)[0]
        return better

    def _save(self, trainer: Trainer, module: TrainModule, name: str | None, best: bool) -> None:
        now = time.monotonic()
        self.state.seconds += now - self._clock
        self._clock = now
        self.state.schedule = module.schedule.state_dict()
        network, optimizer, scaler = collect(trainer)
        if trainer.is_global_zero:
            content = {
                **self.identity,
                "state": self.state.to_plain(),
                "network": network,
                "optimizer": optimizer,
                "scaler": scaler,
                "best": self.best_weights,
            }
            self.folder.save(content, name, best)
        trainer.strategy.barrier()

    def _stop_requested(self) -> int:
        """The signal; processes agree on it, so that all stop after the same step."""
        if not torch.distributed.is_initialized():
            return self.stop.signum
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        flag = torch.tensor(self.stop.signum, device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return int(flag)


def require_same_start(step: int, folder: Folder) -> None:
    """Raises UserError where the processes of a training found different data or checkpoints, as machines do that share no disk."""
    if not torch.distributed.is_initialized():
        return
    told: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, (step, folder.path.name))
    if len({name for _, name in told}) > 1:
        raise UserError(
            f"{folder.path.parent}: the processes of this training found different specs or data (they would save in "
            f"{', '.join(name for _, name in told)}, by rank); put the same configuration and dataset on all machines"
        )
    found = [other for other, _ in told]
    if len(set(found)) > 1:
        raise UserError(
            f"{folder.path}: the processes of this training would continue from different steps there ({found}, by rank); the root of "
            "the checkpoints must lie on a disk that all machines share: set `checkpoints` in config/config.yaml"
        )
