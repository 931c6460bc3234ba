from __future__ import annotations

import io
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from tessera import provenance
from tessera.evaluation.statistics import Statistics, as_columns, write_statistics
from tessera.files import UserError
from tessera.reporting.compare import compare
from tessera.reporting.statistics import evaluated
from tessera.reporting.table import escape_latex
from tessera.spec.compose import Grid, load_grid
from tessera.spec.lineage import lineage
from tessera.spec.planning import Plan, evaluation_file

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
    source = (
        f"commits {'b' * 12}, {'a' * 12}-dirty; digests of the data: demo test {data['test']} train {data['train']}."
    )
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


def write_resampled(grid: Grid, experiment: str, accuracies: list[float], ids: list[int] | None = None) -> Path:
    """Images of one class and a hundred pixels each."""
    rows = [(image, 0, round(100 * value), 100, 100) for image, value in enumerate(accuracies)]
    image_ids = ids or list(range(1, len(accuracies) + 1))
    parts = {"semantic": as_columns("semantic", rows)}
    found = Statistics("semantic", ["ground"], [], [0], image_ids, parts)
    path = write(grid, experiment, {"PQ": None, **evaluated(found)})
    write_statistics(path.with_name("eval.statistics.json.gz"), found)
    return path


GOOD = [0.9, 0.8, 0.85, 0.95, 0.7, 0.9, 0.88, 0.93, 0.75, 0.81, 0.9, 0.99]


def test_intervals_and_differences_from_a_baseline(root: Path) -> None:
    names = ["mask2former_swin", "mask2former_swin-seed1", "mask2former_res_net", "mask2former_res_net-short"]
    wanted = {"metrics": ["mIoU", "pixel_accuracy"], "intervals": True, "baseline": names[2], "parameters": False}
    grid = grid_with(root, experiments=names, **wanted)
    write_resampled(grid, names[0], GOOD)
    write_resampled(grid, names[1], [value - 0.01 for value in GOOD])
    write_resampled(grid, names[2], [value - 0.1 for value in GOOD])
    write_resampled(grid, names[3], [value - 0.1 + 0.01 * (-1) ** place for place, value in enumerate(GOOD)])
    csv, markdown, latex = tables(grid)
    swin, base, other = (line.split("|") for line in markdown.splitlines()[2:5])
    assert re.fullmatch(r" *\*\*85\.8 ± 0\.7\*\* \[8\d\.\d, 9\d\.\d\]† *", swin[5])
    assert "†" not in "".join(base + other)
    assert (
        "† differs from mask2former_res_net (paired bootstrap, two-sided p < 0.05, 1000 resamples of the images)"
        in markdown
    )
    assert r"{\scriptsize [" in latex and r"$^{\dagger}$" in latex and r"p $<$ 0.05" in latex
    document = json.loads((root / "results/tables/t.json").read_text())
    cells = [row["cells"][1] for row in document["rows"]]
    assert [cell["mean"] for cell in cells] == pytest.approx([85.83, 76.33, 76.33], abs=0.01)
    assert cells[0]["difference"] == pytest.approx(9.5) and cells[0]["p"] == pytest.approx(2 / 1001)
    assert cells[1]["difference"] is None and cells[1]["p"] is None
    assert cells[2]["differs"] is False and cells[2]["p"] > 0.5
    low, high = cells[1]["interval"]
    # A mean over twelve images: 1.96 standard errors on either side, or nearly.
    assert (high - low) / 2 == pytest.approx(1.96 * 100 * statistics.pstdev(GOOD) / math.sqrt(12), rel=0.1)
    numbers = pd.read_csv(io.StringIO(csv))
    shown = numbers["metric"].isin(wanted["metrics"])
    assert numbers.loc[shown, "value"].between(numbers.loc[shown, "low"], numbers.loc[shown, "high"]).all()
    assert numbers.loc[~shown, "low"].isna().all() and shown.sum() == 8
    assert provenance.seal_holds(document)
    assert set(document["inputs"]) == {
        f"../{name}/{file}" for name in names for file in ("eval.json", "eval.statistics.json.gz")
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.with_name("eval.statistics.json.gz").unlink(), ["no such file", "snakemake"]),
        (
            lambda path: path.write_text(path.read_text().replace("0.8633", "0.8733")),
            ["_accuracy 0.863", "eval.json beside it says 0.873"],
        ),
        (lambda path: path.write_text(path.read_text().replace('"images": 12', '"images": 13')), ["12 images", "13"]),
    ],
)
def test_statistics_that_do_not_fit_are_refused(root: Path, change: Callable[[Path], None], words: list[str]) -> None:
    grid = grid_with(root, experiments=["mask2former_swin"], intervals=True)
    change(write_resampled(grid, "mask2former_swin", GOOD))
    with pytest.raises(UserError) as caught:
        compare(grid, "t", root / "results")
    for word in words:
        assert word in str(caught.value)
    assert not (root / "results/tables").exists()


def test_models_on_other_images_are_not_compared(root: Path) -> None:
    names = ["mask2former_swin", "mask2former_res_net"]
    grid = grid_with(root, experiments=names, baseline=names[0])
    write_resampled(grid, names[0], GOOD)
    write_resampled(grid, names[1], GOOD, ids=list(range(101, 113)))
    with pytest.raises(UserError, match="other images of demo test"):
        compare(grid, "t", root / "results")


def test_a_baseline_is_one_of_the_experiments(root: Path) -> None:
    with pytest.raises(UserError, match=r"tables\.t\.baseline.*did you mean mask2former_swin\?"):
        grid_with(root, experiments=["mask2former_swin"], baseline="mask2former_swim")


def test_what_a_table_is_made_from(root: Path) -> None:
    names = ["mask2former_swin", "mask2former_swin-seed1"]
    grid_with(root, experiments=names, runtimes=["torch", "onnx"], intervals=True)
    plan = Plan({}, root)
    assert {Path(path).name for path in plan.table_sources("t")} == {
        *("eval.json", "onnx_eval.json", "train.json", "eval.statistics.json.gz", "onnx_eval.statistics.json.gz")
    }
    assert len(plan.table_sources("t")) == 10
    grid_with(root, experiments=names, parameters=False)
    assert Plan({}, root).table_sources("t") == [f"results/{name}/eval.json" for name in names]


def test_second_best_is_underlined(root: Path) -> None:
    names = ["mask2former_swin", "mask2former_res_net", "mask2former_swin-short", "mask2former_res_net-short"]
    grid = grid_with(root, experiments=names, metrics=["PQ"])
    for name, quality in zip(names, (0.5, 0.70001, 0.6, 0.6), strict=True):
        write(grid, name, {"PQ": quality})
    _, markdown, latex = tables(grid)
    assert [line.split("|")[5].strip() for line in markdown.splitlines()[2:6]] == [
        "50.0",
        "**70.0**",
        "_60.0_",
        "_60.0_",
    ]
    assert latex.count(r"\underline{60.00}") == 2 and latex.count(r"\textbf{70.00}") == 1


PAPER = r"""\documentclass{article}
\usepackage[margin=25mm]{geometry}
\usepackage{booktabs}
\begin{document}
\begin{table}
\centering
\caption{Models.}
\input{results/tables/t}
\end{table}
\end{document}
"""


@pytest.mark.skipif(
    shutil.which("pdflatex") is None, reason="pdflatex is not installed (Debian: texlive-latex-recommended)"
)
def test_latex_compiles(root: Path) -> None:
    names = ["mask2former_swin", "mask2former_swin-seed1", "mask2former_res_net", "mask2former_res_net-short"]
    grid = grid_with(root, experiments=names, metrics=["mIoU", "pixel_accuracy"], intervals=True, baseline=names[2])
    for place, name in enumerate(names):
        write_resampled(grid, name, [value - 0.03 * place for value in GOOD])
    tables(grid)
    (root / "paper.tex").write_text(PAPER)
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert (root / "paper.pdf").stat().st_size > 10_000
    assert "Missing character" not in done.stdout and "undefined" not in done.stdout
    assert "Overfull" not in done.stdout, done.stdout[-3000:]


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
