"""Global Context ViT (Hatamizadeh et al. 2023) as its authors' detector and TAO use it: any input size, one LayerNorm per output.

Windows keep the size they are pretrained with: every block pads its map to whole windows, and the global query is resized to one
window. At the pretraining size neither does anything, and the stages are exactly timm's, whose parts and names these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from timm.models.gcvit import Downsample2d, FeatureBlock, GlobalContextVitBlock, Stem
from torch import Tensor, nn

from tessera.models.common import checkpointing
from tessera.models.common.windowed import drop_path_rates, initialise, join, pad_to_windows, partition

WINDOW_STRIDES = (32, 32, 16, 32)
"""Pretraining pixels per token of a window's side, by stage: images of 224 pixels make windows of 7, 7, 14 and 7 tokens."""
QUERY_POOLINGS = (3, 2, 0, 0)
"""Halvings that take a stage's map at the pretraining size to one window."""

_norm: Any = partial(LayerNorm2d, eps=1e-5)


class GCViTBlock(GlobalContextVitBlock):
    """Attention inside each window; in every other block the whole map's global query takes the place of the window's own."""

    def _window_attn(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        """x (B, h, w, C); q_global (B, window, window, C), never None."""
        assert q_global is not None
        window = q_global.shape[1]
        height, width = x.shape[1:3]
        x = pad_to_windows(x, window)
        whole_height, whole_width = x.shape[1:3]
        x = partition(x, window)
        # One query per window: given one per image, timm versions differ in which windows they take for which image's.
        queries = q_global.flatten(1, 2).unsqueeze(1).expand(-1, x.shape[1], -1, -1).flatten(0, 1)
        x = self.attn(x.flatten(0, 1), queries).unflatten(0, x.shape[:2])
        return join(x, window, whole_height, whole_width)[:, :height, :width]


class GCViTStage(nn.Module):
    def __init__(
        self, channels: int, window: int, poolings: int, drop_paths: Sequence[float], downsample: bool, **block: Any
    ) -> None:
        super().__init__()
        self.window = window
        self.downsample = Downsample2d(channels // 2, channels, norm_layer=_norm) if downsample else nn.Identity()
        self.global_block = FeatureBlock(channels, poolings)
        self.blocks = nn.ModuleList(
            GCViTBlock(
                channels,
                feat_size=(window, window),  # sets an attribute that nothing reads
                window_size=window,
                use_global=index % 2 == 1,
                drop_path=drop_path,
                **block,
            )
            for index, drop_path in enumerate(drop_paths)
        )

    def forward(self, x: Tensor, recompute: bool) -> Tensor:
        """The stage before (B, C / 2, 2h, 2w) to this one (B, C, h, w); the first stage keeps the size."""
        x = self.downsample(x)
        # Resizing to the size that the query already has changes no bit.
        query = F.interpolate(self.global_block(x), size=(self.window, self.window), mode="bicubic")
        x, query = x.permute(0, 2, 3, 1), query.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = checkpointing.run(block, x, query, recompute=recompute)
        return x.permute(0, 3, 1, 2)


class GCViT(nn.Module):
    """Four feature maps (B, C, h, w) at strides 4, 8, 16 and 32."""

    origin: dict[str, str] | None = None
    """What the weights were read from; see ``backbone.Origin``. None where they are random."""

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: float,
        layer_scale: float | None = None,
        resolution: int = 224,
        drop_path_rate: float = 0.0,
        activation_checkpoint: bool = False,
    ) -> None:
        """``resolution``: side of the pretraining's square images, a multiple of 32; it sets the windows."""
        super().__init__()
        self.activation_checkpoint = activation_checkpoint
        self.channels = [embed_dim * 2**stage for stage in range(len(depths))]
        self.strides = [4 * 2**stage for stage in range(len(depths))]
        self.stem = Stem(out_chs=embed_dim, norm_layer=_norm)
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList(
            GCViTStage(
                channels,
                resolution // WINDOW_STRIDES[stage],
                QUERY_POOLINGS[stage],
                rates[stage],
                downsample=stage > 0,
                num_heads=num_heads[stage],
                mlp_ratio=mlp_ratio,
                layer_scale=layer_scale,
            )
            for stage, channels in enumerate(self.channels)
        )
        for stage, channels in enumerate(self.channels):
            self.add_module(f"norm{stage}", nn.LayerNorm(channels))
        self.apply(initialise)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images)
        outputs = []
        for number, stage in enumerate(self.stages):
            x = stage(x, self.activation_checkpoint)
            normed = self.get_submodule(f"norm{number}")(x.permute(0, 2, 3, 1))
            outputs.append(normed.permute(0, 3, 1, 2))
        return outputs
