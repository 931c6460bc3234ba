"""What the overfitting tests share: eight demo scenes, and a training that ends as soon as they are known by heart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from tessera.data.demo import CATALOG, generate_scene
from tessera.metrics.evaluate import evaluate
from tessera.models import tasks
from tessera.models.base import Model
from tessera.ops.masks import masks_to_boxes
from tessera.spec.networks import Mode, ModelSpec
from tessera.spec.schema import DemoSpec
from tessera.structures import IGNORE, Batch, ClassCatalog, ImageMeta, Predictions, Target, merge_parts

SIDE = 96
IMAGES = 8
LEARNING_RATE = 2e-3
WARM_UP = 10
ENOUGH = 0.9


def scenes(mode: Mode) -> Batch:
    demo = DemoSpec(height=SIDE, width=SIDE, max_objects=3)
    images, targets = [], []
    for index in range(IMAGES):
        scene = generate_scene(demo, "train", index)
        images.append(torch.from_numpy(scene.image.copy()).permute(2, 0, 1) / 255)
        semantic = torch.from_numpy(scene.semantic.copy()).long()
        classes = [label for label in range(1, len(CATALOG) + 1) if (semantic == label).any()]
        things = [(thing.category, torch.from_numpy(thing.visible)) for thing in scene.things]
        if mode == "semantic":
            segments = [(label, semantic == label) for label in classes]
        elif mode == "instance":
            segments = things
        else:
            stuff = [label for label in classes if not CATALOG.categories[label - 1].isthing]
            segments = [*things, *((label, semantic == label) for label in stuff)]
        masks = torch.stack([mask for _, mask in segments])
        targets.append(
            Target(
                labels=torch.tensor([label - 1 for label, _ in segments]),
                masks=masks,
                boxes=masks_to_boxes(masks),
                iscrowd=torch.zeros(len(segments), dtype=torch.bool),
                areas=masks.flatten(1).sum(1).double(),
                semantic=torch.where(semantic == 0, IGNORE, semantic - 1).to(torch.uint8),
            )
        )
    metas = [ImageMeta(index, f"{index}.png", (SIDE, SIDE), (SIDE, SIDE)) for index in range(IMAGES)]
    return Batch(torch.stack(images), torch.zeros(IMAGES, SIDE, SIDE, dtype=torch.bool), metas, targets, targets)


def learn(
    model: Model,
    spec: ModelSpec,
    catalog: ClassCatalog,
    truth: Batch,
    metrics: Sequence[str],
    steps: int,
    check_every: int,
    shown: Callable[[int], Batch] | None = None,
    clip: float | None = 1.0,
) -> None:
    """Trains on ``truth``, or on what of them is ``shown`` at a step (counted from 1), and fails unless all ``metrics`` reach 0.9 on them."""
    network = model.network
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / WARM_UP) * (1 - step / steps)
    )

    def predict(batch: Batch) -> list[Predictions]:
        size = (batch.images.shape[-2], batch.images.shape[-1])
        parts = []
        for task in tasks(spec):
            asked = batch if task is None else replace(batch, tasks=[task] * len(batch.metas))
            with torch.no_grad():
                outputs = network(**network.inputs(asked))
            parts.append(model.postprocess(outputs, batch.metas, size, task))
        return [merge_parts(answers) for answers in zip(*parts, strict=True)]

    scores: list[list[float]] = []
    for step in range(1, steps + 1):
        batch = truth if shown is None else shown(step)
        network.train()
        losses = model.criterion(network(**network.inputs(batch)), batch.targets or [])
        optimiser.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimiser.step()
        schedule.step()
        if step % check_every == 0:
            network.eval()
            found = evaluate(predict, [truth], catalog, spec.mode, progress=False).metrics
            scores.append([round(found[name], 3) for name in metrics])
            if min(scores[-1]) >= ENOUGH:
                return
    pytest.fail(f"{', '.join(metrics)} reached {scores} in {steps} steps, expected {ENOUGH} of each")
