"""Losses of the mask transformers (Mask2Former, section 3.3): class of every query, cross-entropy and Dice at sampled points.

Shapes: L layers with a loss, B images, Q queries, N targets of an image, M matched pairs of a layer, P points.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.models.common.mask_costs import matching_costs
from tessera.models.common.matching import Matches, assign, mean_count
from tessera.ops.points import sample_logits, sample_masks, uncertain_points
from tessera.spec.networks import MaskLossSpec
from tessera.structures import Target


class MaskCriterion(nn.Module):
    """``criterion(outputs, targets)``: weighted ``loss_class``, ``loss_mask`` and ``loss_dice``, and the same with a suffix ``_<i>``
    for the i-th entry of ``aux``. Crowd targets are left out."""

    class_weights: Tensor

    def __init__(self, num_classes: int, spec: MaskLossSpec) -> None:
        super().__init__()
        self.spec = spec
        self.num_classes = num_classes
        weights = torch.ones(num_classes + 1)
        weights[-1] = spec.no_object_weight
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, outputs: dict[str, Any], targets: list[Target]) -> dict[str, Tensor]:
        layers = [outputs, *outputs.get("aux", [])]
        logits = [layer["pred_logits"] for layer in layers]
        masks = [layer["pred_masks"] for layer in layers]
        device = masks[0].device
        labels = [target.labels[~target.iscrowd].to(device) for target in targets]
        wanted = [target.required_masks()[~target.iscrowd].to(device) for target in targets]
        with torch.no_grad():
            matches = assign(matching_costs(logits, masks, labels, wanted, self.spec))
        by_kind = {
            "loss_class": self.spec.class_weight * self._class_losses(torch.stack(logits).float(), labels, matches),
            **self._mask_losses(masks, wanted, matches),
        }
        suffixes = ["", *(f"_{index}" for index in range(len(layers) - 1))]
        return {
            name + suffix: losses[layer] for layer, suffix in enumerate(suffixes) for name, losses in by_kind.items()
        }

    def _class_losses(self, logits: Tensor, labels: list[Tensor], matches: Matches) -> Tensor:
        """(L,): mean over queries, weighted by the class."""
        wanted = torch.full(logits.shape[:3], self.num_classes, dtype=torch.long, device=logits.device)
        for layer, images in enumerate(matches):
            for image, (queries, found) in enumerate(images):
                wanted[layer, image, queries] = labels[image][found]
        weights = self.class_weights.to(logits.device)
        each = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), weights, reduction="none")
        total = weights[wanted].flatten(1).sum(1)
        # Zero where nothing is matched and no-object has no weight.
        return each.view(len(logits), -1).sum(1) / total.clamp(min=torch.finfo(total.dtype).tiny)

    def _mask_losses(self, masks: list[Tensor], wanted: list[Tensor], matches: Matches) -> dict[str, Tensor]:
        """(L,) each: sums over matched pairs divided by the mean number of targets per process."""
        layers = len(masks)
        starts = torch.tensor([0, *(len(image) for image in wanted)]).cumsum(0).tolist()
        predicted, index = [], []
        for layer, images in zip(masks, matches, strict=True):
            # One indexing per layer: the gradient of each is as large as the whole layer.
            image = torch.cat([torch.full_like(queries, place) for place, (queries, _) in enumerate(images)])
            predicted.append(layer[image, torch.cat([queries for queries, _ in images])])
            index += [found + start for (_, found), start in zip(images, starts[:-1], strict=True)]
        chosen = torch.cat(predicted).float()  # L*M, h, w
        count = mean_count(starts[-1], chosen.device)
        if not len(chosen):
            nothing = chosen.sum()
            return {"loss_mask": nothing.expand(layers), "loss_dice": nothing.expand(layers)}
        points = uncertain_points(
            chosen, self.spec.train_num_points, self.spec.oversample_ratio, self.spec.importance_sample_ratio
        )
        logits = sample_logits(chosen.unsqueeze(1), points).squeeze(1)
        with torch.no_grad():
            truth = sample_masks(torch.cat(wanted), torch.cat(index), points)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
        share = logits.sigmoid()
        dice = 1 - (2 * (share * truth).sum(1) + 1) / (share.sum(1) + truth.sum(1) + 1)
        return {
            "loss_mask": self.spec.mask_weight * cross_entropy.view(layers, -1).sum(1) / count,
            "loss_dice": self.spec.dice_weight * dice.view(layers, -1).sum(1) / count,
        }
