"""Segmentor of the encoder-decoder family: backbone, decode head, and auxiliary heads in training."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tessera.models.backbone import STRIDES, build_backbone, can_dilate
from tessera.models.base import Network
from tessera.models.common import checkpointing
from tessera.models.common.reach import freeze_unread
from tessera.models.encoder_decoder.decoders import FcnBlocks, build_decoder, maps_read
from tessera.spec.networks import AuxiliaryHeadSpec, EncoderDecoderSpec


class EncoderDecoder(Network):
    """``logits`` (B, classes, h, w) at the decoder's own resolution; ``aux`` has those of the auxiliary heads, in the spec's order.

    Images whose sides are no multiples of ``size_divisor`` are padded with zeros inside, and their logits come at full resolution.
    """

    output_names = ("logits",)

    def __init__(
        self,
        spec: EncoderDecoderSpec,
        num_classes: int,
        activation_checkpoint: bool = False,
        load_pretrained: bool = True,
    ) -> None:
        super().__init__(spec.pixel_mean, spec.pixel_std)
        self.activation_checkpoint = activation_checkpoint
        # Pyramid transformers keep their last stride, as in MMSegmentation.
        stride = spec.output_stride if can_dilate(spec.backbone.name) else STRIDES[-1]
        self.backbone = build_backbone(spec.backbone, activation_checkpoint, load_pretrained, stride)
        auxiliary = [STRIDES.index(head.stride) for head in spec.auxiliary.values()]
        freeze_unread(self.backbone, [*maps_read(spec.decoder), *auxiliary])
        channels = self.backbone.channels
        self.decoder = build_decoder(spec.decoder, channels, self.backbone.strides)
        self.classifier = Classifier(self.decoder.out_channels, num_classes, spec.decoder.dropout)
        self.auxiliary = nn.ModuleDict(
            {
                name: AuxiliaryHead(head, channels, num_classes, spec.decoder.dropout)
                for name, head in spec.auxiliary.items()
            }
        )

    def forward(self, images: Tensor, padding: Tensor | None = None, **others: Any) -> dict[str, Any]:
        height, width = images.shape[-2:]
        divisor = self.size_divisor
        padded = (height + -height % divisor, width + -width % divisor)
        inside = F.pad(self.normalise(images), (0, padded[1] - width, 0, padded[0] - height))

        def full(logits: Tensor) -> Tensor:
            if padded == (height, width):
                return logits
            return F.interpolate(logits, padded, mode="bilinear", align_corners=False)[..., :height, :width]

        maps = self.backbone(inside)
        features = checkpointing.run(self.decoder, inside, maps, recompute=self.activation_checkpoint)
        outputs: dict[str, Any] = {"logits": full(self.classifier(features))}
        if self.training and self.auxiliary:
            outputs["aux"] = [{"logits": full(head(maps))} for head in self.auxiliary.values()]
        return outputs


class Classifier(nn.Sequential):
    def __init__(self, in_channels: int, num_classes: int, dropout: float) -> None:
        super().__init__(nn.Dropout2d(dropout), nn.Conv2d(in_channels, num_classes, 1))


class AuxiliaryHead(nn.Module):
    """An FCN head on one of the backbone's maps."""

    def __init__(self, spec: AuxiliaryHeadSpec, channels: list[int], num_classes: int, dropout: float) -> None:
        super().__init__()
        index = STRIDES.index(spec.stride)
        self.blocks = FcnBlocks(channels[index], spec.channels, spec.convs, index)
        self.classifier = Classifier(self.blocks.out_channels, num_classes, dropout)

    def forward(self, maps: list[Tensor]) -> Tensor:
        logits: Tensor = self.classifier(self.blocks(maps))
        return logits
