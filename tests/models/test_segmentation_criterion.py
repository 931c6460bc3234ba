"""Losses of the encoder-decoder family against slow, obvious versions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.models.encoder_decoder.criterion import SegmentationCriterion, cross_entropy, hard_pixels
from tessera.spec.networks import AuxiliaryHeadSpec, EncoderDecoderSpec, OhemSpec, SegmentationLossSpec
from tessera.structures import IGNORE, Target
from tests.models import tiny, tiny_encoder_decoder

CLASSES = len(tiny.CATALOG)
SIZE = (12, 16)
TYPES = ("cross_entropy", "dice", "focal", "lovasz", "tversky")


def targets(ignored: float = 0.2, count: int = 2) -> list[Target]:
    found = [tiny_encoder_decoder.target(1, SIZE) for _ in range(count)]
    for target in found:
        target.semantic[torch.rand(SIZE) < ignored] = IGNORE
    return found


def labels_of(found: list[Target]) -> Tensor:
    return torch.stack([target.semantic for target in found]).long()


def criterion(**keys: object) -> SegmentationCriterion:
    return SegmentationCriterion(EncoderDecoderSpec.model_validate(keys), tiny.CATALOG)


def one(kind: str, **keys: object) -> SegmentationCriterion:
    return criterion(losses={"it": SegmentationLossSpec(type=kind, **keys)})


def pixels(logits: Tensor, labels: Tensor) -> list[tuple[list[float], int]]:
    """(probabilities, class) of every labelled pixel."""
    flat = logits.softmax(1).movedim(1, -1).flatten(0, 2).tolist()
    return [(found, label) for found, label in zip(flat, labels.flatten().tolist(), strict=True) if label != IGNORE]


def slow_cross_entropy(logits: Tensor, labels: Tensor, weights: list[float]) -> float:
    terms = [(weights[label], -weights[label] * math.log(found[label])) for found, label in pixels(logits, labels)]
    return sum(loss for _, loss in terms) / sum(weight for weight, _ in terms)


def slow_tversky(logits: Tensor, labels: Tensor, alpha: float, beta: float) -> float:
    total = 0.0
    for index in range(CLASSES):
        hit = sum(found[index] for found, label in pixels(logits, labels) if label == index)
        wrong = sum(found[index] for found, label in pixels(logits, labels) if label != index)
        missed = sum(1 - found[index] for found, label in pixels(logits, labels) if label == index)
        present = any(label == index for _, label in pixels(logits, labels))
        total += (1 - hit / (hit + alpha * wrong + beta * missed)) if present else 0.0
    return total / CLASSES


def slow_focal(logits: Tensor, labels: Tensor, gamma: float) -> float:
    sigmoid = logits.sigmoid().movedim(1, -1).flatten(0, 2)
    terms = []
    for found, label in zip(sigmoid.tolist(), labels.flatten().tolist(), strict=True):
        if label != IGNORE:
            for index, probability in enumerate(found):
                right = probability if index == label else 1 - probability
                terms.append(-((1 - right) ** gamma) * math.log(right))
    return sum(terms) / len(terms)


def slow_lovasz(logits: Tensor, labels: Tensor) -> float:
    """The Jaccard loss of the pixels above every threshold, integrated over the errors (Berman et al. 2018, equation 9)."""
    total, present = 0.0, 0
    for index in range(CLASSES):
        errors = sorted(
            ((1 - found[index], 1) if label == index else (found[index], 0) for found, label in pixels(logits, labels)),
            reverse=True,
        )
        truth = sum(one for _, one in errors)
        if not truth:
            continue
        present += 1
        before = 0.0
        for place in range(len(errors)):
            missed = sum(one for _, one in errors[: place + 1])
            jaccard = 1 - (truth - missed) / (truth + (place + 1 - missed))
            total += errors[place][0] * (jaccard - before)
            before = jaccard
    return total / present


def test_losses_equal_slow_versions():
    torch.manual_seed(0)
    logits, truth = torch.randn(2, CLASSES, *SIZE), targets()
    labels = labels_of(truth)
    expected = {
        "cross_entropy": slow_cross_entropy(logits, labels, [1.0] * CLASSES),
        "dice": slow_tversky(logits, labels, 0.5, 0.5),
        "tversky": slow_tversky(logits, labels, 0.2, 0.9),
        "focal": slow_focal(logits, labels, 1.5),
        "lovasz": slow_lovasz(logits, labels),
    }
    keys = {"tversky": {"tversky_alpha": 0.2, "tversky_beta": 0.9}, "focal": {"focal_gamma": 1.5}}
    for kind in TYPES:
        losses = one(kind, **keys.get(kind, {}))({"logits": logits}, truth)
        assert float(losses["loss_it"]) == pytest.approx(expected[kind], rel=1e-4), kind


@pytest.mark.parametrize("kind", ["cross_entropy", "focal"])
def test_class_weights(kind: str):
    torch.manual_seed(1)
    logits, truth = torch.randn(2, CLASSES, *SIZE), targets()
    weights = [0.5, 2.0, 1.0, 0.0, 3.0]
    found = criterion(losses={"it": {"type": kind}}, class_weights=weights)({"logits": logits}, truth)["loss_it"]
    if kind == "cross_entropy":
        expected = slow_cross_entropy(logits, labels_of(truth), weights)
    else:
        known = labels_of(truth) != IGNORE
        one_hot = F.one_hot(labels_of(truth).where(known, 0), CLASSES).movedim(-1, 1).float()
        loss = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
        per_class = ((1 - (-loss).exp()) ** 2 * loss).movedim(1, -1)[known].mean(0)
        expected = float((per_class * torch.tensor(weights)).sum() / sum(weights))
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_every_head_has_every_loss_with_its_weights():
    torch.manual_seed(2)
    truth = targets()
    outputs = {
        "logits": torch.randn(2, CLASSES, 3, 4),
        "aux": [{"logits": torch.randn(2, CLASSES, 6, 8)}, {"logits": torch.randn(2, CLASSES, 2, 2)}],
    }
    losses = criterion(
        losses={"ce": SegmentationLossSpec(weight=1.0), "dice": SegmentationLossSpec(type="dice", weight=3.0)},
        auxiliary={"early": AuxiliaryHeadSpec(weight=0.4), "late": AuxiliaryHeadSpec(weight=0.2)},
    )(outputs, truth)
    assert list(losses) == [
        "loss_ce",
        "loss_dice",
        "loss_ce_early",
        "loss_dice_early",
        "loss_ce_late",
        "loss_dice_late",
    ]
    full = F.interpolate(outputs["aux"][1]["logits"], SIZE, mode="bilinear", align_corners=False)
    alone = one("dice")({"logits": full}, truth)["loss_it"]
    assert float(losses["loss_dice_late"]) == pytest.approx(3.0 * 0.2 * float(alone), rel=1e-5)


def slow_hard_pixels(probabilities: list[float], labels: list[int], images: int, ohem: OhemSpec) -> list[bool]:
    """By sorting, as MMSegmentation's sampler describes it."""
    own = sorted(p for p, label in zip(probabilities, labels, strict=True) if label != IGNORE)
    limit = own[min(ohem.min_kept * images, len(own)) - 1]
    return [
        label != IGNORE and (p <= limit or (ohem.thresh is not None and p < ohem.thresh))
        for p, label in zip(probabilities, labels, strict=True)
    ]


@pytest.mark.parametrize("thresh", [0.05, 0.3, None])
@pytest.mark.parametrize("min_kept", [1, 40, 10_000])
def test_hard_pixels_equal_the_slow_version(thresh: float | None, min_kept: int):
    torch.manual_seed(3)
    logits, labels = torch.randn(2, CLASSES, *SIZE), labels_of(targets())
    own = logits.softmax(1).gather(1, labels.where(labels != IGNORE, 0).unsqueeze(1)).flatten().tolist()
    ohem = OhemSpec(thresh=thresh, min_kept=min_kept)
    expected = slow_hard_pixels(own, labels.flatten().tolist(), 2, ohem)
    found = hard_pixels(logits, labels, ohem)
    assert found.flatten().tolist() == expected
    assert sum(expected) >= min(2 * min_kept, int((labels != IGNORE).sum()))
    loss = cross_entropy(logits, labels, None, ohem)
    kept = [-math.log(p) for p, hard in zip(own, expected, strict=True) if hard]
    assert float(loss) == pytest.approx(sum(kept) / len(kept), rel=1e-4)


def test_hard_example_mining_is_for_the_decode_head():
    torch.manual_seed(4)
    logits, truth = torch.randn(2, CLASSES, *SIZE), targets()
    outputs = {"logits": logits, "aux": [{"logits": logits}]}
    losses = criterion(auxiliary={"fcn": AuxiliaryHeadSpec(weight=1.0)}, ohem=OhemSpec(thresh=None, min_kept=5))(
        outputs, truth
    )
    plain = float(one("cross_entropy")({"logits": logits}, truth)["loss_it"])
    assert float(losses["loss_ce_fcn"]) == pytest.approx(plain) and float(losses["loss_ce"]) > 1.5 * plain


@pytest.mark.parametrize("kind", TYPES)
def test_nothing_labelled_costs_nothing(kind: str):
    logits = torch.randn(2, CLASSES, 3, 4, requires_grad=True)
    spec = {"losses": {"it": SegmentationLossSpec(type=kind)}, "class_weights": None}
    if kind == "cross_entropy":
        spec |= {"ohem": OhemSpec(), "class_weights": [1.0] * CLASSES}
    losses = criterion(**spec)({"logits": logits}, targets(ignored=2))
    losses["loss_it"].backward()
    assert float(losses["loss_it"].detach()) == 0 and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("ohem", [None, OhemSpec()])
def test_a_batch_of_classes_without_weight_costs_nothing(ohem: OhemSpec | None):
    logits, truth = torch.randn(2, CLASSES, 3, 4, requires_grad=True), targets()
    for target in truth:
        target.semantic[target.semantic != IGNORE] = 0
    losses = criterion(class_weights=[0.0, 1.0, 1.0, 1.0, 1.0], ohem=ohem)({"logits": logits}, truth)
    losses["loss_ce"].backward()
    assert float(losses["loss_ce"].detach()) == 0 and not logits.grad.any()


@pytest.mark.parametrize("kind", TYPES)
def test_a_partly_labelled_batch_and_half_precision_are_finite(kind: str):
    logits = (torch.randn(2, CLASSES, 3, 4) * 20).bfloat16().requires_grad_()
    truth = [*targets(ignored=2, count=1), *targets(count=1)]
    loss = one(kind)({"logits": logits}, truth)["loss_it"]
    loss.backward()
    assert loss.dtype == torch.float32 and bool(loss.isfinite()) and bool(logits.grad.isfinite().all())
