from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tessera.files import UserError
from tessera.spec.planning import Plan, engine_notice, evaluation_file
from tests.workflow.project import CONFIG, ROOT, make_project


@pytest.mark.parametrize(
    ("rules", "missing", "said"),
    [
        (["train", "evaluate_trt"], "a GPU", True),
        (["engine"], "a GPU", True),
        (["engine"], None, False),
        (["train", "evaluate_onnx"], "a GPU", False),
        ([], "a GPU", False),
    ],
)
def test_engine_notice(rules: list[str], missing: str | None, said: bool) -> None:
    notice = engine_notice(rules, lambda: missing)
    assert (notice is not None) == said
    if notice is not None:
        assert "a GPU" in notice
        assert "onnx_eval.json" in notice


def test_availability_is_only_asked_when_it_matters() -> None:
    def never() -> str:
        raise AssertionError("asked")

    assert engine_notice(["train"], never) is None


@pytest.mark.parametrize(
    ("runtime", "precision", "name"),
    [
        ("torch", "fp32", "eval.json"),
        ("onnx", "fp32", "onnx_eval.json"),
        ("trt", "fp16", "trt_eval.fp16.json"),
    ],
)
def test_evaluation_file(runtime: str, precision: str, name: str) -> None:
    assert evaluation_file(runtime, precision) == name


@pytest.mark.parametrize(
    ("train", "resources", "launcher"),
    [
        ({}, {"gpu": 1, "nodes": 1, "threads": 4}, ""),
        ({"num_gpus": 4}, {"gpu": 4, "nodes": 1, "threads": 16}, ""),
        ({"gpu_ids": [2, 3]}, {"gpu": 2, "nodes": 1, "threads": 8}, ""),
        ({"threads": 6}, {"gpu": 1, "nodes": 1, "threads": 8}, ""),
        (
            {"num_nodes": 2},
            {"gpu": 2, "nodes": 2, "threads": 4, "mpi": "srun", "tasks": 2},
            "srun --nodes=2 --ntasks-per-node=1 --cpus-per-task=4 --kill-on-bad-exit=1 ",
        ),
        (
            {"num_nodes": 2, "num_gpus": 4},
            {"gpu": 8, "nodes": 2, "threads": 4, "mpi": "srun", "tasks_per_node": 4},
            "srun --nodes=2 --ntasks-per-node=4 --cpus-per-task=4 --kill-on-bad-exit=1 ",
        ),
    ],
)
def test_what_a_training_asks_for(
    train: dict[str, object],
    resources: dict[str, object],
    launcher: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project = make_project(tmp_path)
    project.configure("variants/short", {"train": train})
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    plan = Plan(CONFIG, tmp_path)
    assert plan.training_resources("mask2former_swin-short") == resources
    assert plan.launcher("mask2former_swin-short", 4) == launcher


def test_outside_slurm_the_training_itself_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project(tmp_path)
    project.configure("variants/short", {"train": {"num_nodes": 2}})
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert Plan(CONFIG, tmp_path).launcher("mask2former_swin-short", 4) == ""


def test_lost_data_are_made_again_from_their_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion reads what a generator or an archive brings, and its shards name those images."""
    project = make_project(tmp_path)
    project.configure("datasets/demo_kitti", yaml.safe_load((ROOT / "config/datasets/demo_kitti.yaml").read_text()))
    project.configure("config", CONFIG | {"datasets": ["demo", "demo_kitti"], "data_root": "elsewhere"})
    monkeypatch.chdir(tmp_path)
    plan = Plan({"data_root": "my data"})
    stages = [("evaluate_onnx", "mask2former_swin-demo_kitti")]
    first, second = "data/demo_kitti/manifest.json", "data/demo_kitti/converted/manifest.json"
    with pytest.raises(UserError, match=f"`snakemake --cores 2 {first} {second} --config 'data_root=my data'`"):
        plan.refuse_lost_data(stages, ())
    with pytest.raises(UserError, match=f"^{second}: no such file"):
        plan.refuse_lost_data(stages, (first,))
    plan.refuse_lost_data(stages, (first, second))
    with pytest.raises(UserError, match="these data are gone"):  # the size of the graph follows from the images
        plan.refuse_lost_data([("export", "mask2former_swin-demo_kitti")], ())
    plan.refuse_lost_data([("precision", "mask2former_swin-demo_kitti")], ())
