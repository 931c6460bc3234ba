"""OneFormer checkpoints with a Swin backbone: the original code's, and the transformers library's under the names of its files and of
its modules. What they have in common with Mask2Former is renamed there.

Files of the transformers library lack the text encoder unless they were saved for training.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tessera.interop.published import mask2former
from tessera.interop.published.renaming import Rules, renamed

_DECODER = r"^model\.transformer_module\.decoder\."
_TEXT = r"^(?:model\.text_mapper\.)?text_encoder\."
_PREDICTOR = r"^sem_seg_head\.predictor\."
_TRANSFORMERS: Rules = (
    (_DECODER + r"query_transformer\.decoder\.(layers\.\d+)\.multihead_attn\.", r"class_decoder.\1.cross_attn."),
    (_DECODER + r"query_transformer\.decoder\.", "class_decoder."),
    (_DECODER + r"query_input_projection\.", "class_decoder.input_proj."),
    (_DECODER + r"decoder_norm\.", "decoder.heads.norm."),
    (_DECODER + r"class_embed\.", "decoder.heads.class_embed."),
    (_DECODER + r"mask_embed\.layers\.(\d)\.0\.", r"decoder.heads.mask_embed.layers.\1."),
    (_DECODER + r"layers\.(\d+)\.cross_attn\.multihead_attn\.", r"decoder.layers.\1.cross_attn."),
    (_DECODER + r"layers\.(\d+)\.self_attn\.self_attn\.", r"decoder.layers.\1.self_attn."),
    (_DECODER + r"layers\.(\d+)\.ffn\.linear", r"decoder.layers.\1.linear"),
    (_DECODER + r"layers\.(\d+)\.cross_attn\.norm\.", r"decoder.layers.\1.norm1."),
    (_DECODER + r"layers\.(\d+)\.self_attn\.norm\.", r"decoder.layers.\1.norm2."),
    (_DECODER + r"layers\.(\d+)\.ffn\.norm\.", r"decoder.layers.\1.norm3."),
    (r"^model\.task_encoder\.task_mlp\.layers\.(\d)\.0\.", r"task_mlp.layers.\1."),
    (r"^model\.text_mapper\.text_projector\.(?:layers\.)?(\d)\.0\.", r"text.projection.layers.\1."),
    (_TEXT + r"transformer\.layers\.(\d+)\.self_attn\.", r"text.layers.\1.attn."),
    (_TEXT + r"transformer\.layers\.(\d+)\.layer_norm([12])\.", r"text.layers.\1.norm\2."),
    (_TEXT + r"transformer\.layers\.(\d+)\.mlp\.fc([12])\.", r"text.layers.\1.linear\2."),
)
_ORIGINAL: Rules = (
    (_PREDICTOR + r"class_transformer\.decoder\.(layers\.\d+)\.multihead_attn\.", r"class_decoder.\1.cross_attn."),
    (_PREDICTOR + r"class_transformer\.decoder\.", "class_decoder."),
    (_PREDICTOR + r"class_input_proj\.", "class_decoder.input_proj."),
    (r"^text_projector\.", "text.projection."),
    (_TEXT + r"transformer\.resblocks\.(\d+)\.attn\.", r"text.layers.\1.attn."),
    (_TEXT + r"transformer\.resblocks\.(\d+)\.ln_([12])\.", r"text.layers.\1.norm\2."),
    (_TEXT + r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"text.layers.\1.linear1."),
    (_TEXT + r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"text.layers.\1.linear2."),
)
_BOTH: Rules = (
    (_TEXT + r"ln_final\.", "text.norm."),
    (_TEXT + r"(token|positional)_embedding\b", r"text.\1_embedding"),
    (r"^(?:model\.text_mapper\.)?prompt_ctx\.", "text.context."),
    (r"^criterion\.logit_scale$", "text.logit_scale"),
)


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names; unknown names stay as they are, for the strict loading to report."""
    return mask2former.rename(renamed((*_TRANSFORMERS, *_ORIGINAL, *_BOTH), state))


def is_text(name: str) -> bool:
    """What only training reads: a file may lack it, and a network without the contrastive loss may not want it."""
    return name.startswith("text.")
