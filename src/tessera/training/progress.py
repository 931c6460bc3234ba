"""What people see of a training: a bar on a terminal, plain lines elsewhere, curves and pictures in TensorBoard."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

import rich.progress
from rich.console import Console
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from tessera.training.checkpoint import say


class Progress:
    """Does nothing in processes other than the first one."""

    def __init__(
        self,
        folder: Path,
        steps_per_epoch: int,
        num_epochs: int,
        metric: str,
        verbose: bool = False,
        active: bool = True,
    ) -> None:
        self.folder = folder
        self.steps_per_epoch = steps_per_epoch
        self.num_epochs = num_epochs
        self.metric = metric
        self.verbose = verbose
        self.active = active
        self._writer: SummaryWriter | None = None
        self._bar: rich.progress.Progress | None = None
        self._task = rich.progress.TaskID(0)
        self._first = 0
        self._started = self._epoch_started = time.monotonic()

    def start(self, step: int) -> None:
        """Curves behind ``step``, which an earlier start drew before it was killed, are drawn again."""
        if not self.active:
            return
        self._first = step
        self._started = self._epoch_started = time.monotonic()
        self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)
        if sys.stderr.isatty():
            columns = (
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TimeRemainingColumn(),
                rich.progress.TextColumn("{task.fields[loss]}"),
            )
            self._bar = rich.progress.Progress(*columns, console=Console(stderr=True), refresh_per_second=4)
            total = self.steps_per_epoch * self.num_epochs
            self._task = self._bar.add_task("train", total=total, completed=step, loss="")
            self._bar.start()

    def step(self, step: int, losses: dict[str, float], rates: dict[str, float]) -> None:
        if not self.active:
            return
        if self._bar is not None:
            epoch = (step - 1) // self.steps_per_epoch + 1
            self._bar.update(
                self._task,
                completed=step,
                loss=f"loss {losses['loss']:.4f}",
                description=f"epoch {epoch}/{self.num_epochs}",
            )
        self._scalars("step", {name: losses[name] for name in ("loss", "grad_norm") if name in losses}, step)
        self._scalars("lr", rates, step)
        if self.verbose:
            self.say(f"step {step}: " + ", ".join(f"lr of {name} {rate:.6g}" for name, rate in rates.items()))

    def validation(self, step: int, row: dict[str, float], picture: Tensor | None) -> None:
        """``picture`` is (3, H, W) uint8."""
        self._scalars("val", {name.removeprefix("val_"): value for name, value in row.items()}, step)
        if self._writer is not None and picture is not None:
            self._writer.add_image("val/predictions", picture, step)

    def epoch(self, epoch: int, row: dict[str, float]) -> None:
        if not self.active:
            return
        now = time.monotonic()
        step = epoch * self.steps_per_epoch
        per_step = (now - self._started) / max(1, step - self._first)
        left = per_step * (self.num_epochs * self.steps_per_epoch - step)
        parts = [
            f"epoch {epoch}/{self.num_epochs}",
            f"loss {row['train_loss']:.4f}",
            f"lr {row['lr']:.2e}",
            *filter(None, [describe(row, self.metric)]),
            f"{now - self._epoch_started:.1f} s",
            f"{_duration(left)} left",
        ]
        self.say("  ".join(parts))
        self._epoch_started = now
        means = {name.removeprefix("train_"): value for name, value in row.items() if name.startswith("train_")}
        self._scalars("train", means, step)

    def close(self) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):  # a lost terminal
                self._bar.stop()
            self._bar = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _scalars(self, group: str, values: dict[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def say(self, text: str) -> None:
        """One line, above the bar where there is one."""
        if not self.active:
            return
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.console.print(text, highlight=False)
        else:
            say(text)


def describe(row: dict[str, float], metric: str) -> str:
    """What a validation found; empty for a row without one."""
    measured = {"val loss": row.get("val_loss"), metric: row.get(f"val_{metric}")}
    return "  ".join(f"{name} {value:.4f}" for name, value in measured.items() if value is not None)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
