"""Swin checkpoints of the original code, of timm, of torchvision and of the transformers library."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from tessera.interop.published.renaming import Rules, apply

_TIMM: Rules = (
    # timm has the patch merging at the start of a stage, the original code at the end of the one before.
    (r"^layers\.(\d)\.downsample\.", lambda found: f"layers.{int(found[1]) - 1}.downsample."),
)
_TORCHVISION: Rules = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    # Stages and patch mergings alternate.
    (r"^features\.([1357])\.", lambda found: f"layers.{int(found[1]) // 2}.blocks."),
    (r"^features\.([246])\.", lambda found: f"layers.{int(found[1]) // 2 - 1}.downsample."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)
_TRANSFORMERS: Rules = (
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


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names, which are those of the original code; unknown names stay as they are."""
    state = {name.removeprefix("backbone."): value for name, value in state.items() if not name.endswith(_DERIVED)}
    if any(name.startswith("features.") for name in state):
        return {apply(_TORCHVISION, name): value for name, value in state.items()}
    if any(".layernorm_before." in name for name in state):
        return _pack_attention({apply(_TRANSFORMERS, name): value for name, value in state.items()})
    if any(name.startswith("layers.3.downsample.") for name in state):
        return {apply(_TIMM, name): value for name, value in state.items()}
    return state


def _pack_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Separate ``attn.q``, ``attn.k`` and ``attn.v`` to one ``attn.qkv``."""
    packed: dict[str, Tensor] = {}
    for name, value in state.items():
        found = re.fullmatch(r"(.*\.attn)\.([qkv])\.(weight|bias)", name)
        if found is None:
            packed[name] = value
        elif found[2] == "q" and all(f"{found[1]}.{part}.{found[3]}" in state for part in "kv"):
            packed[f"{found[1]}.qkv.{found[3]}"] = torch.cat([state[f"{found[1]}.{part}.{found[3]}"] for part in "qkv"])
    return packed


def starts_afresh(name: str) -> bool:
    """The norms of the four outputs: classifiers have none."""
    return re.fullmatch(r"norm\d\.(weight|bias)", name) is not None


def belongs_to_classifier(name: str) -> bool:
    return name.startswith(("norm.", "head."))
