"""The convert rule: what waits for it and what makes it run again."""

from pathlib import Path

import pytest

from tests.workflow.project import CONFIG, Project, make_project

SHARDS = "converted/shards"
TARGET = "results/detr_swin-{}/eval.json"


def split(name: str, part: str) -> dict[str, object]:
    return {"images": ".", "annotations": f"{name}/{SHARDS}/{part}-*.json"}


def describe(project: Project, name: str, generator: dict[str, int] | None, **convert: object) -> None:
    content: dict[str, object] = {
        "type": "coco",
        "generator": generator,
        "label_map": "map.txt" if generator is None else f"{name}/label_map.json",
        "convert": {"input_source": ["kitti"], "test_source": ["more"], **convert},
        **{part: split(name, part) for part in ("train", "val", "test")},
    }
    project.configure(f"datasets/{name}", {"dataset": content})


def label(project: Project, source: str, text: str) -> None:
    for kind in ("images", "labels"):
        (project.root / "raw" / source / kind).mkdir(parents=True, exist_ok=True)
    (project.root / "raw" / source / "labels" / "1.txt").write_text(text)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = make_project(tmp_path)
    lists = {"models": ["detr"], "datasets": ["made", "given"], "defaults": {"dataset": "made"}, "variants": []}
    made.configure("config", CONFIG | lists | {"experiments": [], "tables": {}, "data_root": "raw"})
    made.configure("models/detr", {"model": {"name": "deformable_detr"}})
    describe(made, "made", {})
    describe(made, "given", None)
    label(made, "kitti", "Car")
    label(made, "more", "Car")
    (made.root / "raw/map.txt").write_text("car\n")
    return made


def test_generated_scenes_are_converted_before_they_are_checked(project: Project) -> None:
    chain = {"demo": 1, "convert": 1, "check": 1, "train": 1, "evaluate": 1}
    assert project.plan("results/detr_swin/eval.json") == chain
    project.run("data/checks/made.json")
    verbs = [call.split()[:2] for call in project.calls()]
    assert verbs == [["demo", "made"], ["convert", "made"], ["check", "made"]]
    assert "--data-root data " in project.calls()[1] and "--processes 2" in project.calls()[1]


def test_labels_and_keys_make_it_run_again_and_nothing_else_does(project: Project) -> None:
    target = TARGET.format("given")
    again = {"convert": 1, "check": 1, "train": 1, "evaluate": 1}
    assert project.plan(target) == again
    project.run(target)
    assert "--data-root raw " in project.calls()[0]
    assert project.plan(target) == {}
    (project.root / "raw/kitti/labels/1.txt").touch()
    assert project.plan(target) == {}
    label(project, "kitti", "Van")
    assert project.plan(target) == again
    label(project, "kitti", "Car")
    assert project.plan(target) == {}
    describe(project, "given", None, num_shards=3)
    assert project.plan(target) == again
    describe(project, "given", None)
    (project.root / "raw/map.txt").write_text("van\n")
    assert project.plan(target) == again


def test_more_images_and_other_test_labels_make_it_run_again(project: Project) -> None:
    target = TARGET.format("given")
    again = {"convert": 1, "check": 1, "train": 1, "evaluate": 1}
    project.run(target)
    assert project.plan(target) == {}
    label(project, "more", "Van")
    assert project.plan(target) == again, "the shards are made together, and Snakemake runs whatever follows"
    label(project, "more", "Car")
    assert project.plan(target) == {}
    (project.root / "raw/kitti/images/1.png").touch()
    assert project.plan(target) == again


def test_folders_that_are_missing_are_named_while_planning(project: Project) -> None:
    describe(project, "given", None, val_source=["gone"])
    done = project.snakemake("--dry-run", TARGET.format("given"))
    assert done.returncode != 0
    assert "dataset given: raw/gone/images, raw/gone/labels not found under the data root raw" in done.stdout
