"""Our OneFormer is the published one: same numbers as the transformers library with the same weights, for every task."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tessera.interop.published import load_strictly, oneformer, read_state
from tessera.models.common import mask_criterion
from tessera.models.oneformer import task_input
from tessera.models.oneformer.criterion import OneFormerCriterion, contrastive_loss
from tessera.models.oneformer.network import OneFormer
from tessera.models.oneformer.text import tokenize
from tessera.spec.networks import OneFormerSpec
from tessera.structures import Target

transformers = pytest.importorskip("transformers")

CLASSES = 5
NAMES = [f"class {index}" for index in range(CLASSES)]
SPEC = OneFormerSpec.model_validate(
    {
        "backbone": {
            "swin": {"embed_dim": 32, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 4},
            "drop_path_rate": 0.0,
        },
        "pixel_decoder": {"hidden_dim": 64, "layers": 2, "nheads": 4, "dim_feedforward": 96, "dropout": 0.0},
        "class_decoder": {"layers": 2, "nheads": 4, "dim_feedforward": 80, "dropout": 0.0},
        "decoder": {"layers": 3, "num_object_queries": 12, "nheads": 4, "dim_feedforward": 80},
        "text": {"width": 64, "layers": 2, "num_context": 3},
        "loss": {"train_num_points": 112},
    }
)


def published(training: bool = False, **changes: object):
    swin = SPEC.backbone.swin
    sizes = {
        "conv_dim": 64,
        "mask_dim": 64,
        "hidden_dim": 64,
        "encoder_layers": 2,
        "encoder_feedforward_dim": 96,
        "decoder_layers": 4,
        "query_dec_layers": 2,
        "dim_feedforward": 80,
        "num_attention_heads": 4,
        "dropout": 0.0,
        "num_queries": 12,
        "num_labels": CLASSES,
        "text_encoder_width": 64,
        "text_encoder_num_layers": 2,
        "text_encoder_n_ctx": 3,
        "train_num_points": 112,
        "is_training": training,
    }
    config = transformers.OneFormerConfig(
        backbone_config=transformers.SwinConfig(
            embed_dim=swin.embed_dim,
            depths=swin.depths,
            num_heads=swin.num_heads,
            window_size=swin.window_size,
            drop_path_rate=0.0,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        **(sizes | changes),
    )
    torch.manual_seed(0)
    model = transformers.OneFormerForUniversalSegmentation(config).eval()
    # Published initialisation leaves many tensors at zero or one, where a wrong name would go unnoticed.
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def build(**changes: object) -> OneFormer:
    return OneFormer(OneFormerSpec.model_validate(SPEC.model_dump() | changes), NAMES)


def ours(model, **changes: object) -> OneFormer:
    network = build(**changes)
    load_strictly(network, oneformer.rename(model.state_dict()), "transformers", may_miss=oneformer.is_text)
    return network


def tasks(*names: str) -> Tensor:
    return torch.stack([task_input(SPEC, name) for name in names])


def assert_same_outputs(network: OneFormer, model, images: Tensor, task: Tensor) -> None:
    with torch.no_grad():
        outputs = network.train()(images, task=task)
        theirs = model(network.normalise(images), task_inputs=task)
    layers = [*outputs["aux"], outputs]
    found = [(layer["pred_logits"], layer["pred_masks"]) for layer in layers]
    expected = [(x["class_queries_logits"], x["masks_queries_logits"]) for x in theirs.auxiliary_predictions]
    expected.append((theirs.class_queries_logits, theirs.masks_queries_logits))
    assert len(found) == len(expected) == 4
    for (logits, masks), (their_logits, their_masks) in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, their_logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(masks, their_masks, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
@pytest.mark.parametrize("size", [(64, 96), (72, 104)], ids=str)
def test_same_outputs(size: tuple[int, int], task: str):
    """The second size is a multiple of neither 32 nor the window."""
    model = published()
    assert_same_outputs(ours(model), model, torch.rand(1, 3, *size), tasks(task))


def test_a_padded_batch_of_several_tasks():
    """Padding has the pixel mean, which is zero once normalised, as theirs."""
    model = published()
    network = ours(model)
    images = torch.rand(3, 3, 64, 96)
    images[1, :, 40:] = network.pixel_mean.flatten()[:, None, None]
    images[2, :, :, 70:] = network.pixel_mean.flatten()[:, None, None]
    assert_same_outputs(network, model, images, tasks("semantic", "panoptic", "instance"))


@pytest.mark.parametrize(
    ("theirs", "changes"),
    [
        ({"use_task_norm": False}, {"use_task_norm": False}),
        ({"pre_norm": True}, {"decoder": SPEC.decoder.model_dump() | {"pre_norm": True}}),
    ],
    ids=["without task norm", "pre-norm"],
)
def test_its_variants(theirs: dict[str, object], changes: dict[str, object]):
    model = published(**theirs)
    assert_same_outputs(ours(model, **changes), model, torch.rand(1, 3, 64, 64), tasks("instance"))


def test_files_of_the_hub_load(tmp_path: Path):
    model = published(training=True)
    model.save_pretrained(tmp_path)
    network = build()
    load_strictly(network, oneformer.rename(read_state(tmp_path / "model.safetensors")), "hub file")
    for name, value in ours(model).state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name


def original_names(network: OneFormer) -> dict[str, Tensor]:
    """Our tensors under the names of the original code, written down from its modules."""
    state = dict(network.state_dict())
    packed: dict[str, Tensor] = {}
    for name, value in state.items():
        if re.search(r"\.(attn|self_attn|cross_attn)\.q_proj\.", name):
            stem, kind = name.split(".q_proj.")
            packed[f"{stem}.in_proj_{kind}"] = torch.cat([state[f"{stem}.{part}_proj.{kind}"] for part in "qkv"])
        elif not re.search(r"\.(attn|self_attn|cross_attn)\.[kv]_proj\.", name):
            packed[name] = value
    predictor = "sem_seg_head.predictor."
    table = [
        (r"^pixel_decoder\.(level_embed|layers\.)", r"sem_seg_head.pixel_decoder.transformer.\1"),
        (r"^(sem_seg_head\.pixel_decoder\.transformer)\.layers\.", r"\1.encoder.layers."),
        (r"^pixel_decoder\.lateral\.0\.", "sem_seg_head.pixel_decoder.adapter_1."),
        (r"^pixel_decoder\.lateral\.1\.", "sem_seg_head.pixel_decoder.adapter_1.norm."),
        (r"^pixel_decoder\.output\.0\.", "sem_seg_head.pixel_decoder.layer_1."),
        (r"^pixel_decoder\.output\.1\.", "sem_seg_head.pixel_decoder.layer_1.norm."),
        (r"^pixel_decoder\.", "sem_seg_head.pixel_decoder."),
        (r"^class_decoder\.input_proj\.", predictor + "class_input_proj."),
        (r"^class_decoder\.(.*)cross_attn\.", predictor + r"class_transformer.decoder.\1multihead_attn."),
        (r"^class_decoder\.", predictor + "class_transformer.decoder."),
        (r"^query_embed\.", predictor + "query_embed."),
        (r"^decoder\.level_embed\.", predictor + "level_embed."),
        (r"^decoder\.heads\.norm\.", predictor + "decoder_norm."),
        (r"^decoder\.heads\.", predictor),
        (
            r"^decoder\.layers\.(\d+)\.cross_attn\.",
            predictor + r"transformer_cross_attention_layers.\1.multihead_attn.",
        ),
        (r"^decoder\.layers\.(\d+)\.self_attn\.", predictor + r"transformer_self_attention_layers.\1.self_attn."),
        (r"^decoder\.layers\.(\d+)\.linear", predictor + r"transformer_ffn_layers.\1.linear"),
        (r"^decoder\.layers\.(\d+)\.norm1\.", predictor + r"transformer_cross_attention_layers.\1.norm."),
        (r"^decoder\.layers\.(\d+)\.norm2\.", predictor + r"transformer_self_attention_layers.\1.norm."),
        (r"^decoder\.layers\.(\d+)\.norm3\.", predictor + r"transformer_ffn_layers.\1.norm."),
        (r"^text\.logit_scale$", "criterion.logit_scale"),
        (r"^text\.projection\.", "text_projector."),
        (r"^text\.context\.", "prompt_ctx."),
        (r"^text\.norm\.", "text_encoder.ln_final."),
        (r"^text\.layers\.(\d+)\.norm", r"text_encoder.transformer.resblocks.\1.ln_"),
        (r"^text\.layers\.(\d+)\.linear1\.", r"text_encoder.transformer.resblocks.\1.mlp.c_fc."),
        (r"^text\.layers\.(\d+)\.linear2\.", r"text_encoder.transformer.resblocks.\1.mlp.c_proj."),
        (r"^text\.layers\.(\d+)\.", r"text_encoder.transformer.resblocks.\1."),
        (r"^text\.", "text_encoder."),
    ]
    named = {}
    for name, value in packed.items():
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        named[name] = value
    named["criterion.empty_weight"] = torch.ones(CLASSES + 1)
    named["backbone.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    return named


def test_files_of_the_original_load(tmp_path: Path):
    torch.manual_seed(3)
    network, other = build(), build()
    named = original_names(network)
    # As in the converter that the transformers library has for these files.
    assert {
        "sem_seg_head.pixel_decoder.transformer.encoder.layers.1.self_attn.value_proj.weight",
        "sem_seg_head.pixel_decoder.input_proj.2.1.bias",
        "sem_seg_head.pixel_decoder.adapter_1.norm.weight",
        "sem_seg_head.pixel_decoder.mask_features.weight",
        "sem_seg_head.predictor.class_transformer.decoder.layers.1.multihead_attn.in_proj_weight",
        "sem_seg_head.predictor.class_transformer.decoder.layers.0.norm3.weight",
        "sem_seg_head.predictor.class_transformer.decoder.norm.bias",
        "sem_seg_head.predictor.transformer_cross_attention_layers.2.multihead_attn.in_proj_bias",
        "sem_seg_head.predictor.transformer_ffn_layers.0.linear1.weight",
        "sem_seg_head.predictor.mask_embed.layers.2.weight",
        "task_mlp.layers.1.bias",
        "text_encoder.transformer.resblocks.1.attn.in_proj_weight",
        "text_encoder.positional_embedding",
        "text_encoder.token_embedding.weight",
        "prompt_ctx.weight",
    } <= set(named)
    torch.save({"model": named, "iteration": 3}, tmp_path / "oneformer.pth")
    load_strictly(other, oneformer.rename(read_state(tmp_path / "oneformer.pth")), "original")
    for name, value in network.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_same_texts():
    """Their text transformer makes a causal mask and then forgets to use it; the original uses it, and so do we."""
    model = published(training=True)
    encoder = model.model.text_mapper.text_encoder
    for layer in encoder.transformer.layers:
        attention, mask = layer.self_attn.forward, encoder.build_attention_mask()
        layer.self_attn.forward = lambda *args, run=attention, mask=mask, **kw: run(*args, **kw, attn_mask=mask)
    network = ours(model)
    assert network.text is not None
    words = ["a photo with a class 0", "a semantic photo", "a photo with a very long name indeed, of a class"]
    texts = torch.stack([tokenize(words[index], 77) for index in (0, 1, 1, 2, 0, 1, 0, 0, 1)]).repeat(2, 1, 1)
    texts[1, 4] = texts[1, 3]
    with torch.no_grad():
        torch.testing.assert_close(network.text(texts)[0], model.model.text_mapper(texts), atol=1e-4, rtol=1e-4)


def test_same_losses(monkeypatch: pytest.MonkeyPatch):
    """With the same points for matching and losses, every loss of every layer and the contrastive one are the same."""
    model = published(training=True)
    network = ours(model).train()
    assert network.text is not None
    torch.manual_seed(1)
    targets = [
        Target(
            labels=torch.randint(CLASSES, (count,)),
            masks=torch.rand(count, 64, 96) > 0.6,
            boxes=torch.zeros(count, 4),
            iscrowd=torch.zeros(count, dtype=torch.bool),
            areas=torch.zeros(count, dtype=torch.float64),
        )
        for count in (3, 1, 6)
    ]
    texts = torch.stack([tokenize(f"a photo with a class {index}", 77) for index in range(27)]).view(3, 9, 77)
    with torch.no_grad():
        outputs = network(torch.rand(3, 3, 64, 96), task=tasks("semantic", "instance", "panoptic"), texts=texts)
    points = torch.rand(1, 112, 2)
    rand: Callable[..., Tensor] = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *shape, **kw: points if shape[-1] == 2 else rand(*shape, **kw))
    module = transformers.models.oneformer.modeling_oneformer
    monkeypatch.setattr(
        module.OneFormerLoss,
        "sample_points_using_uncertainty",
        lambda self, logits, *rest: points.expand(len(logits), -1, -1),
    )
    monkeypatch.setattr(mask_criterion, "uncertain_points", lambda maps, *rest: points.expand(len(maps), -1, -1))
    losses = OneFormerCriterion(CLASSES, SPEC.loss)(outputs, targets)
    theirs = model.get_loss_dict(
        outputs["pred_masks"],
        outputs["pred_logits"],
        outputs["queries"],
        [target.required_masks().float() for target in targets],
        [target.labels for target in targets],
        outputs["texts"],
        [
            {"masks_queries_logits": aux["pred_masks"], "class_queries_logits": aux["pred_logits"]}
            for aux in outputs["aux"]
        ],
        True,
    )
    assert len(losses) == len(theirs) == 13
    for name, value in losses.items():
        expected = theirs[name.replace("loss_class", "loss_cross_entropy")].view(())
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5, msg=name)


def test_the_scale_of_the_contrast_is_clamped():
    network = build()
    assert network.text is not None
    network.train()
    texts = tokenize("a semantic photo", 77).repeat(1, 9, 1)
    for stored, used in ((-math.log(0.07), 1 / 0.07), (7.0, 100.0)):
        network.text.logit_scale.data.fill_(stored)
        with torch.no_grad():
            outputs = network(torch.rand(1, 3, 64, 64), task=tasks("semantic"), texts=texts)
        assert float(outputs["logit_scale"]) == pytest.approx(used)
    assert float(contrastive_loss(outputs["queries"], outputs["texts"], outputs["logit_scale"])) == 0
