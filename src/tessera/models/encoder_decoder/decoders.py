"""Decode heads: from the backbone's maps to the features that the classifier reads. ``DECODERS`` has one line per type.

Those of segmentation-models-pytorch expect the image and a map of stride 2 before the backbone's maps. No timm backbone has the former, few
have the latter: what only looks at their place is given the image, and U-Net and LinkNet, which would decode them, end at stride 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3Decoder, DeepLabV3PlusDecoder
from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
from segmentation_models_pytorch.decoders.linknet.decoder import LinknetDecoder
from segmentation_models_pytorch.decoders.pspnet.decoder import PSPBlock, PSPDecoder
from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn

from tessera.spec.networks import DecodeHeadSpec


class Decoder(nn.Module):
    """``decoder(images, maps)``: (B, 3, H, W) and the backbone's four maps to (B, out_channels, h, w)."""

    def __init__(self, net: nn.Module, before: int, out_channels: int) -> None:
        """``before``: how many maps ``net`` expects in front of the backbone's."""
        super().__init__()
        _accept_single_images(net)
        _accept_free_sizes(net)
        self.net = net
        self.before = before
        self.out_channels = out_channels

    def forward(self, images: Tensor, maps: Sequence[Tensor]) -> Tensor:
        features: Tensor = self.net([*[images] * self.before, *maps])
        return features


class FcnBlocks(nn.Module):
    """3x3 convolutions on one map (Long et al. 2015, in the form of MMSegmentation's FCN head)."""

    def __init__(
        self, in_channels: int, channels: int, convs: int, index: int = -1, concat_input: bool = False
    ) -> None:
        """``index`` is the map's place among the backbone's; ``concat_input`` gives one more convolution the map beside the result."""
        super().__init__()
        self.index = index
        widths = [in_channels, *[channels] * convs]
        self.convs = nn.Sequential(*(conv3x3(width, channels) for width in widths[:-1]))
        self.fuse = conv3x3(in_channels + widths[-1], channels) if concat_input else None
        self.out_channels = channels if concat_input else widths[-1]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        features: Tensor = self.convs(maps[self.index])
        return features if self.fuse is None else self.fuse(torch.cat([maps[self.index], features], 1))


def conv3x3(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class PooledNorm(nn.BatchNorm2d):
    """Batch norm of globally pooled maps. One value has no variance: a training batch of one image is normalised as in evaluation."""

    def forward(self, pooled: Tensor) -> Tensor:
        if self.training and pooled[:, 0].numel() == 1:
            return F.batch_norm(pooled, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(pooled)


def _accept_single_images(net: nn.Module) -> None:
    """Gives every branch that pools to one pixel a ``PooledNorm`` for its batch norm."""
    for branch in net.modules():
        pool = branch[0] if isinstance(branch, nn.Sequential) and len(branch) else None
        if isinstance(pool, nn.AdaptiveAvgPool2d) and _bins(pool) == 1:
            for parent in list(branch.modules()):
                for name, norm in parent.named_children():
                    if type(norm) is nn.BatchNorm2d:
                        setattr(parent, name, PooledNorm(norm.num_features))


class BinPool(nn.Module):
    """``AdaptiveAvgPool2d(bins)`` as two matrix products, which graphs of free height and width can hold."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins

    def forward(self, features: Tensor) -> Tensor:
        rows, columns = self._shares(features, -2), self._shares(features, -1)
        return rows @ features @ columns.transpose(0, 1)

    def _shares(self, features: Tensor, axis: int) -> Tensor:
        """(bins, side): what each place has of each bin. Bins overlap by a place where their number does not divide the side."""
        side = features.shape[axis]
        places = torch.arange(side, device=features.device)
        bins = torch.arange(self.bins, device=features.device).unsqueeze(1)
        first = bins * side // self.bins
        end = ((bins + 1) * side + self.bins - 1) // self.bins
        return ((places >= first) & (places < end)).to(features.dtype) / (end - first)


class PyramidBlock(nn.Module):
    """The library's block without its own branch for export, which fixes the size. Weights keep their names."""

    def __init__(self, block: PSPBlock) -> None:
        super().__init__()
        self.pool = nn.Sequential(*block.pool)

    def forward(self, features: Tensor) -> Tensor:
        return F.interpolate(self.pool(features), features.shape[-2:], mode="bilinear", align_corners=True)


def _bins(pool: nn.AdaptiveAvgPool2d) -> int:
    size: Any = pool.output_size
    return int(size[0] if isinstance(size, tuple) else size)


def _accept_free_sizes(net: nn.Module) -> None:
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PSPBlock):
                child = PyramidBlock(child)
                setattr(parent, name, child)
                _accept_free_sizes(child)
            elif isinstance(child, nn.AdaptiveAvgPool2d) and _bins(child) > 1:
                setattr(parent, name, BinPool(_bins(child)))


def build_decoder(spec: DecodeHeadSpec, channels: Sequence[int], strides: Sequence[int]) -> Decoder:
    """``channels`` and ``strides`` are the backbone's."""
    return DECODERS[spec.type](spec, list(channels), list(strides))


def _fcn(spec: DecodeHeadSpec, channels: list[int], strides: list[int]) -> Decoder:
    return Decoder(FcnBlocks(channels[-1], spec.channels, convs=2, concat_input=True), 0, spec.channels)


def _pspnet(spec: DecodeHeadSpec, channels: list[int], strides: list[int]) -> Decoder:
    """Zhao et al. 2017: pooling to 1, 2, 3 and 6 bins."""
    return Decoder(PSPDecoder(channels, out_channels=spec.channels, dropout=0.0), 0, spec.channels)


def _deeplabv3(spec: DecodeHeadSpec, channels: list[int], strides: list[int]) -> Decoder:
    """Chen et al. 2017: atrous convolutions of three rates beside a pooled image."""
    net = DeepLabV3Decoder(channels[-1], spec.channels, spec.atrous_rates, aspp_separable=False, aspp_dropout=0.0)
    return Decoder(net, 0, spec.channels)


def _deeplabv3plus(spec: DecodeHeadSpec, channels: list[int], strides: list[int]) -> Decoder:
    """Chen et al. 2018: DeepLabV3 with separable convolutions, refined by the map of stride 4."""
    net = DeepLabV3PlusDecoder(
        [0, 0, *channels], 5, spec.channels, spec.atrous_rates, 16, aspp_separable=True, aspp_dropout=0.0
    )
    # Theirs knows the strides 8 and 16 only.
    net.up = nn.Upsample(scale_factor=strides[-1] // strides[0], mode="bilinear", align_corners=False)
    return Decoder(net, 2, spec.channels)


def _unet(spec: DecodeHeadSpec, channels: list[int], strides: list[int]) -> Decoder:
    """Ronneberger et al. 2015: the width halves at every step up, and is ``channels`` at stride 16."""
    widths = [spec.channels, spec.channels // 2, spec.channels // 4]
    return Decoder(UnetDecoder([0, *channels], widths, n_blocks=3), 1, widths[-1])


def _upernet(spec: DecodeHeadSpec, channels: list[int], strides: list[int]) -> Decoder:
    """Xiao et al. 2018: pyramid pooling on the last map, a feature pyramid over all, and their fusion."""
    return Decoder(UPerNetDecoder([0, 0, *channels], decoder_channels=spec.channels), 2, spec.channels)


def _fpn(spec: DecodeHeadSpec, channels: list[int], strides: list[int]) -> Decoder:
    """Kirillov et al. 2019 (panoptic feature pyramid): every level is upsampled to stride 4 and they are added up."""
    net = FPNDecoder(
        channels, encoder_depth=4, pyramid_channels=spec.channels, segmentation_channels=spec.channels // 2, dropout=0.0
    )
    return Decoder(net, 0, spec.channels // 2)


def _segformer(spec: DecodeHeadSpec, channels: list[int], strides: list[int]) -> Decoder:
    """Xie et al. 2021: one linear layer per map, then one over all."""
    return Decoder(SegformerDecoder([3, *channels], segmentation_channels=spec.channels), 1, spec.channels)


def _linknet(spec: DecodeHeadSpec, channels: list[int], strides: list[int]) -> Decoder:
    """Chaurasia and Culurciello 2017: transposed convolutions to the next map, which is added; ``channels`` plays no part."""
    return Decoder(LinknetDecoder([0, *channels], n_blocks=3), 1, channels[0])


DECODERS: dict[str, Callable[[DecodeHeadSpec, list[int], list[int]], Decoder]] = {
    "fcn": _fcn,
    "pspnet": _pspnet,
    "deeplabv3": _deeplabv3,
    "deeplabv3plus": _deeplabv3plus,
    "unet": _unet,
    "upernet": _upernet,
    "fpn": _fpn,
    "segformer": _segformer,
    "linknet": _linknet,
}

READ: dict[str, tuple[int, ...]] = {"fcn": (3,), "pspnet": (3,), "deeplabv3": (3,), "deeplabv3plus": (0, 3)}
"""Of the decoders that do not look at all of the backbone's maps, the indices of those that they do look at."""


def maps_read(spec: DecodeHeadSpec) -> tuple[int, ...]:
    return READ.get(spec.type, (0, 1, 2, 3))
