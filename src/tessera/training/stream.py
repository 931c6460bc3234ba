"""The batches of a whole training as one sequence that can start at any step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from tessera.files import UserError
from tessera.structures import Batch

EpochLoader = Callable[[int, int], Iterable[Batch]]
"""``(epoch, start_batch)`` -> the batches of that epoch from that one on."""


class Stream:
    """Epoch after epoch from ``start`` to ``total`` steps; each epoch is cut or checked to have ``steps_per_epoch``."""

    def __init__(self, load: EpochLoader, steps_per_epoch: int, start: int, total: int, num_classes: int) -> None:
        self.load = load
        self.steps_per_epoch = steps_per_epoch
        self.start = start
        self.total = total
        self.num_classes = num_classes

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self) -> Iterator[Batch]:
        step = self.start
        while step < self.total:
            epoch, first = divmod(step, self.steps_per_epoch)
            end = (epoch + 1) * self.steps_per_epoch
            batches = iter(self.load(epoch, first))
            while step < min(end, self.total):
                batch = self._next(batches, epoch)
                self._check(batch)
                step += 1
                yield batch

    def _next(self, batches: Iterator[Batch], epoch: int) -> Batch:
        try:
            return next(batches)
        except StopIteration:
            raise UserError(
                f"epoch {epoch + 1} ended before its {self.steps_per_epoch} steps; did the data change while training?"
            ) from None

    def _check(self, batch: Batch) -> None:
        for meta, target in zip(batch.metas, batch.targets or (), strict=False):
            if len(target.labels) and int(target.labels.max()) >= self.num_classes:
                raise UserError(
                    f"{meta.file_name}: has class {int(target.labels.max())}, but the label map has {self.num_classes} classes "
                    f"(0..{self.num_classes - 1} inside); correct dataset.label_map or the annotations"
                )
