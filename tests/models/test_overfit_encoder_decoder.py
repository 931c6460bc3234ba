"""The encoder-decoder family can learn: eight demo scenes by heart in a bounded number of steps, with several losses and an auxiliary head."""

from __future__ import annotations

import pytest
import torch

from tessera.data.demo import CATALOG
from tessera.models import build_model
from tessera.spec.networks import (
    AuxiliaryHeadSpec,
    BackboneSpec,
    DecodeHeadSpec,
    EncoderDecoderSpec,
    SegmentationLossSpec,
)
from tests.models.learning import learn, scenes


@pytest.mark.slow
def test_learns_eight_scenes_by_heart():
    torch.manual_seed(0)
    spec = EncoderDecoderSpec(
        backbone=BackboneSpec(name="resnet18", drop_path_rate=0.0),
        output_stride=16,
        decoder=DecodeHeadSpec(type="deeplabv3plus", channels=64, atrous_rates=(1, 2, 3), dropout=0.0),
        auxiliary={"fcn": AuxiliaryHeadSpec(channels=32)},
        losses={"ce": SegmentationLossSpec(), "dice": SegmentationLossSpec(type="dice")},
    )
    model = build_model(spec, CATALOG)
    learn(model, spec, CATALOG, scenes("semantic"), ["mIoU"], steps=160, check_every=20, clip=None)
