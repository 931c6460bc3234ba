"""What a training writes, and how it ends when something is wrong."""

import csv
import json

import pytest
import torch

from tessera.files import UserError, digest_file
from tessera.models.artifact import load_model
from tessera.models.common.mask_criterion import MaskCriterion
from tessera.spec.lineage import lineage
from tessera.training import train as stage
from tessera.training.hardware import choose
from tests.training import toy


def rows(results):
    with (results / "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_outputs(root):
    results = root / "results/whole"
    assert sorted(path.name for path in results.iterdir()) == ["metrics.csv", "model.pth", "train.json"]
    spec = toy.make_spec(root)
    header = load_model(results / "model.pth")[1]
    header.require(results / "model.pth", "train", lineage(spec, "train"), spec.data_root)
    assert header.spec == spec and header.experiment == "whole" and len(header.catalog) == 7
    assert [(row["epoch"], row["step"]) for row in rows(results)] == [("1", "4"), ("2", "8")]
    assert {"lr", "train_loss", "train_loss_class_0", "val_loss", "val_PQ", "val_AP", "val_mIoU"} <= rows(results)[
        0
    ].keys()
    report = json.loads((results / "train.json").read_text())
    assert report["steps"] == 8 and report["starts"] == [{"step": 0, "epoch": 0}]
    assert report["lineage"] == header.lineage and report["facts"] == header.facts
    assert report["parameters"]["total"] == sum(
        value.numel() for value in load_model(results / "model.pth")[0].network.parameters()
    )
    (folder,) = (root / "checkpoints/whole").iterdir()
    assert [path.name for path in sorted(folder.glob("*.pth"))] == [
        "mask2former_best.pth",
        "mask2former_latest.pth",
        "model_epoch_001.pth",
        "model_epoch_002.pth",
    ]
    assert list(folder.glob("tensorboard/events*"))


def test_the_weights_learn(root, work):
    spec = {
        "train.num_epochs": 8,
        "train.validation_interval": 8,
        "train.clip_grad_norm": 1.0,
        "train.optim.milestones": [7],
    }
    found = [float(row["train_loss"]) for row in rows(toy.run(work, spec))]
    assert found[-1] < 0.85 * found[0]


@pytest.mark.parametrize(
    "changes", [{"train.validation_interval": 3}, {"dataset.val.batch_size": 1}, {"dataset.train.num_workers": 2}]
)
def test_validation_and_loading_do_not_disturb_the_weights(root, work, changes):
    found, whole = toy.weights(toy.run(work, changes) / "model.pth"), toy.weights(root / "results/whole/model.pth")
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_the_spec_alone_says_how_many_threads_train(root, work):
    """`--cores 1` and `--cores 2` reach a training as OMP_NUM_THREADS; images of this size are shared out among threads."""
    large = {
        "train.num_epochs": 1,
        "dataset.augmentation.train_min_size": [160],
        "dataset.augmentation.train_crop_size": [160, 160],
        "dataset.augmentation.test_min_size": 160,
        "dataset.augmentation.test_max_size": 160,
    }
    for name, cores, threads in (("one", 1, 2), ("two", 2, 2), ("other", 2, 1)):
        process = toy.start(work, large | {"train.threads": threads}, name, threads=cores)
        log = process.stderr.read()
        assert process.wait(60) == 0 and f"CPU, {threads} thread(s)" in log, log
    one, two, other = (work / "results" / name for name in ("one", "two", "other"))
    toy.assert_same_results(one, two)
    with pytest.raises(AssertionError, match="tensors differ"):
        toy.assert_same_results(one, other)


def test_another_gpu_is_the_same_training(root, work, monkeypatch):
    results = toy.run(work)
    before = (results / "train.json").read_text()
    monkeypatch.setattr("tessera.training.train.fit", None)  # not one more step
    results = toy.run(work, {"train.gpu_ids": [1]})
    assert json.loads((results / "train.json").read_text())["lineage"] == json.loads(before)["lineage"]
    assert len(list((work / "checkpoints/toy").iterdir())) == 1
    toy.assert_same_results(root / "results/whole", results)


def test_activation_checkpoint_gives_the_same_numbers(root, work):
    toy.assert_same_results(root / "results/whole", toy.run(work, {"train.activation_checkpoint": True}))


def test_fine_tuning_and_freezing(root, work, capsys):
    source = root / "results/whole/model.pth"
    results = toy.run(
        work, {"train.pretrained_model_path": str(source), "train.freeze": ["backbone"], "train.num_epochs": 1}
    )
    before, after = toy.weights(source), toy.weights(results / "model.pth")
    same = {name for name in before if torch.equal(before[name], after[name])}
    frozen = {name for name in before if name.startswith("backbone.")}
    assert frozen <= same and len(same) < len(before)
    report = json.loads((results / "train.json").read_text())
    start = report["initial_weights"]
    assert start["backbone"] is None and start["network"]["sha256"] == digest_file(source)
    assert start["network"]["loaded"] == len(before) and not start["network"]["missing"]
    assert report["parameters"]["trained"] < report["parameters"]["total"]
    assert capsys.readouterr().err.startswith(f"weights from model.pth (sha256 {digest_file(source)[:12]})\n")


def test_the_first_line_says_that_nothing_is_pretrained(root, work, capsys):
    results = toy.run(work, {"train.num_epochs": 1})
    first = "weights from random numbers; no pretrained ones are named"
    assert capsys.readouterr().err.splitlines()[0] == first
    toy.run(work)
    assert first in capsys.readouterr().err.splitlines()  # of the training, where it continues
    assert json.loads((results / "train.json").read_text())["initial_weights"] == {"backbone": None, "network": None}


def test_weights_of_the_backbone_are_told_from_those_of_the_network(root, work, capsys):
    """The head is of another class count: it starts from what the backbone's file does not have, random numbers."""
    whole = toy.weights(root / "results/whole/model.pth")
    prefix = "backbone."
    backbone = work / "swin.pth"
    torch.save({name.removeprefix(prefix): whole[name] for name in whole if name.startswith(prefix)}, backbone)
    section = toy.SPEC["model"]["backbone"] | {"pretrained": str(backbone)}
    results = toy.run(work, {"model.backbone": section, "train.num_epochs": 1}, "one")
    named = f"swin.pth (sha256 {digest_file(backbone)[:12]})"
    first = f"weights of the backbone from {named}, all others from random numbers"
    assert capsys.readouterr().err.splitlines()[0] == first
    assert json.loads((results / "train.json").read_text())["initial_weights"] == {
        "backbone": {"source": "file", "name": "swin.pth", "sha256": digest_file(backbone)},
        "network": None,
    }
    head = work / "head.pth"
    torch.save({name: whole[name] for name in whole if not name.startswith(prefix)}, head)
    toy.run(
        work,
        {"model.backbone": section, "train.num_epochs": 1, "train.pretrained_model_path": str(head)},
        "two",
    )
    left = sum(name.startswith(prefix) for name in whole)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        f"weights from head.pth (sha256 {digest_file(head)[:12]}) but for {left} of {len(whole)} tensors: of the backbone from {named}, "
        "all others from random numbers"
    )
    assert lines[1].startswith(f"  {left} not in the file, start afresh: backbone.")


def test_bf16_trains(work):
    assert len(rows(toy.run(work, {"train.precision": "bf16", "train.num_epochs": 1}))) == 1


def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(root, work, monkeypatch):
    calls = 0
    original = MaskCriterion.forward

    def poisoned(self, outputs, targets):
        nonlocal calls
        losses = original(self, outputs, targets)
        calls += "aux" in outputs
        return losses | {"loss_mask": losses["loss_mask"] * float("nan")} if calls == 7 else losses

    monkeypatch.setattr(MaskCriterion, "forward", poisoned)
    with pytest.raises(
        UserError,
        match=r"not finite at epoch 2, batch 3 of 4 \(step 7\), images train_\d+\.png, train_\d+\.png: .*loss_mask nan",
    ):
        toy.run(work)
    assert not (work / "results").exists()
    (folder,) = (work / "checkpoints/toy").iterdir()
    assert sorted(path.name for path in folder.glob("*.pth")) == [
        "mask2former_best.pth",
        "mask2former_latest.pth",
        "model_epoch_001.pth",
    ]
    monkeypatch.undo()
    toy.assert_same_results(root / "results/whole", toy.run(work))


def test_outputs_that_are_not_finite_stop_with_the_images_named(work, monkeypatch):
    original = MaskCriterion.forward

    def poisoned(self, outputs, targets):
        return original(self, outputs | {"pred_logits": outputs["pred_logits"] * float("nan")}, targets)

    monkeypatch.setattr(MaskCriterion, "forward", poisoned)
    with pytest.raises(
        UserError, match=r"not finite.*at epoch 1, batch 1 of 4 \(step 1\), images train_\d+\.png, train_"
    ):
        toy.run(work)
    assert not (work / "results").exists()


def test_gradient_that_is_not_finite_stops(work, monkeypatch):
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    original = MaskCriterion.forward
    monkeypatch.setattr(
        MaskCriterion,
        "forward",
        lambda self, outputs, targets: {
            name: Poison.apply(value) for name, value in original(self, outputs, targets).items()
        },
    )
    with pytest.raises(UserError, match=r"gradient is not finite at epoch 1, batch 1 of 4"):
        toy.run(work)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_gives_advice(work, monkeypatch, error):
    def fail(self, outputs, targets):
        raise error

    monkeypatch.setattr(MaskCriterion, "forward", fail)
    with pytest.raises(UserError) as caught:
        toy.run(work)
    for advice in (
        "train.activation_checkpoint=true",
        "dataset.train.batch_size=1 (now 2)",
        "train_crop_size (now [64, 64])",
    ):
        assert advice in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.freeze": ["backbon"]}, "no module 'backbon'; closest: backbone"),
        ({"train.pretrained_model_path": "nowhere.pth"}, "nowhere.pth: no such file"),
        ({"train.resume_training_checkpoint_path": "nowhere.pth"}, "nowhere.pth: no such file"),
        ({"dataset.train.batch_size": 100}, "fewer than one step takes"),
        ({"train.num_nodes": 2}, "torchrun --nnodes=2"),
        ({"dataset.val.annotations": None, "train.select": "best"}, "train.select: best needs validation"),
    ],
)
def test_mistakes_are_told_before_any_output(work, changes, message):
    with pytest.raises(UserError) as caught:
        toy.run(work, changes)
    assert message in str(caught.value)
    assert not (work / "results").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU cannot do")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"num_gpus": 4096}, "ask for 4096 processes"),
        ({"gpu_ids": [0, 1], "distributed_strategy": "fsdp"}, "fsdp needs GPUs"),
    ],
)
def test_hardware_that_is_not_there(root, changes, message):
    with pytest.raises(UserError, match=message):
        choose(toy.make_spec(root, {f"train.{key}": value for key, value in changes.items()}).train)


def test_frozen_batch_norms_need_weights(work):
    backbone = {"name": "resnet18", "norm": "frozen", "drop_path_rate": 0.0}
    with pytest.raises(
        UserError, match=r"model\.backbone\.norm is frozen, but nothing gives the batch norms of resnet18"
    ):
        toy.run(work, {"model.backbone": backbone})
    assert not (work / "checkpoints").exists()
    with pytest.raises(UserError, match=r"absent\.pth"):  # the next thing that is looked at
        toy.run(work, {"model.backbone": backbone | {"pretrained": "absent.pth"}})


def test_gpus_that_are_not_there(root, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def ids(**changes):
        return choose(toy.make_spec(root, {f"train.{key}": value for key, value in changes.items()}).train).gpus

    assert ids() == (0,)
    assert ids(gpu_ids=[1]) == (1,)
    assert ids(num_gpus=2, gpu_ids=[1]) == (1, 0)
    assert ids(num_gpus=1, gpu_ids=[0, 1]) == (0, 1)
    with pytest.raises(UserError, match=r"there are 2 \(0\.\.1\); set train\.num_gpus=2"):
        ids(num_gpus=3)
    with pytest.raises(UserError, match=r"ask for GPUs \[5\]"):
        ids(gpu_ids=[5])


def test_no_val_split(work, capsys):
    results = toy.run(work, {"dataset.val.annotations": None, "train.num_epochs": 1})
    assert "without validation" in capsys.readouterr().err
    assert not any(name.startswith("val_") for name in rows(results)[0])


def test_best_weights_are_kept(root, work, monkeypatch):
    """Validations score 0.5, then 0.4: the first epoch's weights become the model."""
    scores = iter([0.5, 0.4])
    monkeypatch.setattr(
        "tessera.training.validation.Validation.__call__",
        lambda self, forward: {"val_loss": 1.0, "val_PQ": next(scores)},
    )
    results = toy.run(work, {"train.select": "best"})
    report = json.loads((results / "train.json").read_text())
    assert report["best"] == {"metric": "val_PQ", "value": 0.5, "epoch": 1, "step": 4}
    (folder,) = (root / "checkpoints/whole").iterdir()
    first = torch.load(folder / "model_epoch_001.pth", weights_only=True)["network"]
    found = toy.weights(results / "model.pth")
    assert all(torch.equal(first[name], found[name]) for name in first)


def test_lock_is_held_while_training(work, monkeypatch):
    seen = []
    original = stage.fit
    monkeypatch.setattr(
        stage,
        "fit",
        lambda *arguments: seen.append(next((work / "checkpoints/toy").iterdir()) / "lock") or original(*arguments),
    )
    toy.run(work, {"train.num_epochs": 1})
    assert "pid " in seen[0].read_text()
