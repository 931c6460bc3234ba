"""Swin Transformer as published (Liu et al. 2021) and as dense predictors use it: any input size, one LayerNorm per output.

Feature maps are padded to whole windows and then rolled, and windows never shrink; module names are those of the original
code, so that its checkpoints load as they are. Shapes: B images, h x w tokens, C channels, n = window * window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from tessera.models.common import checkpointing
from tessera.models.common.windowed import drop_path_rates, initialise, join, pad_to_windows, partition

PATCH = 4
ACROSS_REGIONS = -100.0
"""Added to the attention between tokens that only rolling made neighbours; the published value."""


class PatchEmbed(nn.Module):
    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, ceil(H / 4), ceil(W / 4), C)."""
        height, width = images.shape[-2:]
        x = self.proj(F.pad(images, (0, -width % PATCH, 0, -height % PATCH)))
        normed: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return normed


class WindowAttention(nn.Module):
    relative_position_index: Tensor

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (channels // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", _relative_position_index(window), persistent=False)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, across: Tensor | None) -> Tensor:
        """x (B, nW, n, C), windows of tokens; across (nW, 1, n, n) is added to the attention of every head."""
        q, k, v = torch.unflatten(self.qkv(x), 3, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        attention = (q * self.scale) @ k.transpose(-2, -1)
        count = self.relative_position_index.shape[0]
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()].view(count, count, -1)
        bias = bias.permute(2, 0, 1).contiguous()
        attention = attention + (bias if across is None else bias + across)
        attended = attention.softmax(dim=-1) @ v
        projected: Tensor = self.proj(attended.transpose(2, 3).flatten(3))
        return projected


class SwinBlock(nn.Module):
    def __init__(self, channels: int, heads: int, window: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, window)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, 4 * channels)

    def forward(self, x: Tensor, across: Tensor) -> Tensor:
        """x (B, h, w, C); across as ``shifted_window_mask`` gives it."""
        x = x + self.drop_path(self._attend(self.norm1(x), across))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x

    def _attend(self, x: Tensor, across: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = pad_to_windows(x, self.window)
        whole_height, whole_width = x.shape[1:3]
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = self.attn(partition(x, self.window), across if self.shift else None)
        x = join(x, self.window, whole_height, whole_width)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), (1, 2))
        return x[:, :height, :width]


class PatchMerging(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) to (B, ceil(h / 2), ceil(w / 2), 2C)."""
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        corners = (x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2])
        merged: Tensor = self.reduction(self.norm(torch.cat(corners, dim=-1)))
        return merged


class SwinStage(nn.Module):
    def __init__(self, channels: int, heads: int, window: int, drop_paths: Sequence[float], merge: bool) -> None:
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList(
            SwinBlock(channels, heads, window, window // 2 if index % 2 else 0, drop_path)
            for index, drop_path in enumerate(drop_paths)
        )
        self.downsample = PatchMerging(channels) if merge else None

    def forward(self, x: Tensor, recompute: bool) -> tuple[Tensor, Tensor]:
        """(B, h, w, C) to the stage's own output and the next stage's input."""
        across = shifted_window_mask(x.shape[1], x.shape[2], self.window, x)
        for block in self.blocks:
            x = checkpointing.run(block, x, across, recompute=recompute)
        return x, x if self.downsample is None else self.downsample(x)


class Swin(nn.Module):
    """Four feature maps (B, C, h, w) at strides 4, 8, 16 and 32."""

    origin: dict[str, str] | None = None
    """What the weights were read from; see ``backbone.Origin``. None where they are random."""

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int,
        drop_path_rate: float = 0.0,
        activation_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.activation_checkpoint = activation_checkpoint
        self.channels = [embed_dim * 2**stage for stage in range(len(depths))]
        self.strides = [PATCH * 2**stage for stage in range(len(depths))]
        self.patch_embed = PatchEmbed(embed_dim)
        rates = drop_path_rates(drop_path_rate, depths)
        last = len(depths) - 1
        self.layers = nn.ModuleList(
            SwinStage(channels, heads, window_size, rates[stage], merge=stage < last)
            for stage, (channels, heads) in enumerate(zip(self.channels, num_heads, strict=True))
        )
        for stage, channels in enumerate(self.channels):
            self.add_module(f"norm{stage}", nn.LayerNorm(channels))
        self.apply(initialise)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.patch_embed(images)
        outputs = []
        for stage, layer in enumerate(self.layers):
            output, x = layer(x, self.activation_checkpoint)
            outputs.append(self.get_submodule(f"norm{stage}")(output).permute(0, 3, 1, 2))
        return outputs


def shifted_window_mask(height: int, width: int, window: int, like: Tensor) -> Tensor:
    """(nW, 1, n, n): 0 between tokens of one region of the rolled map, ``ACROSS_REGIONS`` between others.

    Computed from the sizes inside the graph, so that they stay free in an exported one.
    """
    shift = window // 2
    rows = _regions(height + -height % window, window, shift, like.device)
    columns = _regions(width + -width % window, window, shift, like.device)
    region = 3 * rows.unsqueeze(2).unsqueeze(1) + columns.unsqueeze(1).unsqueeze(
        0
    )  # windows down, across, n down, n across
    region = region.flatten(2).flatten(0, 1)
    return ((region.unsqueeze(1) != region.unsqueeze(2)) * ACROSS_REGIONS).to(like.dtype).unsqueeze(1)


def _regions(size: int, window: int, shift: int, device: torch.device) -> Tensor:
    """(size / window, window): which of the three bands of a rolled axis a token lies in."""
    place = torch.arange(size, device=device)
    band = (place >= size - window).long() + (place >= size - shift).long()
    return band.view(-1, window)


def _relative_position_index(window: int) -> Tensor:
    """(n, n): row of the bias table for every pair of tokens of a window."""
    place = torch.arange(window)
    rows, columns = (x.flatten() for x in torch.meshgrid(place, place, indexing="ij"))
    down = rows.unsqueeze(1) - rows.unsqueeze(0) + window - 1
    across = columns.unsqueeze(1) - columns.unsqueeze(0) + window - 1
    return down * (2 * window - 1) + across
