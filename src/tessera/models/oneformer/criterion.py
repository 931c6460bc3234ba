"""OneFormer's losses: those of the mask transformers, and the contrast of queries with texts (Jain et al. 2023, section 3.3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as gathering
import torch.nn.functional as F
from torch import Tensor

from tessera.models.common.mask_criterion import MaskCriterion
from tessera.spec.networks import OneFormerLossSpec
from tessera.structures import Target


class OneFormerCriterion(MaskCriterion):
    """Adds ``loss_contrastive`` where the outputs hold texts, as they do in training."""

    def __init__(self, num_classes: int, spec: OneFormerLossSpec) -> None:
        super().__init__(num_classes, spec)
        self.contrastive_weight = spec.contrastive_weight

    def forward(self, outputs: dict[str, Any], targets: list[Target]) -> dict[str, Tensor]:
        losses = super().forward(outputs, targets)
        if "texts" in outputs:
            loss = contrastive_loss(outputs["queries"], outputs["texts"], outputs["logit_scale"])
            losses["loss_contrastive"] = self.contrastive_weight * loss
        return losses


def contrastive_loss(queries: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """queries and texts (B, Q, C): each image is to be more like its own texts than like those of every other image on any process,
    and the other way round. Zero for a single image, which has nothing to be told from."""
    queries = F.normalize(queries.flatten(1).float(), dim=1)
    texts = F.normalize(texts.flatten(1).float(), dim=1)
    own = torch.arange(len(queries), device=queries.device)
    all_queries, all_texts = queries, texts
    if dist.is_available() and dist.is_initialized():
        # Gradients flow back to the other processes, so that averaging over processes is the loss of one large batch.
        all_queries, all_texts = _gather(queries), _gather(texts)
        own = own + dist.get_rank() * len(queries)
    scale = scale.float()
    of_images = F.cross_entropy(scale * queries @ all_texts.T, own)
    of_texts = F.cross_entropy(scale * texts @ all_queries.T, own)
    return of_images + of_texts


def _gather(features: Tensor) -> Tensor:
    """(B, N) of every process, one after the other."""
    return torch.cat(tuple(gathering.all_gather(features)))  # type: ignore[no-untyped-call]  # torch leaves it untyped
