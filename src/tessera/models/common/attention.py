"""Attention layers of the transformers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.ops.deformable import multi_scale_deformable_sample


class Attention(nn.Module):
    """Multi-head attention with separate projections, initialised like ``nn.MultiheadAttention``."""

    def __init__(self, channels: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            # Xavier over the packed (3C, C) matrix, whose fan-out is 3C.
            nn.init.xavier_uniform_(projection.weight, gain=1 / math.sqrt(2))
            nn.init.zeros_(projection.bias)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """query (B, Q, C), key and value (B, K, C); allowed (B, 1 or heads, Q, K) bool, True where a query may look."""
        attended = F.scaled_dot_product_attention(
            self._split(self.q_proj(query)),
            self._split(self.k_proj(key)),
            self._split(self.v_proj(value)),
            attn_mask=allowed,
            dropout_p=self.dropout if self.training else 0.0,
        )
        projected: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return projected

    def _split(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, 2, (self.heads, -1)).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, section 4.1); sampling runs in fp32 under mixed precision.

    ``sample`` computes it and may be replaced, by an exporter for example: any function with the signature of
    ``ops.deformable.multi_scale_deformable_sample``.
    """

    def __init__(self, channels: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.sample = multi_scale_deformable_sample
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head m looks in compass direction m at first, point k at distance k + 1."""
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = direction[:, None, None, :] * distance[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        memory: Tensor,
        reference: Tensor,
        shapes: Sequence[tuple[int, int]],
        padding: Tensor | None = None,
    ) -> Tensor:
        """query (B, Q, C); memory (B, S, C), the levels' pixels in order, and (h, w) of these levels.

        reference (Q, 2), the same for all images and levels, or (B, Q, L, 2): points (x, y) in [0, 1], from which offsets are counted
        in pixels; or (B, Q, L, 4): boxes (cx, cy, w, h), of whose sizes offsets are a share. padding (B, S) bool, True where nothing
        is to be read.
        """
        batch, queries, _ = query.shape
        value = self.value_proj(memory)
        if padding is not None:
            value = value.masked_fill(padding.unsqueeze(-1), 0.0)
        value = torch.unflatten(value, 2, (self.heads, -1))
        if reference.dim() == 2:
            reference = reference.view(1, -1, 1, 2)
        reference = reference.unsqueeze(3).unsqueeze(2)  # B, Q, 1, L, 1, 2 or 4
        with full_precision(query):
            query = query.float()
            offsets = self.sampling_offsets(query).view(batch, queries, self.heads, self.levels, self.points, 2)
            weights = self.attention_weights(query).view(batch, queries, self.heads, self.levels * self.points)
            weights = weights.softmax(-1).view(batch, queries, self.heads, self.levels, self.points)
            if reference.shape[-1] == 4:
                locations = reference[..., :2] + offsets / self.points * reference[..., 2:] * 0.5
            else:
                # Divided level by level: a tensor of the sizes would bake them into an exported graph.
                steps = [
                    torch.stack((offsets[:, :, :, level, :, 0] / width, offsets[:, :, :, level, :, 1] / height), dim=-1)
                    for level, (height, width) in enumerate(shapes)
                ]
                locations = reference + torch.stack(steps, dim=3)
            attended = self.sample(value.float(), shapes, locations, weights)
        projected: Tensor = self.output_proj(attended)
        return projected


def full_precision(like: Tensor) -> contextlib.AbstractContextManager[object]:
    """Switches autocast off where it is on; where it is off, nothing that an exporter would have to trace."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
