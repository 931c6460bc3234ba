"""A run reads the data that its record speaks of, from its beginning to its end."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tessera.data import opened
from tessera.data.datamodule import eval_loader, train_loader
from tessera.data.demo import write_demo
from tessera.data.opened import OpenedData
from tessera.files import UserError
from tessera.spec.lineage import Lineages
from tessera.spec.schema import DemoSpec, Spec
from tests.data.test_datamodule import make_spec

SCENES = DemoSpec(train_images=2, val_images=2, test_images=1, height=32, width=48)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_demo(root / "demo", SCENES, False)
    return root


@pytest.fixture
def root(scenes: Path, tmp_path: Path) -> Path:
    shutil.copytree(scenes, tmp_path / "data")
    return tmp_path / "data"


def spec_of(root: Path, **dataset: Any) -> Spec:
    spec = make_spec(root)
    return spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"name": "demo"} | dataset)})


def change(path: Path) -> bytes:
    """Other content of the same size; the former one."""
    before = path.read_bytes()
    path.write_bytes(before.replace(b'"area"', b'"aera"').replace(b'"name"', b'"eman"'))
    assert path.read_bytes() != before and path.stat().st_size == len(before)
    return before


@pytest.mark.parametrize("name", ["panoptic_train.json", "label_map.json"])
def test_a_changed_file_is_named_and_one_that_was_put_back_is_not(root: Path, name: str) -> None:
    path = root / "demo" / name
    data = OpenedData(spec_of(root), ("train",))
    before = change(path)
    with pytest.raises(UserError, match=rf"{name}: changed during this run, .*\(sha256 \w{{12}}, now \w{{12}}\)"):
        data.require_unchanged()
    path.write_bytes(before)
    data.require_unchanged()
    os.utime(path)
    data.require_unchanged()
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}: changed during this run, .*now missing"):
        data.require_unchanged()


def test_a_file_of_another_split_is_none_of_a_runs_business(root: Path) -> None:
    data = OpenedData(spec_of(root), ("val",))
    change(root / "demo/panoptic_train.json")
    data.require_unchanged()


def test_a_file_that_changes_while_it_is_opened(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is put back, so that its digest is the same before and after."""
    path = root / "demo/panoptic_train.json"
    original = opened.open_dataset

    def meanwhile(*arguments: Any) -> Any:
        before = change(path)
        found = original(*arguments)
        path.write_bytes(before)
        return found

    monkeypatch.setattr(opened, "open_dataset", meanwhile)
    with pytest.raises(UserError, match=r"panoptic_train\.json: changed while it was opened; run this again"):
        OpenedData(spec_of(root), ("train",))


def test_a_file_that_changes_between_the_plan_of_a_run_and_its_opening(root: Path) -> None:
    spec = spec_of(root)
    lineages = Lineages(spec)
    lineages.of("train")
    path = root / "demo/label_map.json"
    before = path.read_text()
    path.write_text(before.replace("disc", "dish"))
    with pytest.raises(UserError, match="dataset demo: its annotations or label map changed while this began"):
        OpenedData(spec, ("train",), lineages=lineages)
    path.write_text(before)
    assert OpenedData(spec, ("train",), lineages=lineages).lineages is lineages


def test_generated_data_are_held_against_their_manifest(root: Path) -> None:
    """Their lineage is of the generator's keys alone."""
    OpenedData(spec_of(root, generator=SCENES), ("train", "val"))
    other = SCENES.model_copy(update={"seed": 7})
    with pytest.raises(
        UserError, match=r"demo: was generated with other keys \(seed: 0 -> 7\); remove .* generate again"
    ):
        OpenedData(spec_of(root, generator=other), ("train",))
    change(root / "demo/panoptic_val.json")
    OpenedData(spec_of(root, generator=SCENES), ("train",))
    with pytest.raises(UserError, match=r"panoptic_val\.json: differs from what demo wrote; remove .* generate again"):
        OpenedData(spec_of(root, generator=SCENES), ("train", "val"))
    (root / "demo/manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json: no such file; .*snakemake"):
        OpenedData(spec_of(root, generator=SCENES), ("train",))


@pytest.mark.parametrize("folder", ["images", "panoptic"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_picture_that_changes_between_two_epochs_is_named(root: Path, split: str, folder: str) -> None:
    spec = spec_of(root)
    data = OpenedData(spec, ("train", "val"))

    def epoch(number: int) -> None:
        for _ in train_loader(spec, data, number) if split == "train" else eval_loader(spec, data, split):
            pass

    epoch(0)
    epoch(1)
    path = sorted((root / "demo" / folder / split).iterdir())[0]
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    os.utime(path, (1e9, 1e9))
    with pytest.raises(
        UserError, match=rf"{path.name} \({split} split of .*panoptic_{split}\.json\): the image or its masks changed"
    ):
        epoch(2)
    data = OpenedData(spec, ("train", "val"))
    epoch(2)
