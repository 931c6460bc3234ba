"""The error patterns of the documents (docs/tao.md lists them) meet one clear message before any work. Memory: tests/training/test_hardware.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from tessera.cli import app
from tessera.data.catalog import load_catalog
from tessera.data.label_map import read_label_map
from tessera.files import UserError
from tessera.spec.compose import load_grid
from tessera.spec.schema import DatasetSpec
from tests.spec.conftest import Project

INSTANCES = """
dataset:
  type: coco
  train: {images: street/images, annotations: street/instances.json}
"""


@pytest.mark.parametrize(
    ("mode", "files", "advice"),
    [
        ("panoptic", INSTANCES, ("annotations of type coco", "found panoptic", "set model.mode: instance")),
        ("semantic", INSTANCES, ("annotations of type coco", "found semantic", "set model.mode: instance")),
        ("instance", None, ("annotations of type mask_pairs", "found instance", "set model.mode: semantic")),
    ],
)
def test_annotations_of_another_format_than_the_mode_needs(
    mode: str, files: str | None, advice: tuple[str, ...], project: Project
) -> None:
    root = project({} if files is None else {"datasets/street.yaml": files})
    with pytest.raises(UserError) as caught:
        load_grid(root).resolve("mask2former_swin-street", [f"model.mode={mode}"])
    for words in ("model.mode", *advice):
        assert words in str(caught.value)


def test_the_mode_left_out_fits_the_format(project: Project) -> None:
    grid = load_grid(project({"datasets/street.yaml": INSTANCES}))
    assert grid.resolve("mask2former_swin-street").spec.model.mode == "instance"


def label_map(folder: Path, *ids: int) -> Path:
    path = folder / "label_map.json"
    path.write_text(json.dumps([{"id": number, "name": f"class {number}"} for number in ids]))
    return path


@pytest.mark.parametrize(
    ("ids", "contiguous", "count", "message"),
    [
        ((1, 2, 3), True, 90, "names 3 classes, but dataset.num_classes is 90. Set num_classes to 3 or leave it out"),
        (
            (1, 2, 200),
            False,
            90,
            "the largest id is 200, but dataset.num_classes is 90.*at least 200, or contiguous_id to true",
        ),
        (
            (0, 1),
            False,
            2,
            "has a class with id 0, but with contiguous_id false the classes are the ids 1..num_classes",
        ),
    ],
)
def test_number_of_classes_against_the_label_map(
    ids: tuple[int, ...], contiguous: bool, count: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read_label_map(label_map(tmp_path, *ids), contiguous, count)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"type": "coco"}, "neither dataset.label_map nor dataset.train.annotations is set"),
        ({"type": "mask_pairs", "train": {"annotations": "train.jsonl"}}, "dataset.label_map is not set"),
        ({"type": "coco", "label_map": "absent.json"}, "absent.json"),
    ],
)
def test_data_sources_that_are_not_given(dataset: dict[str, Any], message: str, tmp_path: Path) -> None:
    mode = "semantic" if dataset["type"] == "mask_pairs" else "instance"
    with pytest.raises(UserError, match=message):
        load_catalog(DatasetSpec.model_validate(dataset), str(tmp_path), mode)


def test_int8_is_refused_before_any_work(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project())
    with pytest.raises(UserError, match="--precision int8"):
        app(["engine", "mask2former_swin", "--precision", "int8"], standalone_mode=False)
    assert not Path("results").exists()


def test_a_missing_model_names_the_command_that_makes_it(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """TAO infers the file from the parent job; here a stage knows it by the experiment's name."""
    monkeypatch.chdir(project())
    with pytest.raises(UserError, match=r"results/mask2former_swin/model.pth: no such file; make it with `snakemake"):
        app(["evaluate", "mask2former_swin"], standalone_mode=False)
