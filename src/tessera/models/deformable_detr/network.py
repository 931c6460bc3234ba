"""Deformable DETR (Zhu et al. 2021), single-stage, as its authors published it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tessera.models.backbone import STRIDES, build_backbone
from tessera.models.base import Network
from tessera.models.common.reach import freeze_unread
from tessera.models.deformable_detr.transformer import Decoder, Encoder, build_pyramid
from tessera.spec.networks import DeformableDetrSpec

GROUPS = 32
"""Of every group norm."""


class DeformableDetr(Network):
    """``pred_logits`` (B, Q, classes), one sigmoid each and none for the background, and ``pred_boxes`` (B, Q, 4), centre-size in [0, 1].

    Boxes are relative to each image without its padding, which must lie at the bottom and right. Nothing is read from padding.
    """

    input_names = ("images", "padding")
    output_names = ("pred_logits", "pred_boxes")

    def __init__(
        self,
        spec: DeformableDetrSpec,
        num_classes: int,
        activation_checkpoint: bool = False,
        load_pretrained: bool = True,
    ) -> None:
        super().__init__(spec.pixel_mean, spec.pixel_std)
        self.aux_loss = spec.loss.aux_loss
        self.backbone = build_backbone(
            spec.backbone, activation_checkpoint, load_pretrained, output_stride=16 if spec.dilation else 32
        )
        self.maps = [STRIDES.index(stride) for stride in spec.strides]
        freeze_unread(self.backbone, self.maps)
        self.input_proj = _input_proj([self.backbone.channels[index] for index in self.maps], spec)
        self.level_embed = nn.Parameter(torch.empty(spec.num_feature_levels, spec.hidden_dim))
        nn.init.normal_(self.level_embed)
        self.encoder = Encoder(spec, activation_checkpoint)
        self.decoder = Decoder(spec, num_classes, activation_checkpoint)

    def forward(self, images: Tensor, padding: Tensor | None = None, **others: Tensor) -> dict[str, Any]:
        if padding is None:
            padding = torch.zeros_like(images[:, 0], dtype=torch.bool)
        pyramid = build_pyramid(self._levels(images), padding, self.level_embed)
        *earlier, last = self.decoder(self.encoder(pyramid), pyramid)
        outputs: dict[str, Any] = _named(last)
        if self.training and self.aux_loss:
            outputs["aux"] = [_named(prediction) for prediction in earlier]
        return outputs

    def _levels(self, images: Tensor) -> list[Tensor]:
        """(B, C, h, w), finest first: the chosen maps, then each beyond them from the one before."""
        features = self.backbone(self.normalise(images))
        chosen = [features[index] for index in self.maps]
        levels = [project(feature) for project, feature in zip(self.input_proj, chosen, strict=False)]
        x = chosen[-1]
        for project in self.input_proj[len(chosen) :]:
            x = project(x)
            levels.append(x)
        return levels


def _input_proj(channels: list[int], spec: DeformableDetrSpec) -> nn.ModuleList:
    """1x1 convolutions of the backbone's maps; the first level beyond them is made from the last map itself, not from its projection."""
    dim = spec.hidden_dim
    convolutions = [nn.Conv2d(count, dim, kernel_size=1) for count in channels]
    inputs = channels[-1]
    for _ in range(spec.num_feature_levels - len(channels)):
        convolutions.append(nn.Conv2d(inputs, dim, kernel_size=3, stride=2, padding=1))
        inputs = dim
    for convolution in convolutions:
        nn.init.xavier_uniform_(convolution.weight)
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)
    return nn.ModuleList(nn.Sequential(convolution, nn.GroupNorm(GROUPS, dim)) for convolution in convolutions)


def _named(prediction: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {"pred_logits": prediction[0], "pred_boxes": prediction[1]}
