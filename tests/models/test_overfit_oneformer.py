"""One training learns all three tasks: eight demo scenes by heart, in a bounded number of steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tessera.data.demo import CATALOG
from tessera.data.tasks import Task, Tasks
from tessera.models import build_model
from tessera.spec.networks import OneFormerSpec
from tessera.structures import Batch
from tests.models.learning import learn, scenes

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
    assert sampler is not None

    def shown(step: int) -> Batch:
        asked = [ORDER[(step + place) % len(ORDER)] for place in range(len(truth.metas))]
        targets = [sampler.target(target, task) for target, task in zip(truth.targets or [], asked, strict=True)]
        return replace(truth, targets=targets, tasks=list(asked))

    learn(
        build_model(spec, CATALOG), spec, CATALOG, truth, ["PQ", "AP", "mIoU"], steps=320, check_every=40, shown=shown
    )
