"""Matching costs of the mask transformers, for all layers at once (Mask2Former, section 3.3; MaskFormer, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.ops.points import sample_logits, sample_masks
from tessera.spec.schema import MaskLossSpec


def matching_costs(
    logits: Tensor, masks: Tensor, labels: Sequence[Tensor], targets: Sequence[Tensor], spec: MaskLossSpec
) -> list[Tensor]:
    """One (L, Q, N) float32 cost per image for L layers and N targets.

    logits (L, B, Q, C + 1); masks (L, B, Q, h, w) logits; labels (N,) and targets (N, H, W) bool per image. Predictions and
    targets of an image are compared at the same random points, drawn once for all its layers.
    """
    return [
        _image_cost(logits[:, image], masks[:, image], labels[image], targets[image], spec)
        for image in range(logits.shape[1])
    ]


def _image_cost(logits: Tensor, masks: Tensor, labels: Tensor, targets: Tensor, spec: MaskLossSpec) -> Tensor:
    layers, queries = logits.shape[:2]
    points = torch.rand(1, spec.train_num_points, 2, device=masks.device)
    if not len(labels):
        return logits.new_zeros((layers, queries, 0), dtype=torch.float32)
    predicted = sample_logits(masks.flatten(0, 1).unsqueeze(0).float(), points).squeeze(0)  # L*Q, P
    every = torch.arange(len(targets), device=targets.device)
    wanted = sample_masks(targets, every, points.expand(len(targets), -1, -1))  # N, P
    cost = spec.mask_weight * cross_entropy_cost(predicted, wanted) + spec.dice_weight * dice_cost(predicted, wanted)
    return cost.view(layers, queries, -1) - spec.class_weight * logits.float().softmax(-1)[..., labels]


def cross_entropy_cost(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Mean binary cross-entropy of every pair: (M, P) logits and (N, P) targets in [0, 1] to (M, N).

    softplus(x) - x t is the cross-entropy of logit x and target t, so one matrix product serves all pairs.
    """
    return (F.softplus(predicted).sum(1, keepdim=True) - predicted @ wanted.T) / predicted.shape[1]


def dice_cost(predicted: Tensor, wanted: Tensor) -> Tensor:
    """1 - Dice coefficient, smoothed by 1, of every pair: (M, P) logits and (N, P) targets in [0, 1] to (M, N)."""
    share = predicted.sigmoid()
    total = share.sum(1, keepdim=True) + wanted.sum(1)
    return 1 - (2 * (share @ wanted.T) + 1) / (total + 1)
