"""Commands by hand with an override or another model: never in place of what the workflow declared, and with the command that works."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tessera.files import read_json
from tessera.inference import load_predictor
from tests.malformed.conftest import call
from tests.malformed.project import EVALUATION, EXPERIMENT, FOLDER, GRAPH, GRID, MODEL, content, recipe

CALLS = {
    "train": f"train {EXPERIMENT} train.num_epochs=0 train.pretrained_model_path={MODEL}",
    "export": f"export {EXPERIMENT} export.opset_version=20",
    "precision": f"precision {EXPERIMENT} precision.fp16_keep=[Softmax]",
    "parity": f"parity {EXPERIMENT} parity.images=1",
    "evaluate": f"evaluate {EXPERIMENT} evaluate.split=val",
    "evaluate on onnx": f"evaluate {EXPERIMENT} evaluate.split=val --runtime onnx",
    "infer": f"infer {EXPERIMENT} inference.opacity=0.1",
    "checkpoint": f"evaluate {EXPERIMENT} --checkpoint {MODEL}",
}


def advised(message: str) -> list[str]:
    (command,) = re.findall(r"`tessera (.*)`", message)
    return shlex.split(command)


@pytest.mark.parametrize("what", CALLS)
def test_an_override_needs_a_place_of_its_own(what: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused with the command that works, which leaves results/ as it was and says where it wrote."""
    before = content(project)
    words = CALLS[what].split()
    refused = call(words, project, capsys)
    assert refused.code == 1 and "is the workflow's, which makes it without that; write elsewhere: `" in refused.err
    assert content(project) == before
    done = call(advised(refused.err), project, capsys)
    assert done.code == 0, done.err
    after = content(project)
    made = {name for name in after.keys() - before.keys() if after[name] != "folder"}
    assert made and all(name.startswith(f"out/{EXPERIMENT}/") for name in made)
    assert {name: after[name] for name in before} == before
    assert f"out/{EXPERIMENT}" in done.out + done.err and "wrote" in done.out + done.err


def test_an_engine_with_an_override_needs_a_place_of_its_own(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = call(["engine", EXPERIMENT, "engine.workspace_size=2048"], project, capsys)
    assert refused.code == 1
    assert advised(refused.err)[-2:] == ["--out", f"out/{EXPERIMENT}/model.engine"]


@pytest.mark.parametrize(
    "command",
    [
        f"evaluate {EXPERIMENT} dataset.test.num_workers=0 train.gpu_ids=[1]",
        f"evaluate {EXPERIMENT} evaluate.split=val evaluate.split=test",
        f"train {EXPERIMENT} train.gpu_ids=[1] train.verbose=true dataset.train.num_workers=0",
    ],
)
def test_an_override_that_changes_no_result_needs_none(
    command: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, name, *_ = command.split()
    assert call([stage, name], project, capsys).code == 0
    before = content(project)
    done = call(command.split(), project, capsys)
    assert done.code == 0 and f"wrote {FOLDER}/" in done.out + done.err
    assert content(project).keys() == before.keys()


@pytest.mark.parametrize(
    "out", [EVALUATION, f"{FOLDER}/mine.json", "results/tables/demo.json", f"sub/../{EVALUATION}", "link.json"]
)
def test_no_place_below_results_is_accepted(out: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "sub").mkdir()
    (project / "link.json").symlink_to(EVALUATION)
    before = content(project)
    refused = call(["evaluate", EXPERIMENT, "evaluate.split=val", "--out", out], project, capsys)
    assert refused.code == 1 and f"--out {out}: what lies below results is the workflow's alone" in refused.err
    assert content(project) == before


def test_the_place_of_the_workflow_may_be_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_json(project / EVALUATION)["metrics"]
    (project / EVALUATION).unlink()
    assert call(["evaluate", EXPERIMENT, "--out", EVALUATION], project, capsys).code == 0
    assert read_json(project / EVALUATION)["metrics"] == before
    assert call(["compare", "demo"], project, capsys).code == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "evaluate {} evaluate.split=val --out eval.txt",
            "--out eval.txt: expected the name of a file that ends in .json",
        ),
        ("export {} --out model.pth", "--out model.pth: expected the name of a file that ends in .onnx"),
        ("infer {} --out config/config.yaml", "--out config/config.yaml: is a file, expected a folder or nothing"),
        ("evaluate {} --checkpoint model.onnx --out e.json", "--checkpoint model.onnx: no such file"),
        (
            f"evaluate {{}} --checkpoint {GRAPH} --out e.json",
            f"--checkpoint {GRAPH}: expected a name that ends in .pth",
        ),
        (
            "evaluate {} train.num_epochs=7 --out e.json",
            "`tessera train mask2former_swin train.num_epochs=7 --out out/mask2former_swin`, then `tessera evaluate",
        ),
        (
            f"evaluate {{}} model.decoder.num_object_queries=9 --checkpoint {MODEL} --out e.json",
            "holds another network than the experiment's",
        ),
    ],
)
def test_what_cannot_be_written_or_read_is_refused_first(
    command: str, message: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(project)
    refused = call(command.format(EXPERIMENT).split(), project, capsys)
    assert refused.code == 1 and message in refused.err
    assert content(project) == before


@pytest.mark.parametrize(
    ("command", "verbs"),
    [
        ("evaluate {} train.num_epochs=1 --out e.json", ["train", "evaluate"]),
        ("evaluate {} export.opset_version=20 --runtime onnx --out e.json", ["export", "evaluate"]),
        ("infer {} train.num_epochs=1 --runtime onnx --out found", ["train", "export", "infer"]),
    ],
)
def test_another_model_is_made_by_the_commands_that_are_advised(
    command: str, verbs: list[str], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = call(command.format(EXPERIMENT).split(), project, capsys)
    assert refused.code == 1 and "was made from another spec than these overrides give" in refused.err
    steps = [shlex.split(step) for step in re.findall(r"`tessera ([^`]*)`", refused.err)]
    assert [verb for verb, *_ in steps] == verbs
    for step in steps:
        done = call(step, project, capsys)
        assert done.code == 0, done.err


@pytest.mark.parametrize(
    "command", ["parity {} export.opset_version=20 --out p.json", "precision {} export.opset_version=20 --out m.onnx"]
)
def test_what_takes_no_other_model_needs_a_variant(
    command: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = call(command.format(EXPERIMENT).split(), project, capsys)
    assert refused.code == 1 and "add VARIANT to `variants`" in refused.err and "tessera train" not in refused.err


def test_a_model_of_an_older_spec_is_made_again_whatever_the_overrides(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe({"train": {"num_epochs": 3}})(project)
    refused = call(["evaluate", EXPERIMENT, "evaluate.split=val", "--out", "e.json"], project, capsys)
    assert refused.code == 1 and f"make it again with `snakemake --cores 2 --force {MODEL}`" in refused.err


def test_a_check_of_other_data_needs_a_place_of_its_own(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(project / "data", project / "elsewhere")
    assert call(["check", "objects"], project, capsys).code == 0
    before = content(project)
    refused = call(["check", "objects", "--data-root", "elsewhere"], project, capsys)
    assert refused.code == 1 and "data/checks/objects.json is the workflow's" in refused.err
    for out, folder in ((EVALUATION, "results"), ("data/checks/demo.json", "data/checks")):
        inside = call(["check", "objects", "--out", out], project, capsys)
        assert inside.code == 1 and f"--out {out}: what lies below {folder} is the workflow's alone" in inside.err
    assert content(project) == before
    assert call(advised(refused.err), project, capsys).code == 0
    assert content(project).keys() - before.keys() == {"out", "out/objects.json"}


def test_other_data_do_not_replace_an_evaluation(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--data-root is an input, too; the same data elsewhere are the same input."""
    shutil.copytree(project / "data", project / "elsewhere")
    words = ["evaluate", f"{EXPERIMENT}-objects", "--data-root", "elsewhere"]
    record = project / f"results/{EXPERIMENT}-objects/eval.json"
    record.parent.mkdir()
    record.write_text('{"lineage": {}}')
    refused = call(words, project, capsys)
    assert refused.code == 1 and "made from other data or keys" in refused.err
    assert advised(refused.err)[-4:] == ["--data-root", "elsewhere", "--out", f"out/{EXPERIMENT}-objects/eval.json"]
    assert record.read_text() == '{"lineage": {}}'


def test_generated_data_are_used_where_the_workflow_makes_them(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Although the data root is elsewhere."""
    config = project / "config/config.yaml"
    config.write_text(yaml.safe_dump(GRID | {"data_root": "/elsewhere"}))
    (project / "data/demo/manifest.json").unlink()
    missing = call(["evaluate", EXPERIMENT], project, capsys)
    assert missing.code == 1 and "snakemake --cores 2 data/demo/manifest.json" in missing.err
    shutil.rmtree(project / "data/demo")
    made = call(["demo"], project, capsys)
    assert made.code == 0 and "wrote data/demo" in made.out
    assert call(["check", "demo"], project, capsys).code == 0
    done = call(["evaluate", EXPERIMENT], project, capsys)
    assert done.code == 0, done.err


def test_any_checkpoint_can_be_evaluated_exported_and_opened(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = call(["train", EXPERIMENT, "--out", "trained"], project, capsys)
    assert trained.code == 0, trained.err
    assert "`tensorboard --logdir checkpoints/mask2former_swin/" in trained.err
    (first,) = project.glob("checkpoints/*/*/model_epoch_001.pth")
    name = first.relative_to(project).as_posix()
    predictor = load_predictor(first)
    assert predictor.header.lineage["checkpoint"] == {"step": 1, "epoch": 1}
    weights = torch.load(first, weights_only=True)["network"]
    assert all(torch.equal(value, weights[key]) for key, value in predictor.network.state_dict().items())

    done = call(["evaluate", EXPERIMENT, "--checkpoint", name, "--out", "first.json"], project, capsys)
    assert done.code == 0, done.err
    assert f"weights of {name}, step 1 (epoch 1)" in done.out
    document = read_json(project / "first.json")
    origin = document["lineage"]["checkpoint"]
    assert (origin["file"], origin["step"], origin["epoch"]) == (name, 1, 1)
    assert document["inputs"] == {name: origin["sha256"]}

    assert call(["export", EXPERIMENT, "--checkpoint", name, "--out", "first.onnx"], project, capsys).code == 0
    on_onnx = ["evaluate", EXPERIMENT, "--runtime", "onnx", "--checkpoint", "first.onnx", "--out", "first_onnx.json"]
    done = call(on_onnx, project, capsys)
    assert done.code == 0 and "weights of first.onnx, step 1 (epoch 1)" in done.out

    # None of it passes for the experiment's own.
    shutil.copy(project / "first.json", project / EVALUATION)
    assert "was made from another spec" in call(["compare", "demo"], project, capsys).err
    shutil.copy(project / "first.onnx", project / GRAPH)
    assert "was made from another spec" in call(["evaluate", EXPERIMENT, "--runtime", "onnx"], project, capsys).err
    shutil.copy(first, project / MODEL)
    refused = call(["evaluate", EXPERIMENT], project, capsys)
    assert "checkpoint: {'step': 1, 'epoch': 1} -> (absent)" in refused.err


def test_another_way_of_testing_is_an_evaluation_of_the_same_model(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    way = project / "config/testing/strict.yaml"
    way.parent.mkdir()
    way.write_text("postprocess: {object_mask_threshold: 1.0}\nevaluate: {split: val}\n")
    before = content(project)
    done = call(["evaluate", EXPERIMENT, "--testing", "strict"], project, capsys)
    assert done.code == 0 and f"wrote {FOLDER}/eval.strict.json" in done.out
    document = read_json(project / FOLDER / "eval.strict.json")
    assert document["testing"] == "strict" and document["split"] == "val"
    assert document["lineage"]["postprocess"]["object_mask_threshold"] == 1.0
    names = {f"{FOLDER}/eval.strict{end}" for end in (".json", ".predictions.json.gz", ".statistics.json.gz")}
    assert content(project).keys() - before.keys() == names and before.items() <= content(project).items()
    done = call(["infer", EXPERIMENT, "--testing", "strict"], project, capsys)
    assert done.code == 0 and f"wrote {FOLDER}/inference.strict: index.json" in done.out
    index = read_json(project / FOLDER / "inference.strict/index.json")
    assert index["testing"] == "strict" and "the val split" in index["source"]
    assert before.items() <= content(project).items()
    assert call(["verify", FOLDER], project, capsys).code == 0
