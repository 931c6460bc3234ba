"""Metrics and losses on the val split during training, the same whatever the batch size and whatever training does with random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from tessera.data.datamodule import eval_loader
from tessera.evaluation.draw import draw_predictions
from tessera.evaluation.evaluate import evaluate
from tessera.models import tasks
from tessera.models.base import Model
from tessera.ops.images import resize
from tessera.spec.schema import Spec
from tessera.structures import Batch, ClassCatalog, Predictions, merge_parts
from tessera.training.interrupt import shield_workers
from tessera.training.module import move_target
from tessera.training.state import counter_seed

Forward = Callable[[Batch], dict[str, Tensor]]
"""The network in evaluation mode, on its own device."""


class Validation:
    """Called with a ``Forward``, gives one row: ``val_loss``, its parts, and ``val_<metric>`` for every metric of the mode.

    Losses lack deep supervision, which networks add in training mode only, and are means over images taken one by one.
    """

    def __init__(self, spec: Spec, catalog: ClassCatalog, model: Model) -> None:
        """``model.postprocess`` has the default thresholds: evaluation's are none of training's business."""
        self.spec = spec
        self.catalog = catalog
        self.model = model
        self.picture: Tensor | None = None
        """(3, H, W) uint8: the first image of the last validation with its predictions drawn."""

    def __call__(self, forward: Forward) -> dict[str, float]:
        sums: dict[str, float] = {}
        self.picture = None

        def predict(batch: Batch) -> list[Predictions]:
            # Networks may keep tensors between calls, which training then needs gradients through.
            with torch.inference_mode(False), torch.no_grad():
                asked = tasks(self.spec.model)
                parts = [self._ask(forward, batch, task, sums if task == asked[0] else None) for task in asked]
            found = [merge_parts(list(answers)) for answers in zip(*parts, strict=True)]
            if self.picture is None:
                self.picture = self._draw(batch, found[0])
            return found

        loader = eval_loader(self.spec, self.catalog, "val")
        shield_workers(loader)
        evaluation = evaluate(predict, loader, self.catalog, self.spec.model.mode, progress=False)
        row = {f"val_{name}": total / evaluation.images for name, total in sums.items()}
        return row | {f"val_{name}": float(value) for name, value in evaluation.metrics.items()}

    def _ask(
        self, forward: Forward, batch: Batch, task: str | None, sums: dict[str, float] | None
    ) -> list[Predictions]:
        """Adds the losses to ``sums`` where they are given: of several tasks, the first one's fit the batch's targets."""
        asked = batch if task is None else replace(batch, tasks=[task] * len(batch.metas))
        outputs = {name: value.float() for name, value in forward(asked).items() if isinstance(value, Tensor)}
        if sums is not None:
            for name, value in self._losses(outputs, batch).items():
                sums[name] = sums.get(name, 0.0) + value
        return self.model.postprocess(outputs, batch.metas, (batch.images.shape[-2], batch.images.shape[-1]), task)

    def _losses(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, float]:
        sums: dict[str, float] = {}
        device = next(iter(outputs.values())).device
        for index, (meta, target) in enumerate(zip(batch.metas, batch.targets or (), strict=True)):
            torch.manual_seed(counter_seed(self.spec.seed, "validation", meta.image_id))
            one = {name: value[index : index + 1] for name, value in outputs.items()}
            losses: dict[str, Any] = self.model.criterion(one, [move_target(target, device)])
            for name, value in {"loss": sum(losses.values()), **losses}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def _draw(self, batch: Batch, predictions: Predictions) -> Tensor:
        height, width = batch.metas[0].resized_size
        shown = (batch.images[0, :, :height, :width] * 255).round().to(torch.uint8).cpu()
        image = resize(shown, batch.metas[0].original_size)
        drawn: Tensor = pil_to_tensor(draw_predictions(image, predictions, self.catalog, self.spec.model.mode))
        return drawn
