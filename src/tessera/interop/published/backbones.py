"""Tensor names of ResNet, Swin and GC ViT checkpoints, from everybody who published some; unknown names stay as they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.interop.published.renaming import Rules, renamed

State = Mapping[str, Tensor]


def _never(name: str) -> bool:
    return False


@dataclass(frozen=True)
class Names:
    rename: Callable[[State], dict[str, Tensor]]
    starts_afresh: Callable[[str], bool] = _never
    """Tensors of ours that a classifier does without: the norms of the outputs."""
    belongs_to_classifier: Callable[[str], bool] = _never


_RESNET_DETECTRON2: Rules = (
    (r"^stem\.conv1\.norm\.", "bn1."),
    (r"^stem\.", ""),  # conv1, and the classifier fc of converted torchvision files
    (r"^res(\d)\.", lambda found: f"layer{int(found[1]) - 1}."),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
)
_RESNET_TRANSFORMERS: Rules = (
    (r"^resnet\.", ""),
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^encoder\.stages\.(\d)\.layers\.", lambda found: f"layer{int(found[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    (r"\.layer\.(\d)\.convolution\.", lambda found: f".conv{int(found[1]) + 1}."),
    (r"\.layer\.(\d)\.normalization\.", lambda found: f".bn{int(found[1]) + 1}."),
    (r"^classifier\.1\.", "fc."),
)


def _resnet(state: State) -> dict[str, Tensor]:
    """torchvision's names, which are timm's, too."""
    if "stem.conv1.weight" in state and any(name.startswith("res2.") for name in state):
        rules = _RESNET_DETECTRON2
    elif any(name.removeprefix("resnet.").startswith("embedder.embedder.") for name in state):
        rules = _RESNET_TRANSFORMERS
    else:
        return dict(state)
    return renamed(rules, state)


_SWIN_TIMM: Rules = (
    # timm has the patch merging at the start of a stage, the original code at the end of the one before.
    (r"^layers\.(\d)\.downsample\.", lambda found: f"layers.{int(found[1]) - 1}.downsample."),
)
_SWIN_TORCHVISION: Rules = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    # Stages and patch mergings alternate.
    (r"^features\.([1357])\.", lambda found: f"layers.{int(found[1]) // 2}.blocks."),
    (r"^features\.([246])\.", lambda found: f"layers.{int(found[1]) // 2 - 1}.downsample."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)
_SWIN_TRANSFORMERS: Rules = (
    (r"^swin\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.layers\.", "layers."),
    (r"^hidden_states_norms\.stage(\d)\.", lambda found: f"norm{int(found[1]) - 1}."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"(blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (
        r"\.attention\.(?:self|relative_position_bias)\.relative_position_bias_table$",
        ".attn.relative_position_bias_table",
    ),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(?:self\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:self\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:self\.value|v_proj)\.", ".attn.v."),
)
"""Under the names of its files and of its modules."""
_DERIVED = ("relative_position_index", "attn_mask")
"""Buffers that old files hold and that follow from the sizes."""


def _swin(state: State) -> dict[str, Tensor]:
    """The original code's names."""
    state = {name.removeprefix("backbone."): value for name, value in state.items() if not name.endswith(_DERIVED)}
    if any(name.startswith("features.") for name in state):
        return renamed(_SWIN_TORCHVISION, state)
    if any(".layernorm_before." in name for name in state):
        return _pack_attention(renamed(_SWIN_TRANSFORMERS, state))
    if any(name.startswith("layers.3.downsample.") for name in state):
        return renamed(_SWIN_TIMM, state)
    return state


def _pack_attention(state: State) -> dict[str, Tensor]:
    """Separate ``attn.q``, ``attn.k`` and ``attn.v`` to one ``attn.qkv``."""
    packed: dict[str, Tensor] = {}
    for name, value in state.items():
        found = re.fullmatch(r"(.*\.attn)\.([qkv])\.(weight|bias)", name)
        if found is None:
            packed[name] = value
        elif found[2] == "q" and all(f"{found[1]}.{part}.{found[3]}" in state for part in "kv"):
            packed[f"{found[1]}.qkv.{found[3]}"] = torch.cat([state[f"{found[1]}.{part}.{found[3]}"] for part in "qkv"])
    return packed


_GCVIT_TIMM: Rules = ((r"^stages\.3\.norm\.", "norm3."),)
"""The classifier's last norm is the one of the last output."""

_GCVIT_ORIGINAL: Rules = (
    (r"^norm\.", "norm3."),
    (r"^patch_embed\.proj\.", "stem.conv1."),
    (r"^patch_embed\.conv_down\.", "stem.down."),
    # Downsampling stands at the end of a stage, in timm at the start of the next.
    (r"^levels\.(\d)\.downsample\.", lambda found: f"stages.{int(found[1]) + 1}.downsample."),
    (
        r"^levels\.(\d)\.(?:q_global_gen\.)?to_q_global\.(\d)\.",
        lambda found: f"stages.{found[1]}.global_block.blocks.conv{int(found[2]) + 1}.",
    ),
    (r"^levels\.", "stages."),
    (r"(\.blocks\.conv\d)\.conv\.", r"\1."),
    (r"(downsample|down)\.conv\.", r"\1.conv_block."),
    (r"(conv_block|\.conv\d)\.0\.", r"\1.conv_dw."),
    (r"(conv_block|\.conv\d)\.2\.fc\.0\.", r"\1.se.fc1."),
    (r"(conv_block|\.conv\d)\.2\.fc\.2\.", r"\1.se.fc2."),
    (r"(conv_block|\.conv\d)\.3\.", r"\1.conv_pw."),
    (r"\.attn\.relative_position_bias_table$", ".attn.rel_pos.relative_position_bias_table"),
    (r"\.gamma([12])$", r".ls\1.gamma"),
)


def _gcvit(state: State) -> dict[str, Tensor]:
    """timm's names, but for the norms of the outputs; of the original code's, TAO's included."""
    if not any(name.startswith("levels.") for name in state):
        return renamed(_GCVIT_TIMM, state)
    kept = {name: value for name, value in state.items() if not name.endswith(".relative_position_index")}
    # Linear layers over pooled maps there, 1x1 convolutions here.
    return {
        name: value[:, :, None, None] if re.search(r"\.se\.fc[12]\.weight$", name) and value.ndim == 2 else value
        for name, value in renamed(_GCVIT_ORIGINAL, kept).items()
    }


def _is_norm_of_output(name: str) -> bool:
    return re.fullmatch(r"norm[0-3]\.(weight|bias)", name) is not None


resnet = Names(_resnet)
swin = Names(_swin, _is_norm_of_output, lambda name: name.startswith(("norm.", "head.")))
gcvit = Names(_gcvit, _is_norm_of_output, lambda name: name.startswith("head."))
