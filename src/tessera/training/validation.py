"""Metrics and losses on the val split during training, the same whatever the batch size, the number of processes, and whatever training does
with random numbers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from tessera.data.datamodule import eval_loader
from tessera.data.opened import OpenedData
from tessera.files import UserError
from tessera.metrics.evaluate import Evaluator, accumulate
from tessera.models import build_postprocess, tasks
from tessera.models.base import Model
from tessera.models.common.matching import alone
from tessera.ops.images import resize
from tessera.pictures.overlays import draw_predictions
from tessera.spec.schema import PostprocessSpec, Spec
from tessera.structures import Batch, Predictions, merge_parts
from tessera.training.interrupt import StopRequest
from tessera.training.module import move_target
from tessera.training.state import counter_seed

Forward = Callable[[Batch], dict[str, Tensor]]
"""The network in evaluation mode, on its own device."""

Losses = defaultdict[str, list[float]]
"""Name -> one number for each image."""


class Validation:
    """Gives one row when called with a ``Forward``: ``val_loss``, its parts, and ``val_<metric>`` for every metric of the mode.

    Losses lack deep supervision, which networks add in training mode only, and are means over images taken one by one.
    Images are seen whole and at one scale, whatever `testing` says.
    """

    def __init__(
        self,
        spec: Spec,
        data: OpenedData,
        model: Model,
        postprocess: dict[str, Any],
        rank: int = 0,
        world_size: int = 1,
        in_step: bool = False,
        stop: StopRequest | None = None,
    ) -> None:
        """``postprocess`` has the keys of that section and takes the place of the model's own. Every process takes its share of the batches and
        gets the row of the whole. ``in_step``: a ``Forward`` is a matter of all processes, so each of them makes equally many."""
        self.spec = spec
        self.data = data
        self.catalog = data.catalog
        self.model = model
        self.postprocess = build_postprocess(spec.model, data.catalog, PostprocessSpec.model_validate(postprocess))
        self.rank = rank
        self.world_size = world_size
        self.in_step = in_step
        self.stop = stop
        self.picture: Tensor | None = None
        """(3, H, W) uint8: the first image of the last validation with its predictions drawn. Of the first process."""
        self._group: Any = None

    def __call__(self, forward: Forward) -> dict[str, float]:
        share = self.share(forward)
        if self.world_size == 1:
            return _row([share])
        if self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")  # shares are no matter of GPUs
        shares: list[Any] = [None] * self.world_size
        torch.distributed.gather_object(share, shares if self.rank == 0 else None, group=self._group)
        answer: list[Any] = [None]
        if self.rank == 0:
            try:
                answer = [_row(shares)]
            except UserError as error:
                answer = [error]
        torch.distributed.broadcast_object_list(answer, group=self._group)
        if isinstance(answer[0], UserError):
            raise answer[0]
        row: dict[str, float] = answer[0]
        return row

    def share(self, forward: Forward) -> tuple[Evaluator, Losses]:
        """Share of this process: what its images gave, and their losses."""
        self.data.require_unchanged()
        evaluator = Evaluator(self.catalog, self.spec.model.mode)
        losses: Losses = defaultdict(list)
        self.picture = None

        def predict(batch: Batch) -> list[Predictions]:
            # No inference mode: networks may keep tensors between calls, which training then needs gradients through.
            with torch.no_grad():
                asked = tasks(self.spec.model)
                parts = [self._ask(forward, batch, task, losses if task == asked[0] else None) for task in asked]
            found = [merge_parts(list(answers)) for answers in zip(*parts, strict=True)]
            if self.picture is None and self.rank == 0:
                self.picture = self._draw(batch, found[0])
            return found

        loader = eval_loader(self.spec, self.data, "val", rank=self.rank, world_size=self.world_size)
        if self.stop is not None:
            self.stop.attend(loader)
        accumulate(evaluator, predict, loader, progress=False)
        if self.in_step:
            most = math.ceil(len(eval_loader(self.spec, self.data, "val")) / self.world_size)
            spare = iter(eval_loader(self.spec, self.data, "val", limit=1)) if len(loader) < most else ()
            with torch.no_grad():
                for batch in spare:
                    for task in tasks(self.spec.model):
                        forward(_told(batch, task))
        return evaluator, losses

    def _ask(self, forward: Forward, batch: Batch, task: str | None, losses: Losses | None) -> list[Predictions]:
        """Adds to ``losses`` where they are given: of several tasks, the first one's fit the batch's targets."""
        answers = forward(_told(batch, task))
        outputs = {name: value.float() for name, value in answers.items() if isinstance(value, Tensor)}
        if losses is not None:
            self._lose(outputs, batch, losses)
        return self.postprocess(outputs, batch.metas, (batch.images.shape[-2], batch.images.shape[-1]), task)

    def _lose(self, outputs: dict[str, Tensor], batch: Batch, losses: Losses) -> None:
        device = next(iter(outputs.values())).device
        for index, (meta, target) in enumerate(zip(batch.metas, batch.targets or (), strict=True)):
            torch.manual_seed(counter_seed(self.spec.seed, "validation", meta.image_id))
            one = {name: value[index : index + 1] for name, value in outputs.items()}
            with alone():
                found: dict[str, Any] = self.model.criterion(one, [move_target(target, device)])
            for name, value in {"loss": sum(found.values()), **found}.items():
                losses[name].append(float(value))

    def _draw(self, batch: Batch, predictions: Predictions) -> Tensor:
        height, width = batch.metas[0].resized_size
        shown = (batch.images[0, :, :height, :width] * 255).round().to(torch.uint8).cpu()
        image = resize(shown, batch.metas[0].original_size)
        drawn: Tensor = pil_to_tensor(draw_predictions(image, predictions, self.catalog, self.spec.model.mode))
        return drawn


def _told(batch: Batch, task: str | None) -> Batch:
    return batch if task is None else replace(batch, tasks=[task] * len(batch.metas))


def _row(shares: list[tuple[Evaluator, Losses]]) -> dict[str, float]:
    """Numbers that no order of the images changes."""
    whole, losses = shares[0]
    for evaluator, more in shares[1:]:
        whole.merge(evaluator)
        for name, values in more.items():
            losses[name] += values
    evaluation = whole.result()
    row = {f"val_{name}": math.fsum(values) / evaluation.images for name, values in losses.items()}
    return row | {f"val_{name}": float(value) for name, value in evaluation.metrics.items()}
