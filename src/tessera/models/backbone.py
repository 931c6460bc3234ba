"""Backbones: networks that turn normalised images into feature maps at strides 4, 8, 16 and 32."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.resnet import ResNet
from torch import Tensor

from tessera.files import UserError, digest_file
from tessera.interop import published
from tessera.models import pyramid
from tessera.models.gcvit import GCViT
from tessera.models.pyramid import STRIDES, TimmBackbone
from tessera.models.swin import Swin
from tessera.spec.networks import SWIN_SIZES, BackboneSpec, SwinSpec

__all__ = ["STRIDES", "Backbone", "build_backbone", "can_dilate"]

Backbone = Swin | GCViT | TimmBackbone

Origin = dict[str, str]
"""``source`` (file or timm), ``name`` (the file's, or the timm model with its tag) and ``sha256``: of the file, or of the tensors that timm gave."""

_GCVIT_BASE = {
    "embed_dim": 128,
    "depths": [3, 4, 19, 5],
    "num_heads": [4, 8, 16, 32],
    "mlp_ratio": 2,
    "layer_scale": 1e-5,
}
_GCVIT_LARGE = _GCVIT_BASE | {"embed_dim": 192, "num_heads": [6, 12, 24, 48]}
GCVIT_SIZES: dict[str, dict[str, Any]] = {
    "gc_vit_xxtiny": {"embed_dim": 64, "depths": [2, 2, 6, 2], "num_heads": [2, 4, 8, 16], "mlp_ratio": 3},
    "gc_vit_xtiny": {"embed_dim": 64, "depths": [3, 4, 6, 5], "num_heads": [2, 4, 8, 16], "mlp_ratio": 3},
    "gc_vit_tiny": {"embed_dim": 64, "depths": [3, 4, 19, 5], "num_heads": [2, 4, 8, 16], "mlp_ratio": 3},
    "gc_vit_small": _GCVIT_BASE | {"embed_dim": 96, "num_heads": [3, 6, 12, 24]},
    "gc_vit_base": _GCVIT_BASE,
    "gc_vit_large": _GCVIT_LARGE,
    "gc_vit_large_384": _GCVIT_LARGE | {"resolution": 384},
}
"""Hatamizadeh et al. 2023 and their code, which alone has large; the names are TAO's."""


def build_backbone(
    spec: BackboneSpec,
    activation_checkpoint: bool = False,
    load_pretrained: bool = True,
    output_stride: int = STRIDES[-1],
) -> Backbone:
    """``output_stride`` 16 or 8 dilates the convolutions of the deep stages instead of striding; ``strides`` of the backbone tells the
    result, the channels stay. ``load_pretrained`` False leaves the weights random: the caller is about to load a whole model's.

    Raises UserError on names, sizes and weights that do not fit, and when the backbone cannot be dilated (see ``can_dilate``).
    """
    name = spec.name
    if spec.swin != SwinSpec() and name not in SWIN_SIZES:
        keys = ", ".join(f"model.backbone.swin.{key}" for key in spec.swin.model_dump(exclude_none=True))
        raise UserError(f"{keys}: only with a Swin backbone, but model.backbone.name is {name}; remove the key")
    pretrained = spec.pretrained if load_pretrained else None
    if name in SWIN_SIZES or name in GCVIT_SIZES:
        if output_stride != STRIDES[-1]:
            raise pyramid.not_dilatable(name, output_stride)
        if spec.norm == "frozen":
            raise pyramid.no_batch_norms(name)
    if name in SWIN_SIZES:
        return _swin(spec, pretrained, activation_checkpoint)
    if name in GCVIT_SIZES:
        return _gcvit(spec, pretrained, activation_checkpoint)
    pyramid.check_name(name, [*SWIN_SIZES, *GCVIT_SIZES])
    network = TimmBackbone(name, spec.drop_path_rate, activation_checkpoint, output_stride)
    if pretrained is not None:
        _load_timm(network, pretrained)
    if spec.norm == "frozen":
        network.freeze_batch_norms()
    return network


def can_dilate(name: str) -> bool:
    """Whether ``build_backbone`` takes an ``output_stride`` of 16 or 8 for this backbone; raises UserError on unknown names."""
    if name in SWIN_SIZES or name in GCVIT_SIZES:
        return False
    pyramid.check_name(name, [*SWIN_SIZES, *GCVIT_SIZES])
    return pyramid.can_dilate(name)


def _swin(spec: BackboneSpec, pretrained: str | None, activation_checkpoint: bool) -> Swin:
    sizes = SWIN_SIZES[spec.name]._asdict() | spec.swin.model_dump(exclude_none=True)
    window = sizes["window_size"]
    name = f"{spec.name}_patch4_window{window}_{32 * window}"
    state, origin = ({}, None) if pretrained is None else _weights(pretrained, name)
    backbone = Swin(**sizes, drop_path_rate=spec.drop_path_rate, activation_checkpoint=activation_checkpoint)
    if origin is not None:
        backbone.origin = origin
        _load_renamed(backbone, state, published.swin, f"model.backbone.pretrained: {pretrained} into {spec.name}")
    return backbone


def _gcvit(spec: BackboneSpec, pretrained: str | None, activation_checkpoint: bool) -> GCViT:
    name = spec.name.replace("gc_vit", "gcvit")
    state, origin = ({}, None) if pretrained is None else _weights(pretrained, name)
    backbone = GCViT(
        **GCVIT_SIZES[spec.name], drop_path_rate=spec.drop_path_rate, activation_checkpoint=activation_checkpoint
    )
    if origin is not None:
        backbone.origin = origin
        _load_renamed(backbone, state, published.gcvit, f"model.backbone.pretrained: {pretrained} into {spec.name}")
    return backbone


def _load_renamed(backbone: Swin | GCViT, state: Mapping[str, Tensor], names: Any, source: str) -> None:
    """``names``: the module of ``published`` that knows this architecture."""
    published.load_strictly(
        backbone, names.rename(state), source, may_miss=names.starts_afresh, may_add=names.belongs_to_classifier
    )


def _load_timm(backbone: TimmBackbone, pretrained: str) -> None:
    name = backbone.name
    state, backbone.origin = _weights(pretrained, name)
    whole = pyramid.whole_model(name)
    if isinstance(whole, ResNet):
        state = published.resnet.rename(state)
    own = backbone.net.state_dict().keys()
    cut_off = whole.state_dict().keys()
    published.load_strictly(
        backbone.net,
        {_name_in_features(given, own): value for given, value in state.items()},
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


def _weights(pretrained: str, name: str) -> tuple[dict[str, Tensor], Origin]:
    """Of a local file; or, if ``pretrained`` is ``timm``, of the timm model ``name`` from timm's own download or its cache."""
    if pretrained != "timm":
        file = published.weights_file(Path(pretrained))
        return published.read_state(file), {"source": "file", "name": file.name, "sha256": digest_file(file)}
    if not timm.is_model_pretrained(name):
        raise UserError(
            f"model.backbone.pretrained is timm, but timm publishes no weights of {name}; give a local file or leave the key out"
        )
    try:
        model: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever the download library of the day raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model.backbone.pretrained is timm, but the weights of {name} could not be downloaded ({reason}); "
            "go online once, or set the key to a local file"
        ) from None
    state = model.state_dict()
    published_as = ".".join(filter(None, (name, model.pretrained_cfg.get("tag"))))
    return state, {"source": "timm", "name": published_as, "sha256": _digest(state)}


def _digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes, whatever file or cache the tensors came in."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
