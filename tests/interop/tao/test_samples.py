"""The sample specs of TAO's documents are read completely, and what is written composes into the experiment that they describe."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tessera.cli import app
from tessera.files import UserError
from tessera.interop.tao import TABLES, Import, import_spec, write_files
from tessera.interop.tao.table import Fate
from tessera.spec.compose import load_grid
from tessera.spec.schema import Spec

SAMPLES = Path(__file__).parent / "samples"
FAMILIES = {
    "mask2former_train": "mask2former",
    "mask2former_actions": "mask2former",
    "mask2former_overrides": "mask2former",
    "oneformer_train": "oneformer",
    "oneformer_block": "oneformer",
    "deformable_detr_train": "deformable_detr",
    "deformable_detr_convert": "deformable_detr",
}


def read(root: Path, *names: str, **options: Any) -> Import:
    done = import_spec([SAMPLES / f"{name}.yaml" for name in names], "coco", root=root, **options)
    write_files(done.files)
    return done


def resolve(root: Path, done: Import) -> Spec:
    """What the written files compose into; the grid is what the report asks for."""
    config = root / "config"
    if not (config / "datasets/coco.yaml").exists():
        (config / "datasets").mkdir()
        (config / "datasets/demo.yaml").write_text("dataset: {generator: {}}\n")
    parts = {
        folder: sorted(path.stem for path in (config / folder).glob("*.yaml"))
        for folder in ("models", "backbones", "datasets")
    }
    grid = {
        **parts,
        "variants": ["tao"],
        "seeds": sorted({0, done.converted.values.get("seed", 0)}),
        "defaults": {"dataset": parts["datasets"][0]},
    }
    (config / "config.yaml").write_text(yaml.safe_dump(grid))
    assert done.experiment is not None
    name = done.experiment.replace("-coco-", "-")  # the only dataset is the default one, and left out of names
    return load_grid(root).resolve(name).spec


def leaves(content: Any, family: str, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a YAML file, down to lists and what is no section of TAO's schema."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict) and prefix + name not in TABLES[family].rows:
            found |= leaves(value, family, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def value_at(spec: Any, key: str) -> Any:
    for name in key.split("."):
        spec = spec[name]
    return spec


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_key_is_accounted_for(name: str, tmp_path: Path) -> None:
    done = read(tmp_path, name)
    assert done.converted.family == FAMILIES[name]
    content = leaves(yaml.safe_load((SAMPLES / f"{name}.yaml").read_text()), FAMILIES[name])
    accounted = {outcome.key: outcome for outcome in done.converted.outcomes}
    assert accounted.keys() == content.keys()
    for key, outcome in accounted.items():
        assert f"  {key} = " in done.report
        assert outcome.ours or outcome.fate not in (Fate.TAKEN, Fate.REVIVED)
        assert not outcome.ours or outcome.fate in (Fate.TAKEN, Fate.REVIVED)


@pytest.mark.parametrize("name", sorted(name for name in FAMILIES if name != "deformable_detr_convert"))
def test_the_written_parts_compose_to_the_values(name: str, tmp_path: Path) -> None:
    done = read(tmp_path, name)
    spec = resolve(tmp_path, done)
    assert spec.model.name == FAMILIES[name]
    composed = spec.model_dump(mode="json")
    for key, value in done.converted.values.items():
        assert value_at(composed, key) == value, key


def test_mask2former(tmp_path: Path) -> None:
    done = read(tmp_path, "mask2former_train")
    spec = resolve(tmp_path, done)
    composed = spec.model_dump(mode="json")
    expected = {
        "dataset.type": "coco_panoptic",
        "dataset.contiguous_id": False,
        "dataset.num_classes": 200,
        "dataset.label_map": "tlt3_experiments/mask2former_coco_effvit_b2/colormap.json",
        "dataset.train.images": "datasets/coco/train2017",
        "dataset.val.panoptic": "datasets/coco/panoptic_val2017",
        "dataset.val.target_size": [1024, 1024],
        "dataset.train.batch_size": 16,
        "dataset.augmentation.train_min_size": list(range(512, 2049, 64)),
        "inference.images": "workspace/test_images",
        "evaluate.split": "val",
        "model.mode": "semantic",
        "model.backbone.name": "swin_tiny",
        "model.decoder.layers": 9,
        "train.precision": "fp16",
        "train.optim.milestones": [44, 48],
        "train.optim.lr": 1e-4,
        "train.clip_grad_norm": 0.1,
        "postprocess.object_mask_threshold": 0.0,
        "export.opset_version": 18,
        "export.on_cpu": True,
    }
    assert {key: value_at(composed, key) for key in expected} == expected
    assert done.converted.data_root == "/"
    assert done.experiment == "mask2former_swin_tiny-coco-tao"


def test_oneformer(tmp_path: Path) -> None:
    done = read(tmp_path, "oneformer_train")
    composed = resolve(tmp_path, done).model_dump(mode="json")
    expected = {
        "model.mode": "panoptic",
        "model.backbone.name": "swin_large",
        "model.backbone.swin.window_size": 12,
        "model.pixel_mean": [0.485, 0.456, 0.406],
        "dataset.train.annotations": "annotations/panoptic_train2017.json",
        "dataset.test.target_size": [1024, 1024],
        "dataset.augmentation.train_scale": [0.1, 2.0],
        "dataset.contiguous_id": True,
        "dataset.num_classes": 133,
        "evaluate.split": "test",
        "train.precision": "fp32",
        "train.num_gpus": 8,
        "train.num_nodes": 4,
        "train.optim.lr": 1e-5,
        "train.iters_per_epoch": None,
    }
    assert {key: value_at(composed, key) for key in expected} == expected
    assert done.converted.data_root == "/workspace/datasets/coco"
    std = value_at(composed, "model.pixel_std")
    assert std == pytest.approx([0.229, 0.224, 0.225])


def test_deformable_detr(tmp_path: Path) -> None:
    done = read(tmp_path, "deformable_detr_train")
    composed = resolve(tmp_path, done).model_dump(mode="json")
    expected = {
        "seed": 1234,
        "model.mode": "detection",
        "model.backbone.name": "resnet50",
        "model.backbone.norm": "frozen",
        "model.backbone.pretrained": "/path/to/your-resnet50-pretrained-model",
        "model.strides": [8, 16, 32],
        "model.num_feature_levels": 4,
        "model.dropout": 0.3,
        "dataset.type": "coco",
        "dataset.contiguous_id": False,
        "dataset.num_classes": 90,
        "dataset.label_map": "annotations/coco_classmap.txt",
        "dataset.train.images": "images/train2017",
        "dataset.augmentation.train_crop_size": None,
        "dataset.augmentation.train_random_crop": [384, 600],
        "dataset.augmentation.fixed_padding": [800, 1333],
        "dataset.augmentation.test_min_size": 800,
        "dataset.augmentation.test_max_size": 1333,
        "dataset.augmentation.color_jitter": False,
        "train.freeze": [],
        "train.optim.backbone_multiplier": 0.1,
        "train.optim.multipliers": {"reference_points": 0.1, "sampling_offsets": 0.1},
        "train.optim.milestones": [40],
        "inference.color_map": {"person": [255, 0, 0], "car": [0, 0, 255]},
        "inference.score_threshold": 0.5,
        "postprocess.num_select": 100,
    }
    assert {key: value_at(composed, key) for key in expected} == expected
    assert done.experiment == "deformable_detr_resnet50-coco-tao-seed1234"


def test_a_spec_of_the_deployment_alone_names_no_data(tmp_path: Path) -> None:
    done = read(tmp_path, "mask2former_actions")
    assert not (tmp_path / "config/datasets/coco.yaml").exists()
    spec = resolve(tmp_path, done)
    assert (spec.export.input_width, spec.export.on_cpu, spec.engine.max_batch_size) == (960, False, 8)
    assert spec.train.optim.lr == 1e-4  # the file has no `train`, so that TAO's defaults for it are not imposed


def test_several_files_are_one_spec(tmp_path: Path) -> None:
    done = read(tmp_path, "mask2former_overrides", "mask2former_actions")
    spec = resolve(tmp_path, done)
    assert (spec.train.num_epochs, spec.engine.max_batch_size) == (10, 8)
    assert spec.dataset.type == "coco_panoptic"
    with pytest.raises(
        UserError, match=r"export.input_width: 1024 here, but 960 as export.input_width in .*_actions.yaml"
    ):
        read(tmp_path, "mask2former_actions", "mask2former_train")


def test_marks_for_values_to_come_say_nothing(tmp_path: Path) -> None:
    done = read(tmp_path, "oneformer_block")
    still = {outcome.key for outcome in done.converted.outcomes if outcome.fate is Fate.OPEN}
    assert still == {"train.pretrained_model", "evaluate.checkpoint", "export.checkpoint", "export.onnx_file"}
    assert resolve(tmp_path, done).train.optim.lr == 1e-4


def test_a_conversion_is_no_experiment(tmp_path: Path) -> None:
    done = read(tmp_path, "deformable_detr_convert")
    assert (done.files, done.experiment) == ({}, None)
    assert not (tmp_path / "config").exists()
    assert "describes no experiment" in done.report


def test_families_share_a_dataset_and_a_recipe(tmp_path: Path) -> None:
    """The companions of a variant lie side by side; a dataset that says the same is not written again."""
    read(tmp_path, "oneformer_train")
    for name in ("datasets/coco.yaml", "variants/tao.oneformer.yaml"):
        assert (tmp_path / "config" / name).exists()
    again = read(tmp_path, "oneformer_train")
    assert again.files == {}
    assert "unchanged: " in again.report
    with pytest.raises(UserError, match=r"datasets/coco.yaml: exists and says something else; choose another --name"):
        read(tmp_path, "mask2former_train")
    done = import_spec([SAMPLES / "mask2former_train.yaml"], "coco_raw", root=tmp_path)
    assert sorted(path.name for path in done.files) == [
        "coco_raw.yaml",
        "mask2former.yaml",
        "swin_tiny.yaml",
        "tao.mask2former.yaml",
    ]


def test_a_recipe_is_not_overwritten(tmp_path: Path) -> None:
    read(tmp_path, "mask2former_overrides")
    before = {path: path.read_text() for path in tmp_path.rglob("*.yaml")}
    with pytest.raises(
        UserError, match=r"tao.mask2former.yaml: exists and says something else; choose another --variant"
    ):
        read(tmp_path, "mask2former_actions")
    assert {path: path.read_text() for path in tmp_path.rglob("*.yaml")} == before
    assert read(tmp_path, "mask2former_actions", variant="deploy").experiment == "mask2former_swin_tiny-deploy"


def test_parts_of_the_project_are_found_by_what_they_say(tmp_path: Path) -> None:
    backbones = tmp_path / "config/backbones"
    backbones.mkdir(parents=True)
    (backbones / "swin.yaml").write_text("model: {backbone: {name: swin_tiny}}\n")
    done = read(tmp_path, "mask2former_train")
    assert done.experiment == "mask2former_swin-coco-tao"
    assert not (backbones / "swin_tiny.yaml").exists()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["import-spec", str(SAMPLES / "mask2former_train.yaml"), "--name", "coco", "--out", str(tmp_path)]
    app(arguments, standalone_mode=False)
    printed = capsys.readouterr().out
    assert "data.train.batch_size = 16 -> dataset.train.batch_size = 16" in printed
    assert "experiment: mask2former_swin_tiny-coco-tao" in printed
    assert (tmp_path / "config/variants/tao.mask2former.yaml").exists()
    with pytest.raises(UserError, match="letters, digits and underscores"):
        app([*arguments[:3], "../coco", *arguments[4:]], standalone_mode=False)
