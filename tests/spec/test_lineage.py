import json
from pathlib import Path
from typing import Any

import pytest

from tessera.files import canonical_json
from tessera.spec.lineage import (
    STAGES,
    Lineages,
    ancestry,
    data_digest,
    data_files,
    differences,
    lineage,
    lineage_digest,
    lineage_text,
    resume_digest,
)
from tessera.spec.schema import DatasetSpec, Spec, read_spec

ROOT = Path(__file__).parents[2]

STEPS = [
    ("train", "torch", "fp32"),
    ("evaluate", "torch", "fp32"),
    ("infer", "torch", "fp32"),
    ("export", "onnx", "fp32"),
    ("parity", "onnx", "fp32"),
    ("evaluate", "onnx", "fp32"),
    ("precision", "onnx", "fp16"),
    ("evaluate", "onnx", "fp16"),
    ("engine", "trt", "fp32"),
    ("engine", "trt", "fp16"),
    ("evaluate", "trt", "fp16"),
]
"""(verb, runtime, precision) of one experiment's outputs."""


def make_spec(**sections: Any) -> Spec:
    """Of generated data; ``sections`` are nested values as a part file would give them."""
    values: dict[str, Any] = {"dataset": {"generator": {}}}
    for section, content in sections.items():
        values[section] = values.get(section, {}) | content if isinstance(content, dict) else content
    values["model"] = {"name": "mask2former", **values.get("model", {})}
    return read_spec(values)


def changed_steps(**sections: Any) -> set[tuple[str, str, str]]:
    """Steps whose lineage differs from the plain spec's."""
    old, new = make_spec(), make_spec(**sections)
    return {step for step in STEPS if lineage_text(old, *step) != lineage_text(new, *step)}


def of(*verbs: str) -> set[tuple[str, str, str]]:
    return {step for step in STEPS if step[0] in verbs}


EVALUATED = of("evaluate", "infer", "parity")
TRT = {step for step in STEPS if step[1] == "trt"}
HALF = {step for step in STEPS if step[2] == "fp16"}
AFTER_EXPORT = {step for step in STEPS if step[1] != "torch"}
AFTER_PARITY = {
    step for step in STEPS if step[0] == "parity" or (step[0] in ("evaluate", "infer") and step[1] != "torch")
}

CHANGES = {
    "learning rate": ({"train": {"optim": {"lr": 0.5}}}, set(STEPS)),
    "seed": ({"seed": 1}, set(STEPS)),
    "architecture": ({"model": {"decoder": {"layers": 2}}}, set(STEPS)),
    "train augmentation": ({"dataset": {"generator": {}, "augmentation": {"flip": 0.0}}}, set(STEPS)),
    "train batch size": ({"dataset": {"generator": {}, "train": {"batch_size": 2}}}, set(STEPS)),
    "val images of the generator": ({"dataset": {"generator": {"val_images": 3}}}, set(STEPS)),
    "test images of the generator": ({"dataset": {"generator": {"test_images": 3}}}, EVALUATED),
    "test split's size": ({"dataset": {"generator": {}, "test": {"target_size": [64, 64]}}}, EVALUATED),
    "evaluated split": ({"evaluate": {"split": "val"}}, EVALUATED),
    "threshold": ({"postprocess": {"object_mask_threshold": 0.1}}, EVALUATED),
    "drawing": ({"inference": {"opacity": 0.1}}, of("infer")),
    "tolerance": ({"parity": {"tolerance": 0.5}}, AFTER_PARITY),
    "export size": ({"export": {"input_height": 320}}, AFTER_EXPORT),
    "half precision": ({"precision": {"fp16_keep": ["Softmax"]}}, HALF),
    "engine": ({"engine": {"workspace_size": 2}}, TRT),
    "workers": ({"dataset": {"generator": {}, "train": {"num_workers": 9}}}, set()),
    "val batch size": ({"dataset": {"generator": {}, "val": {"batch_size": 9}}}, set()),
    "test batch size": ({"dataset": {"generator": {}, "test": {"batch_size": 9}}}, set()),
    "another GPU": ({"train": {"gpu_ids": [1]}}, set()),
    "another strategy for one process": ({"train": {"distributed_strategy": "fsdp"}}, set()),
    "another process": ({"train": {"gpu_ids": [0, 1]}}, set(STEPS)),
    "threads": ({"train": {"threads": 1}}, set(STEPS)),
    "checkpoint interval": ({"train": {"checkpoint_interval": 9}}, set()),
    "data root": ({"data_root": "elsewhere"}, set()),
}  # fmt: skip


@pytest.mark.parametrize(("sections", "expected"), CHANGES.values(), ids=CHANGES.keys())
def test_a_change_reaches_exactly_what_depends_on_it(
    sections: dict[str, Any], expected: set[tuple[str, str, str]]
) -> None:
    assert changed_steps(**sections) == expected


@pytest.mark.parametrize(
    "train", [{"num_gpus": 4}, {"num_nodes": 4}, {"num_gpus": 2, "num_nodes": 2}, {"gpu_ids": [0, 1, 2, 5]}]
)
def test_of_the_processes_their_number_alone_counts(train: dict[str, Any]) -> None:
    found = lineage(make_spec(train=train), "train")["train"]
    assert found["processes"] == 4
    assert {**found, "processes": 1} == lineage(make_spec(), "train")["train"] | {"distributed_strategy": "ddp"}


@pytest.mark.parametrize(
    ("model", "dataset", "deciding"),
    [
        ({"mode": "panoptic"}, "coco_panoptic", {"object_mask_threshold", "overlap_threshold"}),
        ({"mode": "instance"}, "coco_panoptic", {"test_topk_per_image"}),
        ({"mode": "semantic"}, "coco_panoptic", set()),
        ({"name": "deformable_detr"}, "coco", {"num_select", "conf_threshold"}),
    ],
    ids=["panoptic", "instance", "semantic", "detection"],
)
@pytest.mark.parametrize("select", ["last", "best"])
def test_a_threshold_retrains_where_it_chooses_the_weights(
    model: dict[str, Any], dataset: str, deciding: set[str], select: str
) -> None:
    changes = dict.fromkeys(("object_mask_threshold", "overlap_threshold", "conf_threshold"), 0.25)
    changes |= dict.fromkeys(("test_topk_per_image", "num_select"), 7)
    base: dict[str, Any] = {
        "model": model,
        "dataset": {"type": dataset, "generator": {}},
        "train": {"select": select},
    }
    plain = make_spec(**base)
    for key, value in changes.items():
        changed = make_spec(**base, postprocess={key: value})
        found = {step for step in STEPS if lineage_text(plain, *step) != lineage_text(changed, *step)}
        assert found == (set(STEPS) if select == "best" and key in deciding else EVALUATED), key
        assert lineage_text(changed, "export") == canonical_json(lineage(changed, "export"))
        assert lineage(changed, "evaluate")["postprocess"][key] == value


def test_order_of_keys_means_nothing() -> None:
    one = Spec.model_validate_json('{"train": {"num_epochs": 3, "optim": {"lr": 0.1, "gamma": 0.5}}, "seed": 1}')
    two = Spec.model_validate_json('{"seed": 1, "train": {"optim": {"gamma": 0.5, "lr": 0.1}, "num_epochs": 3}}')
    assert lineage_text(one, "evaluate") == lineage_text(two, "evaluate")


def test_swapped_values_are_seen() -> None:
    one = make_spec(train={"optim": {"lr": 0.1, "weight_decay": 0.9}})
    two = make_spec(train={"optim": {"lr": 0.9, "weight_decay": 0.1}})
    assert lineage_digest(one, "train") != lineage_digest(two, "train")


def test_whole_number_and_fraction_of_equal_value_are_one() -> None:
    assert lineage_text(make_spec(train={"clip_grad_norm": 1}), "train") == lineage_text(
        make_spec(train={"clip_grad_norm": 1.0}), "train"
    )


def test_versions_are_those_of_the_stage_and_its_ancestors() -> None:
    for verb, runtime, precision in STEPS:
        found = lineage(make_spec(), verb, runtime, precision)["versions"]
        assert found == {stage: STAGES[stage].version for stage in ancestry(verb, runtime, precision)}
    assert ancestry("evaluate") == ("train", "evaluate")
    assert ancestry("evaluate", "trt", "fp16") == ("train", "export", "precision", "engine", "parity", "evaluate")
    assert ancestry("parity", "onnx") == ("train", "export", "parity")


def test_val_split_may_be_the_evaluated_one() -> None:
    """Then the test split is nobody's business."""
    val = {"evaluate": {"split": "val"}}
    one, two = (
        make_spec(**val),
        make_spec(**val, dataset={"generator": {"test_images": 1}, "test": {"target_size": [64, 64]}}),
    )
    assert lineage_text(one, "evaluate", "onnx") == lineage_text(two, "evaluate", "onnx")


@pytest.fixture
def dataset(tmp_path: Path) -> DatasetSpec:
    for name in ("labels", "train", "val", "test"):
        (tmp_path / f"{name}.json").write_text(name)
    splits = {split: {"annotations": f"{split}.json"} for split in ("train", "val", "test")}
    return DatasetSpec.model_validate_json(json.dumps({"label_map": "labels.json", **splits}))


def test_annotation_files_reach_the_stages_that_read_them(tmp_path: Path, dataset: DatasetSpec) -> None:
    spec = Spec(dataset=dataset, data_root=str(tmp_path))

    def steps_after_writing(name: str) -> set[tuple[str, str, str]]:
        before = {step: lineage_text(spec, *step) for step in STEPS}
        path = tmp_path / name
        path.write_text(path.read_text() + " more")
        return {step for step in STEPS if lineage_text(spec, *step) != before[step]}

    assert steps_after_writing("train.json") == set(STEPS)
    assert steps_after_writing("val.json") == set(STEPS)
    assert steps_after_writing("labels.json") == set(STEPS)
    assert steps_after_writing("test.json") == EVALUATED


def test_data_digest_is_of_content_not_of_place_or_time(tmp_path: Path, dataset: DatasetSpec) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in data_files(dataset, str(tmp_path)):
        (other / path.name).write_text(path.read_text())
    assert data_digest(dataset, str(tmp_path)) == data_digest(dataset, str(other))
    (other / "val.json").unlink()
    assert data_digest(dataset, str(tmp_path)) != data_digest(dataset, str(other))


def test_data_files_of_splits(tmp_path: Path, dataset: DatasetSpec) -> None:
    assert [path.name for path in data_files(dataset, "x")] == ["labels.json", "test.json", "train.json", "val.json"]
    assert [path.name for path in data_files(dataset, "x", ("test",))] == ["labels.json", "test.json"]


def test_weights_to_start_from_count_by_content(tmp_path: Path) -> None:
    """Another file under the same name trains again; one that is not there yet does not stop the planning."""
    path = tmp_path / "weights.pth"
    changes: list[dict[str, Any]] = [
        {"train": {"pretrained_model_path": str(path)}},
        {"model": {"backbone": {"pretrained": str(path)}}},
    ]
    for sections in changes:
        key = "train.pretrained_model_path" if "train" in sections else "model.backbone.pretrained"
        spec = make_spec(**sections)
        assert lineage(spec, "train")["weights"] == {key: "missing"}
        digests = [resume_digest(Lineages(spec))]
        for text in ("one", "other", "one"):
            path.write_text(text)
            assert {step for step in STEPS if "weights" in lineage(spec, *step)} == set(STEPS)
            digests.append(resume_digest(Lineages(spec)))
        assert digests[1] == digests[3] and len(set(digests)) == 3
        path.unlink()
    folder = tmp_path / "hub"
    folder.mkdir()
    spec = make_spec(model={"backbone": {"pretrained": str(folder)}})
    (folder / "model.safetensors").write_text("one")
    before = lineage_digest(spec, "train")
    (folder / "model.safetensors").write_text("other")
    assert lineage_digest(spec, "train") != before
    assert "weights" not in lineage(make_spec(), "train")
    assert "weights" not in lineage(make_spec(model={"backbone": {"pretrained": "timm"}}), "train")


RESUMES = {
    "more epochs": ({"num_epochs": 99}, True),
    "explicit checkpoint": ({"resume_training_checkpoint_path": "x.pth"}, True),
    "verbosity": ({"verbose": True}, True),
    "learning rate": ({"optim": {"lr": 0.5}}, False),
    "more epochs of a schedule that ends at the last one": ({"num_epochs": 99, "optim": {"lr_scheduler": "WarmupPoly"}}, False),
}  # fmt: skip


@pytest.mark.parametrize(("train", "same"), RESUMES.values(), ids=RESUMES.keys())
def test_resume_folder_is_kept_by_what_continues_a_training(train: dict[str, Any], same: bool) -> None:
    schedule = {"optim": {"lr_scheduler": train.get("optim", {}).get("lr_scheduler", "MultiStep")}}
    assert (
        resume_digest(Lineages(make_spec(train=schedule))) == resume_digest(Lineages(make_spec(train=train)))
    ) is same


def test_differences_name_every_changed_leaf() -> None:
    old, new = {"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 2, "c": [1]}, "e": 3}
    assert differences(old, new) == ["a.b: 1 -> 2", "d: 2 -> (absent)", "e: (absent) -> 3"]
    assert differences(old, old) == []
