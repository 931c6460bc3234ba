"""Backbones of the timm library: any model of it that has feature maps at strides 4, 8, 16 and 32."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import timm
import torch
from timm.layers.norm_act import freeze_batch_norm_2d
from timm.models import FeatureDictNet, build_model_with_cfg
from timm.models.efficientvit_mit import EfficientVitLarge
from torch import Tensor, nn

from tessera.files import UserError
from tessera.models.common import checkpointing

STRIDES = (4, 8, 16, 32)

_EFFICIENTVIT_L0: dict[str, Any] = {
    "widths": (32, 64, 128, 256, 512),
    "depths": (1, 1, 1, 4, 4),
    "head_dim": 32,
    "head_widths": (3072, 3200),
}
"""The size that timm leaves out (Cai et al. 2023, EfficientViT-SAM)."""

_PROBE = (96, 160)
"""Height and width of the image that a timm model must digest; no training size of any of them."""


class TimmBackbone(nn.Module):
    """Any convolutional or hierarchical model of timm, cut off behind its last feature map."""

    origin: dict[str, str] | None = None
    """What the weights were read from; see ``backbone.Origin``. None where they are random."""

    def __init__(
        self, name: str, drop_path_rate: float, activation_checkpoint: bool = False, output_stride: int = STRIDES[-1]
    ) -> None:
        super().__init__()
        self.name = name
        self.activation_checkpoint = activation_checkpoint
        undilated = None if output_stride == STRIDES[-1] else _undilated_reductions(name, drop_path_rate)
        self.net = _create_features(name, drop_path_rate, output_stride)
        reductions = list(self.net.feature_info.reduction())
        self.index = _map_indices(name, undilated or reductions)
        self.channels = [int(self.net.feature_info.channels()[index]) for index in self.index]
        self.strides = [min(stride, output_stride) for stride in STRIDES]
        if [reductions[index] for index in self.index] != self.strides:
            raise not_dilatable(name, output_stride)
        self.channels_last = str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC")
        self._probe()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps (B, C, H / stride, W / stride) as ``channels`` and ``strides`` tell."""
        features = self._features(images)
        chosen = [features[index] for index in self.index]
        return [feature.permute(0, 3, 1, 2) for feature in chosen] if self.channels_last else chosen

    def freeze_batch_norms(self) -> None:
        """Makes constants of the batch norms' statistics and affine parameters, in training mode, too. Raises UserError without any."""
        if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.net.modules()):
            raise no_batch_norms(self.name)
        self.net = freeze_batch_norm_2d(self.net)  # type: ignore[no-untyped-call]  # timm leaves it untyped

    def _features(self, images: Tensor) -> Sequence[Tensor]:
        if not self.activation_checkpoint or not torch.is_grad_enabled():
            features: Sequence[Tensor] = self.net(images)
            return features
        if not isinstance(self.net, FeatureDictNet) or self.net.concat:
            features = checkpointing.run_checkpointed(self.net, images)
            return features
        found: dict[str, Tensor] = {}
        x = images
        for name, stage in self.net.items():
            # An in-place activation would overwrite the very input that its recomputation starts from.
            x = stage(x) if getattr(stage, "inplace", False) else checkpointing.run_checkpointed(stage, x)
            if name in self.net.return_layers:
                found[name] = x[0] if isinstance(x, tuple | list) else x
        return list(found.values())

    @torch.no_grad()
    def _probe(self) -> None:
        """Refuses models that take one image size only, or whose maps are not where they say."""
        height, width = _PROBE
        training = self.training
        self.eval()
        try:
            shapes = [tuple(feature.shape[1:]) for feature in self(torch.zeros(1, 3, height, width))]
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"model.backbone.name: {self.name} cannot take images of any size ({str(error).splitlines()[0]}); "
                "choose another backbone (for Swin: swin_tiny, swin_small, swin_base, swin_large; for GC ViT: gc_vit_tiny and so on)"
            ) from None
        finally:
            self.train(training)
        expected = [(count, height // s, width // s) for count, s in zip(self.channels, self.strides, strict=True)]
        if shapes != expected:
            raise UserError(
                f"model.backbone.name: {self.name} gives feature maps of {shapes}, expected {expected}; choose another backbone"
            )


def can_dilate(name: str, output_stride: int = 16) -> bool:
    """Whether timm can keep the deep maps of this model at ``output_stride``, dilating their convolutions."""
    index = _map_indices(name, _undilated_reductions(name))
    try:
        with torch.device("meta"):
            reductions = _create_features(name, 0.0, output_stride).feature_info.reduction()
    except UserError:
        return False
    return [reductions[place] for place in index] == [min(stride, output_stride) for stride in STRIDES]


def whole_model(name: str) -> nn.Module:
    """With its classifier, and without storage: for the names of its tensors."""
    with torch.device("meta"):
        model: nn.Module = _efficientvit_l0() if name == "efficientvit_l0" else timm.create_model(name)
    return model


def check_name(name: str, ours: Iterable[str]) -> None:
    """Raises UserError with the closest names unless it is one of timm's or of ``ours``."""
    if name == "efficientvit_l0" or timm.is_model(name):
        return
    close = difflib.get_close_matches(name, [*ours, "efficientvit_l0", *timm.list_models()], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() names all of timm's"
    raise UserError(f"model.backbone.name is {name}, which is neither ours nor timm's; {hint}")


def no_batch_norms(name: str) -> UserError:
    return UserError(f"model.backbone.norm is frozen, but {name} has no batch norms to freeze; leave the key out")


def _undilated_reductions(name: str, drop_path_rate: float = 0.0) -> list[int]:
    with torch.device("meta"):
        return list(_create_features(name, drop_path_rate).feature_info.reduction())


def _map_indices(name: str, reductions: list[int]) -> list[int]:
    """Which of the model's feature maps have the strides 4, 8, 16 and 32; ``reductions`` are all strides, when nothing is dilated."""
    if not set(STRIDES) <= set(reductions):
        raise UserError(
            f"model.backbone.name: {name} has feature maps at strides {reductions}, expected {list(STRIDES)} among them; "
            "choose a backbone with a feature pyramid, such as swin_tiny, resnet50, convnext_tiny or efficientvit_b1"
        )
    # Some models have two maps of one stride; the later one is the deeper.
    return [len(reductions) - 1 - reductions[::-1].index(stride) for stride in STRIDES]


def _create_features(name: str, drop_path_rate: float, output_stride: int = STRIDES[-1]) -> Any:
    options: dict[str, Any] = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
    if output_stride != STRIDES[-1]:
        options["output_stride"] = output_stride
    try:
        if name == "efficientvit_l0":
            return _efficientvit_l0(features_only=True, **options)
        return timm.create_model(name, features_only=True, **options)
    except (AttributeError, RuntimeError, AssertionError, ValueError, TypeError) as error:
        if "output_stride" in options:
            raise not_dilatable(name, output_stride) from None
        if isinstance(error, TypeError):
            if "drop_path_rate" not in str(error):
                raise
            raise UserError(
                f"model.backbone.drop_path_rate is {drop_path_rate}, but {name} has no stochastic depth; set it to 0"
            ) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model.backbone.name: {name} has no feature pyramid in timm ({reason}); "
            "choose another, such as swin_tiny, resnet50, convnext_tiny or efficientvit_b1"
        ) from None


def not_dilatable(name: str, output_stride: int) -> UserError:
    return UserError(
        f"model.backbone.name: {name} cannot keep its deep feature maps at stride {output_stride}, because it has no dilated "
        "form; choose a convolutional backbone such as resnet50 or convnext_tiny, or do without dilation"
    )


def _efficientvit_l0(**options: Any) -> nn.Module:
    features = {"flatten_sequential": True, "out_indices": (0, 1, 2, 3)}
    return build_model_with_cfg(
        EfficientVitLarge,
        "efficientvit_l0",
        False,
        pretrained_cfg={"url": ""},
        feature_cfg=features,
        **_EFFICIENTVIT_L0,
        **options,
    )
