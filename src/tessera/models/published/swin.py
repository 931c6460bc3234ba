"""Swin checkpoints of the original code, of timm and of torchvision."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_TORCHVISION = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)
_DERIVED = ("relative_position_index", "attn_mask")
"""Buffers that old files hold and that follow from the sizes."""


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names, which are those of the original code; unknown names stay as they are."""
    state = {name.removeprefix("backbone."): value for name, value in state.items() if not name.endswith(_DERIVED)}
    if any(name.startswith("features.") for name in state):
        return {_from_torchvision(name): value for name, value in state.items()}
    if any(name.startswith("layers.3.downsample.") for name in state):
        return {_from_timm(name): value for name, value in state.items()}
    return state


def starts_afresh(name: str) -> bool:
    """The norms of the four outputs: classifiers have none."""
    return re.fullmatch(r"norm\d\.(weight|bias)", name) is not None


def belongs_to_classifier(name: str) -> bool:
    return name.startswith(("norm.", "head."))


def _from_timm(name: str) -> str:
    """timm has the patch merging at the start of a stage, the original code at the end of the one before."""
    return re.sub(r"^layers\.(\d)\.downsample\.", lambda found: f"layers.{int(found[1]) - 1}.downsample.", name)


def _from_torchvision(name: str) -> str:
    """Stages and patch mergings alternate in ``features``."""
    for pattern, replacement in _TORCHVISION:
        name = re.sub(pattern, replacement, name)
    found = re.match(r"^features\.(\d)\.(.*)", name)
    if found is None:
        return name
    place, rest = int(found[1]), found[2]
    if place % 2:
        return f"layers.{(place - 1) // 2}.blocks.{rest}"
    return f"layers.{place // 2 - 1}.downsample.{rest}"
