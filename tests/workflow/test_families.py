"""Every model family through the same rules: a tiny run of each, and a plan of every pair and task of the documents."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.workflow import small
from tests.workflow.project import ROOT, Project, make_project

SWIN = {"swin": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}}
TRANSFORMER = {"layers": 1, "nheads": 2, "dim_feedforward": 32}

MODELS: dict[str, dict[str, Any]] = {
    "oneformer_swin": {
        "backbone": SWIN,
        "pixel_decoder": {"hidden_dim": 32, "points": 2, **TRANSFORMER},
        "class_decoder": TRANSFORMER,
        "decoder": {"num_object_queries": 8, **TRANSFORMER},
        "text": {"width": 64, "layers": 1, "num_context": 2},
        "loss": {"train_num_points": 64},
    },
    "deformable_detr_resnet18": {
        "hidden_dim": 64,
        "nheads": 2,
        "enc_layers": 1,
        "dec_layers": 1,
        "dim_feedforward": 32,
        "num_queries": 8,
    },
    "deeplabv3plus_resnet18": {"decoder": {"channels": 32}},
}
METRICS = {
    "oneformer_swin": {"PQ", "AP", "mIoU"},
    "deformable_detr_resnet18": {"box_AP", "box_AP50", "box_AR100"},
    "deeplabv3plus_resnet18": {"mIoU", "pixel_accuracy"},
}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", MODELS)
def test_a_tiny_run_from_data_to_onnx_runtime(experiment: str, tmp_path: Path):
    folder = small.make_project(tmp_path)
    tiny = {
        **small.TINY,
        "model": MODELS[experiment],
        "train": {"num_epochs": 1, "threads": 1, "validation_interval": 1, "optim": {"milestones": [1]}},
    }
    tiny["dataset"]["augmentation"] = {
        **tiny["dataset"]["augmentation"],
        "train_random_resize": None,
        "train_random_crop": None,
    }
    (folder / f"config/experiments/{experiment}-demo.yaml").write_text(yaml.safe_dump(tiny))
    results = folder / "results" / experiment
    targets = ["eval.json", "onnx_eval.json", "inference/index.json", "onnx_inference/index.json"]
    small.run(folder, *(f"results/{experiment}/{target}" for target in targets))

    found = {name: json.loads((results / name).read_text()) for name in ("eval.json", "onnx_eval.json")}
    assert METRICS[experiment] <= found["eval.json"]["metrics"].keys()
    assert found["eval.json"]["images"] == found["onnx_eval.json"]["images"] == 3
    for name, value in found["eval.json"]["metrics"].items():
        assert found["onnx_eval.json"]["metrics"][name] == pytest.approx(value, abs=0.02)
    pictures = sorted(path.name for path in (results / "inference/overlays").iterdir())
    assert len(pictures) == 3
    assert pictures == sorted(path.name for path in (results / "onnx_inference/overlays").iterdir())
    assert Project(folder).plan(*(f"results/{experiment}/{target}" for target in targets)) == {}
    verify = ["tessera", "verify", f"results/{experiment}"]
    done = subprocess.run(verify, cwd=folder, env=small.ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("seal, lineage") == 7 and done.stdout.count("metrics made again") == 2
    assert "no record speaks of" not in done.stdout


@pytest.mark.slow
def test_every_pair_and_task_of_the_documents_plans(tmp_path: Path):
    """All models on all backbones, the mask transformers for each of their tasks, up to TensorRT's evaluation."""
    project = make_project(tmp_path)
    shutil.rmtree(tmp_path / "config")
    shutil.copytree(ROOT / "config", tmp_path / "config")
    for task in ("instance", "semantic"):
        project.configure(f"variants/{task}", {})
        for family in ("mask2former", "oneformer"):
            project.configure(f"variants/{task}.{family}", {"model": {"mode": task}})
    grid = yaml.safe_load((tmp_path / "config/config.yaml").read_text())
    pairs = [f"{model}_{backbone}" for model in grid["models"] for backbone in grid["backbones"]]
    tasked = [
        f"{pair}-{task}"
        for pair in pairs
        if "former_" in pair and "seg" not in pair
        for task in ("instance", "semantic")
    ]
    for path in (tmp_path / "config/experiments").iterdir():
        path.unlink()
    project.configure(
        "config",
        grid
        | {"datasets": ["demo"], "variants": ["instance", "semantic"], "seeds": [0], "experiments": [], "tables": {}},
    )
    names = pairs + tasked
    exported = [name for name in names if "swin_huge" not in name]  # more weights than an ONNX file holds
    jobs = project.plan(
        *(f"results/{name}/eval.json" for name in names),
        *(f"results/{name}/{file}" for name in exported for file in ("trt_eval.json", "onnx_eval.json")),
    )
    assert len(names) == len(set(names)) > 300
    assert {rule: jobs[rule] for rule in ("train", "evaluate")} == dict.fromkeys(("train", "evaluate"), len(names))
    rules = ("export", "engine", "evaluate_trt", "evaluate_onnx")
    assert {rule: jobs[rule] for rule in rules} == dict.fromkeys(rules, len(exported))
