from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tessera.models.common.mask_costs import cross_entropy_cost, dice_cost
from tessera.models.common.mask_criterion import MaskCriterion
from tessera.models.common.matching import assign
from tessera.spec.networks import MaskLossSpec
from tests.models import tiny

SIZE = (32, 48)


def outputs(queries: int = 6, layers: int = 3, batch: int = 2, classes: int = 3) -> dict:
    def one() -> dict[str, Tensor]:
        return {
            "pred_logits": torch.randn(batch, queries, classes + 1, requires_grad=True),
            "pred_masks": torch.randn(batch, queries, SIZE[0] // 4, SIZE[1] // 4, requires_grad=True),
        }

    return {**one(), "aux": [one() for _ in range(layers - 1)]}


def losses(found: dict, targets: list, **spec: object) -> dict[str, Tensor]:
    return MaskCriterion(3, MaskLossSpec(**{"train_num_points": 50, **spec}))(found, targets)


def test_costs_equal_every_pair_one_by_one():
    torch.manual_seed(0)
    predicted, wanted = 9 * torch.randn(5, 40), torch.rand(3, 40)
    entropy, dice = cross_entropy_cost(predicted, wanted), dice_cost(predicted, wanted)
    for i in range(5):
        for j in range(3):
            expected = F.binary_cross_entropy_with_logits(predicted[i], wanted[j])
            torch.testing.assert_close(entropy[i, j], expected, atol=1e-4, rtol=1e-5)
            share = predicted[i].sigmoid()
            overlap = 2 * (share * wanted[j]).sum() + 1
            torch.testing.assert_close(dice[i, j], 1 - overlap / (share.sum() + wanted[j].sum() + 1))


@pytest.mark.parametrize(
    ("counts", "crowd"),
    [
        ([0, 0], 0),  # nothing in any image
        ([0, 4], 0),  # nothing in one
        ([9, 2], 0),  # more objects than queries
        ([3, 3], 3),  # crowds alone
    ],
)
def test_losses_are_finite_and_reach_every_output(counts: list[int], crowd: int):
    torch.manual_seed(0)
    found = outputs()
    targets = [tiny.target(count, SIZE, crowd=crowd) for count in counts]
    result = losses(found, targets)
    assert len(result) == 9
    total = torch.stack(list(result.values())).sum()
    assert total.isfinite()
    total.backward()
    for layer in (found, *found["aux"]):
        assert layer["pred_logits"].grad.any()
        assert layer["pred_masks"].grad is not None and layer["pred_masks"].grad.isfinite().all()


def test_crowds_are_no_targets():
    torch.manual_seed(0)
    found = outputs(layers=1)
    with_crowd = [tiny.target(4, SIZE, crowd=2), tiny.target(1, SIZE, crowd=1)]
    without = [tiny.target(0, SIZE), tiny.target(0, SIZE)]
    for source, kept in zip(with_crowd, without, strict=True):
        real = ~source.iscrowd
        kept.labels, kept.masks, kept.iscrowd = source.labels[real], source.masks[real], source.iscrowd[real]
    torch.manual_seed(3)
    first = losses(found, with_crowd)
    torch.manual_seed(3)
    second = losses(found, without)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nothing_to_find_costs_nothing_where_no_object_has_no_weight():
    found = losses(outputs(layers=2), [tiny.target(0, SIZE), tiny.target(0, SIZE)], no_object_weight=0.0)
    assert [value.item() for value in found.values()] == [0.0] * 6


def test_a_perfect_prediction_costs_almost_nothing():
    torch.manual_seed(0)
    targets = [tiny.target(3, SIZE)]
    masks = torch.zeros(3, *SIZE, dtype=torch.bool)
    masks[0, :16], masks[1, 16:, :20], masks[2, 16:, 20:] = True, True, True
    targets[0].masks = masks
    order = [2, 0, 1]
    logits = torch.full((1, 5, 4), -20.0)
    logits[0, torch.arange(5), [*targets[0].labels[order].tolist(), 3, 3]] = 20.0
    predicted = torch.full((1, 5, *SIZE), -30.0)
    predicted[0, :3] = torch.where(masks[order], 30.0, -30.0)
    result = losses({"pred_logits": logits, "pred_masks": predicted}, targets, importance_sample_ratio=0.0)
    assert float(result["loss_class"]) < 1e-3
    # Not zero: beside an edge both are bilinear, but the prediction before its sigmoid, the target after.
    assert float(result["loss_dice"]) < 0.5
    wrong = {"pred_logits": logits.flip(1), "pred_masks": -predicted}
    assert float(losses(wrong, targets)["loss_mask"]) > 10


def test_predictions_that_are_not_finite_are_told():
    found = outputs()
    found["aux"][1]["pred_masks"].data[0, 2] = float("nan")
    with pytest.raises(FloatingPointError, match="hold NaN or infinity"):
        losses(found, [tiny.target(2, SIZE), tiny.target(1, SIZE)])


def test_assignment_is_the_cheapest():
    cost = torch.tensor([[[1.0, 5.0], [2.0, 1.0], [9.0, 0.0]], [[0.0, 0.1], [0.3, 5.0], [9.0, 9.0]]])
    matches = assign([cost])
    assert [[x.tolist() for x in matches[layer][0]] for layer in range(2)] == [[[0, 2], [0, 1]], [[1, 0], [0, 1]]]


def test_masks_are_counted_over_processes(monkeypatch: pytest.MonkeyPatch):
    """This process has 6 masks, the other one none: the mean is 3, so the mask losses are twice as large as alone."""
    torch.manual_seed(0)
    found = outputs(layers=1)
    targets = [tiny.target(4, SIZE), tiny.target(2, SIZE)]
    torch.manual_seed(1)
    alone = losses(found, targets)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    counted: list[float] = []
    monkeypatch.setattr(dist, "all_reduce", lambda value: counted.append(float(value)))
    torch.manual_seed(1)
    together = losses(found, targets)
    assert counted == [6.0]
    torch.testing.assert_close(together["loss_mask"], 2 * alone["loss_mask"])
    torch.testing.assert_close(together["loss_dice"], 2 * alone["loss_dice"])
    torch.testing.assert_close(together["loss_class"], alone["loss_class"])
