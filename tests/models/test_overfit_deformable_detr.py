"""The whole of Deformable DETR can learn: the boxes of eight demo scenes by heart, in a bounded number of steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tessera.data.demo import CATALOG
from tessera.evaluation.evaluate import evaluate
from tessera.models import build_model
from tessera.spec.networks import BackboneSpec, DeformableDetrSpec, SwinSpec
from tessera.structures import Batch, Predictions
from tests.models.test_overfit import SIDE, scenes

WIDTH = 128
"""Of the batch: a quarter of it is padding, which the boxes must not be relative to."""
STEPS = 200
CHECK_EVERY = 25
LEARNING_RATE = 2e-3
WARM_UP = 10


def boxes_alone() -> Batch:
    batch = scenes("instance")
    targets = [replace(target, masks=None, semantic=None, size=(SIDE, SIDE)) for target in batch.targets or []]
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    images = F.pad(batch.images - mean, (0, WIDTH - SIDE)) + mean
    padding = F.pad(batch.padding, (0, WIDTH - SIDE), value=True)
    return replace(batch, images=images, padding=padding, targets=targets, truths=targets)


@pytest.mark.slow
def test_learns_eight_scenes_by_heart():
    torch.manual_seed(0)
    batch = boxes_alone()
    spec = DeformableDetrSpec(
        backbone=BackboneSpec(
            swin=SwinSpec(embed_dim=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], window_size=4), drop_path_rate=0.0
        ),
        hidden_dim=64,
        nheads=4,
        enc_layers=1,
        dec_layers=3,
        dim_feedforward=128,
        num_feature_levels=3,
        num_queries=12,
        dropout=0.0,
    )
    catalog = CATALOG.things()
    model = build_model(spec, catalog)
    optimiser = torch.optim.AdamW(model.network.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / WARM_UP) * (1 - step / STEPS)
    )

    def predict(batch: Batch) -> list[Predictions]:
        with torch.no_grad():
            return model.postprocess(model.network(batch.images, batch.padding), batch.metas, (SIDE, WIDTH))

    scores: list[float] = []
    for step in range(1, STEPS + 1):
        losses = model.criterion(model.network.train()(batch.images, batch.padding), batch.targets or [])
        optimiser.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % CHECK_EVERY == 0:
            model.network.eval()
            scores.append(evaluate(predict, [batch], catalog, "detection", progress=False).metrics["box_AP"])
            if scores[-1] >= 0.9:
                return
    pytest.fail(f"box AP reached {[round(score, 3) for score in scores]} in {STEPS} steps, expected 0.9")
