from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from tessera.files import UserError
from tessera.spec.compose import Grid, load_grid
from tessera.tables.flat import write_metrics
from tests.tables.test_compare import CONFIG, root, write  # noqa: F401  # root is a fixture


def listing(root: Path, **more: object) -> Grid:  # noqa: F811
    (root / "config/config.yaml").write_text(yaml.safe_dump({**CONFIG, "experiments": ["mask2former_swin"], **more}))
    return load_grid(root)


def test_every_number_of_the_listed_experiments_and_of_their_tables(root: Path) -> None:  # noqa: F811
    tables = {
        "with": {"experiments": ["mask2former_swin", "mask2former_swin-short"], "runtimes": ["torch"]},
        "without": {"experiments": ["mask2former_res_net"], "runtimes": ["torch"]},
    }
    grid = listing(root, tables=tables)
    write(grid, "mask2former_swin", {"PQ": 0.5, "AR100": 0.75})
    write(grid, "mask2former_swin", {"PQ": 0.25}, "onnx")
    write(grid, "mask2former_swin-short", {"PQ": 0.125})
    write_metrics(grid, root / "results")
    assert json.loads((root / "results/metrics.json").read_text()) == {
        "mask2former_swin": {"torch": {"PQ": 0.5}, "onnx": {"PQ": 0.25}},
        "mask2former_swin-short": {"torch": {"PQ": 0.125}},
    }
    with (root / "results/metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["label"], float(row["value"])) for row in rows] == [
        ("mask2former_swin torch fp32 PQ", 0.5),
        ("mask2former_swin torch fp32 AR100", 0.75),
        ("mask2former_swin onnx fp32 PQ", 0.25),
        ("mask2former_swin-short torch fp32 PQ", 0.125),
    ]


def test_a_stale_evaluation_is_refused_and_nothing_written(root: Path) -> None:  # noqa: F811
    grid = listing(root)
    for runtime in ("torch", "onnx"):
        write(grid, "mask2former_swin", {"PQ": 0.5}, runtime)
    (root / "config/experiments").mkdir()
    (root / "config/experiments/mask2former_swin-demo.yaml").write_text("train: {optim: {lr: 3.0e-4}}\n")
    with pytest.raises(UserError, match=r"/eval\.json: was made from another spec"):
        write_metrics(load_grid(root), root / "results")
    assert not (root / "results/metrics.json").exists()
    assert not (root / "results/metrics.csv").exists()


def test_without_experiments_there_are_no_metrics(root: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match="experiments: lists none"):
        write_metrics(listing(root, experiments=[]), root / "results")
    assert not (root / "results").exists()
