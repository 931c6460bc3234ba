"""A small Deformable DETR for the tests of this folder."""

from __future__ import annotations

from tessera.spec.networks import BackboneSpec, DeformableDetrSpec, DetectionLossSpec, Mode, SwinSpec
from tests.models import tiny


def spec(
    backbone: str = "resnet18", mode: Mode = "detection", dropout: float = 0.0, **keys: object
) -> DeformableDetrSpec:
    assert mode == "detection"
    swin = backbone == "swin_tiny"
    values: dict[str, object] = {
        "hidden_dim": 32,
        "nheads": 2,
        "enc_layers": 1,
        "dec_layers": 2,
        "dim_feedforward": 32,
        "enc_n_points": 2,
        "dec_n_points": 2,
        "num_queries": 7,
        "dropout": dropout,
        "loss": DetectionLossSpec(),
        "backbone": BackboneSpec(
            name=backbone, swin=tiny.SWIN if swin else SwinSpec(), drop_path_rate=dropout if swin else 0.0
        ),
    }
    return DeformableDetrSpec.model_validate(values | keys)
