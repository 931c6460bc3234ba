"""What Snakemake plans, with a command line that only writes files: which jobs, after which change, and never a stale one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.workflow.project import CONFIG, Project, make_project

CHAIN = {"demo": 1, "check": 1, "train": 1, "export": 1}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_project(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Everything that plain `snakemake` builds, and an fp16 evaluation; tests leave it as they found it."""
    made = make_project(tmp_path_factory.mktemp("built"))
    made.run("all", "results/mask2former_swin/onnx_eval.fp16.json")
    return made


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("onnx_eval.json", {**CHAIN, "parity_onnx": 1, "evaluate_onnx": 1}),
        ("trt_inference.fp16/index.json", {**CHAIN, "precision": 1, "engine": 1, "parity_trt": 1, "infer_trt": 1}),
    ],
)
def test_a_target_brings_its_whole_chain(project: Project, target: str, expected: dict[str, int]) -> None:
    assert project.plan(f"results/mask2former_swin/{target}") == expected


def test_a_finished_tree_has_nothing_to_do(built: Project) -> None:
    assert built.plan() == {}


def set_threshold(project: Project) -> None:
    project.configure("experiments/mask2former_swin-demo", {"postprocess": {"object_mask_threshold": 0.6}})


def set_learning_rate(project: Project) -> None:
    project.configure("experiments/mask2former_swin-demo-short", {"train": {"optim": {"lr": 3.0e-4}}})


def swap_two_losses(project: Project) -> None:
    """Snakemake alone compares params without their names and would not notice."""
    project.configure(
        "experiments/mask2former_swin-demo-short", {"model": {"loss": {"class_weight": 5.0, "mask_weight": 2.0}}}
    )


def set_metrics(project: Project) -> None:
    table = {**CONFIG["tables"]["demo"], "metrics": ["PQ"]}
    project.configure("config", {**CONFIG, "tables": {"demo": table}})


def set_decimals(project: Project) -> None:
    table = {**CONFIG["tables"]["demo"], "decimals": 3}
    project.configure("config", {**CONFIG, "tables": {"demo": table}})


def set_inert_key(project: Project) -> None:
    project.configure(
        "experiments/mask2former_swin-demo", {"dataset": {"train": {"num_workers": 7}}, "train": {"verbose": True}}
    )


def write_the_default(project: Project) -> None:
    project.configure("experiments/mask2former_swin-demo", {"postprocess": {"object_mask_threshold": 0.8}})


def add_an_experiment(project: Project) -> None:
    project.configure("config", {**CONFIG, "seeds": [0, 1]})


TABLES = {"metrics": 1, "compare": 1, "figures": 1, "all": 1}
SHORT = {"train": 1, "evaluate": 1, "export": 1, "parity_onnx": 1, "evaluate_onnx": 1, "infer": 1, **TABLES}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (set_threshold, {"evaluate": 1, "evaluate_onnx": 1, "infer": 1, **TABLES}),
        (set_learning_rate, SHORT),
        (swap_two_losses, SHORT),
        (set_metrics, {"compare": 1, "figures": 1, "all": 1}),
        (set_decimals, {"compare": 1, "all": 1}),
        (set_inert_key, {}),
        (write_the_default, {}),
        (add_an_experiment, {}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_change_reruns_what_depends_on_it(
    built: Project, change: Callable[[Project], None], expected: dict[str, int]
) -> None:
    before = built.configuration()
    try:
        change(built)
        assert built.plan() == expected
    finally:
        built.restore(before)


def test_a_failed_retraining_leaves_no_stale_score(project: Project) -> None:
    """After the failure Snakemake's own record of the training holds the new parameters; the evaluation must know by itself."""
    target = "results/mask2former_swin/eval.json"
    project.run(target)
    set_threshold(project)
    project.configure("experiments/mask2former_swin-demo", {"train": {"optim": {"lr": 3.0e-4}}})
    failed = project.snakemake(target, fail="train")
    assert failed.returncode != 0
    assert "train fails because the test says so" in failed.stdout + failed.stderr
    assert (project.root / target).exists()
    assert project.plan(target) == {"train": 1, "evaluate": 1}


def test_equal_data_under_another_root_reruns_nothing(project: Project) -> None:
    for root in ("one", "two"):
        folder = project.root / root / "streets"
        folder.mkdir(parents=True)
        for name in ("label_map", "train", "val", "test"):
            (folder / f"{name}.json").write_text(f'{{"file": "{name}"}}')
    target = "results/mask2former_swin-streets/eval.json"
    project.run(target, "--config", "data_root=one")
    assert project.plan(target, "--config", "data_root=two", "checkpoints=scratch") == {}
    (project.root / "two/streets/test.json").write_text("{}")
    assert project.plan(target, "--config", "data_root=two") == {"evaluate": 1}
    (project.root / "two/streets/train.json").write_text("{}")
    assert project.plan(target, "--config", "data_root=two") == {"check": 1, "train": 1, "evaluate": 1}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["results/mask2former_swim/eval.json"], ["no experiment 'mask2former_swim'", "did you mean mask2former_swin"]),
        (["results/tables/dem.md"], ["no table 'dem'", "did you mean demo"]),
        (
            ["results/mask2former_swin-streets/eval.json", "--config", "data_root=elsewhere"],
            ["dataset streets", "elsewhere/streets/train.json", "data_root=..."],
        ),
        (["--config", "dataroot=elsewhere"], ["--config dataroot=elsewhere", "did you mean data_root?"]),
    ],
    ids=["experiment", "table", "data", "config"],
)
def test_a_mistake_fails_while_planning(project: Project, arguments: list[str], words: list[str]) -> None:
    done = project.snakemake("--dry-run", *arguments)
    assert done.returncode != 0
    for word in words:
        assert word in done.stdout + done.stderr


def test_tensorrt_on_a_machine_without_is_announced_once(project: Project) -> None:
    """The announcement is the first thing said, before the jobs; the stub then builds the engine all the same."""
    done = project.snakemake("results/mask2former_swin/trt_eval.json")
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine may have a GPU and TensorRT")
    assert text.count("TensorRT stages are planned") == 1
    assert "onnx_eval.json" in text
    assert text.index("TensorRT stages are planned") < text.index("rule demo:")


def test_logs_and_data_root_reach_the_command_line(project: Project) -> None:
    """Generated data stay in the project: the data root may be read-only."""
    roots = ["--config", "data_root=my data", "checkpoints=some where"]
    for name in ("label_map", "train", "val", "test"):
        path = project.root / "my data/streets" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    project.run("results/mask2former_swin/model.pth", "results/mask2former_swin-streets/model.pth", *roots)
    calls = {" ".join(line.split()[:2]): line for line in project.calls()}
    assert "--data-root data " in calls["demo demo"]
    assert "--data-root data " in calls["train mask2former_swin"]
    assert "--data-root my data " in calls["train mask2former_swin-streets"]
    assert "--checkpoints some where " in calls["train mask2former_swin-streets"]
    assert "--log logs/train/mask2former_swin-streets.log" in calls["train mask2former_swin-streets"]


def test_lint_finds_nothing(project: Project) -> None:
    done = project.snakemake("--lint")
    assert done.returncode == 0, done.stdout + done.stderr


def test_another_way_of_testing_evaluates_again_and_trains_nothing(built: Project) -> None:
    before = built.configuration()
    target = "results/mask2former_swin/onnx_eval.fp16.strict.json"
    try:
        built.configure("testing/strict", {"postprocess": {"object_mask_threshold": 0.9}})
        assert built.plan(target, "results/mask2former_swin/eval.strict.json") == {"evaluate": 1, "evaluate_onnx": 1}
        built.run(target)
        assert "--testing strict" in built.calls()[-1]
        assert built.plan(target) == built.plan() == {}
        built.configure("testing/strict", {"postprocess": {"object_mask_threshold": 0.7}})
        assert built.plan(target) == {"evaluate_onnx": 1}
        assert built.plan() == {}
    finally:
        built.restore(before)
