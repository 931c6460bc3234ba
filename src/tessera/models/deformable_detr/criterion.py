"""Losses of Deformable DETR: focal loss of the classes, L1 distance and generalised IoU of the matched boxes (DETR, section 3.1).

Shapes: L layers with a loss, B images, Q queries, C classes, N targets of an image, M matched pairs of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from tessera.models.common.matching import Matches, assign, mean_count
from tessera.ops.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from tessera.spec.networks import DetectionLossSpec
from tessera.structures import Target

GAMMA = 2.0
"""Exponent of the focal loss."""


class DetectionCriterion(nn.Module):
    """``criterion(outputs, targets)``: weighted ``loss_class``, ``loss_box`` and ``loss_giou``, and the same with a suffix ``_<i>`` for
    the i-th entry of ``aux``. Targets that are crowds or have no area are left out."""

    def __init__(self, spec: DetectionLossSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, outputs: dict[str, Any], targets: list[Target]) -> dict[str, Tensor]:
        layers = [outputs, *outputs.get("aux", [])]
        logits = torch.stack([layer["pred_logits"] for layer in layers]).float()  # L, B, Q, C
        boxes = torch.stack([layer["pred_boxes"] for layer in layers]).float()  # L, B, Q, 4
        labels, wanted = zip(*(_wanted(target, boxes.device) for target in targets), strict=True)
        with torch.no_grad():
            costs = [
                matching_costs(logits[:, image], boxes[:, image], labels[image], wanted[image], self.spec)
                for image in range(len(targets))
            ]
            matches = assign(costs)
        count = mean_count(sum(map(len, labels)), boxes.device)
        by_kind = {
            "loss_class": self.spec.class_weight * self._class_losses(logits, labels, matches) / count,
            **{name: losses / count for name, losses in self._box_losses(boxes, wanted, matches).items()},
        }
        suffixes = ["", *(f"_{index}" for index in range(len(layers) - 1))]
        return {
            name + suffix: losses[layer] for layer, suffix in enumerate(suffixes) for name, losses in by_kind.items()
        }

    def _class_losses(self, logits: Tensor, labels: tuple[Tensor, ...], matches: Matches) -> Tensor:
        """(L,): sum over queries and classes."""
        truth = torch.zeros_like(logits)
        for layer, images in enumerate(matches):
            for image, (queries, found) in enumerate(images):
                truth[layer, image, queries, labels[image][found]] = 1.0
        losses: Tensor = sigmoid_focal_loss(logits, truth, alpha=self.spec.focal_alpha, gamma=GAMMA)
        return losses.flatten(1).sum(1)

    def _box_losses(self, boxes: Tensor, wanted: tuple[Tensor, ...], matches: Matches) -> dict[str, Tensor]:
        """(L,) each: sums over matched pairs."""
        chosen, truth = [], []
        for layer, images in enumerate(matches):
            image = torch.cat([torch.full_like(queries, place) for place, (queries, _) in enumerate(images)])
            chosen.append(boxes[layer, image, torch.cat([queries for queries, _ in images])])
            truth.append(torch.cat([wanted[place][found] for place, (_, found) in enumerate(images)]))
        predicted, expected = torch.stack(chosen), torch.stack(truth)  # L, M, 4
        distance = (predicted - expected).abs().sum((1, 2))
        # Targets have an area, so no union is zero; torchvision's default epsilon would be felt by small boxes.
        giou = generalized_box_iou_loss(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(expected), eps=0.0).sum(1)
        return {"loss_box": self.spec.box_weight * distance, "loss_giou": self.spec.giou_weight * giou}


def matching_costs(logits: Tensor, boxes: Tensor, labels: Tensor, wanted: Tensor, spec: DetectionLossSpec) -> Tensor:
    """(L, Q, N) for one image: logits (L, Q, C), boxes (L, Q, 4) and wanted (N, 4) centre-size in [0, 1], labels (N,)."""
    share = logits.sigmoid()[..., labels]
    # What the focal loss of the pair would grow by if the query were matched.
    present = spec.focal_alpha * (1 - share) ** GAMMA * -(share + 1e-8).log()
    absent = (1 - spec.focal_alpha) * share**GAMMA * -(1 - share + 1e-8).log()
    distance = torch.cdist(boxes, wanted, p=1)
    giou: Tensor = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted))
    return spec.class_weight * (present - absent) + spec.box_weight * distance - spec.giou_weight * giou


def _wanted(target: Target, device: torch.device) -> tuple[Tensor, Tensor]:
    """Labels (N,) and boxes (N, 4), centre-size, relative to the image without its padding."""
    if target.size is None:
        raise ValueError("a target for the detection losses carries no `size`, by which its boxes are normalised")
    height, width = target.size
    corners = target.boxes.to(device) / torch.tensor([width, height, width, height], device=device)
    boxes = xyxy_to_cxcywh(corners)
    # Of centre and size, so that a box too thin for float32 is left out, too.
    corners = cxcywh_to_xyxy(boxes)
    kept = ~target.iscrowd.to(device) & (corners[:, 2:] > corners[:, :2]).all(1)
    return target.labels.to(device)[kept], boxes[kept]
