"""Matching costs of the mask transformers, for all layers at once (Mask2Former, section 3.3; MaskFormer, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.ops.points import sample_logits, sample_masks
from tessera.spec.networks import MaskLossSpec


def matching_costs(
    logits: Sequence[Tensor],
    masks: Sequence[Tensor],
    labels: Sequence[Tensor],
    targets: Sequence[Tensor],
    spec: MaskLossSpec,
) -> list[Tensor]:
    """One (L, Q, N) float32 cost per image for L layers and N targets.

    logits (B, Q, C + 1) and masks (B, Q, h, w), logits too, per layer; labels (N,) and targets (N, H, W) bool per image. Predictions
    and targets of an image are compared at the same random points, drawn once for all its layers.
    """
    costs = []
    for image, (image_labels, image_targets) in enumerate(zip(labels, targets, strict=True)):
        points = torch.rand(1, spec.train_num_points, 2, device=masks[0].device)
        classes = torch.stack([layer[image] for layer in logits]).float()
        if not len(image_labels):
            costs.append(classes.new_zeros((*classes.shape[:2], 0)))
            continue
        # Layer by layer, because a float copy of all layers' masks can be gigabytes.
        sampled = [sample_logits(layer[image : image + 1].float(), points) for layer in masks]
        predicted = torch.cat(sampled).flatten(0, 1)  # L*Q, P
        every = torch.arange(len(image_targets), device=image_targets.device)
        wanted = sample_masks(image_targets, every, points.expand(len(image_targets), -1, -1))  # N, P
        cost = spec.mask_weight * cross_entropy_cost(predicted, wanted) + spec.dice_weight * dice_cost(
            predicted, wanted
        )
        cost = cost.view(*classes.shape[:2], -1) - spec.class_weight * classes.softmax(-1)[..., image_labels]
        costs.append(cost)
    return costs


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
