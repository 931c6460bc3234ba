"""Small models, made-up targets and image descriptions for the tests of this folder."""

from __future__ import annotations

import torch

from tessera.spec.networks import (
    BackboneSpec,
    Mask2FormerSpec,
    MaskLossSpec,
    Mode,
    PixelDecoderSpec,
    SwinSpec,
    TransformerDecoderSpec,
)
from tessera.structures import Category, ClassCatalog, ImageMeta, Target

CATALOG = ClassCatalog(tuple(Category(index + 1, f"class {index}", (index, 0, 0), index < 3) for index in range(5)))
SWIN = SwinSpec(embed_dim=16, depths=[1, 2, 1, 1], num_heads=[1, 2, 4, 8], window_size=3)
NO_STOCHASTIC_DEPTH = ("efficientvit_b0",)
BACKBONES = ("swin_tiny", "efficientvit_b0", "resnet18")


def catalog(mode: Mode) -> ClassCatalog:
    return CATALOG.things() if mode == "instance" else CATALOG


def drop_path_rate(backbone: str, dropout: float) -> float:
    return 0.0 if backbone in NO_STOCHASTIC_DEPTH else dropout


def spec(backbone: str = "swin_tiny", mode: Mode = "panoptic", dropout: float = 0.0, **loss: object) -> Mask2FormerSpec:
    return Mask2FormerSpec(
        mode=mode,
        backbone=BackboneSpec(
            name=backbone,
            swin=SWIN if backbone == "swin_tiny" else SwinSpec(),
            drop_path_rate=drop_path_rate(backbone, dropout),
        ),
        pixel_decoder=PixelDecoderSpec(
            hidden_dim=32, layers=1, nheads=2, points=2, dim_feedforward=32, dropout=dropout
        ),
        decoder=TransformerDecoderSpec(num_object_queries=7, layers=3, nheads=2, dim_feedforward=32, dropout=dropout),
        loss=MaskLossSpec(**{"train_num_points": 64, **loss}),
    )


def target(count: int, size: tuple[int, int], classes: int = 3, crowd: int = 0) -> Target:
    """``count`` random objects, the last ``crowd`` of them crowd regions."""
    masks = torch.rand(count, *size) > 0.6
    iscrowd = torch.arange(count) >= count - crowd
    return Target(
        labels=torch.randint(classes, (count,)),
        masks=masks,
        boxes=torch.zeros(count, 4),
        iscrowd=iscrowd,
        areas=masks.flatten(1).sum(1).double(),
    )


def meta(original: tuple[int, int], resized: tuple[int, int]) -> ImageMeta:
    return ImageMeta(image_id=1, file_name="1.png", original_size=original, resized_size=resized)
