"""Backbones: networks that turn normalised images into feature maps at strides 4, 8, 16 and 32."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg
from timm.models.efficientvit_mit import EfficientVitLarge
from torch import Tensor, nn

from tessera.files import UserError
from tessera.models.common import checkpointing
from tessera.models.swin import Swin
from tessera.spec.schema import BackboneSpec, SwinSpec

STRIDES = (4, 8, 16, 32)

SWIN_SIZES: dict[str, dict[str, Any]] = {
    "swin_tiny": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "swin_small": {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "swin_base": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 7},
    "swin_large": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 7},
    "swin_huge": {"embed_dim": 352, "depths": [2, 2, 18, 2], "num_heads": [11, 22, 44, 88], "window_size": 7},
}


class Backbone(nn.Module):
    """What a model needs to know of its backbone; ``Swin`` and ``TimmBackbone`` provide it."""

    channels: list[int]
    strides: list[int]


def build_backbone(spec: BackboneSpec, activation_checkpoint: bool = False, load_pretrained: bool = True) -> Any:
    """``load_pretrained`` False leaves the weights random: the caller is about to load a whole model's."""
    if spec.name in SWIN_SIZES:
        sizes = _swin_sizes(spec)
        return Swin(**sizes, drop_path_rate=spec.drop_path_rate, activation_checkpoint=activation_checkpoint)
    if spec.swin != SwinSpec():
        raise UserError(f"model.backbone.swin is set, but model.backbone.name is {spec.name}")
    return TimmBackbone(spec, activation_checkpoint)


def _swin_sizes(spec: BackboneSpec) -> dict[str, Any]:
    given = spec.swin.model_dump(exclude_none=True)
    return SWIN_SIZES[spec.name] | given


class TimmBackbone(Backbone):
    def __init__(self, spec: BackboneSpec, activation_checkpoint: bool) -> None:
        super().__init__()
        self.activation_checkpoint = activation_checkpoint
        try:
            self.net = timm.create_model(spec.name, features_only=True, drop_path_rate=spec.drop_path_rate)
        except TypeError:
            self.net = timm.create_model(spec.name, features_only=True)
        reductions = self.net.feature_info.reduction()
        self.index = [reductions.index(stride) for stride in STRIDES]
        self.channels = [self.net.feature_info.channels()[i] for i in self.index]
        self.strides = list(STRIDES)

    def forward(self, images: Tensor) -> list[Tensor]:
        features = checkpointing.run(self.net, images, recompute=self.activation_checkpoint)
        return [features[i] for i in self.index]
