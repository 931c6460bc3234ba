"""One encoder layer of deformable attention (Deformable DETR, section 4.1), as the box and the mask transformers have it."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from tessera.models.common.attention import DeformableAttention


class DeformableEncoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, levels: int, points: int, dim_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(dim, heads, levels, points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference: Tensor,
        shapes: Sequence[tuple[int, int]],
        padding: Tensor | None = None,
    ) -> Tensor:
        """x (B, S, C); position (S, C) or (B, S, C); the rest as in ``DeformableAttention``, every pixel being a query."""
        x = self.norm1(x + self.dropout(self.self_attn(x + position, x, reference, shapes, padding)))
        x = self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))
        return x
