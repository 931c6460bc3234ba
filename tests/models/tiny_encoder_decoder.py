"""A small encoder-decoder segmentor for the tests of this folder."""

from __future__ import annotations

import dataclasses

import torch

from tessera.spec.networks import (
    AuxiliaryHeadSpec,
    BackboneSpec,
    DecodeHeadSpec,
    EncoderDecoderSpec,
    Mode,
    SwinSpec,
)
from tessera.structures import IGNORE, Target
from tests.models import tiny


def spec(
    backbone: str = "resnet18",
    mode: Mode = "semantic",
    dropout: float = 0.0,
    decoder: str = "deeplabv3plus",
    **keys: object,
) -> EncoderDecoderSpec:
    assert mode == "semantic"
    swin = backbone == "swin_tiny"
    values: dict[str, object] = {
        "output_stride": 32 if decoder in ("fpn", "linknet") else 16,
        "decoder": DecodeHeadSpec.model_validate(
            {"type": decoder, "channels": 64 if decoder == "fpn" else 32, "dropout": dropout, "atrous_rates": (1, 2, 3)}
        ),
        "auxiliary": {"fcn": AuxiliaryHeadSpec(channels=16)},
        "backbone": BackboneSpec(
            name=backbone, swin=tiny.SWIN if swin else SwinSpec(), drop_path_rate=dropout if swin else 0.0
        ),
    }
    return EncoderDecoderSpec.model_validate(values | keys)


def target(count: int, size: tuple[int, int], classes: int = 5) -> Target:
    """``tiny.target`` with a map of the first ``classes`` classes; without objects, every pixel is ignored."""
    semantic = torch.randint(classes, size, dtype=torch.uint8)
    semantic[torch.rand(size) < (0.2 if count else 2)] = IGNORE
    return dataclasses.replace(tiny.target(count, size), semantic=semantic)
