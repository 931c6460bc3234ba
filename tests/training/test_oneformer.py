"""A real training of OneFormer that takes seconds: the schedule and the clipping are attached, and it continues as it would have gone on."""

from __future__ import annotations

import csv
import os

import pytest
import torch

from tests.training import toy

CHANGES = {
    "model.name": "oneformer",
    "model.class_decoder": {"layers": 1, "nheads": 2, "dim_feedforward": 32},
    "model.text": {"width": 64, "layers": 1, "context_length": 16, "num_context": 2},
    "train.clip_grad_norm": 0.5,
    "train.optim.lr_scheduler": "MultiStep",
}


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """The results of an uninterrupted training, and what every optimiser step saw: rates over initial rates, and the gradient's norm."""
    place = tmp_path_factory.mktemp("oneformer")
    (place / "data").symlink_to(root / "data")
    steps = []
    step = torch.optim.AdamW.step

    def record(self, *arguments, **options):
        found = step(self, *arguments, **options)  # computes the gradients first
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        factors = [group["lr"] / group["initial_lr"] for group in self.param_groups]
        steps.append((factors, float(torch.nn.utils.get_total_norm(gradients))))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", record)
        results = toy.run(place, CHANGES)
    return results, steps


def rows(results):
    with (results / "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_learning_rates_follow_the_schedule(whole):
    """Three steps of warm-up from 0.001, a tenth after the first epoch of four steps; the same factor for every group."""
    results, steps = whole
    warm_up = [0.001, 0.001 * 2 / 3 + 1 / 3, 0.001 / 3 + 2 / 3]
    for (factors, _), expected in zip(steps, [*warm_up, 1.0, 0.1, 0.1, 0.1, 0.1], strict=True):
        assert len(factors) == 4 and factors == pytest.approx([expected] * 4)
    assert [float(row["lr"]) for row in rows(results)] == pytest.approx([1e-3, 1e-4])


def test_gradients_are_clipped(whole):
    results, steps = whole
    assert all(norm <= 0.5 * 1.0001 for _, norm in steps)
    assert all(float(row["train_grad_norm"]) > 0.5 for row in rows(results)), "nothing had to be clipped"


def test_losses_and_all_three_tasks_are_recorded(whole):
    last = rows(whole[0])[-1]
    assert float(last["train_loss_contrastive"]) > 0
    assert {"val_PQ", "val_AP", "val_mIoU", "val_loss", "train_loss_class_0"} <= last.keys()
    assert "val_loss_contrastive" not in last


def test_the_temperature_moved(whole):
    scale = toy.weights(whole[0] / "model.pth")["text.logit_scale"]
    assert float(scale) != pytest.approx(-torch.tensor(0.07).log().item(), abs=1e-6)


def test_it_continues_as_it_would_have_gone_on(whole, work):
    toy.run(work, CHANGES | {"train.num_epochs": 1})
    toy.assert_same_results(whole[0], toy.run(work, CHANGES))


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two processors")
def test_texts_of_other_processes_are_negatives(work):
    """The contrastive loss of two processes with one image each, gradients included, is that of one process with both images."""
    calm = {
        **CHANGES,
        "model.backbone.drop_path_rate": 0.0,
        "model.pixel_decoder.dropout": 0.0,
        "model.decoder.dropout": 0.0,
        "model.class_decoder": {"layers": 1, "nheads": 2, "dim_feedforward": 32, "dropout": 0.0},
        "model.loss.deep_supervision": False,
        "train.num_epochs": 1,
        "train.optim.type": "SGD",
        "train.optim.warmup_iters": 0,
    }
    found = {}
    for name, changes in (("one", calm), ("two", calm | {"train.num_gpus": 2, "dataset.train.batch_size": 1})):
        process = toy.start(work, changes, name, module="tests.training.toy_mean")
        log = process.stderr.read()
        assert process.wait(60) == 0, log
        assert ("2 processes" in log) == (name == "two")
        found[name] = work / "results" / name
    losses = [float(rows(results)[0]["train_loss_contrastive"]) for results in found.values()]
    assert losses[0] > 0.1 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    one, two = (toy.weights(results / "model.pth") for results in found.values())
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
