"""Classes of pixels from the logits of the encoder-decoder family."""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.models.common.resizing import to_original
from tessera.structures import ImageMeta, Predictions


class SegmentationPostprocess:
    """Logits are resized to the padded input, cropped, and resized to the original image before the class is chosen."""

    @torch.no_grad()
    def __call__(
        self,
        outputs: dict[str, Tensor],
        metas: list[ImageMeta],
        input_size: tuple[int, int],
        task: str | None = None,
    ) -> list[Predictions]:
        logits = outputs["logits"].float()
        return [
            Predictions(meta, semantic=to_original(one, meta, input_size).argmax(0))
            for one, meta in zip(logits, metas, strict=True)
        ]

    @torch.no_grad()
    def scores(
        self,
        outputs: dict[str, Tensor],
        metas: list[ImageMeta],
        input_size: tuple[int, int],
        task: str | None = None,
    ) -> list[Tensor]:
        """Probabilities (C, H, W) of the classes at original size, for averaging over crops, scales and flips."""
        logits = outputs["logits"].float()
        return [to_original(one, meta, input_size).softmax(0) for one, meta in zip(logits, metas, strict=True)]
