"""Mask2Former checkpoints: the original code's (detectron2) with a Swin or a ResNet, and the transformers library's with a Swin, under the
names of its files and of its modules."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from tessera.interop.published.backbones import resnet, swin
from tessera.interop.published.renaming import Rules, renamed, split_packed

_SWIN = r"^model\.pixel_level_module\.encoder\.(?:swin\.)?"
_PIXELS = r"^model\.pixel_level_module\.decoder\."
_QUERIES = r"^model\.transformer_module\."

_TRANSFORMERS: Rules = (
    (_SWIN, "backbone."),
    (_PIXELS + r"input_projections\.", "pixel_decoder.input_proj."),
    (_PIXELS + r"encoder\.layers\.(\d+)\.self_attn\.", r"pixel_decoder.layers.\1.self_attn."),
    (_PIXELS + r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.", r"pixel_decoder.layers.\1.norm1."),
    (_PIXELS + r"encoder\.layers\.(\d+)\.fc([12])\.", r"pixel_decoder.layers.\1.linear\2."),
    (_PIXELS + r"encoder\.layers\.(\d+)\.final_layer_norm\.", r"pixel_decoder.layers.\1.norm2."),
    (_PIXELS + r"adapter_1\.", "pixel_decoder.lateral."),
    (_PIXELS + r"layer_1\.", "pixel_decoder.output."),
    (_PIXELS + r"mask_projection\.", "pixel_decoder.mask_features."),
    (_PIXELS + r"level_embed$", "pixel_decoder.level_embed"),
    (_QUERIES + r"queries_embedder\.", "query_embed."),
    (_QUERIES + r"queries_features\.", "query_feat."),
    (_QUERIES + r"level_embed\.", "decoder.level_embed."),
    (_QUERIES + r"decoder\.layernorm\.", "decoder.heads.norm."),
    (_QUERIES + r"decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.", r"decoder.heads.mask_embed.layers.\1."),
    (_QUERIES + r"decoder\.layers\.(\d+)\.(cross|self)_attn\.", r"decoder.layers.\1.\2_attn."),
    (_QUERIES + r"decoder\.layers\.(\d+)\.cross_attn_layer_norm\.", r"decoder.layers.\1.norm1."),
    (_QUERIES + r"decoder\.layers\.(\d+)\.self_attn_layer_norm\.", r"decoder.layers.\1.norm2."),
    (_QUERIES + r"decoder\.layers\.(\d+)\.fc([12])\.", r"decoder.layers.\1.linear\2."),
    (_QUERIES + r"decoder\.layers\.(\d+)\.final_layer_norm\.", r"decoder.layers.\1.norm3."),
    (r"^class_predictor\.", "decoder.heads.class_embed."),
)
_HEAD = r"^sem_seg_head\."
_DECODER = r"^sem_seg_head\.predictor\."
_ORIGINAL: Rules = (
    # Files before version 2 have the pixel decoder's parts in the head itself.
    (_HEAD + r"(?:pixel_decoder\.)?(?!predictor\.)(?:transformer\.(?:encoder\.)?)?", "pixel_decoder."),
    (r"^pixel_decoder\.adapter_1\.norm\.", "pixel_decoder.lateral.1."),
    (r"^pixel_decoder\.adapter_1\.", "pixel_decoder.lateral.0."),
    (r"^pixel_decoder\.layer_1\.norm\.", "pixel_decoder.output.1."),
    (r"^pixel_decoder\.layer_1\.", "pixel_decoder.output.0."),
    (_DECODER + r"static_query\.", "query_feat."),  # before version 2
    (_DECODER + r"query_(feat|embed)\.", r"query_\1."),
    (_DECODER + r"level_embed\.", "decoder.level_embed."),
    (_DECODER + r"decoder_norm\.", "decoder.heads.norm."),
    (_DECODER + r"(class|mask)_embed\.", r"decoder.heads.\1_embed."),
    (_DECODER + r"transformer_cross_attention_layers\.(\d+)\.multihead_attn\.", r"decoder.layers.\1.cross_attn."),
    (_DECODER + r"transformer_cross_attention_layers\.(\d+)\.norm\.", r"decoder.layers.\1.norm1."),
    (_DECODER + r"transformer_self_attention_layers\.(\d+)\.self_attn\.", r"decoder.layers.\1.self_attn."),
    (_DECODER + r"transformer_self_attention_layers\.(\d+)\.norm\.", r"decoder.layers.\1.norm2."),
    (_DECODER + r"transformer_ffn_layers\.(\d+)\.linear", r"decoder.layers.\1.linear"),
    (_DECODER + r"transformer_ffn_layers\.(\d+)\.norm\.", r"decoder.layers.\1.norm3."),
)
_NOT_WEIGHTS = re.compile(_SWIN + r"layernorm\.|^criterion\.|\.relative_position_index$")
"""The classifier's last norm, which no output goes through, and constants."""


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names; unknown names stay as they are, for the strict loading to report."""
    weights = {name: value for name, value in state.items() if not _NOT_WEIGHTS.search(name)}
    return split_packed(_rename_backbone(renamed((*_TRANSFORMERS, *_ORIGINAL), weights)))


def _rename_backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a ResNet of detectron2, or a Swin."""
    prefix = "backbone."
    inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    names, ours = (resnet, f"{prefix}net.") if "stem.conv1.weight" in inside else (swin, prefix)
    return {
        **{ours + name: value for name, value in names.rename(inside).items()},
        **{name: value for name, value in state.items() if not name.startswith(prefix)},
    }
