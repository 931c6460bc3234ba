"""The committed configuration itself."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tessera.files import UserError
from tessera.spec.compose import Grid, full_name, load_grid

ROOT = Path(__file__).parents[2]
PARTS = sorted(path for path in (ROOT / "config").glob("*/*.yaml"))


@pytest.fixture(scope="module")
def grid() -> Grid:
    return load_grid(ROOT)


def test_every_experiment_of_the_grid_resolves(grid: Grid) -> None:
    for name in grid.possible:
        resolved = grid.resolve(name)
        assert resolved.spec.seed == resolved.parts["seed"]
        assert resolved.spec.dataset.name == resolved.parts["dataset"]
        assert grid.dataset(resolved.parts["dataset"]).train.annotations == resolved.spec.dataset.train.annotations


def test_what_plain_snakemake_builds_is_part_of_the_grid(grid: Grid) -> None:
    assert "mask2former_swin" in grid.experiments
    assert set(grid.experiments) <= set(grid.names)


@pytest.mark.parametrize("path", PARTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_part_opens_with_purpose_cost_and_score(path: Path) -> None:
    lines = path.read_text().splitlines()
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        head.append(line)
    text = " ".join(head).lower()
    assert len(head) >= 2, "a part opens with a comment: purpose, cost, expected score"
    assert path.parent.name == "datasets" or ("cost" in text and ("score" in text or "measured" in text))


@pytest.mark.parametrize("path", PARTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_part_is_listed(grid: Grid, path: Path) -> None:
    listed = {
        "models": set(grid.file.models),
        "backbones": set(grid.file.backbones),
        "datasets": set(grid.file.datasets),
        "variants": {name for parts in grid.parts.values() for name in parts["variants"]},
        "experiments": {full_name(parts) for parts in grid.parts.values()},
        "testing": set(grid.testings),
    }
    assert path.stem.partition(".")[0] in listed[path.parent.name]


@pytest.mark.parametrize("dataset", ["demo_kitti", "camvid", "camvid_panoptic", "nuclei", "coco_tiny", "bccd"])
def test_whatever_dataset_is_the_default_a_models_name_stands_for_the_published_sizes(
    grid: Grid, tmp_path: Path, dataset: str
) -> None:
    """Published: what the files of the model and the backbone say, and the schema's defaults."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    content = {key: getattr(grid.file, key) for key in ("models", "backbones", "datasets", "variants")}
    text = json.dumps(content | {"defaults": {"dataset": dataset}})
    (tmp_path / "config/config.yaml").write_text(text)
    changed = load_grid(tmp_path)
    seen = 0
    for name in changed.possible:
        parts = changed.parts[name]
        if parts["dataset"] != dataset or parts["variants"]:
            continue
        assert name == f"{parts['model']}_{parts['backbone']}"
        model = changed.resolve(name).spec.model
        published = {"mode": model.mode}
        for kind, part in (("models", "model"), ("backbones", "backbone")):
            written = yaml.safe_load((ROOT / f"config/{kind}/{parts[part]}.yaml").read_text())["model"]
            published |= written
        assert model == type(model).model_validate_json(json.dumps(published)), name
        seen += 1
    assert seen >= 26


def test_the_demo_is_small_with_every_backbone_and_its_swin_alone_is_a_small_swin(grid: Grid) -> None:
    demo, small, resnet = (
        grid.resolve(name).spec for name in ("mask2former_swin", "mask2former_swin_small", "mask2former_resnet50")
    )
    assert demo.model.backbone.swin.embed_dim == 32 and small.model.backbone.swin.embed_dim is None
    for spec in (demo, small, resnet):
        assert spec.model.decoder.num_object_queries == 20 and spec.model.pixel_decoder.hidden_dim == 64
        assert (spec.export.input_height, spec.train.num_epochs) == (None, 15)
    with pytest.raises(UserError, match="only a Swin backbone"):
        grid.resolve("mask2former_resnet18", ["model.backbone.swin.embed_dim=32"])
    assert grid.resolve("mask2former_swin-seed1").spec.model == demo.model


def test_what_the_cpu_variant_clears_is_clear(grid: Grid) -> None:
    """Deformable DETR's own file slows its offsets down."""
    assert grid.resolve("deformable_detr_resnet50").spec.train.optim.multipliers == {
        "reference_points": 0.1,
        "sampling_offsets": 0.1,
    }
    assert grid.resolve("deformable_detr_resnet50-cpu").spec.train.optim.multipliers == {}
