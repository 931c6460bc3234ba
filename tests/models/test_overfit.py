"""The whole of network, losses and post-processing can learn: eight demo scenes by heart, in every mode, in a bounded number of steps."""

from __future__ import annotations

import pytest
import torch

from tessera.data.demo import CATALOG
from tessera.models import build_model
from tessera.spec.networks import (
    BackboneSpec,
    Mask2FormerSpec,
    MaskLossSpec,
    Mode,
    PixelDecoderSpec,
    SwinSpec,
    TransformerDecoderSpec,
)
from tessera.training.state import METRIC
from tests.models.learning import learn, scenes


@pytest.mark.slow
@pytest.mark.parametrize("mode", Mask2FormerSpec.modes)
def test_learns_eight_scenes_by_heart(mode: Mode):
    torch.manual_seed(0)
    catalog = CATALOG.things() if mode == "instance" else CATALOG
    spec = Mask2FormerSpec(
        mode=mode,
        backbone=BackboneSpec(
            swin=SwinSpec(embed_dim=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], window_size=4), drop_path_rate=0.0
        ),
        pixel_decoder=PixelDecoderSpec(hidden_dim=64, layers=1, nheads=4, dim_feedforward=128),
        decoder=TransformerDecoderSpec(num_object_queries=12, layers=3, nheads=4, dim_feedforward=128),
        loss=MaskLossSpec(train_num_points=1024),
    )
    learn(build_model(spec, catalog), spec, catalog, scenes(mode), [METRIC[mode]], steps=240, check_every=40)
