"""Validation measures what evaluation will, in any number of processes, and chooses the weights by it."""

import csv
import json
import os

import pytest
import torch

from tessera.data.datamodule import eval_loader
from tessera.data.opened import OpenedData
from tessera.inference import load_predictor
from tessera.metrics.evaluate import evaluate
from tessera.models import build_model
from tessera.spec.lineage import DECIDING
from tessera.spec.schema import PostprocessSpec
from tessera.training.validation import Validation
from tests.training import toy

OPEN = {"object_mask_threshold": 0.0, "overlap_threshold": 0.0}
"""Lets segments of a network through that has hardly learned."""
LEARN = {
    "train.num_epochs": 6,
    "train.validation_interval": 3,
    "train.clip_grad_norm": 1.0,
    "train.optim.milestones": [5],
    "train.select": "best",
}


def rows(results):
    with (results / "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


def report(results):
    return json.loads((results / "train.json").read_text())


def scores(monkeypatch, values, metric="val_PQ"):
    """The next validations find these."""
    found = iter(values)
    monkeypatch.setattr(Validation, "__call__", lambda self, forward: {"val_loss": 1.0, metric: next(found)})


def test_the_best_weights_score_in_evaluation_what_validation_said(work):
    results = toy.run(work, LEARN | {"postprocess": OPEN})
    best = report(results)["best"]
    assert best["value"] > 0.1 and best["value"] == float(rows(results)[best["epoch"] - 1]["val_PQ"])
    assert report(results)["postprocess"] == PostprocessSpec(**OPEN).model_dump()
    predictor = load_predictor(results / "model.pth", device="cpu")
    spec = toy.make_spec(work, LEARN | {"postprocess": OPEN})
    data = OpenedData(spec, ("val",))
    found = evaluate(predictor, eval_loader(spec, data, "val"), data.catalog, "panoptic", progress=False)
    assert found.metrics["PQ"] == pytest.approx(best["value"], abs=1e-6)


def test_of_equal_validations_the_later_is_best(work, monkeypatch, capsys):
    scores(monkeypatch, [0.0, 0.25, 0.25, 0.1])
    results = toy.run(work, {"train.num_epochs": 4, "train.select": "best"})
    assert report(results)["best"] == {"metric": "val_PQ", "value": 0.25, "epoch": 3, "step": 12}
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("select", ["last", "best"])
def test_a_best_value_of_0_is_warned_of(work, monkeypatch, capsys, select):
    scores(monkeypatch, [0.0, 0.0])
    results = toy.run(work, {"train.select": select})
    assert report(results)["best"]["epoch"] == 2
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert "the best PQ of all validations is 0" in said
    assert "postprocess.object_mask_threshold=0.8 is too strict" in said


def test_where_nothing_could_be_measured_the_last_weights_are_said_to_be_the_last(work, monkeypatch, capsys):
    scores(monkeypatch, [0.5, 0.5], metric="val_AP")
    results = toy.run(work, {"train.select": "best"})
    assert report(results)["best"] is None and report(results)["weights"] == "last"
    assert "warning: no validation gave a PQ; model.pth has the last weights" in capsys.readouterr().err


def test_a_training_goes_on_with_the_thresholds_it_began_with(work, capsys):
    """With the last weights a threshold chooses nothing: it retrains nothing, and the rows of one file can be compared."""
    whole = toy.run(work, {"postprocess": OPEN}, "whole")
    toy.run(work, {"postprocess": OPEN, "train.num_epochs": 1})
    capsys.readouterr()
    results = toy.run(work, {"postprocess": {"object_mask_threshold": 0.9, "overlap_threshold": 0.0}})
    assert [start["step"] for start in report(results)["starts"]] == [0, 4]
    assert "began with (postprocess.object_mask_threshold: 0.0 -> 0.9)" in capsys.readouterr().err
    assert report(results)["postprocess"]["object_mask_threshold"] == 0.0
    assert rows(results) == rows(whole)


def test_another_way_to_choose_forgets_a_best_whose_weights_are_gone(work, monkeypatch, capsys):
    scores(monkeypatch, [0.75, 0.5])
    toy.run(work, {"train.num_epochs": 1})
    (folder,) = (work / "checkpoints/toy").iterdir()
    named = {"train.resume_training_checkpoint_path": str(folder / "model_epoch_001.pth"), "train.select": "best"}
    results = toy.run(work, named | {"postprocess": OPEN})
    assert report(results)["best"] == {"metric": "val_PQ", "value": 0.5, "epoch": 2, "step": 8}
    assert report(results)["postprocess"] == PostprocessSpec(**OPEN).model_dump()
    assert "postprocess: (absent) -> {'object_mask_threshold': 0.0" in capsys.readouterr().err


def test_every_threshold_is_known_to_decide_or_not():
    assert {key for keys in DECIDING.values() for key in keys} == PostprocessSpec.model_fields.keys()


def test_validations_between_epochs_print_their_line(work, capsys):
    changes = {"train.validation_interval": 2, "train.validation_interval_unit": "step", "train.num_epochs": 1}
    toy.run(work, changes)
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("step 2 of epoch 1: val loss ")]
    assert line.endswith("  PQ 0.0000")
    assert not any(line.startswith("step 4") for line in lines)  # the line of the epoch has it
    assert any(line.startswith("epoch 1/1") and "  PQ " in line for line in lines)


def test_the_validation_after_the_last_epoch_prints_its_line(work, capsys):
    toy.run(work, {"train.validation_interval": 3})
    assert "after the last epoch: val loss " in capsys.readouterr().err


def test_equal_shares_of_forwards_where_all_processes_take_part_in_each(tmp_path):
    """Three batches for two processes: the second one runs the network once more, which counts nowhere."""
    few = json.loads(json.dumps(toy.SPEC["dataset"]["generator"])) | {"val_images": 3}
    spec = toy.make_spec(tmp_path, {"dataset.generator": few, "dataset.val.batch_size": 1})
    data = OpenedData(spec, ("val",))
    model = build_model(spec.model, data.catalog)
    model.network.eval()
    calls = []

    def forward(batch):
        calls.append([meta.file_name for meta in batch.metas])
        return model.network(**model.network.inputs(batch))

    seen = {}
    for rank in (0, 1):
        validation = Validation(spec, data, model, OPEN, rank, 2, in_step=True)
        evaluator, losses = validation.share(forward)
        seen[rank] = len(evaluator.records)
        assert len(losses["loss"]) == seen[rank]
    assert seen == {0: 2, 1: 1}
    assert [len(calls[:2]), len(calls[2:])] == [2, 2]


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two processors")
@pytest.mark.parametrize("images", [1, 5])
def test_two_processes_measure_what_one_does(tmp_path, images):
    """Of one image the second process has nothing. The rate is so small that no weight changes."""
    few = json.loads(json.dumps(toy.SPEC["dataset"]["generator"])) | {"val_images": images}
    still = {
        "dataset.generator": few,
        "dataset.val.batch_size": 1,
        "postprocess": OPEN,
        "train.num_epochs": 1,
        "train.validation_interval": 2,
        "train.validation_interval_unit": "step",
        "train.optim.type": "SGD",
        "train.optim.lr": 1e-30,
    }
    start = toy.run(tmp_path, LEARN | {"dataset.generator": few, "postprocess": OPEN}, "start")
    still["train.pretrained_model_path"] = str(start / "model.pth")
    for name, more in (("one", {}), ("two", {"train.num_gpus": 2, "dataset.train.batch_size": 1})):
        process = toy.start(tmp_path, still | more, name)
        log = process.stderr.read()
        assert process.wait(60) == 0, log
    one, two = (tmp_path / "results" / name for name in ("one", "two"))
    equal, other = toy.weights(one / "model.pth"), toy.weights(two / "model.pth")
    assert all(torch.equal(equal[name], other[name]) for name in equal)
    found = [[{key: row[key] for key in row if key.startswith("val_")} for row in rows(path)] for path in (one, two)]
    assert found[0] == found[1]
    assert float(found[0][-1]["val_PQ"]) > 0 and float(found[0][-1]["val_mIoU"]) > 0
