"""Backbones: networks that turn normalised images into feature maps at strides 4, 8, 16 and 32."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import FeatureDictNet, build_model_with_cfg
from timm.models.efficientvit_mit import EfficientVitLarge
from torch import Tensor, nn

from tessera.files import UserError
from tessera.models import published
from tessera.models.common import checkpointing
from tessera.models.published import swin as published_swin
from tessera.models.swin import Swin
from tessera.spec.schema import BackboneSpec, SwinSpec

STRIDES = (4, 8, 16, 32)

SWIN_SIZES: dict[str, dict[str, Any]] = {
    "swin_tiny": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "swin_small": {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "swin_base": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 7},
    "swin_large": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 7},
    "swin_huge": {"embed_dim": 352, "depths": [2, 2, 18, 2], "num_heads": [11, 22, 44, 88], "window_size": 7},
}
"""Liu et al. 2021; huge is the size of SwinV2 and SimMIM."""

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

    def __init__(self, name: str, drop_path_rate: float, activation_checkpoint: bool = False) -> None:
        super().__init__()
        self.name = name
        self.activation_checkpoint = activation_checkpoint
        self.net = _create_features(name, drop_path_rate)
        reductions = list(self.net.feature_info.reduction())
        if not set(STRIDES) <= set(reductions):
            raise UserError(
                f"model.backbone.name: {name} has feature maps at strides {reductions}, expected {list(STRIDES)} among them; "
                "choose a backbone with a feature pyramid, such as swin_tiny, resnet50, convnext_tiny or efficientvit_b1"
            )
        # Some models have two maps of one stride; the later one is the deeper.
        self.index = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in STRIDES]
        self.channels = [int(self.net.feature_info.channels()[index]) for index in self.index]
        self.strides = list(STRIDES)
        self.channels_last = str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC")
        self._probe()

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self._features(images)
        chosen = [features[index] for index in self.index]
        return [feature.permute(0, 3, 1, 2) for feature in chosen] if self.channels_last else chosen

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
                "choose another backbone (for Swin: swin_tiny, swin_small, swin_base, swin_large)"
            ) from None
        finally:
            self.train(training)
        expected = [(count, height // s, width // s) for count, s in zip(self.channels, STRIDES, strict=True)]
        if shapes != expected:
            raise UserError(
                f"model.backbone.name: {self.name} gives feature maps of {shapes}, expected {expected}; choose another backbone"
            )


def build_backbone(
    spec: BackboneSpec, activation_checkpoint: bool = False, load_pretrained: bool = True
) -> Swin | TimmBackbone:
    """``load_pretrained`` False leaves the weights random: the caller is about to load a whole model's."""
    if spec.name in SWIN_SIZES:
        sizes = SWIN_SIZES[spec.name] | spec.swin.model_dump(exclude_none=True)
        _check_heads(sizes)
        wanted = spec.pretrained if load_pretrained else None
        state = None if wanted is None else _swin_weights(spec.name, sizes["window_size"], wanted)
        backbone = Swin(**sizes, drop_path_rate=spec.drop_path_rate, activation_checkpoint=activation_checkpoint)
        if state is not None:
            published.load_strictly(
                backbone,
                published_swin.rename(state),
                f"model.backbone.pretrained: {wanted} into {spec.name}",
                may_miss=published_swin.starts_afresh,
                may_add=published_swin.belongs_to_classifier,
            )
        return backbone
    if spec.swin != SwinSpec():
        keys = ", ".join(f"model.backbone.swin.{key}" for key in spec.swin.model_dump(exclude_none=True))
        raise UserError(f"{keys}: only with a Swin backbone, but model.backbone.name is {spec.name}; remove the key")
    network = TimmBackbone(spec.name, spec.drop_path_rate, activation_checkpoint)
    if load_pretrained and spec.pretrained is not None:
        _load_timm(network, spec.pretrained)
    return network


def _check_heads(sizes: dict[str, Any]) -> None:
    for stage, heads in enumerate(sizes["num_heads"]):
        channels = sizes["embed_dim"] * 2**stage
        if channels % heads:
            raise UserError(
                f"model.backbone.swin.num_heads[{stage}] is {heads}, expected a divisor of the stage's {channels} channels "
                "(embed_dim doubled per stage)"
            )


def _create_features(name: str, drop_path_rate: float) -> Any:
    _check_name(name)
    options: dict[str, Any] = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
    try:
        if name == "efficientvit_l0":
            return _efficientvit_l0(features_only=True, **options)
        return timm.create_model(name, features_only=True, **options)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise UserError(
            f"model.backbone.drop_path_rate is {drop_path_rate}, but {name} has no stochastic depth; set it to 0"
        ) from None
    except (AttributeError, RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model.backbone.name: {name} has no feature pyramid in timm ({reason}); "
            "choose another, such as swin_tiny, resnet50, convnext_tiny or efficientvit_b1"
        ) from None


def _check_name(name: str) -> None:
    if name == "efficientvit_l0" or timm.is_model(name):
        return
    known = [*SWIN_SIZES, "efficientvit_l0", *timm.list_models()]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() names all of timm's"
    raise UserError(f"model.backbone.name is {name}, which is neither ours nor timm's; {hint}")


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


def _swin_weights(name: str, window: int, pretrained: str) -> dict[str, Tensor]:
    if pretrained == "timm":
        return _download(f"{name}_patch4_window{window}_{32 * window}")
    return published.read_state(Path(pretrained))


def _load_timm(backbone: TimmBackbone, pretrained: str) -> None:
    name = backbone.name
    state = _download(name) if pretrained == "timm" else published.read_state(Path(pretrained))
    with torch.device("meta"):
        whole = _efficientvit_l0() if name == "efficientvit_l0" else timm.create_model(name)
    own = backbone.net.state_dict().keys()
    cut_off = whole.state_dict().keys()
    renamed = {_name_in_features(given, own): value for given, value in state.items()}
    published.load_strictly(
        backbone.net,
        renamed,
        f"model.backbone.pretrained: {pretrained} into {name}",
        may_miss=lambda missing: missing.endswith("num_batches_tracked"),
        may_add=lambda given: given in cut_off,
    )


def _name_in_features(name: str, own: Collection[str]) -> str:
    """Cutting a model off leaves its names, flattens ``stages.0`` to ``stages_0``, or puts the whole below ``model``."""
    for candidate in (name, name.replace(".", "_", 1), f"model.{name}"):
        if candidate in own:
            return candidate
    return name


def _download(name: str) -> dict[str, Tensor]:
    """Weights of a timm model from timm's own download or its cache."""
    if not timm.is_model_pretrained(name):
        raise UserError(
            f"model.backbone.pretrained is timm, but timm publishes no weights of {name}; give a local file or leave the key out"
        )
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # whatever the download library of the day raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model.backbone.pretrained is timm, but the weights of {name} could not be downloaded ({reason}); "
            "go online once, or set the key to a local file"
        ) from None
