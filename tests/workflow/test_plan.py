"""What Snakemake plans, with a command line that only writes files: which jobs, after which change, and never a stale one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.workflow.project import CONFIG, PARTS, ROOT, Project, make_project

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
        (set_threshold, {"evaluate": 1, "parity_onnx": 1, "evaluate_onnx": 1, "infer": 1, **TABLES}),
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
        (
            ["results/mask2former_swin-streets/eval.json"],
            ["not found under the data root data", "`--config data_root=...`"],
        ),
        (["--config", "dataroot=elsewhere"], ["--config dataroot=elsewhere", "did you mean data_root?"]),
    ],
    ids=["experiment", "table", "data", "data root", "config"],
)
def test_a_mistake_fails_while_planning_with_its_message_last(
    project: Project, arguments: list[str], words: list[str]
) -> None:
    done = project.snakemake("--dry-run", *arguments)
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), done.stdout
    assert "Traceback" not in done.stdout


def test_a_mistake_in_the_configuration_has_no_traceback(project: Project) -> None:
    project.configure("config", {**CONFIG, "models": ["mask2fromer"]})
    said = project.snakemake("--dry-run").stdout.splitlines()
    assert "no file config/models/mask2fromer.yaml; did you mean mask2former?" in said[-1]
    project.configure("config", CONFIG)
    project.configure("variants/short", {"train": {"num_epochs": "x"}})
    said = project.snakemake("--dry-run").stdout.splitlines()
    assert said[-1].startswith(
        "error: mask2former_swin-short: config/variants/short.yaml, line 2: train.num_epochs: expected a whole number"
    )


def test_what_is_lost_is_told_before_anything_runs_and_leaves_no_lock(project: Project) -> None:
    project.run("results/mask2former_swin/model.pth")
    (project.root / "data/demo/manifest.json").unlink()
    done = project.snakemake("results/mask2former_swin/eval.json")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith(
        "error: data/demo/manifest.json: no such file, so these data are gone"
    )
    project.run("data/demo/manifest.json", "results/mask2former_swin/eval.json")


LATE = {
    "no test split": (
        {"datasets/streets": {"dataset": {**PARTS["datasets/streets"]["dataset"], "test": {}}}},
        "results/mask2former_swin-streets/eval.json",
        ["evaluate.split: the dataset 'streets' has no test split; set evaluate.split=val"],
    ),
    "a test split of pictures alone": (
        {
            "datasets/streets": {
                "dataset": {**PARTS["datasets/streets"]["dataset"], "test": {"images": "streets/photos"}}
            }
        },
        "results/mask2former_swin-streets/inference/index.json",
        ["evaluate.split: the dataset 'streets' has no test split; set evaluate.split=val"],
    ),
    "pictures that are not there": (
        {"variants/short": {"inference": {"images": "streets/photos"}}},
        "results/mask2former_swin-streets-short/inference/index.json",
        [
            "config/variants/short.yaml, line 2: inference.images: data/streets/photos: no such file or folder; expected images below the "
            "data root data"
        ],
    ),
    "a test server's split": (
        {"data/streets/test.json": '{"images": [{"id": 1}], "categories": []}'},
        "results/mask2former_swin-streets/eval.json",
        ["evaluate.split: is test, and data/streets/test.json has no list `annotations`", "not evaluated"],
    ),
    "a test split without an annotation": (
        {"data/streets/test.json": '{"images": [{"id": 1}], "annotations": [ ]}'},
        "results/mask2former_swin-streets/onnx_eval.json",
        ["evaluate.split: is test, and data/streets/test.json has an empty list `annotations`"],
    ),
    "a class of no label map": (
        {
            "data/streets/label_map.json": '[{"id": 1, "name": "road"}, {"id": 2, "name": "car"}]',
            "variants/short": {"evaluate": {"classes": ["car", "raod"]}},
        },
        "results/mask2former_swin-streets-short/eval.json",
        ["short.yaml, line 2: evaluate.classes: the model has no class 'raod'; did you mean 'road'?"],
    ),
    "a colour of no category": (
        {
            "data/streets/train.json": '{"images": [], "categories": [{"id": 1, "name": "road"}]}',
            "datasets/streets": {"dataset": {**PARTS["datasets/streets"]["dataset"], "label_map": None}},
            "variants/short": {"inference": {"color_map": {"sky": [1, 2, 3]}}},
        },
        "results/mask2former_swin-streets-short/model.pth",
        ["short.yaml, line 3: inference.color_map: the model has no class 'sky'; its classes are road"],
    ),
    "best without validation": (
        {
            "datasets/streets": {"dataset": {**PARTS["datasets/streets"]["dataset"], "val": {}}},
            "variants/short": {"train": {"select": "best"}},
        },
        "results/mask2former_swin-streets-short/model.pth",
        [
            "config/variants/short.yaml, line 2: train.select: best needs validation",
            "'streets' has no dataset.val.annotations",
        ],
    ),
    "a graph that is too large": (
        {"backbones/swin": {"model": {"backbone": {"name": "swin_huge"}}}},
        "results/mask2former_swin/onnx_eval.json",
        ["model.backbone.name: swin_huge has 2.4 GiB of weights", "ask for eval.json"],
    ),
    "an engine of free size": (
        {"variants/short": {"export": {"dynamic_size": True}}},
        "results/mask2former_swin-short/trt_eval.json",
        ["config/variants/short.yaml, line 2: export.dynamic_size: leaves height and width free"],
    ),
    "an engine of another batch": (
        {"variants/short": {"export": {"batch_size": 4}}},
        "results/mask2former_swin-short/model.engine",
        ["export.batch_size: fixes the batch to 4, but engine.min/opt/max_batch_size are (1, 1, 1)"],
    ),
    "windows of another size than the graph": (
        {
            "variants/short": {
                "model": {"mode": "semantic"},
                "testing": {"mode": "slide"},
                "export": {"input_height": 640, "input_width": 640},
            }
        },
        "results/mask2former_swin-short/onnx_eval.json",
        ["testing.crop_size: is [512, 512], but the graph takes [640, 640]"],
    ),
    "scales of a graph of one size": (
        {"variants/short": {"model": {"mode": "semantic"}, "testing": {"scales": [0.5, 1.0]}}},
        "results/mask2former_swin-short/onnx_eval.json",
        ["testing.scales: is [0.5, 1.0], but the graph has one size"],
    ),
    "a metric of another mode": (
        {
            "config": {
                **CONFIG,
                "tables": {"t": {"experiments": ["mask2former_swin"], "metrics": ["PQ", "mAP", "box_AP75"]}},
            }
        },
        "results/tables/t.md",
        ["config/config.yaml, tables.t.metrics: no evaluation has mAP; the experiments' mode is panoptic"],
    ),
    "seeds of two recipes": (
        {
            "config": {
                **CONFIG,
                "seeds": [0, 1],
                "tables": {"t": {"experiments": ["mask2former_swin", "mask2former_swin-seed1"]}},
            },
            "experiments/mask2former_swin-demo-seed1": {"train": {"num_epochs": 7}},
        },
        "results/tables/t.md",
        ["mask2former_swin and mask2former_swin-seed1 are one row of the table", "train.num_epochs: 50 -> 7"],
    ),
}


@pytest.mark.parametrize(("files", "target", "words"), LATE.values(), ids=LATE.keys())
def test_what_a_later_stage_would_refuse_is_told_before_any_runs(
    project: Project, files: dict[str, Any], target: str, words: list[str]
) -> None:
    for name in ("label_map", "train", "val", "test"):
        path = project.root / "data/streets" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    for part, content in files.items():
        if isinstance(content, str):
            (project.root / part).write_text(content)
        else:
            project.configure(part, content)
    done = project.snakemake(target)
    assert done.returncode == 1
    said = done.stdout[done.stdout.rindex("error: ") :]
    assert all(word in said for word in words), done.stdout
    assert project.calls() == []


def test_a_stage_that_nobody_asks_for_refuses_nothing(project: Project) -> None:
    """Training, evaluation and inference of a model whose graph could not be."""
    project.configure("backbones/swin", {"model": {"backbone": {"name": "swin_huge"}}})
    project.configure("variants/short", {"export": {"dynamic_size": True}})
    assert "train" in project.plan(
        "results/mask2former_swin/eval.json", "results/mask2former_swin/inference/index.json"
    )


def test_pictures_and_classes_of_data_that_a_rule_makes_are_not_missed(project: Project) -> None:
    """A training tells the classes as soon as the data are there."""
    project.configure(
        "variants/short", {"inference": {"images": "demo/images/test"}, "evaluate": {"classes": ["nothing"]}}
    )
    assert "infer" in project.plan("results/mask2former_swin-short/inference/index.json")


def test_all_stands_for_what_has_data_and_says_what_it_leaves_out(project: Project) -> None:
    project.configure("models/detr", {"model": {"name": "deformable_detr"}})
    project.configure(
        "datasets/pairs", {"dataset": {"type": "mask_pairs", "generator": {}, "test": {"annotations": "t.jsonl"}}}
    )
    config = {
        **CONFIG,
        "models": ["mask2former", "detr"],
        "datasets": ["demo", "streets", "pairs"],
        "experiments": "all",
    }
    project.configure("config", {**config, "tables": {"all": {}}})
    done = project.snakemake("--dry-run")
    assert done.returncode == 0, done.stdout
    assert (
        "`experiments: all` leaves out 6 of 12 experiments:\n"
        "  dataset streets: data/streets/label_map.json and 3 more not found under the data root data\n"
        "  dataset pairs with detr: its annotations teach semantic, which these do not learn\n"
    ) in done.stdout
    assert project.plan()["train"] == 6
    for name in ("label_map", "train", "val", "test"):
        path = project.root / "data/streets" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    assert project.plan()["train"] == 10


def test_the_demo_is_all_that_plain_snakemake_builds(built: Project) -> None:
    """So that nothing is left to do after `make demo`, and the report has everything that it asks for."""
    recipe = (ROOT / "Makefile").read_text().partition("\ndemo:")[2]
    assert "\tsnakemake --cores $(CORES) all results/tables/demo.md\n" in recipe
    assert yaml.safe_load((ROOT / "config/config.yaml").read_text())["experiments"] == ["mask2former_swin"]
    shutil.copytree(ROOT / "report", built.root / "report")
    built.run("--report", "report.html")
    assert "demo" in (built.root / "report.html").read_text()


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


def test_without_a_home_that_can_be_written_a_cache_elsewhere_will_do(project: Project) -> None:
    """As docs/faults.md says; `make` does so by itself."""
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--cores", "1"]
    homeless = {**os.environ, "HOME": "/proc/none"}
    homeless.pop("XDG_CACHE_HOME", None)
    failed = subprocess.run(command, cwd=project.root, env=homeless, capture_output=True, text=True)
    assert failed.returncode != 0 and "/proc/none" in failed.stdout
    helped = homeless | {"XDG_CACHE_HOME": str(project.root / ".snakemake/cache")}
    done = subprocess.run(command, cwd=project.root, env=helped, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = subprocess.run(["make", "-pn", "unlock"], cwd=ROOT, env=homeless, capture_output=True, text=True).stdout
    assert "XDG_CACHE_HOME = $(CURDIR)/.snakemake/cache" in said


def test_lint_finds_nothing(project: Project) -> None:
    done = project.snakemake("--lint")
    assert done.returncode == 0, done.stdout + done.stderr


def test_another_way_of_testing_evaluates_again_and_trains_nothing(built: Project) -> None:
    before = built.configuration()
    target = "results/mask2former_swin/onnx_eval.fp16.strict.json"
    try:
        built.configure("testing/strict", {"postprocess": {"object_mask_threshold": 0.9}})
        pictures = "results/mask2former_swin/inference.strict/index.json"
        wanted = (target, "results/mask2former_swin/eval.strict.json", pictures)
        assert built.plan(*wanted) == {"evaluate": 1, "evaluate_onnx": 1, "infer": 1}
        built.run(pictures)
        assert "--testing strict" in built.calls()[-1]
        built.run(target)
        assert "--testing strict" in built.calls()[-1]
        assert built.plan(target) == built.plan() == {}
        built.configure("testing/strict", {"postprocess": {"object_mask_threshold": 0.7}})
        assert built.plan(target, pictures) == {"evaluate_onnx": 1, "infer": 1}
        assert built.plan() == {}
    finally:
        built.restore(before)
