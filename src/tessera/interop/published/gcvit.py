"""GC ViT checkpoints of timm and of the original code, TAO's included."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from tessera.interop.published.renaming import Rules, apply

_TIMM: Rules = ((r"^stages\.3\.norm\.", "norm3."),)
"""The classifier's last norm is the one of the last output."""

_ORIGINAL: Rules = (
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


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names, which are timm's but for the norms of the outputs; unknown names stay as they are."""
    if not any(name.startswith("levels.") for name in state):
        return {apply(_TIMM, name): value for name, value in state.items()}
    renamed = {
        apply(_ORIGINAL, name): value for name, value in state.items() if not name.endswith(".relative_position_index")
    }
    # Linear layers over pooled maps there, 1x1 convolutions here.
    return {
        name: value[:, :, None, None] if re.search(r"\.se\.fc[12]\.weight$", name) and value.ndim == 2 else value
        for name, value in renamed.items()
    }


def starts_afresh(name: str) -> bool:
    """The norms of the outputs that classifiers do without."""
    return re.fullmatch(r"norm[0-3]\.(weight|bias)", name) is not None


def belongs_to_classifier(name: str) -> bool:
    return name.startswith("head.")
