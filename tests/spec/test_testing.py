"""Named ways of testing a model that is trained: what they may set, and that no training knows of them."""

from pathlib import Path

import pytest

from tessera.files import UserError
from tessera.spec.compose import load_grid
from tessera.spec.lineage import lineage
from tessera.spec.planning import Plan, evaluation_file
from tests.spec.conftest import Project

STREET = "mask2former_swin-street"
WAYS: dict[str, str | None] = {
    "testing/slide.yaml": "testing: {mode: slide, crop_size: [64, 64], stride: [32, 32]}\n",
    "testing/strict.yaml": "postprocess: {object_mask_threshold: 0.9}\n",
    "testing/other.yaml": "evaluate: {split: test}\ndataset: {test: {annotations: elsewhere/test.jsonl}}\n",
    "datasets/street.yaml": "dataset:\n  type: mask_pairs\n  train: {annotations: street/train.jsonl}\n  test: {annotations: street/test.jsonl}\n"
    "model: {mode: semantic}\n",
}


def test_evaluation_changes_and_training_does_not(project: Project) -> None:
    grid = load_grid(project(WAYS))
    assert grid.testings == ("other", "slide", "strict")
    plain = grid.resolve(STREET)
    for way, section in (("slide", "testing"), ("strict", "postprocess"), ("other", "dataset")):
        tested = grid.resolve(STREET, testing=way)
        assert tested.testing == way
        assert lineage(tested.spec, "train") == lineage(plain.spec, "train")
        found, before = lineage(tested.spec, "evaluate"), lineage(plain.spec, "evaluate")
        assert {key for key in found if found[key] != before[key]} - {"data"} == {section}
    assert grid.resolve(STREET, testing="slide").origins["testing.mode"].endswith("config/testing/slide.yaml")
    assert grid.resolve(STREET, ["testing.flip=true"], "slide").spec.testing.flip


def test_another_test_set_has_its_own_digest(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    root = project(WAYS)
    monkeypatch.chdir(root)
    for folder, line in (("street", "one"), ("elsewhere", "two")):
        path = root / "data" / folder / "test.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text(line)
    plan = Plan({})
    own, other = (plan.lineages(STREET, way).of("evaluate")["data"] for way in ("", "other"))
    assert own["train"] == other["train"] and own["test"] != other["test"]
    assert plan.digest(STREET, "evaluate", "torch", "fp32", "slide") != plan.digest(STREET, "evaluate")


def test_a_threshold_that_chose_the_weights_is_a_variant(project: Project) -> None:
    grid = load_grid(project(WAYS))
    grid.resolve("mask2former_swin", testing="strict")
    with pytest.raises(
        UserError, match=r"strict.yaml: would need another training of mask2former_swin \(postprocess.obj.*variant"
    ):
        grid.resolve("mask2former_swin", ["train.select=best"], "strict")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {num_epochs: 3}", "slide.yaml, line 1: train.num_epochs: a way of testing sets testing, postprocess, evaluate, dataset.test alone"),
        ("dataset: {augmentation: {test_min_size: 64}}", "dataset.augmentation.test_min_size: a way of testing sets"),
        ("testing: {made: slide}", "slide.yaml, line 1: testing.made: .*testing.mode"),
        ("testing: {crop_size: [60, 64], mode: slide}", "tested as slide.*testing.crop_size"),
    ],
)  # fmt: skip
def test_what_it_may_not_set(project: Project, text: str, words: str) -> None:
    grid = load_grid(project(WAYS | {"testing/slide.yaml": text}))
    with pytest.raises(UserError, match=f"(?s){words}"):
        grid.resolve(STREET, testing="slide")


def test_a_companion_may_set_no_more(project: Project) -> None:
    companion = {"testing/slide.mask2former.yaml": "export: {input_height: 256}"}
    with pytest.raises(UserError, match=r"slide.mask2former.yaml, line 1: export.input_height: a way of testing sets"):
        load_grid(project(WAYS | companion)).resolve(STREET, testing="slide")


def test_names(project: Project) -> None:
    with pytest.raises(UserError, match=r"no way of testing 'slid' in .*testing; did you mean slide\?"):
        load_grid(project(WAYS)).resolve(STREET, testing="slid")
    with pytest.raises(UserError, match=r"fp16.yaml: 'fp16' cannot name a way of testing"):
        load_grid(project({"testing/fp16.yaml": "evaluate: {split: val}"}))
    table = "tables: {t: {experiments: [mask2former_swin], testing: [slyde]}}\n"
    with pytest.raises(UserError, match=r"tables.t.testing: no way of testing 'slyde'.*slide"):
        files = {"testing/fp16.yaml": None, "config.yaml": (Path(project()) / "config/config.yaml").read_text() + table}
        load_grid(project(WAYS | files))
    assert evaluation_file("onnx", "fp16", "slide") == "onnx_eval.fp16.slide.json"
