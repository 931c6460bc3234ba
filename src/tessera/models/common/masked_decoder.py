"""Masked attention decoder (Mask2Former, section 3.2.1): queries look only where their own mask of the layer before is foreground."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.models.common import checkpointing
from tessera.models.common.attention import Attention
from tessera.models.common.pixel_decoder import PixelFeatures
from tessera.spec.networks import TransformerDecoderSpec

LEVELS = 3
"""Strides 32, 16 and 8 in turn."""


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int, layers: int) -> None:
        super().__init__()
        widths = [inputs, *[hidden] * (layers - 1), outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x) if index == 0 else layer(F.relu(x))
        return x


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward; normalised after each, or before each with ``pre_norm``."""

    def __init__(self, dim: int, spec: TransformerDecoderSpec) -> None:
        super().__init__()
        self.pre_norm = spec.pre_norm
        self.cross_attn = Attention(dim, spec.nheads, spec.dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = Attention(dim, spec.nheads, spec.dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, spec.dim_feedforward)
        self.linear2 = nn.Linear(spec.dim_feedforward, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(spec.dropout)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor, query_position: Tensor, memory: Tensor, keys: Tensor, allowed: Tensor) -> Tensor:
        """x (B, Q, C); query_position (Q, C); memory (B, S, C) and keys, the same with positions; allowed (B, 1, Q, S) bool."""
        if self.pre_norm:
            y = self.norm1(x)
            x = x + self.dropout(self.cross_attn(y + query_position, keys, memory, allowed))
            y = self.norm2(x)
            x = x + self.dropout(self.self_attn(y + query_position, y + query_position, y))
            x = x + self.dropout(self._feed_forward(self.norm3(x)))
            return x
        x = self.norm1(x + self.dropout(self.cross_attn(x + query_position, keys, memory, allowed)))
        y = x + query_position
        x = self.norm2(x + self.dropout(self.self_attn(y, y, x)))
        x = self.norm3(x + self.dropout(self._feed_forward(x)))
        return x

    def _feed_forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return out


class MaskHeads(nn.Module):
    """Class and mask of every query; the same weights after every layer."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.mask_embed = MLP(dim, dim, dim, layers=3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, Q, C) to class logits (B, Q, classes + 1), no-object last, and mask embeddings (B, Q, C)."""
        x = self.norm(x)
        return self.class_embed(x), self.mask_embed(x)


class MaskedDecoder(nn.Module):
    def __init__(
        self, dim: int, num_classes: int, spec: TransformerDecoderSpec, activation_checkpoint: bool = False
    ) -> None:
        super().__init__()
        self.activation_checkpoint = activation_checkpoint
        self.level_embed = nn.Embedding(LEVELS, dim)
        self.layers = nn.ModuleList(DecoderLayer(dim, spec) for _ in range(spec.layers))
        self.heads = MaskHeads(dim, num_classes)

    def forward(self, x: Tensor, query_position: Tensor, pixels: PixelFeatures) -> list[tuple[Tensor, Tensor]]:
        """Class logits and mask embeddings of the raw queries x (B, Q, C) and after every layer."""
        levels = self.level_embed.weight
        memories = [memory + levels[level] for level, memory in enumerate(pixels.memories)]
        keys = [memory + position for memory, position in zip(memories, pixels.positions, strict=True)]
        small = [_resized(pixels.mask_features.detach(), shape) for shape in pixels.shapes]
        predictions = [self.heads(x)]
        for index, layer in enumerate(self.layers):
            level = index % LEVELS
            allowed = _foreground(predictions[-1][1].detach(), small[level])
            x = checkpointing.run(
                layer, x, query_position, memories[level], keys[level], allowed, recompute=self.activation_checkpoint
            )
            predictions.append(self.heads(x))
        return predictions


def mask_outputs(prediction: tuple[Tensor, Tensor], mask_features: Tensor) -> dict[str, Tensor]:
    """Class logits and mask embeddings (B, Q, C) with mask features (B, C, h, w) to the logits by name."""
    logits, embeddings = prediction
    masks = torch.unflatten(embeddings @ mask_features.flatten(2), 2, mask_features.shape[-2:])
    return {"pred_logits": logits, "pred_masks": masks}


def _resized(mask_features: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, C, h * w). Resizing is linear, so a query's mask from resized features is its resized mask, at a fraction of the work."""
    return F.interpolate(mask_features, size=shape, mode="bilinear", align_corners=False).flatten(2)


def _foreground(embeddings: Tensor, features: Tensor) -> Tensor:
    """(B, 1, Q, h * w) bool, True where a query may look: its mask's foreground, or everywhere if there is none."""
    foreground = (embeddings @ features) >= 0
    return (foreground | ~foreground.any(dim=2, keepdim=True)).unsqueeze(1)
