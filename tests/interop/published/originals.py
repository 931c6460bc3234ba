"""Names and shapes of the tensors in the original authors' files at their published sizes, enumerated from their modules."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

DIM = 256
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def tensors(shapes: Shapes) -> dict[str, Tensor]:
    """Zeros that take no memory."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def affine(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def linear(name: str, inputs: int, outputs: int, *kernel: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, *kernel)} | ({f"{name}.bias": (outputs,)} if bias else {})


def mlp(name: str, *widths: int) -> Shapes:
    found: Shapes = {}
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        found |= linear(f"{name}.layers.{layer}", inputs, outputs)
    return found


def attention(name: str, dim: int = DIM) -> Shapes:
    """``nn.MultiheadAttention``."""
    packed = {f"{name}.in_proj_weight": (3 * dim, dim), f"{name}.in_proj_bias": (3 * dim,)}
    return packed | linear(f"{name}.out_proj", dim, dim)


def deformable(name: str, levels: int) -> Shapes:
    """Eight heads, four points."""
    return {
        **linear(f"{name}.sampling_offsets", DIM, 8 * levels * 4 * 2),
        **linear(f"{name}.attention_weights", DIM, 8 * levels * 4),
        **linear(f"{name}.value_proj", DIM, DIM),
        **linear(f"{name}.output_proj", DIM, DIM),
    }


def feed_forward(name: str, hidden: int) -> Shapes:
    return linear(f"{name}.linear1", DIM, hidden) | linear(f"{name}.linear2", hidden, DIM)


def encoder_layer(name: str, levels: int) -> Shapes:
    return {
        **deformable(f"{name}.self_attn", levels),
        **affine(f"{name}.norm1", DIM),
        **feed_forward(name, 1024),
        **affine(f"{name}.norm2", DIM),
    }


def swin(name: str, dim: int, depths: Sequence[int], heads: Sequence[int], window: int) -> Shapes:
    """The dense predictors' (``D2SwinTransformer``)."""
    found = linear(f"{name}.patch_embed.proj", 3, dim, 4, 4) | affine(f"{name}.patch_embed.norm", dim)
    for stage, depth in enumerate(depths):
        width = dim * 2**stage
        for block in range(depth):
            place = f"{name}.layers.{stage}.blocks.{block}"
            found |= affine(f"{place}.norm1", width) | affine(f"{place}.norm2", width)
            found |= linear(f"{place}.attn.qkv", width, 3 * width) | linear(f"{place}.attn.proj", width, width)
            found |= linear(f"{place}.mlp.fc1", width, 4 * width) | linear(f"{place}.mlp.fc2", 4 * width, width)
            found[f"{place}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads[stage])
            found[f"{place}.attn.relative_position_index"] = (window**2, window**2)
        if stage < 3:
            merging = f"{name}.layers.{stage}.downsample"
            found |= affine(f"{merging}.norm", 4 * width) | linear(
                f"{merging}.reduction", 4 * width, 2 * width, bias=False
            )
        found |= affine(f"{name}.norm{stage}", width)
    return found


def detectron2_resnet50(name: str) -> Shapes:
    def convolution(place: str, inputs: int, outputs: int, kernel: int) -> Shapes:
        counted = {f"{place}.norm.num_batches_tracked": ()}
        norm = {f"{place}.norm.{kind}": (outputs,) for kind in BATCH_NORM}
        return {f"{place}.weight": (outputs, inputs, kernel, kernel), **norm, **counted}

    found = convolution(f"{name}.stem.conv1", 3, 64, 7)
    inputs = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(depth):
            place = f"{name}.res{stage + 2}.{block}"
            if block == 0:
                found |= convolution(f"{place}.shortcut", inputs, 4 * width, 1)
            found |= convolution(f"{place}.conv1", inputs, width, 1)
            found |= convolution(f"{place}.conv2", width, width, 3)
            found |= convolution(f"{place}.conv3", width, 4 * width, 1)
            inputs = 4 * width
    return found


def torchvision_resnet50(name: str) -> Shapes:
    """With frozen batch norms, which count nothing; without the classifier."""

    def norm(place: str, channels: int) -> Shapes:
        return {f"{place}.{kind}": (channels,) for kind in BATCH_NORM}

    found = {f"{name}.conv1.weight": (64, 3, 7, 7), **norm(f"{name}.bn1", 64)}
    inputs = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(depth):
            place = f"{name}.layer{stage + 1}.{block}"
            if block == 0:
                found |= linear(f"{place}.downsample.0", inputs, 4 * width, 1, 1, bias=False)
                found |= norm(f"{place}.downsample.1", 4 * width)
            for index, (before, after, kernel) in enumerate(
                ((inputs, width, 1), (width, width, 3), (width, 4 * width, 1)), start=1
            ):
                found |= linear(f"{place}.conv{index}", before, after, kernel, kernel, bias=False)
                found |= norm(f"{place}.bn{index}", after)
            inputs = 4 * width
    return found


def mask_head(channels: Sequence[int], queries: int, classes: int) -> Shapes:
    """What Mask2Former and OneFormer share; ``channels`` at strides 4 to 32."""
    pixels, predictor = "sem_seg_head.pixel_decoder", "sem_seg_head.predictor"
    found: Shapes = {
        f"{pixels}.transformer.level_embed": (3, DIM),
        f"{predictor}.query_embed.weight": (queries, DIM),
        f"{predictor}.level_embed.weight": (3, DIM),
        "criterion.empty_weight": (classes + 1,),
    }
    for level, count in enumerate(channels[:0:-1]):
        found |= linear(f"{pixels}.input_proj.{level}.0", count, DIM, 1, 1) | affine(
            f"{pixels}.input_proj.{level}.1", DIM
        )
    for layer in range(6):
        found |= encoder_layer(f"{pixels}.transformer.encoder.layers.{layer}", levels=3)
    for part, inputs, kernel in (("adapter_1", channels[0], 1), ("layer_1", DIM, 3)):
        found |= linear(f"{pixels}.{part}", inputs, DIM, kernel, kernel, bias=False) | affine(
            f"{pixels}.{part}.norm", DIM
        )
    found |= linear(f"{pixels}.mask_features", DIM, DIM, 1, 1)
    for layer in range(9):
        place = f"{predictor}.transformer_cross_attention_layers.{layer}"
        found |= attention(f"{place}.multihead_attn") | affine(f"{place}.norm", DIM)
        place = f"{predictor}.transformer_self_attention_layers.{layer}"
        found |= attention(f"{place}.self_attn") | affine(f"{place}.norm", DIM)
        place = f"{predictor}.transformer_ffn_layers.{layer}"
        found |= feed_forward(place, 2048) | affine(f"{place}.norm", DIM)
    found |= affine(f"{predictor}.decoder_norm", DIM) | linear(f"{predictor}.class_embed", DIM, classes + 1)
    return found | mlp(f"{predictor}.mask_embed", DIM, DIM, DIM, DIM)


def mask2former(backbone: Shapes, channels: Sequence[int], queries: int, classes: int) -> Shapes:
    content = {"sem_seg_head.predictor.query_feat.weight": (queries, DIM)}
    return backbone | mask_head(channels, queries, classes) | content


def before_version_2(shapes: Shapes) -> Shapes:
    found = {}
    for name, shape in shapes.items():
        name = name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.")
        found[name.replace(".query_feat.", ".static_query.")] = shape
    return found


def oneformer(backbone: Shapes, channels: Sequence[int], queries: int, classes: int) -> Shapes:
    predictor = "sem_seg_head.predictor"
    found: Shapes = {
        **backbone,
        **mask_head(channels, queries, classes),
        **mlp("task_mlp", 77, DIM, DIM),
        **mlp("text_projector", DIM, DIM, DIM),
        **linear(f"{predictor}.class_input_proj", DIM, DIM, 1, 1),
        **affine(f"{predictor}.class_transformer.decoder.norm", DIM),
        **affine("text_encoder.ln_final", DIM),
        "text_encoder.token_embedding.weight": (49408, DIM),
        "text_encoder.positional_embedding": (77, DIM),
        "prompt_ctx.weight": (16, DIM),
        "criterion.logit_scale": (),
    }
    for layer in range(2):
        place = f"{predictor}.class_transformer.decoder.layers.{layer}"
        found |= attention(f"{place}.self_attn") | attention(f"{place}.multihead_attn") | feed_forward(place, 2048)
        for norm in ("norm1", "norm2", "norm3"):
            found |= affine(f"{place}.{norm}", DIM)
    for layer in range(6):
        place = f"text_encoder.transformer.resblocks.{layer}"
        found |= attention(f"{place}.attn") | affine(f"{place}.ln_1", DIM) | affine(f"{place}.ln_2", DIM)
        found |= linear(f"{place}.mlp.c_fc", DIM, 4 * DIM) | linear(f"{place}.mlp.c_proj", 4 * DIM, DIM)
    return found


def deformable_detr(refine: bool, classes: int = 91) -> Shapes:
    found: Shapes = {
        **torchvision_resnet50("backbone.0.body"),
        **linear("transformer.reference_points", DIM, 2),
        "transformer.level_embed": (4, DIM),
        "query_embed.weight": (300, 2 * DIM),
    }
    for level, (inputs, kernel) in enumerate(((512, 1), (1024, 1), (2048, 1), (2048, 3))):
        found |= linear(f"input_proj.{level}.0", inputs, DIM, kernel, kernel) | affine(f"input_proj.{level}.1", DIM)
    for layer in range(6):
        found |= encoder_layer(f"transformer.encoder.layers.{layer}", levels=4)
        place = f"transformer.decoder.layers.{layer}"
        found |= deformable(f"{place}.cross_attn", levels=4) | attention(f"{place}.self_attn")
        found |= feed_forward(place, 1024)
        for norm in ("norm1", "norm2", "norm3"):
            found |= affine(f"{place}.{norm}", DIM)
        found |= linear(f"class_embed.{layer}", DIM, classes)
        for prefix in ("", "transformer.decoder.") if refine else ("",):
            found |= mlp(f"{prefix}bbox_embed.{layer}", DIM, DIM, DIM, 4)
    return found
