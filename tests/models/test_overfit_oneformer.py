"""One training learns all three tasks: eight demo scenes by heart, in a bounded number of steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tessera.data.demo import CATALOG
from tessera.data.tasks import Task, Tasks
from tessera.evaluation.evaluate import evaluate
from tessera.models import build_model, tasks
from tessera.spec.networks import OneFormerSpec
from tessera.structures import Batch, Predictions, merge_parts
from tests.models.test_overfit import CHECK_EVERY, LEARNING_RATE, SIDE, WARM_UP, scenes

STEPS = 320
METRICS = ("PQ", "AP", "mIoU")
ORDER: tuple[Task, ...] = ("panoptic", "semantic", "instance")


@pytest.mark.slow
def test_learns_eight_scenes_by_heart_for_every_task():
    torch.manual_seed(0)
    truth = scenes("panoptic")
    spec = OneFormerSpec.model_validate(
        {
            "backbone": {
                "swin": {"embed_dim": 32, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 4},
                "drop_path_rate": 0.0,
            },
            "pixel_decoder": {"hidden_dim": 64, "layers": 1, "nheads": 4, "dim_feedforward": 128, "dropout": 0.0},
            "class_decoder": {"layers": 1, "nheads": 4, "dim_feedforward": 128, "dropout": 0.0},
            "decoder": {"num_object_queries": 13, "layers": 3, "nheads": 4, "dim_feedforward": 128},
            "text": {"width": 64, "layers": 1, "num_context": 2},
            "loss": {"train_num_points": 1024},
        }
    )
    sampler = Tasks.of(spec, CATALOG)
    assert sampler is not None and truth.targets is not None
    model = build_model(spec, CATALOG)
    optimiser = torch.optim.AdamW(model.network.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / WARM_UP) * (1 - step / STEPS)
    )

    def predict(batch: Batch) -> list[Predictions]:
        parts = []
        for task in tasks(spec):
            asked = replace(batch, tasks=[task] * len(batch.metas))
            with torch.no_grad():
                outputs = model.network(**model.network.inputs(asked))
            parts.append(model.postprocess(outputs, batch.metas, (SIDE, SIDE), task))
        return [merge_parts(answers) for answers in zip(*parts, strict=True)]

    scores: list[list[float]] = []
    for step in range(1, STEPS + 1):
        asked = [ORDER[(step + place) % len(ORDER)] for place in range(len(truth.metas))]
        targets = [sampler.target(target, task) for target, task in zip(truth.targets, asked, strict=True)]
        batch = replace(truth, targets=targets, tasks=list(asked))
        network = model.network.train()
        losses = model.criterion(network(**network.inputs(batch)), targets)
        optimiser.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % CHECK_EVERY == 0:
            network.eval()
            found = evaluate(predict, [truth], CATALOG, "panoptic", progress=False).metrics
            scores.append([round(found[name], 3) for name in METRICS])
            if min(scores[-1]) >= 0.9:
                return
    pytest.fail(f"{METRICS} reached {scores} in {STEPS} steps, expected 0.9 of each")
