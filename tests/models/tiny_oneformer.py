"""A small OneFormer for the tests of this folder."""

from __future__ import annotations

from tessera.spec.networks import (
    BackboneSpec,
    ClassDecoderSpec,
    Mode,
    OneFormerDecoderSpec,
    OneFormerLossSpec,
    OneFormerPixelDecoderSpec,
    OneFormerSpec,
    SwinSpec,
    TextEncoderSpec,
)
from tests.models.tiny import SWIN, drop_path_rate


def spec(backbone: str = "swin_tiny", mode: Mode = "panoptic", dropout: float = 0.0, **loss: object) -> OneFormerSpec:
    return OneFormerSpec.model_validate(
        {
            "mode": mode,
            "backbone": BackboneSpec(
                name=backbone,
                swin=SWIN if backbone == "swin_tiny" else SwinSpec(),
                drop_path_rate=drop_path_rate(backbone, dropout),
            ),
            "pixel_decoder": OneFormerPixelDecoderSpec(
                hidden_dim=32, layers=1, nheads=2, points=2, dim_feedforward=32, dropout=dropout
            ),
            "class_decoder": ClassDecoderSpec(layers=1, nheads=2, dim_feedforward=32, dropout=dropout),
            "decoder": OneFormerDecoderSpec(
                num_object_queries=7, layers=3, nheads=2, dim_feedforward=32, dropout=dropout
            ),
            "text": TextEncoderSpec(width=64, layers=1, context_length=16, num_context=2),
            "loss": OneFormerLossSpec.model_validate({"train_num_points": 64, **loss}),
        }
    )
