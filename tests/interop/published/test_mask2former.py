"""Our Mask2Former is the published one: same numbers as the transformers library with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tessera.interop.published import load_strictly, mask2former, read_state
from tessera.models.common import mask_costs, mask_criterion
from tessera.models.mask2former.network import Mask2Former
from tessera.spec.networks import (
    BackboneSpec,
    Mask2FormerSpec,
    MaskLossSpec,
    PixelDecoderSpec,
    SwinSpec,
    TransformerDecoderSpec,
)
from tessera.structures import Target

transformers = pytest.importorskip("transformers")

CLASSES = 5
SPEC = Mask2FormerSpec(
    backbone=BackboneSpec(
        swin=SwinSpec(embed_dim=32, depths=[1, 2, 1, 1], num_heads=[1, 2, 4, 8], window_size=4), drop_path_rate=0.0
    ),
    pixel_decoder=PixelDecoderSpec(hidden_dim=64, layers=2, nheads=4, dim_feedforward=96),
    decoder=TransformerDecoderSpec(layers=4, num_object_queries=12, nheads=4, dim_feedforward=80),
    loss=MaskLossSpec(train_num_points=112),
)


def published(pre_norm: bool = False):
    swin = SPEC.backbone.swin
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(
            embed_dim=swin.embed_dim,
            depths=swin.depths,
            num_heads=swin.num_heads,
            window_size=swin.window_size,
            drop_path_rate=0.0,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_layers=2,
        encoder_feedforward_dim=96,
        decoder_layers=5,
        dim_feedforward=80,
        num_attention_heads=4,
        num_queries=12,
        num_labels=CLASSES,
        pre_norm=pre_norm,
        train_num_points=112,
        output_auxiliary_logits=True,
    )
    torch.manual_seed(0)
    model = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    # Published initialisation leaves many tensors at zero or one, where a wrong name would go unnoticed.
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def ours(model, pre_norm: bool = False) -> Mask2Former:
    spec = SPEC.model_copy(update={"decoder": SPEC.decoder.model_copy(update={"pre_norm": pre_norm})})
    network = Mask2Former(spec, CLASSES)
    load_strictly(network, mask2former.rename(model.state_dict()), "transformers")
    return network


@pytest.mark.parametrize(
    ("height", "width", "pre_norm"), [(64, 64, False), (96, 80, False), (72, 104, False), (64, 96, True)]
)
def test_same_outputs(height: int, width: int, pre_norm: bool):
    model = published(pre_norm)
    network = ours(model, pre_norm).train()
    images = torch.rand(2, 3, height, width)
    with torch.no_grad():
        outputs = network(images)
        theirs = model(network.normalise(images))
    layers = [*outputs["aux"], outputs]
    their_masks = [layer["masks_queries_logits"] for layer in theirs.auxiliary_logits] + [theirs.masks_queries_logits]
    their_classes = [layer["class_queries_logits"] for layer in theirs.auxiliary_logits] + [theirs.class_queries_logits]
    assert len(layers) == len(their_masks) == 5
    for layer, masks, classes in zip(layers, their_masks, their_classes, strict=True):
        torch.testing.assert_close(layer["pred_masks"], masks, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer["pred_logits"], classes, atol=1e-4, rtol=1e-4)


def test_files_of_the_hub_load(tmp_path: Path):
    model = published()
    model.save_pretrained(tmp_path)
    network = Mask2Former(SPEC, CLASSES)
    load_strictly(network, mask2former.rename(read_state(tmp_path / "model.safetensors")), "hub file")
    for name, value in ours(model).state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name


def targets_of(counts: list[int], size: tuple[int, int]) -> list[Target]:
    torch.manual_seed(1)
    return [
        Target(
            labels=torch.randint(CLASSES, (count,)),
            masks=torch.rand(count, *size) > 0.6,
            boxes=torch.zeros(count, 4),
            iscrowd=torch.zeros(count, dtype=torch.bool),
            areas=torch.zeros(count, dtype=torch.float64),
        )
        for count in counts
    ]


def test_same_losses(monkeypatch: pytest.MonkeyPatch):
    """With the same points for matching and losses, every loss of every layer is the same."""
    model = published()
    network = ours(model).train()
    images = torch.rand(3, 3, 64, 96)
    targets = targets_of([3, 1, 6], (64, 96))
    points = torch.rand(1, 112, 2)
    with torch.no_grad():
        outputs = network(images)
    module = transformers.models.mask2former.modeling_mask2former
    rand: Callable[..., Tensor] = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *shape, **kw: points if shape[-1] == 2 else rand(*shape, **kw))
    monkeypatch.setattr(
        module.Mask2FormerLoss,
        "sample_points_using_uncertainty",
        lambda self, logits, *rest: points.expand(len(logits), -1, -1),
    )
    monkeypatch.setattr(mask_criterion, "uncertain_points", lambda maps, *rest: points.expand(len(maps), -1, -1))
    losses = mask_criterion.MaskCriterion(CLASSES, SPEC.loss)(outputs, targets)
    theirs = model.criterion(
        outputs["pred_masks"],
        outputs["pred_logits"],
        [target.masks.float() for target in targets],
        [target.labels for target in targets],
        [
            {"masks_queries_logits": aux["pred_masks"], "class_queries_logits": aux["pred_logits"]}
            for aux in outputs["aux"]
        ],
    )
    names = {
        "loss_class": ("loss_cross_entropy", 2.0),
        "loss_mask": ("loss_mask", 5.0),
        "loss_dice": ("loss_dice", 5.0),
    }
    assert len(losses) == len(theirs) == 15
    for name, value in losses.items():
        kind, _, layer = name.partition("_")[2].partition("_")
        their_name, weight = names[f"loss_{kind}"]
        expected = weight * theirs[f"{their_name}_{layer}" if layer else their_name]
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5, msg=name)


def test_same_matching(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(2)
    logits, masks = torch.randn(2, 12, CLASSES + 1), torch.randn(2, 12, 16, 24)
    targets = targets_of([4, 7], (64, 96))
    points = torch.rand(1, 112, 2)
    monkeypatch.setattr(torch, "rand", lambda *shape, **kw: points)
    costs = mask_costs.matching_costs(
        [logits], [masks], [target.labels for target in targets], [target.masks for target in targets], SPEC.loss
    )
    (matches,) = mask_criterion.assign(costs)
    matcher = transformers.models.mask2former.modeling_mask2former.Mask2FormerHungarianMatcher(2.0, 5.0, 5.0, 112)
    theirs = matcher(masks, logits, [target.masks.float() for target in targets], [target.labels for target in targets])
    for (queries, found), (their_queries, their_found) in zip(matches, theirs, strict=True):
        assert set(zip(queries.tolist(), found.tolist(), strict=True)) == set(
            zip(their_queries.tolist(), their_found.tolist(), strict=True)
        )
