"""The whole of Deformable DETR can learn: the boxes of eight demo scenes by heart, in a bounded number of steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tessera.data.demo import CATALOG
from tessera.models import build_model
from tessera.spec.networks import BackboneSpec, DeformableDetrSpec, SwinSpec
from tessera.structures import Batch
from tests.models.learning import SIDE, learn, scenes

WIDTH = 128
"""Of the batch: a quarter of it is padding, which the boxes must not be relative to."""


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
    learn(build_model(spec, catalog), spec, catalog, boxes_alone(), ["box_AP"], steps=200, check_every=25)
