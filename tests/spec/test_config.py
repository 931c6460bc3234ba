"""The committed configuration itself."""

from pathlib import Path

import pytest

from tessera.files import UserError
from tessera.spec.compose import Grid, load_grid

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
        "experiments": set(grid.names),
    }
    assert path.stem.partition(".")[0] in listed[path.parent.name]


def test_swin_sizes_of_the_demo_do_not_leak_into_other_backbones(grid: Grid) -> None:
    assert grid.resolve("mask2former_swin").spec.model.backbone.swin.embed_dim is not None
    assert grid.resolve("mask2former_resnet18").spec.model.backbone.swin.embed_dim is None
    with pytest.raises(UserError, match="only a Swin backbone"):
        grid.resolve("mask2former_resnet18", ["model.backbone.swin.embed_dim=32"])
