from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from tessera.files import UserError
from tessera.reporting.compare import compare
from tessera.reporting.table import escape_latex
from tessera.spec.compose import Grid, load_grid
from tessera.spec.lineage import lineage
from tessera.spec.planning import evaluation_file

CONFIG: dict[str, Any] = {
    "models": ["mask2former"],
    "backbones": ["swin", "res_net"],
    "datasets": ["demo"],
    "variants": ["short"],
    "seeds": [0, 1],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    parts = {
        "models/mask2former": {"model": {"name": "mask2former"}},
        "backbones/swin": {"model": {"backbone": {"name": "swin_tiny"}}},
        "backbones/res_net": {"model": {"backbone": {"name": "resnet18"}}},
        "datasets/demo": {"dataset": {"generator": {}}},
        "variants/short": {"train": {"num_epochs": 2}},
    }
    for part, content in parts.items():
        path = tmp_path / "config" / f"{part}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))
    return tmp_path


def grid_with(root: Path, **table: Any) -> Grid:
    (root / "config/config.yaml").write_text(yaml.safe_dump({**CONFIG, "tables": {"t": table}}))
    return load_grid(root)


def write(
    grid: Grid, experiment: str, metrics: dict[str, float | None], runtime: str = "torch", **changes: Any
) -> Path:
    resolved = grid.resolve(experiment)
    document = {
        "experiment": experiment,
        **resolved.parts,
        "mode": "panoptic",
        "split": "test",
        "runtime": runtime,
        "precision": "fp32",
        "images": 12,
        "metrics": metrics,
        "per_class": [],
        "seconds": 1.5,
        "lineage": lineage(resolved.spec, "evaluate", runtime),
        "facts": {"commit": "a" * 40 + "-dirty"},
    }
    path = grid.root / "results" / experiment / evaluation_file(runtime, "fp32")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    training = {
        "experiment": experiment,
        "parameters": {"total": 47_400_000 if "swin" in experiment else 9_876_543, "trained": 5},
        "lineage": lineage(resolved.spec, "train"),
        "facts": {"commit": "b" * 40},
    }
    path.with_name("train.json").write_text(json.dumps(training))
    return path


def tables(grid: Grid) -> tuple[str, str, str]:
    compare(grid, "t", grid.root / "results")
    folder = grid.root / "results/tables"
    return tuple((folder / f"t.{end}").read_text() for end in ("csv", "md", "tex"))  # type: ignore[return-value]  # three


def test_runtimes_and_metrics_are_columns(root: Path) -> None:
    grid = grid_with(root, experiments=["mask2former_swin", "mask2former_res_net"], runtimes=["torch", "onnx"])
    for experiment, quality in (("mask2former_swin", 0.61239), ("mask2former_res_net", 0.5)):
        write(grid, experiment, {"mIoU": 0.9, "PQ": quality, "AP": None})
        write(grid, experiment, {"mIoU": 0.9, "PQ": quality - 0.001, "AP": None}, "onnx")
    csv, markdown, latex = tables(grid)
    data = lineage(grid.resolve("mask2former_swin").spec, "evaluate")["data"]
    source = f"commits {'b' * 12}, {'a' * 12}-dirty; digests of the data: demo test {data['test']} train {data['train']}."
    assert markdown.splitlines() == [
        "| model       | backbone | params (M) | PyTorch PQ | PyTorch AP | PyTorch mIoU | ONNX Runtime PQ | ONNX Runtime AP | ONNX Runtime mIoU |",
        "|-------------|----------|-----------:|-----------:|-----------:|-------------:|----------------:|----------------:|------------------:|",
        "| mask2former | swin     |       47.4 |   **61.2** |          - |     **90.0** |        **61.1** |               - |          **90.0** |",
        "| mask2former | res_net  |       9.88 |       50.0 |          - |     **90.0** |            49.9 |               - |          **90.0** |",
        "",
        "Percent, on demo test (12 images); bold is best, italic second.",
        "",
        f"From {source}",
    ]
    assert f"% From {source}" in latex
    numbers = pd.read_csv(io.StringIO(csv))
    assert set(numbers.query("experiment == 'mask2former_swin' and metric == 'PQ'")["value"]) == {0.61239, 0.61139}
    assert "AP" not in set(numbers["metric"])
    body = latex.split("\\midrule\n")[1].splitlines()
    assert body[0] == (
        r"mask2former & swin & 47.4 & \textbf{61.24} & -- & \textbf{90.00} & \textbf{61.14} & -- & \textbf{90.00} \\"
    )
    assert body[1] == r"mask2former & res\_net & 9.88 & 50.00 & -- & \textbf{90.00} & 49.90 & -- & \textbf{90.00} \\"
    assert r"\multicolumn{3}{c}{PyTorch} & \multicolumn{3}{c}{ONNX Runtime} \\" in latex
    assert r"\cmidrule(lr){4-6} \cmidrule(lr){7-9}" in latex
    assert latex.count(r"\begin{tabular}{llrrrrrrr}") == 1


def test_seeds_become_mean_and_spread(root: Path) -> None:
    names = ["mask2former_swin", "mask2former_swin-seed1", "mask2former_swin-short"]
    grid = grid_with(root, experiments=names, metrics=["PQ"])
    for name, quality in zip(names, (0.60, 0.64, 0.1), strict=True):
        write(grid, name, {"PQ": quality})
    csv, markdown, latex = tables(grid)
    assert markdown.splitlines()[2:4] == [
        "| mask2former | swin     | -       |       47.4 | **62.0 ± 2.8** |",
        "| mask2former | swin     | short   |       47.4 |           10.0 |",
    ]
    assert "mean ± standard deviation over up to 2 seeds" in markdown
    assert r"\textbf{62.00 $\pm$ 2.83}" in latex
    assert len(csv.splitlines()) == 4


def test_a_single_row_has_no_best(root: Path) -> None:
    grid = grid_with(root, experiments=["mask2former_swin"], latex_decimals=1, parameters=False)
    write(grid, "mask2former_swin", {"PQ": 0.6}).with_name("train.json").unlink()
    _, markdown, latex = tables(grid)
    assert r"mask2former & swin & 60.0 \\" in latex
    assert "best" not in markdown + latex and "params" not in markdown + latex


@pytest.mark.parametrize(
    ("table", "changes", "words"),
    [
        ({}, {"lineage": {"seed": 7}}, ["another spec", "seed: 7 -> 0", "snakemake"]),
        ({}, {"experiment": "mask2former_res_net"}, ["says it is of mask2former_res_net", "copied"]),
        ({}, {"runtime": "onnx"}, ["says it is of", "onnx"]),
        ({}, {"metrics": {"PQ": 61.2}}, ["PQ is 61.2", "between 0 and 1"]),
        ({}, {"metrics": {}}, ["metrics"]),
        ({}, {"images": "12"}, ["images"]),
        ({"metrics": ["PG"]}, {}, ["no evaluation has PG", "there are PQ"]),
        ({"experiments": ["mask2former_swin", "mask2former_swin"]}, {}, ["stands twice"]),
        ({"runtimes": []}, {}, ["asks for no evaluation"]),
        ({"runtimes": ["torch", "onnx"]}, {}, ["onnx_eval.json: no such file"]),
    ],
)
def test_a_wrong_file_is_refused_and_no_table_written(
    root: Path, table: dict[str, Any], changes: dict[str, Any], words: list[str]
) -> None:
    grid = grid_with(root, **({"experiments": ["mask2former_swin"]} | table))
    path = write(grid, "mask2former_swin", {"PQ": 0.6})
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError) as caught:
        compare(grid, "t", root / "results")
    for word in words:
        assert word in str(caught.value)
    assert not (root / "results/tables").exists()


def test_an_unreadable_file_is_named(root: Path) -> None:
    grid = grid_with(root, experiments=["mask2former_swin"])
    write(grid, "mask2former_swin", {"PQ": 0.6}).write_text('{"experiment": ')
    with pytest.raises(UserError, match=r"eval\.json, line 1"):
        compare(grid, "t", root / "results")


def test_latex_special_characters() -> None:
    assert escape_latex(r"a_b & 5% \x^~{}") == (r"a\_b \& 5\% \textbackslash{}x\textasciicircum{}\textasciitilde{}\{\}")


def test_no_torch_is_needed() -> None:
    code = "import sys, tessera.cli, tessera.reporting.compare, tessera.spec.planning; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
