"""Losses on the class of every pixel, at the size of the labels; pixels labelled IGNORE count in none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.losses import DiceLoss, FocalLoss, LovaszLoss, TverskyLoss
from torch import Tensor, nn

from tessera.files import UserError
from tessera.spec.networks import EncoderDecoderSpec, OhemSpec, SegmentationLossSpec
from tessera.structures import IGNORE, ClassCatalog, Target

MULTICLASS = "multiclass"


class SegmentationCriterion(nn.Module):
    """``criterion(outputs, targets)``: ``loss_<name>`` for every loss, and ``loss_<name>_<head>`` for every auxiliary head.

    A batch without a labelled pixel has losses of zero, and a cross-entropy of zero where the classes it counts have no weight.
    """

    class_weights: Tensor | None

    def __init__(self, spec: EncoderDecoderSpec, catalog: ClassCatalog) -> None:
        super().__init__()
        _check_weights(spec.class_weights, catalog)
        weights = spec.class_weights
        self.register_buffer("class_weights", None if weights is None else torch.tensor(weights), persistent=False)
        self.losses = spec.losses
        self.heads = {name: head.weight for name, head in spec.auxiliary.items()}
        self.ohem = spec.ohem
        self.region_losses = {name: region_loss(loss, weights) for name, loss in spec.losses.items()}

    def forward(self, outputs: dict[str, Any], targets: list[Target]) -> dict[str, Tensor]:
        logits = outputs["logits"]
        labels = torch.stack([_semantic(target) for target in targets]).to(logits.device, torch.long)
        found = self._losses(logits, labels, "", 1.0, self.ohem)
        for (name, weight), auxiliary in zip(self.heads.items(), outputs.get("aux", []), strict=False):
            # Like MMSegmentation's sampler, hard example mining belongs to the decode head alone.
            found |= self._losses(auxiliary["logits"], labels, f"_{name}", weight, None)
        return found

    def _losses(
        self, logits: Tensor, labels: Tensor, suffix: str, factor: float, ohem: OhemSpec | None
    ) -> dict[str, Tensor]:
        logits = F.interpolate(logits.float(), labels.shape[-2:], mode="bilinear", align_corners=False)
        labelled = bool((labels != IGNORE).any())
        found = {}
        for name, spec in self.losses.items():
            region = self.region_losses[name]
            if not labelled:
                value = logits.sum() * 0
            elif region is None:
                value = cross_entropy(logits, labels, self.class_weights, ohem)
            else:
                value = region(logits, labels)
            found[f"loss_{name}{suffix}"] = value * (spec.weight * factor)
        return found


def region_loss(
    spec: SegmentationLossSpec, class_weights: list[float] | None
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """``loss(logits, labels)``; None for the cross-entropy, which is ours."""
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    if spec.type == "dice":
        loss = DiceLoss(MULTICLASS, ignore_index=IGNORE)
    elif spec.type == "tversky":
        loss = TverskyLoss(MULTICLASS, ignore_index=IGNORE, alpha=spec.tversky_alpha, beta=spec.tversky_beta)
    elif spec.type == "focal":
        loss = FocalLoss(MULTICLASS, ignore_index=IGNORE, gamma=spec.focal_gamma, class_weights=class_weights)
    elif spec.type == "lovasz":
        loss = LovaszLoss(MULTICLASS, ignore_index=IGNORE)
    return loss


def cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None, ohem: OhemSpec | None) -> Tensor:
    """Mean over the labelled pixels, or over the hard ones among them, in which every pixel counts with the weight of its class; zero
    where all of them have none.

    Logits (B, C, H, W), labels (B, H, W) with at least one labelled pixel.
    """
    labelled = labels != IGNORE
    counted = labelled if ohem is None else hard_pixels(logits.detach(), labels, ohem)
    if class_weights is not None and not bool(class_weights[labels[counted]].any()):
        return logits.sum() * 0
    return F.cross_entropy(logits, labels.masked_fill(~counted, IGNORE), class_weights, ignore_index=IGNORE)


def hard_pixels(logits: Tensor, labels: Tensor, ohem: OhemSpec) -> Tensor:
    """(B, H, W) bool: labelled pixels whose own class has a probability below ``thresh``, and at least the ``min_kept`` per image,
    taken over the whole batch, that have the smallest ones (Shrivastava et al. 2016; MMSegmentation's OHEMPixelSampler)."""
    labelled = labels != IGNORE
    own = logits.softmax(1).gather(1, labels.masked_fill(~labelled, 0).unsqueeze(1)).squeeze(1)
    own = own.masked_fill(~labelled, 2.0)
    kept = min(ohem.min_kept * len(labels), int(labelled.sum()))
    # Ties with the last one that has to be kept are kept, too.
    hardest = own.flatten().kthvalue(kept).values
    below = own <= hardest
    return below if ohem.thresh is None else below | (own < ohem.thresh)


def _semantic(target: Target) -> Tensor:
    if target.semantic is None:
        raise ValueError("the target carries no semantic map; expected a dataset read in semantic mode")
    return target.semantic


def _check_weights(weights: list[float] | None, catalog: ClassCatalog) -> None:
    if weights is None:
        return
    if len(weights) != len(catalog):
        raise UserError(
            f"model.class_weights has {len(weights)} entries, expected one for each of the {len(catalog)} classes, in their order: "
            f"{', '.join(catalog.names)}"
        )
