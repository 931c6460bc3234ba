"""Pixel decoder of the mask transformers (Mask2Former, section 3.2.2): deformable attention over strides 32, 16 and 8, one step to 4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.models.common import checkpointing
from tessera.models.common.deformable_encoder import DeformableEncoderLayer
from tessera.models.common.position import sine_position
from tessera.spec.networks import PixelDecoderSpec

GROUPS = 32
"""Of every group norm."""


@dataclass
class PixelFeatures:
    mask_features: Tensor
    """(B, C, H/4, W/4)."""
    memories: list[Tensor]
    """(B, h * w, C) at strides 32, 16, 8."""
    positions: list[Tensor]
    """(h * w, C), the position encodings of ``memories``."""
    shapes: list[tuple[int, int]]
    """(h, w) of ``memories``."""


class PixelDecoder(nn.Module):
    def __init__(self, channels: Sequence[int], spec: PixelDecoderSpec, activation_checkpoint: bool = False) -> None:
        """``channels`` of the backbone's outputs at strides 4, 8, 16 and 32."""
        super().__init__()
        self.activation_checkpoint = activation_checkpoint
        dim = spec.hidden_dim
        coarse = list(channels[:0:-1])
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(count, dim, kernel_size=1), nn.GroupNorm(GROUPS, dim)) for count in coarse
        )
        self.level_embed = nn.Parameter(torch.empty(len(coarse), dim))
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(dim, spec.nheads, len(coarse), spec.points, spec.dim_feedforward, spec.dropout)
            for _ in range(spec.layers)
        )
        self.lateral = nn.Sequential(nn.Conv2d(channels[0], dim, kernel_size=1, bias=False), nn.GroupNorm(GROUPS, dim))
        self.output = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size=3, padding=1, bias=False), nn.GroupNorm(GROUPS, dim), nn.ReLU()
        )
        self.mask_features = nn.Conv2d(dim, dim, kernel_size=1)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.level_embed)
        for convolution in self.input_proj.modules():
            if isinstance(convolution, nn.Conv2d):
                nn.init.xavier_uniform_(convolution.weight)
        for convolution in (*self.lateral, *self.output, self.mask_features):
            if isinstance(convolution, nn.Conv2d):
                nn.init.kaiming_uniform_(convolution.weight, a=1)
        for name, parameter in self.named_parameters():
            if name.endswith("bias") and name.startswith(("input_proj", "mask_features")):
                nn.init.zeros_(parameter)

    def forward(self, features: Sequence[Tensor]) -> PixelFeatures:
        """``features`` (B, C, h, w) at strides 4, 8, 16 and 32."""
        maps = [project(feature) for project, feature in zip(self.input_proj, features[:0:-1], strict=True)]
        shapes = [(x.shape[2], x.shape[3]) for x in maps]
        dim = self.level_embed.shape[1]
        positions = [sine_position(height, width, dim, maps[0]) for height, width in shapes]
        level_positions = [position + level for position, level in zip(positions, self.level_embed, strict=True)]
        position = torch.cat(level_positions)
        reference = torch.cat([_pixel_centres(height, width, maps[0]) for height, width in shapes])
        x = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)
        for layer in self.layers:
            x = checkpointing.run(layer, x, position, reference, shapes, recompute=self.activation_checkpoint)
        memories = list(torch.split(x, [height * width for height, width in shapes], dim=1))
        finest = torch.unflatten(memories[-1].transpose(1, 2), 2, shapes[-1])
        lateral = self.lateral(features[0])
        finest = F.interpolate(finest, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
        return PixelFeatures(self.mask_features(self.output(lateral + finest)), memories, positions, shapes)


def _pixel_centres(height: int, width: int, like: Tensor) -> Tensor:
    """(height * width, 2) float32 as (x, y) in [0, 1]."""
    y = (torch.arange(height, device=like.device, dtype=torch.float32) + 0.5) / height
    x = (torch.arange(width, device=like.device, dtype=torch.float32) + 0.5) / width
    grid = (x.unsqueeze(0).expand(height, -1), y.unsqueeze(1).expand(-1, width))
    return torch.stack(grid, dim=-1).flatten(0, 1)
