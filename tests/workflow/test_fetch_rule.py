"""Archives are fetched before the dataset is checked, and again when another one is declared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.workflow.project import PARTS, Project, make_project

TARGET = "results/mask2former_swin-streets/eval.json"


def declare(project: Project, address: str, sha256: str | None, **paths: Any) -> None:
    streets = json.loads(json.dumps(PARTS["datasets/streets"]["dataset"]))
    for split in ("train", "val", "test"):
        streets[split] = {key: f"streets/archive/{key}" for key in ("images", "annotations", "panoptic")}
    streets |= {"label_map": "streets/archive/label_map.json", **paths}
    streets["fetch"] = {"archive": {"address": address, **({"sha256": sha256} if sha256 else {})}}
    project.configure("datasets/streets", {"dataset": streets})


def test_the_rule_and_what_makes_it_run_again(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    declare(project, "s3://bucket/a.tar", "0" * 64)
    assert project.plan(TARGET) == {"fetch": 1, "check": 1, "train": 1, "evaluate": 1}
    project.run(TARGET, "--config", "data_root=elsewhere")
    fetched, checked, trained = project.calls()[:3]
    assert fetched == "fetch streets --data-root elsewhere --log logs/fetch/streets.log"
    assert checked.startswith("check streets") and "--data-root data " in checked and "--data-root data " in trained
    declare(project, "moved/a.tar", "0" * 64)
    assert project.plan(TARGET) == {}
    declare(project, "moved/a.tar", "1" * 64)
    assert project.plan(TARGET) == {"fetch": 1, "check": 1, "train": 1, "evaluate": 1}


def test_files_beside_the_archives_count_by_content(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    declare(project, "a.tar", "0" * 64, label_map="streets/own.json")
    refused = project.snakemake("--dry-run", TARGET)
    assert refused.returncode and "data/streets/own.json not found" in refused.stdout
    own = project.root / "data/streets/own.json"
    own.parent.mkdir(parents=True)
    own.write_text("[]")
    project.run(TARGET)
    assert project.plan(TARGET) == {}
    own.write_text("[1]")
    assert project.plan(TARGET) == {"check": 1, "train": 1, "evaluate": 1}
