"""The encoder-decoder family can learn: eight demo scenes by heart in a bounded number of steps, with several losses and an auxiliary head."""

from __future__ import annotations

import pytest
import torch

from tessera.data.demo import CATALOG
from tessera.evaluation.evaluate import evaluate
from tessera.models import build_model
from tessera.spec.networks import (
    AuxiliaryHeadSpec,
    BackboneSpec,
    DecodeHeadSpec,
    EncoderDecoderSpec,
    SegmentationLossSpec,
)
from tessera.structures import Batch, Predictions
from tests.models.test_overfit import SIDE, scenes

STEPS = 160
CHECK_EVERY = 20
LEARNING_RATE = 2e-3
WARM_UP = 10


@pytest.mark.slow
def test_learns_eight_scenes_by_heart():
    torch.manual_seed(0)
    batch = scenes("semantic")
    spec = EncoderDecoderSpec(
        backbone=BackboneSpec(name="resnet18", drop_path_rate=0.0),
        output_stride=16,
        decoder=DecodeHeadSpec(type="deeplabv3plus", channels=64, atrous_rates=(1, 2, 3), dropout=0.0),
        auxiliary={"fcn": AuxiliaryHeadSpec(channels=32)},
        losses={"ce": SegmentationLossSpec(), "dice": SegmentationLossSpec(type="dice")},
    )
    model = build_model(spec, CATALOG)
    optimiser = torch.optim.AdamW(model.network.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / WARM_UP) * (1 - step / STEPS)
    )

    def predict(batch: Batch) -> list[Predictions]:
        with torch.no_grad():
            return model.postprocess(model.network(batch.images), batch.metas, (SIDE, SIDE))

    scores: list[float] = []
    for step in range(1, STEPS + 1):
        losses = model.criterion(model.network.train()(batch.images), batch.targets or [])
        optimiser.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimiser.step()
        schedule.step()
        if step % CHECK_EVERY == 0:
            model.network.eval()
            scores.append(evaluate(predict, [batch], CATALOG, "semantic", progress=False).metrics["mIoU"])
            if scores[-1] >= 0.9:
                return
    pytest.fail(f"mIoU reached {[round(score, 3) for score in scores]} in {STEPS} steps, expected 0.9")
