"""Our Deformable DETR is the published one: same numbers as the transformers library with the same weights."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.files import UserError
from tessera.interop.published import deformable_detr, load_strictly
from tessera.models.deformable_detr.criterion import DetectionCriterion
from tessera.models.deformable_detr.network import DeformableDetr
from tessera.models.deformable_detr.postprocess import DetectionPostprocess
from tessera.ops.boxes import cxcywh_to_xyxy
from tessera.spec.networks import BackboneSpec, DeformableDetrSpec
from tessera.spec.schema import PostprocessSpec
from tessera.structures import Target
from tests.models import tiny

transformers = pytest.importorskip("transformers")

CLASSES = 5
SIZES = ((64, 96), (75, 109))
LAYERS = 3


@lru_cache(maxsize=2)
def published(refine: bool, levels: int = 4, dilation: bool = False) -> Any:
    options = {"output_stride": 16} if dilation else {}
    config = transformers.DeformableDetrConfig(
        backbone_config=transformers.TimmBackboneConfig(
            backbone="resnet50",
            use_pretrained_backbone=False,
            features_only=True,
            out_indices=[2, 3, 4] if levels > 1 else [4],
            **options,
        ),
        d_model=64,
        encoder_layers=2,
        decoder_layers=LAYERS,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        encoder_n_points=3,
        decoder_n_points=2,
        num_queries=12,
        num_feature_levels=levels,
        with_box_refine=refine,
        num_labels=CLASSES,
        class_cost=2,
        auxiliary_loss=True,
        # Heads are shared by all layers without refinement, and by none with it.
        tie_word_embeddings=not refine,
    )
    torch.manual_seed(0)
    model = transformers.DeformableDetrForObjectDetection(config).eval()
    if refine:
        model.model.decoder.bbox_embed = model.bbox_embed
    # Published initialisation leaves many tensors at zero or one, where a wrong name would go unnoticed.
    for name, parameter in model.named_parameters():
        if "backbone" not in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer += 0.1 * torch.rand_like(buffer)
    return model


def spec(refine: bool, levels: int = 4, dilation: bool = False) -> DeformableDetrSpec:
    return DeformableDetrSpec(
        backbone=BackboneSpec(name="resnet50", drop_path_rate=0.0),
        strides=[8, 16, 32] if levels > 1 else [32],
        num_feature_levels=levels,
        dilation=dilation,
        num_queries=12,
        hidden_dim=64,
        nheads=4,
        enc_layers=2,
        dec_layers=LAYERS,
        dim_feedforward=96,
        enc_n_points=3,
        dec_n_points=2,
        dropout=0.0,
        with_box_refine=refine,
    )


@lru_cache(maxsize=2)
def ours(refine: bool, levels: int = 4, dilation: bool = False) -> DeformableDetr:
    network = DeformableDetr(spec(refine, levels, dilation), CLASSES).eval()
    state = deformable_detr.rename(published(refine, levels, dilation).state_dict())
    load_strictly(network, state, "transformers", may_miss=deformable_detr.may_miss)
    return network


def padded_batch(size: tuple[int, int], inner: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Random images of the sizes ``inner`` inside a batch of ``size``, padded with the pixel mean, and the padding mask."""
    torch.manual_seed(1)
    images = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).repeat(len(inner), 1, *size)
    padding = torch.ones(len(inner), *size, dtype=torch.bool)
    for image, (height, width) in enumerate(inner):
        images[image, :, :height, :width] = torch.rand(3, height, width)
        padding[image, :height, :width] = False
    return images, padding


def assert_same(network: DeformableDetr, model: Any, images: Tensor, padding: Tensor | None) -> None:
    with torch.no_grad():
        found = network(images, padding)
        expected = model(network.normalise(images), None if padding is None else (~padding).long())
    torch.testing.assert_close(found["pred_logits"], expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(found["pred_boxes"], expected.pred_boxes, atol=1e-4, rtol=0)
    assert expected.pred_boxes.std() > 0.02 and expected.logits.std() > 0.02, "the outputs say nothing"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("refine", [False, True], ids=["shared heads", "refined"])
def test_same_outputs(refine: bool, size: tuple[int, int]):
    height, width = size
    assert_same(ours(refine), published(refine), *padded_batch(size, [size]))
    images, padding = padded_batch(size, [(height, width // 2), (height - 23, width), (40, 37)])
    assert_same(ours(refine), published(refine), images, padding)


@pytest.mark.parametrize(
    ("levels", "dilation"), [(1, False), (3, False), (5, False), (4, True)], ids=["one", "three", "five", "dilated"]
)
def test_same_outputs_with_other_levels(levels: int, dilation: bool):
    size = SIZES[1]
    assert_same(ours(True, levels, dilation), published(True, levels, dilation), *padded_batch(size, [size, (50, 60)]))


def test_no_padding_is_padding_nowhere():
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        found, expected = ours(True)(images), ours(True)(images, torch.zeros(2, 64, 96, dtype=torch.bool))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def to_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the authors' files, from those of the library; written the other way round, from their listing."""
    original: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, replacement in (
            (r"^model\.backbone\.model\.", "backbone.0.body."),
            (r"^model\.input_proj", "input_proj"),
            (r"^model\.query_position_embeddings", "query_embed"),
            (r"^model\.", "transformer."),
            (r"encoder_attn_layer_norm", "norm1"),
            (r"(decoder\.layers\.\d+)\.self_attn_layer_norm", r"\1.norm2"),
            (r"(decoder\.layers\.\d+)\.final_layer_norm", r"\1.norm3"),
            (r"self_attn_layer_norm", "norm1"),
            (r"final_layer_norm", "norm2"),
            (r"mlp\.fc", "linear"),
            (r"encoder_attn", "cross_attn"),
            (r"o_proj", "out_proj"),
        ):
            name = re.sub(pattern, replacement, name)
        original[name] = value
    for name in [name for name in original if ".q_proj." in name]:
        parts = [original.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        original[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return original


@pytest.mark.parametrize("refine", [False, True], ids=["shared heads", "refined"])
def test_original_names(refine: bool):
    """The original files' names for every tensor (fundamentalvision/Deformable-DETR; torchvision's for the backbone)."""
    state = to_original(published(refine).state_dict())
    assert "transformer.decoder.layers.2.self_attn.in_proj_weight" in state
    assert ("transformer.decoder.bbox_embed.2.layers.0.weight" in state) == refine
    network = DeformableDetr(spec(refine), CLASSES)
    load_strictly(network, deformable_detr.rename(state), "original", may_miss=deformable_detr.may_miss)
    expected = ours(refine).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


def test_names_of_older_files():
    renames = ((r"backbone\.model", "backbone.conv_encoder.model"), (r"mlp\.fc", "fc"), (r"o_proj", "out_proj"))
    state = published(True).state_dict()
    older = {}
    for name, value in state.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        older[name] = value
    assert deformable_detr.rename(older).keys() == deformable_detr.rename(state).keys()


def test_two_stage_and_damaged_files_are_refused():
    network = DeformableDetr(spec(True), CLASSES)
    state = dict(published(True).state_dict())
    two_stage = deformable_detr.rename(state | {"model.enc_output.weight": torch.zeros(64, 64)})
    with pytest.raises(UserError, match=r"1 that the network does not have: model\.enc_output\.weight"):
        load_strictly(network, two_stage, "two-stage", may_miss=deformable_detr.may_miss)
    twin = "model.decoder.bbox_embed.1.layers.0.bias"
    with pytest.raises(UserError, match=r"bbox_embed\.1\.layers\.0\.bias: differs .* damaged"):
        deformable_detr.rename(state | {twin: state[twin] + 1})


@pytest.mark.parametrize("refine", [False, True], ids=["shared heads", "refined"])
def test_same_losses(refine: bool):
    """Every loss of every layer, an image without objects among the images."""
    size = SIZES[1]
    inner = [(size[0], 80), size, (60, 70)]
    images, padding = padded_batch(size, inner)
    torch.manual_seed(3)
    normalised = [torch.rand(count, 4) * 0.3 + torch.tensor([0.3, 0.3, 0.02, 0.02]) for count in (4, 0, 7)]
    labels = [torch.randint(CLASSES, (len(boxes),)) for boxes in normalised]
    targets = [
        Target(
            labels=label,
            masks=None,
            boxes=cxcywh_to_xyxy(boxes) * torch.tensor([width, height, width, height]),
            iscrowd=torch.zeros(len(boxes), dtype=torch.bool),
            areas=torch.ones(len(boxes), dtype=torch.float64),
            size=(height, width),
        )
        for label, boxes, (height, width) in zip(labels, normalised, inner, strict=True)
    ]
    network, model = ours(refine), published(refine)
    with torch.no_grad():
        network.train().backbone.eval()  # their batch norms are frozen
        found = DetectionCriterion(spec(refine).loss)(network(images, padding), targets)
        network.eval()
        theirs = model(
            network.normalise(images),
            (~padding).long(),
            labels=[{"class_labels": label, "boxes": boxes} for label, boxes in zip(labels, normalised, strict=True)],
        ).loss_dict
    names = {"loss_class": ("loss_ce", 2.0), "loss_box": ("loss_bbox", 5.0), "loss_giou": ("loss_giou", 2.0)}
    assert len(found) == 3 * LAYERS
    for name, value in found.items():
        kind, _, layer = name.partition("_")[2].partition("_")
        their_name, weight = names[f"loss_{kind}"]
        expected = weight * theirs[f"{their_name}_{layer}" if layer else their_name]
        torch.testing.assert_close(value, expected, atol=1e-4, rtol=0, msg=f"{name}: {value} and {expected}")


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.999])
def test_same_predictions(threshold: float):
    torch.manual_seed(4)
    logits = torch.randn(3, 12, CLASSES)
    centres, sizes = torch.rand(3, 12, 2) * 0.4 + 0.3, torch.rand(3, 12, 2) * 0.5
    outputs = {"pred_logits": logits, "pred_boxes": torch.cat((centres, sizes), dim=-1)}
    originals = [(48, 100), (200, 30), (64, 96)]
    processor = transformers.DeformableDetrImageProcessor()
    theirs = processor.post_process_object_detection(
        transformers.models.deformable_detr.modeling_deformable_detr.DeformableDetrObjectDetectionOutput(
            logits=logits, pred_boxes=outputs["pred_boxes"]
        ),
        threshold=threshold,
        target_sizes=originals,
        top_k=40,
    )
    metas = [tiny.meta(original, (64, 96)) for original in originals]
    postprocess = DetectionPostprocess(PostprocessSpec(num_select=40, conf_threshold=threshold))
    found = postprocess(outputs, metas, (64, 96))
    counts = []
    for one, meta, expected in zip(found, metas, theirs, strict=True):
        assert one.meta is meta and one.instances is not None and one.instances.masks is None
        assert torch.equal(one.instances.labels, expected["labels"])
        torch.testing.assert_close(one.instances.scores, expected["scores"], atol=1e-6, rtol=0)
        torch.testing.assert_close(one.instances.boxes, expected["boxes"], atol=1e-4, rtol=0)
        counts.append(len(expected["scores"]))
    assert counts == {0.0: [40, 40, 40], 0.999: [0, 0, 0]}.get(threshold, counts)
