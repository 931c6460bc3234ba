"""Deformable DETR checkpoints with a ResNet: the original code's, and the transformers library's under the names of its files and modules.

The two-stage variant, which proposes boxes from the encoder, is another network: its additional tensors are left for the strict
loading to report.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from tessera.files import UserError
from tessera.interop.published.renaming import Rules, apply, split_packed

_LAYER = r"\.layers\.(\d+)\."
_RULES: Rules = (
    (r"^backbone\.0\.body\.", "backbone.net."),
    (r"^model\.backbone\.(?:conv_encoder\.)?model\.", "backbone.net."),
    (r"^(?:model|transformer)\.(encoder|decoder|input_proj|level_embed)\b", r"\1"),
    (r"^(?:model|transformer)\.reference_points\.", "decoder.reference_points."),
    (r"^(?:query_embed|model\.query_position_embeddings)\.", "decoder.query_embed."),
    (r"^(class_embed|bbox_embed)\.", r"decoder.\1."),
    # The original numbers its norms by their place in the paper's figure, not by their turn.
    (r"^decoder" + _LAYER + r"norm1\.", r"decoder.layers.\1.norm for cross-attention."),
    (r"^decoder" + _LAYER + r"norm2\.", r"decoder.layers.\1.norm1."),
    (r"norm for cross-attention", "norm2"),
    (r"^(encoder|decoder)" + _LAYER + r"self_attn_layer_norm\.", r"\1.layers.\2.norm1."),
    (r"^decoder" + _LAYER + r"encoder_attn_layer_norm\.", r"decoder.layers.\1.norm2."),
    (r"^encoder" + _LAYER + r"final_layer_norm\.", r"encoder.layers.\1.norm2."),
    (r"^decoder" + _LAYER + r"final_layer_norm\.", r"decoder.layers.\1.norm3."),
    (r"^(encoder|decoder)" + _LAYER + r"(?:mlp\.)?fc([12])\.", r"\1.layers.\2.linear\3."),
    (r"^decoder" + _LAYER + r"encoder_attn\.", r"decoder.layers.\1.cross_attn."),
    (r"^decoder" + _LAYER + r"self_attn\.o_proj\.", r"decoder.layers.\1.self_attn.out_proj."),
)
_REFINED = re.compile(r"^(?:model|transformer)\.decoder\.bbox_embed\.")
"""Only networks with box refinement hold the box heads a second time, where the decoder uses them."""


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names; unknown names stay as they are, for the strict loading to report."""
    renamed: dict[str, Tensor] = {}
    for given, value in state.items():
        name = apply(_RULES, given)
        if name in renamed and not torch.equal(renamed[name], value):
            raise UserError(f"{given}: differs from the tensor that should be the same, {name}; the file is damaged")
        renamed[name] = value
    refined = any(_REFINED.match(name) for name in state)
    return split_packed(renamed if refined else _without_copies(renamed))


def may_miss(name: str) -> bool:
    """Frozen batch norms do not count batches."""
    return name.endswith("num_batches_tracked")


def _without_copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without refinement all layers share their heads, of which files hold a copy per layer; heads that differ are kept."""
    copies = []
    for name, value in state.items():
        found = re.match(r"^(decoder\.(?:class|bbox)_embed)\.(\d+)\.(.*)", name)
        if found is None or found[2] == "0":
            continue
        first = state.get(f"{found[1]}.0.{found[3]}")
        if first is None or not torch.equal(first, value):
            return state
        copies.append(name)
    return {name: value for name, value in state.items() if name not in copies}
