"""Encoder and decoder over a pyramid of feature maps (Deformable DETR, sections 4.1 and 4.2; appendix A.3).

Shapes: B images, C channels, L levels, S pixels of all levels together, Q queries. Boxes and points are relative to the image without
its padding: (1, 1) is the image's own bottom right corner, and each level's ``valid`` share leads from there into the padded level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.models.common import checkpointing
from tessera.models.common.attention import Attention, DeformableAttention
from tessera.models.common.deformable_encoder import DeformableEncoderLayer
from tessera.models.common.masked_decoder import MLP
from tessera.models.common.position import centred_sine_position
from tessera.spec.networks import DeformableDetrSpec

PRIOR = 0.01
"""Probability of every class at first, so that the many background queries do not swamp the first steps (RetinaNet, section 4.1)."""


@dataclass
class Pyramid:
    """The levels' pixels, one level after the other."""

    x: Tensor
    """(B, S, C)."""
    position: Tensor
    """(B, S, C), level embeddings included."""
    centres: Tensor
    """(B, S, 2), of the pixels as (x, y)."""
    padding: Tensor
    """(B, S) bool, True where padded."""
    valid: Tensor
    """(B, L, 2): the share of a level's width and height that is no padding."""
    shapes: list[tuple[int, int]]
    """(h, w) of the levels."""


def build_pyramid(maps: Sequence[Tensor], padding: Tensor, level_embed: Tensor) -> Pyramid:
    """``maps`` (B, C, h, w), finest first; padding (B, H, W) bool, at the bottom and right; level_embed (L, C)."""
    rows, columns = ~padding[:, :, 0], ~padding[:, 0, :]
    positions, centres, paddings, shares = [], [], [], []
    for level, x in enumerate(maps):
        channels, height, width = x.shape[1:]
        inside_rows, inside_columns = _nearest(rows, height), _nearest(columns, width)
        counts = torch.stack((inside_columns.sum(1), inside_rows.sum(1)), dim=1).float()
        positions.append(centred_sine_position(counts, height, width, channels) + level_embed[level])
        centres.append(_pixel_centres(counts, height, width))
        inside = inside_rows.unsqueeze(2) & inside_columns.unsqueeze(1)
        paddings.append(~inside.flatten(1))
        shares.append(torch.stack((counts[:, 0] / width, counts[:, 1] / height), dim=1))
    return Pyramid(
        x=torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1),
        position=torch.cat(positions, dim=1),
        centres=torch.cat(centres, dim=1),
        padding=torch.cat(paddings, dim=1),
        valid=torch.stack(shares, dim=1),
        shapes=[(x.shape[2], x.shape[3]) for x in maps],
    )


class Encoder(nn.Module):
    def __init__(self, spec: DeformableDetrSpec, activation_checkpoint: bool = False) -> None:
        super().__init__()
        self.activation_checkpoint = activation_checkpoint
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(
                spec.hidden_dim,
                spec.nheads,
                spec.num_feature_levels,
                spec.enc_n_points,
                spec.dim_feedforward,
                spec.dropout,
            )
            for _ in range(spec.enc_layers)
        )

    def forward(self, pyramid: Pyramid) -> Tensor:
        """(B, S, C)."""
        reference = pyramid.centres.unsqueeze(2) * pyramid.valid.unsqueeze(1)
        x = pyramid.x
        for layer in self.layers:
            x = checkpointing.run(
                layer,
                x,
                pyramid.position,
                reference,
                pyramid.shapes,
                pyramid.padding,
                recompute=self.activation_checkpoint,
            )
        return x


class DecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention around the reference, feed-forward; normalised after each."""

    def __init__(self, spec: DeformableDetrSpec) -> None:
        super().__init__()
        dim = spec.hidden_dim
        self.self_attn = Attention(dim, spec.nheads, spec.dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn = DeformableAttention(dim, spec.nheads, spec.num_feature_levels, spec.dec_n_points)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, spec.dim_feedforward)
        self.linear2 = nn.Linear(spec.dim_feedforward, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(spec.dropout)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(
        self,
        x: Tensor,
        query_position: Tensor,
        reference: Tensor,
        memory: Tensor,
        padding: Tensor,
        shapes: Sequence[tuple[int, int]],
    ) -> Tensor:
        """x (B, Q, C); query_position (Q, C); reference (B, Q, L, 2 or 4); memory (B, S, C); padding (B, S)."""
        y = x + query_position
        x = self.norm1(x + self.dropout(self.self_attn(y, y, x)))
        x = self.norm2(x + self.dropout(self.cross_attn(x + query_position, memory, reference, shapes, padding)))
        x = self.norm3(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))
        return x


class Decoder(nn.Module):
    """With refinement every layer has its own heads and moves the boxes of the one before it, through which no gradient flows; without,
    all layers share their heads and look around the queries' first points."""

    def __init__(self, spec: DeformableDetrSpec, num_classes: int, activation_checkpoint: bool = False) -> None:
        super().__init__()
        dim = spec.hidden_dim
        self.activation_checkpoint = activation_checkpoint
        self.refine = spec.with_box_refine
        self.query_embed = nn.Embedding(spec.num_queries, 2 * dim)
        """Position, then content."""
        self.reference_points = nn.Linear(dim, 2)
        self.layers = nn.ModuleList(DecoderLayer(spec) for _ in range(spec.dec_layers))
        heads = spec.dec_layers if self.refine else 1
        self.class_embed = nn.ModuleList(_class_head(dim, num_classes) for _ in range(heads))
        # The first boxes have about an eighth of the image's width and height; later layers start by leaving them as they are.
        self.bbox_embed = nn.ModuleList(_box_head(dim, 0.0 if head else -2.0) for head in range(heads))
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, memory: Tensor, pyramid: Pyramid) -> list[tuple[Tensor, Tensor]]:
        """Class logits (B, Q, classes) and boxes (B, Q, 4), centre-size in [0, 1], after every layer."""
        query_position, content = self.query_embed.weight.chunk(2, dim=1)
        x = content.expand(memory.shape[0], -1, -1)
        reference = self.reference_points(query_position).sigmoid().expand(memory.shape[0], -1, -1)
        predictions = []
        for index, layer in enumerate(self.layers):
            x = checkpointing.run(
                layer,
                x,
                query_position,
                _into_levels(reference, pyramid.valid),
                memory,
                pyramid.padding,
                pyramid.shapes,
                recompute=self.activation_checkpoint,
            )
            head = index if self.refine else 0
            boxes = _moved(reference, self.bbox_embed[head](x))
            predictions.append((self.class_embed[head](x), boxes))
            if self.refine:
                reference = boxes.detach()
        return predictions


def _class_head(dim: int, num_classes: int) -> nn.Linear:
    head = nn.Linear(dim, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - PRIOR) / PRIOR))
    return head


def _box_head(dim: int, size: float) -> MLP:
    """``size``: the first answer for width and height, in logits."""
    head = MLP(dim, dim, 4, layers=3)
    last = head.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias.copy_(torch.tensor([0.0, 0.0, size, size]))
    return head


def _nearest(inside: Tensor, size: int) -> Tensor:
    """(B, n) bool to (B, size) bool."""
    return F.interpolate(inside.float().unsqueeze(1), size=size, mode="nearest").squeeze(1).bool()


def _pixel_centres(counts: Tensor, height: int, width: int) -> Tensor:
    """(B, height * width, 2) as (x, y); ``counts`` (B, 2) are the columns and rows that are no padding."""
    x = (torch.arange(width, device=counts.device, dtype=torch.float32) + 0.5) / counts[:, 0:1]
    y = (torch.arange(height, device=counts.device, dtype=torch.float32) + 0.5) / counts[:, 1:2]
    grid = (x.unsqueeze(1).expand(-1, height, -1), y.unsqueeze(2).expand(-1, -1, width))
    return torch.stack(grid, dim=-1).flatten(1, 2)


def _into_levels(reference: Tensor, valid: Tensor) -> Tensor:
    """(B, Q, 2 or 4) relative to the image to (B, Q, L, 2 or 4) relative to each padded level."""
    share = torch.cat((valid, valid), dim=2) if reference.shape[-1] == 4 else valid
    return reference.unsqueeze(2) * share.unsqueeze(1)


def _moved(reference: Tensor, delta: Tensor) -> Tensor:
    """(B, Q, 4) boxes: ``delta`` (B, Q, 4) counts from the reference in logits, its size from nothing where that is a point."""
    start = _inverse_sigmoid(reference)
    if start.shape[-1] == 2:
        start = F.pad(start, (0, 2))
    return (delta + start).sigmoid()


def _inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()
