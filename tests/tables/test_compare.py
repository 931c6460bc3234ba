from __future__ import annotations

import hashlib
import io
import itertools
import math
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
from tessera.files import UserError, read_json, write_json
from tessera.metrics.formulas import evaluated
from tessera.metrics.statistics import Statistics, as_columns, write_statistics
from tessera.provenance import sealed
from tessera.spec.compose import Grid, load_grid
from tessera.spec.lineage import lineage
from tessera.spec.planning import Plan, evaluation_file
from tessera.tables.compare import compare
from tessera.tables.table import escape_latex

CONFIG: dict[str, Any] = {
    "models": ["mask2former"],
    "backbones": ["swin", "res_net"],
    "datasets": ["demo", "street"],
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
        "datasets/street": {"dataset": {"generator": {"seed": 1}}},
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
    grid: Grid, experiment: str, metrics: dict[str, float], runtime: str = "torch", testing: str = "", **changes: Any
) -> Path:
    """As the stages leave them, an evaluation with ``changes`` and a training's report."""
    resolved = grid.resolve(experiment, testing=testing)
    document = {
        "experiment": experiment,
        **resolved.parts,
        "mode": "panoptic",
        "split": resolved.spec.evaluate.split,
        "runtime": runtime,
        "precision": "fp32",
        "testing": testing,
        "images": 12,
        "metrics": metrics,
        "per_class": [],
        "seconds": 1.5,
        "lineage": lineage(resolved.spec, "evaluate", runtime),
        "facts": {"commit": "a" * 40 + "-dirty"},
        **changes,
    }
    path = grid.root / "results" / experiment / evaluation_file(runtime, "fp32", testing)
    write_json(path, sealed(document))
    training = {
        "experiment": experiment,
        "parameters": {"total": 47_400_000 if "swin" in experiment else 9_876_543, "trained": 5},
        "lineage": lineage(resolved.spec, "train"),
        "facts": {"commit": "b" * 40},
    }
    write_json(path.with_name("train.json"), sealed(training))
    return path


def reseal(path: Path, **changes: Any) -> None:
    document = {**read_json(path), **changes}
    write_json(path, sealed({key: document[key] for key in document.keys() - {"inputs", "outputs", "seal"}}))


def tables(grid: Grid) -> tuple[str, str, str]:
    compare(grid, "t", grid.root / "results")
    folder = grid.root / "results/tables"
    return tuple((folder / f"t.{end}").read_text() for end in ("csv", "md", "tex"))  # type: ignore[return-value]  # three


def test_runtimes_and_metrics_are_columns(root: Path) -> None:
    grid = grid_with(root, experiments=["mask2former_swin", "mask2former_res_net"], runtimes=["torch", "onnx"])
    for experiment, quality in (("mask2former_swin", 0.61239), ("mask2former_res_net", 0.5)):
        found = {"mIoU": 0.9, "PQ": quality}
        write(grid, experiment, found if "res_net" in experiment else found | {"AP": 0.25})
        write(grid, experiment, {"mIoU": 0.9, "PQ": quality - 0.001}, "onnx")
    csv, markdown, latex = tables(grid)
    data = lineage(grid.resolve("mask2former_swin").spec, "evaluate")["data"]
    source = (
        f"commits {'b' * 12}, {'a' * 12}-dirty; digests of the data: demo test {data['test']} train {data['train']}."
    )
    assert markdown.splitlines() == [
        "| model       | backbone | params (M) | PyTorch PQ | PyTorch AP | PyTorch mIoU | ONNX Runtime PQ | ONNX Runtime AP | ONNX Runtime mIoU |",
        "|-------------|----------|-----------:|-----------:|-----------:|-------------:|----------------:|----------------:|------------------:|",
        "| mask2former | swin     |       47.4 |   **61.2** |       25.0 |     **90.0** |        **61.1** |               - |          **90.0** |",
        "| mask2former | res_net  |       9.88 |       50.0 |          - |     **90.0** |            49.9 |               - |          **90.0** |",
        "",
        "Percent, on demo test (12 images); trained from random weights; bold is best, italic second.",
        "",
        f"From {source}",
    ]
    assert f"% From {source}" in latex
    numbers = pd.read_csv(io.StringIO(csv))
    assert set(numbers.query("experiment == 'mask2former_swin' and metric == 'PQ'")["value"]) == {0.61239, 0.61139}
    assert (numbers["metric"] == "AP").sum() == 1
    body = latex.split("\\midrule\n")[1].splitlines()
    assert body[0] == (
        r"mask2former & swin & 47.4 & \textbf{61.24} & 25.00 & \textbf{90.00} & \textbf{61.14} & -- & \textbf{90.00} \\"
    )
    assert body[1] == r"mask2former & res\_net & 9.88 & 50.00 & -- & \textbf{90.00} & 49.90 & -- & \textbf{90.00} \\"
    assert r"\multicolumn{3}{c}{PyTorch} & \multicolumn{3}{c}{ONNX Runtime} \\" in latex
    assert r"\cmidrule(lr){4-6} \cmidrule(lr){7-9}" in latex
    assert latex.count(r"\begin{tabular}{llrrrrrrr}") == 1


def test_what_weights_started_from_stands_below(root: Path) -> None:
    (root / "weights.pth").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()[:12]
    path = str(root / "weights.pth")
    names = ["mask2former_swin", "mask2former_swin-seed1", "mask2former_res_net", "mask2former_swin-short"]
    changes: dict[str, Any] = {
        "backbones/res_net": {"model": {"backbone": {"name": "resnet18", "pretrained": "timm"}}},
        "variants/short": {"train": {"num_epochs": 0, "pretrained_model_path": path}},
    }
    for part, content in changes.items():
        (root / f"config/{part}.yaml").write_text(yaml.safe_dump(content))
    grid = grid_with(root, experiments=names)
    for name in names:
        write(grid, name, {"PQ": 0.5})
    _, markdown, latex = tables(grid)
    started = [
        "mask2former_swin: trained from random weights.",
        "mask2former_res_net: trained from a backbone of timm.",
        f"mask2former_swin-short: not trained, weights of weights.pth (sha256 {digest}).",
    ]
    assert [line for line in markdown.splitlines() if "trained" in line] == started
    assert "trained" in latex and f"(sha256 {digest})" in (root / "results/tables/t.html").read_text()

    (root / "config/variants/short.yaml").write_text(yaml.safe_dump({"train": {"pretrained_model_path": path}}))
    grid = grid_with(root, experiments=["mask2former_res_net-short"])
    write(grid, "mask2former_res_net-short", {"PQ": 0.5})
    assert f"; trained from weights.pth (sha256 {digest}) and a backbone of timm" in tables(grid)[1]


SIDE_BY_SIDE = {
    "columns": [
        "| model       | backbone | PyTorch PQ | PyTorch strict PQ |",
        "|-------------|----------|-----------:|------------------:|",
        "| mask2former | swin     |   **61.0** |          **60.0** |",
        "| mask2former | res_net  |       50.0 |              49.0 |",
    ],
    "rows": [
        "| model       | backbone | variant | PyTorch PQ |",
        "|-------------|----------|---------|-----------:|",
        "| mask2former | swin     | -       |   **61.0** |",
        "| mask2former | swin     | strict  |     _60.0_ |",
        "| mask2former | res_net  | -       |       50.0 |",
        "| mask2former | res_net  | strict  |       49.0 |",
    ],
}


@pytest.mark.parametrize("where", SIDE_BY_SIDE)
def test_ways_of_testing_stand_beside_each_other(root: Path, where: str) -> None:
    way = root / "config/testing/strict.yaml"
    way.parent.mkdir()
    way.write_text("postprocess: {object_mask_threshold: 0.9}\n")
    names = ["mask2former_swin", "mask2former_res_net"]
    grid = grid_with(root, experiments=names, testing=["", "strict"], testing_as=where, parameters=False)
    for experiment, quality in zip(names, (0.61, 0.5), strict=True):
        write(grid, experiment, {"PQ": quality})
        write(grid, experiment, {"PQ": quality - 0.01}, testing="strict")
    csv, markdown, _ = tables(grid)
    assert markdown.splitlines()[: len(SIDE_BY_SIDE[where])] == SIDE_BY_SIDE[where]
    numbers = pd.read_csv(io.StringIO(csv), keep_default_na=False)
    assert numbers.set_index(["experiment", "testing"])["value"].to_dict() == {
        (name, testing): quality - 0.01 * (testing == "strict")
        for name, quality in zip(names, (0.61, 0.5), strict=True)
        for testing in ("", "strict")
    }
    (root / "results/mask2former_swin/eval.strict.json").write_bytes(
        (root / "results/mask2former_swin/eval.json").read_bytes()
    )
    with pytest.raises(
        UserError, match=r"says it is of mask2former_swin torch fp32, expected mask2former_swin torch fp32 strict"
    ):
        compare(grid, "t", root / "results")


def test_tasks_are_tables_of_their_own_and_no_zero_stands_out(root: Path) -> None:
    names = ["mask2former_swin", "mask2former_res_net", "mask2former_swin-short", "mask2former_res_net-short"]
    grid = grid_with(root, experiments=names)
    write(grid, names[0], {"PQ": 0.5, "AP": 0.0001, "mIoU": 0.0}, remarks=["3 of 12 images are <cut>_off"])
    write(grid, names[1], {"PQ": 0.4, "AP": 0.0002, "mIoU": 0.0}, remarks=["3 of 12 images are <cut>_off"])
    write(grid, names[2], {"AP": 0.2, "box_AP": 0.3}, mode="instance", remarks=["of one alone"])
    write(grid, names[3], {"AP": 0.3, "box_AP": 0.0}, mode="instance", remarks=["3 of 12 images are <cut>_off"])
    csv, markdown, latex = tables(grid)
    assert [line.replace(" ", "") for line in markdown.splitlines()[:14] if "--" not in line] == [
        "###Panoptic",
        "",
        "|model|backbone|variant|params(M)|PyTorchPQ|PyTorchAP|PyTorchmIoU|",
        "|mask2former|swin|-|47.4|**50.0**|0.0|0.0|",
        "|mask2former|res_net|-|9.88|40.0|0.0|0.0|",
        "",
        "###Instance",
        "",
        "|model|backbone|variant|params(M)|PyTorchAP|PyTorchbox_AP|",
        "|mask2former|swin|short|47.4|20.0|**30.0**|",
        "|mask2former|res_net|short|9.88|**30.0**|0.0|",
        "",
    ]
    assert f"{names[0]}, {names[1]}, {names[3]}: 3 of 12 images are <cut>_off." in markdown
    assert f"{names[2]}: of one alone." in markdown
    assert latex.count(r"\begin{tabular}") == 2 and r"\textbf{Instance}\par" in latex
    assert r"are $<$cut$>$\_off." in latex
    assert set(pd.read_csv(io.StringIO(csv)).query("metric == 'box_AP'")["mode"]) == {"instance"}
    document = read_json(root / "results/tables/t.json")
    assert [row["mode"] for row in document["rows"]] == ["panoptic", "panoptic", "instance", "instance"]
    page = (root / "results/tables/t.html").read_text()
    assert page.count("<table") == 2 and page.count('id="row-4"') == 1 and "are &lt;cut&gt;_off." in page
    assert page.count("<strong>") == 3


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
    assert "mean ± sample standard deviation over up to 2 seeds" in markdown
    assert r"\textbf{62.00 $\pm$ 2.83}" in latex
    assert len(csv.splitlines()) == 4


def test_other_seeds_in_other_rows_are_no_spread(root: Path) -> None:
    names = ["mask2former_swin", "mask2former_res_net-seed1"]
    grid = grid_with(root, experiments=names)
    for name in names:
        write(grid, name, {"PQ": 0.5})
    assert "±" not in "".join(tables(grid))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train: {num_epochs: 5}", r"train\.num_epochs: \d+ -> 5"),
        ("evaluate: {split: val}", "evaluate.split: test -> val"),
    ],
)
def test_seeds_of_a_row_differ_in_nothing_else(root: Path, change: str, words: str) -> None:
    names = ["mask2former_swin", "mask2former_swin-seed1"]
    (root / "config/experiments").mkdir()
    (root / "config/experiments/mask2former_swin-demo-seed1.yaml").write_text(change)
    grid = grid_with(root, experiments=names)
    for name in names:
        write(grid, name, {"PQ": 0.5})
    with pytest.raises(UserError, match=rf"{names[0]} and {names[1]} are one row(.|\n)*{words}"):
        compare(grid, "t", root / "results")
    assert not (root / "results/tables").exists()


def test_best_is_judged_among_the_rows_of_one_dataset(root: Path) -> None:
    scores = {
        "mask2former_swin": 0.9,
        "mask2former_res_net": 0.8,
        "mask2former_swin-short": 0.7,
        "mask2former_swin-street": 0.3,
        "mask2former_res_net-street": 0.4,
    }
    grid = grid_with(root, experiments=list(scores), metrics=["PQ"], parameters=False)
    for name, quality in scores.items():
        write(grid, name, {"PQ": quality})
    _, markdown, latex = tables(grid)
    shown = [line.split("|")[-2].strip() for line in markdown.splitlines()[2:7]]
    assert shown == ["**90.0**", "_80.0_", "70.0", "30.0", "**40.0**"]
    assert [line.split("|")[3].strip() for line in markdown.splitlines()[2:7]] == ["demo"] * 3 + ["street"] * 2
    html = (root / "results/tables/t.html").read_text()
    for number in ("90.0", "40.0"):
        assert f"<strong>{number}</strong>" in html and rf"\textbf{{{number}0}}" in latex
    assert "<u>80.0</u>" in html and r"\underline{80.00}" in latex
    assert html.count("<strong>") == latex.count(r"\textbf{") == 2
    assert html.count("<u>") == latex.count(r"\underline{") == 1


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
        ({}, {"metrics": {"PQ": 61.2}}, ["metrics.PQ", "61.2"]),
        ({}, {"metrics": {}}, ["metrics"]),
        ({}, {"metrics": {"PQ": None}}, ["metrics.PQ"]),
        ({}, {"images": "12"}, ["images"]),
        ({"metrics": ["PG"]}, {}, ["no evaluation has PG", "mode is panoptic"]),
        ({"metrics": ["PQ", "APl"]}, {}, ["no evaluation has APl", "there are PQ"]),
        ({"experiments": ["mask2former_swin", "mask2former_swin"]}, {}, ["stands twice"]),
        ({"runtimes": []}, {}, ["asks for no evaluation"]),
        ({"runtimes": ["torch", "onnx"]}, {}, ["onnx_eval.json: no such file"]),
    ],
)
def test_a_wrong_file_is_refused_and_no_table_written(
    root: Path, table: dict[str, Any], changes: dict[str, Any], words: list[str]
) -> None:
    grid = grid_with(root, **({"experiments": ["mask2former_swin"]} | table))
    reseal(write(grid, "mask2former_swin", {"PQ": 0.6}), **changes)
    with pytest.raises(UserError) as caught:
        compare(grid, "t", root / "results")
    for word in words:
        assert word in str(caught.value)
    assert not (root / "results/tables").exists()


@pytest.mark.parametrize("file", ["eval.json", "train.json"])
def test_an_edited_record_is_refused(root: Path, file: str) -> None:
    grid = grid_with(root, experiments=["mask2former_swin"])
    path = write(grid, "mask2former_swin", {"PQ": 0.6}).with_name(file)
    document = read_json(path)
    write_json(path, {**document, "facts": {}})
    with pytest.raises(UserError, match=f"{file}: was edited after it was written"):
        compare(grid, "t", root / "results")
    del document["seal"]
    write_json(path, document)
    with pytest.raises(UserError, match=f"{file}: carries no seal"):
        compare(grid, "t", root / "results")
    assert not (root / "results/tables").exists()


def write_resampled(grid: Grid, experiment: str, accuracies: list[float], ids: list[int] | None = None) -> Path:
    """Images of one class and a hundred pixels each."""
    rows = [(image, 0, round(100 * value), 100, 100) for image, value in enumerate(accuracies)]
    image_ids = ids or list(range(1, len(accuracies) + 1))
    parts = {"semantic": as_columns("semantic", rows)}
    found = Statistics("semantic", ["ground"], [], [0], image_ids, parts)
    path = write(grid, experiment, evaluated(found), images=len(accuracies))
    write_statistics(path.with_name("eval.statistics.json.gz"), found)
    return path


def cells(root: Path, column: int = 0) -> list[dict[str, Any]]:
    return [row["cells"][column] for row in read_json(root / "results/tables/t.json")["rows"]]


GOOD = [0.9, 0.8, 0.85, 0.95, 0.7, 0.9, 0.88, 0.93, 0.75, 0.81, 0.9, 0.99]
ENOUGH = GOOD * 2
"""For intervals."""


def test_intervals_and_differences_from_a_baseline(root: Path) -> None:
    names = ["mask2former_swin", "mask2former_res_net", "mask2former_res_net-short"]
    wanted = {"metrics": ["mIoU", "pixel_accuracy"], "intervals": True, "baseline": names[1], "parameters": False}
    grid = grid_with(root, experiments=names, **wanted)
    write_resampled(grid, names[0], ENOUGH)
    write_resampled(grid, names[1], [value - 0.1 for value in ENOUGH])
    write_resampled(grid, names[2], [value - 0.1 + 0.01 * (-1) ** place for place, value in enumerate(ENOUGH)])
    csv, markdown, latex = tables(grid)
    swin, base, other = (line.split("|") for line in markdown.splitlines()[2:5])
    assert swin[5].strip().startswith("**86.3** [8") and swin[5].strip().endswith("]†")
    assert "†" not in "".join(base + other)
    assert (
        "† differs from mask2former_res_net (paired randomization test over the images, two-sided p < 0.05)" in markdown
    )
    assert r"{\scriptsize [" in latex and r"$^{\dagger}$" in latex and r"p $<$ 0.05" in latex
    document = read_json(root / "results/tables/t.json")
    found = cells(root, 1)
    assert [cell["mean"] for cell in found] == pytest.approx([86.33, 76.33, 76.33], abs=0.01)
    assert found[0]["difference"] == pytest.approx(10) and found[0]["p"] == 1 / 1001
    assert found[1]["difference"] is None and found[1]["p"] is None
    assert found[2]["differs"] is False and found[2]["p"] == 1
    numbers = pd.read_csv(io.StringIO(csv))
    shown = numbers["metric"].isin(wanted["metrics"])
    assert numbers.loc[shown, "value"].between(numbers.loc[shown, "low"], numbers.loc[shown, "high"]).all()
    assert numbers.loc[~shown, "low"].isna().all() and shown.sum() == 6
    assert provenance.seal_holds(document)
    assert set(document["inputs"]) == {
        f"../{name}/{file}" for name in names for file in ("eval.json", "eval.statistics.json.gz")
    }


def test_images_of_all_seeds_are_drawn_together(root: Path) -> None:
    """The interval and p of a mean over seeds are those of the images' means over seeds."""
    names = ["mask2former_swin-seed1", "mask2former_swin", "mask2former_res_net", "mask2former_res_net-seed1"]
    grid = grid_with(root, experiments=names, metrics=["pixel_accuracy"], intervals=True, baseline=names[3])
    # Seeds that err on opposite images: their mean varies less over images than either.
    sway = [0.1 * (-1) ** place for place in range(24)]
    base = [0.6 + 0.01 * (place % 7) for place in range(24)]
    changes = [0.02 if place % 3 else -0.03 for place in range(24)]
    scores = {
        names[0]: [a - b + c for a, b, c in zip(base, sway, changes, strict=True)],
        names[1]: [a + b + c for a, b, c in zip(base, sway, changes, strict=True)],
        names[2]: [a + b for a, b in zip(base, sway, strict=True)],
        names[3]: [a - b for a, b in zip(base, sway, strict=True)],
    }
    for name, values in scores.items():
        write_resampled(grid, name, values)
    tables(grid)
    ours, theirs = cells(root)
    low, high = theirs["interval"]
    # A mean over 24 images: 1.96 standard errors on either side, or nearly.
    assert (low + high) / 2 == pytest.approx(100 * statistics.mean(base), abs=0.1)
    assert (high - low) / 2 == pytest.approx(1.96 * 100 * statistics.pstdev(base) / math.sqrt(24), rel=0.1)
    assert theirs["std"] == pytest.approx(0, abs=1e-9) and theirs["p"] is None
    assert ours["difference"] == pytest.approx(100 * statistics.mean(changes))
    # Of 24 images 16 are 0.02 better and 8 are 0.03 worse; the sum after a swap of i of these and j of those.
    after = {(i, j): abs((16 - 2 * i) * 0.02 - (8 - 2 * j) * 0.03) for i, j in itertools.product(range(17), range(9))}
    as_large = sum(math.comb(16, i) * math.comb(8, j) for (i, j), value in after.items() if value >= 0.08 - 1e-9)
    assert ours["p"] == pytest.approx(as_large / 2**24, abs=0.03)


def test_few_images_have_exact_p_and_no_interval(root: Path) -> None:
    names = ["mask2former_swin", "mask2former_res_net"]
    grid = grid_with(root, experiments=names, metrics=["pixel_accuracy"], intervals=True, baseline=names[1])
    changes = [0.1, 0.02, 0.03, -0.01, 0.02, 0.05]
    write_resampled(grid, names[0], [0.5 + change for change in changes])
    write_resampled(grid, names[1], [0.5] * 6)
    csv, markdown, _ = tables(grid)
    ours, theirs = cells(root)
    sums = [
        sum(sign * change for sign, change in zip(signs, changes, strict=True))
        for signs in itertools.product((1, -1), repeat=6)
    ]
    assert ours["p"] == sum(abs(value) > sum(changes) - 1e-9 for value in sums) / 64
    assert ours["interval"] is None and theirs["interval"] is None and "low" not in csv
    assert "no interval for fewer than 20 images" in markdown and "bootstrap" not in markdown


def test_rows_without_a_partner_are_not_compared(root: Path) -> None:
    names = ["mask2former_swin", "mask2former_res_net", "mask2former_swin-street", "mask2former_swin-short"]
    grid = grid_with(root, experiments=[*names, f"{names[3]}-seed1"], metrics=["mIoU"], baseline=names[0])
    for place, name in enumerate([*names, f"{names[3]}-seed1"]):
        write_resampled(grid, name, [value - 0.1 * place for value in GOOD])
    _, markdown, _ = tables(grid)
    assert [cell["p"] for cell in cells(root)] == [None, 1 / 1001, None, None]
    assert [cell["difference"] is None for cell in cells(root)] == [True, False, True, True]
    assert markdown.count("†") == 2  # one row and the note
    assert "rows on other data or with another number of seeds are not compared" in markdown
    compare(grid_with(root, experiments=names[:2], baseline=names[0]), "t", root / "results")
    assert "not compared" not in (root / "results/tables/t.md").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.with_name("eval.statistics.json.gz").unlink(), ["no such file", "snakemake"]),
        (
            lambda path: reseal(path, metrics={**read_json(path)["metrics"], "pixel_accuracy": 0.8733}),
            ["eval.json: pixel_accuracy is 0.8733", "give 0.863"],
        ),
        (lambda path: reseal(path, images=13), ["12 images", "13"]),
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


@pytest.mark.parametrize("name", ["main results", "$(touch x)", "a;b", "-x", "a/b", ""])
def test_a_table_has_a_name_that_files_and_shells_take(root: Path, name: str) -> None:
    (root / "config/config.yaml").write_text(yaml.safe_dump({**CONFIG, "tables": {name: {}, "main-2": {}}}))
    with pytest.raises(UserError) as caught:
        load_grid(root)
    assert f"tables: {name!r} is no name of a table" in str(caught.value) and "main-2" not in str(caught.value)


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


def of_four_models(root: Path, *qualities: float) -> tuple[str, str]:
    """Markdown and LaTeX of a table of their panoptic qualities."""
    names = ["mask2former_swin", "mask2former_res_net", "mask2former_swin-short", "mask2former_res_net-short"]
    grid = grid_with(root, experiments=names, metrics=["PQ"])
    for name, quality in zip(names, qualities, strict=True):
        write(grid, name, {"PQ": quality})
    _, markdown, latex = tables(grid)
    return markdown, latex


def test_nothing_is_second_beside_two_best(root: Path) -> None:
    markdown, latex = of_four_models(root, 0.9, 0.9, 0.9, 0.1)
    assert markdown.count("**90.0**") == 3 and "10.0 |" in markdown and "_10.0_" not in markdown
    assert "underline{1" not in latex


def test_second_best_is_underlined(root: Path) -> None:
    markdown, latex = of_four_models(root, 0.5, 0.70001, 0.6, 0.6)
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
        write_resampled(grid, name, [value - 0.03 * place for value in ENOUGH])
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
    code = "import sys, tessera.cli, tessera.tables.compare, tessera.spec.planning; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
