"""Mask2Former (Cheng et al. 2022), as its authors published it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tessera.models.backbone import build_backbone
from tessera.models.base import Network
from tessera.models.common.masked_decoder import MaskedDecoder, mask_outputs
from tessera.models.common.pixel_decoder import PixelDecoder
from tessera.spec.networks import Mask2FormerSpec


class Mask2Former(Network):
    """``pred_logits`` (B, Q, classes + 1), no-object last, and ``pred_masks`` (B, Q, H/4, W/4), logits.

    Padding is not masked, as published: every query may look at it and learns to call it background.
    """

    output_names = ("pred_logits", "pred_masks")

    def __init__(
        self,
        spec: Mask2FormerSpec,
        num_classes: int,
        activation_checkpoint: bool = False,
        load_pretrained: bool = True,
    ) -> None:
        super().__init__(spec.pixel_mean, spec.pixel_std)
        dim = spec.pixel_decoder.hidden_dim
        self.deep_supervision = spec.loss.deep_supervision
        self.backbone = build_backbone(spec.backbone, activation_checkpoint, load_pretrained)
        self.pixel_decoder = PixelDecoder(self.backbone.channels, spec.pixel_decoder, activation_checkpoint)
        self.query_feat = nn.Embedding(spec.decoder.num_object_queries, dim)
        self.query_embed = nn.Embedding(spec.decoder.num_object_queries, dim)
        self.decoder = MaskedDecoder(dim, num_classes, spec.decoder, activation_checkpoint)

    def forward(self, images: Tensor, padding: Tensor | None = None) -> dict[str, Any]:
        pixels = self.pixel_decoder(self.backbone(self.normalise(images)))
        queries = self.query_feat.weight.expand(images.shape[0], -1, -1)
        *earlier, last = self.decoder(queries, self.query_embed.weight, pixels)
        outputs: dict[str, Any] = mask_outputs(last, pixels.mask_features)
        if self.training and self.deep_supervision:
            outputs["aux"] = [mask_outputs(prediction, pixels.mask_features) for prediction in earlier]
        return outputs
