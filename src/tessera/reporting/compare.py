"""The comparison of models: one row per model, backbone, dataset and variant, one column per runtime, precision and metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tessera.files import UserError, write_text
from tessera.reporting.collect import Evaluation, collect
from tessera.spec.compose import Grid

MAIN_METRICS = ("PQ", "SQ", "RQ", "AP", "AP50", "box_AP", "mIoU", "pixel_accuracy")
"""Shown where a table names no metrics, in this order, as far as there are any."""

RUNTIME_NAMES = {"torch": "PyTorch", "onnx": "ONNX Runtime", "trt": "TensorRT"}

ROW = ["model", "backbone", "dataset", "variant"]
COLUMN = ["runtime", "precision", "metric"]
DATASET = ROW.index("dataset")

Row = tuple[str, str, str, str]
Column = tuple[str, str, str]


@dataclass(frozen=True)
class Cell:
    mean: float
    """Percent."""
    std: float | None
    """Over seeds, of the sample (n - 1); None where there is one seed."""

    def text(self, decimals: int, plus_minus: str = "±") -> str:
        spread = "" if self.std is None else f" {plus_minus} {self.std:.{decimals}f}"
        return f"{self.mean:.{decimals}f}{spread}"


def compare(grid: Grid, table: str, results: Path) -> None:
    """Writes ``results/tables/<table>.csv`` (every number, in full), ``.md`` and ``.tex`` (percent, mean and spread over seeds)."""
    evaluations = collect(grid, table, results)
    definition = grid.tables[table]
    metrics = choose_metrics(table, evaluations, definition.metrics)
    numbers = long_form(evaluations)
    cells = summarise(numbers, metrics)
    folder = results / "tables"
    write_text(folder / f"{table}.csv", numbers.to_csv(index=False, lineterminator="\n"))
    text = to_markdown(cells, evaluations, definition.decimals)
    write_text(folder / f"{table}.md", text)
    write_text(folder / f"{table}.tex", to_latex(cells, evaluations, definition.latex_decimals))
    print(text, end="", flush=True)


def choose_metrics(table: str, evaluations: Sequence[Evaluation], asked: Sequence[str]) -> list[str]:
    """Those asked for, or the main ones that any evaluation has. Raises UserError for one that none has."""
    known = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.metrics))
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise UserError(
            f"config/config.yaml, tables.{table}.metrics: no evaluation has {', '.join(unknown)}; there are {', '.join(known)}"
        )
    return list(asked) or [name for name in MAIN_METRICS if name in known] or known


def long_form(evaluations: Sequence[Evaluation]) -> pd.DataFrame:
    """One row per number, as it was measured; a metric without a value has no row."""
    return pd.DataFrame(
        [
            {
                "experiment": evaluation.experiment,
                "model": evaluation.model,
                "backbone": evaluation.backbone,
                "dataset": evaluation.dataset,
                "variant": "-".join(evaluation.variants),
                "seed": evaluation.seed,
                "split": evaluation.split,
                "images": evaluation.images,
                "runtime": evaluation.runtime,
                "precision": evaluation.precision,
                "metric": metric,
                "value": value,
            }
            for evaluation in evaluations
            for metric, value in evaluation.metrics.items()
            if value is not None
        ]
    )


def summarise(numbers: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Cells (None where nothing was measured), rows by ``ROW`` and columns by ``COLUMN``, both in order of appearance."""
    wanted = numbers[numbers["metric"].isin(list(metrics))]
    columns = [
        (runtime, precision, metric)
        for runtime, precision in numbers[COLUMN[:2]].drop_duplicates().itertuples(index=False)
        for metric in metrics
    ]
    rows = list(numbers[ROW].drop_duplicates().itertuples(index=False, name=None))
    cells = {
        key: Cell(100 * values.mean(), 100 * values.std() if len(values) > 1 else None)
        for key, values in wanted.groupby(ROW + COLUMN, sort=False)["value"]
    }
    return pd.DataFrame(
        [[cells.get((*row, *column)) for column in columns] for row in rows],
        index=pd.MultiIndex.from_tuples(rows, names=ROW),
        columns=pd.MultiIndex.from_tuples(columns, names=COLUMN),
        dtype=object,
    )


def to_markdown(cells: pd.DataFrame, evaluations: Sequence[Evaluation], decimals: int) -> str:
    """A pipe table aligned for a terminal, and one line that says what the numbers are."""
    keys = shown_keys(cells)
    header = keys + [" ".join(part for part in (*_runtime(column), column[2]) if part) for column in _columns(cells)]
    lines = [
        [*_row_texts(row, keys), *("-" if cell is None else cell.text(decimals) for cell in values)]
        for row, values in zip(_rows(cells), cells.to_numpy(), strict=True)
    ]
    widths = [max(len(line[place]) for line in [header, *lines]) for place in range(len(header))]
    aligned = [
        "| "
        + " | ".join(
            text.ljust(width) if place < len(keys) else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in [header, *lines]
    ]
    rule = "|" + "|".join(
        "-" * (width + 2) if place < len(keys) else "-" * (width + 1) + ":" for place, width in enumerate(widths)
    )
    return "\n".join([aligned[0], rule + "|", *aligned[1:], "", describe(evaluations), ""])


def to_latex(cells: pd.DataFrame, evaluations: Sequence[Evaluation], decimals: int) -> str:
    """A booktabs tabular; the best number of each column and dataset is bold."""
    keys = shown_keys(cells)
    best = _best(cells, decimals)
    groups: dict[str, int] = {}
    for column in _columns(cells):
        name = " ".join(part for part in _runtime(column) if part)
        groups[name] = groups.get(name, 0) + 1
    heads, rules, start = [], [], len(keys) + 1
    for name, width in groups.items():
        heads.append(f"\\multicolumn{{{width}}}{{c}}{{{escape_latex(name)}}}")
        rules.append(f"\\cmidrule(lr){{{start}-{start + width - 1}}}")
        start += width
    titles = [escape_latex(text) for text in [*keys, *(column[2] for column in _columns(cells))]]
    body = []
    for row, values in zip(_rows(cells), cells.to_numpy(), strict=True):
        texts = [escape_latex(text) for text in _row_texts(row, keys)]
        for column, cell in zip(_columns(cells), values, strict=True):
            text = "--" if cell is None else cell.text(decimals, r"$\pm$")
            is_best = cell is not None and best.get((row[DATASET], column)) == round(cell.mean, decimals)
            texts.append(f"\\textbf{{{text}}}" if is_best else text)
        body.append(" & ".join(texts) + r" \\")
    return "\n".join(
        [
            f"% {describe(evaluations)}",
            f"\\begin{{tabular}}{{{'l' * len(keys)}{'r' * len(cells.columns)}}}",
            r"\toprule",
            " & ".join([""] * len(keys) + heads).strip() + r" \\",
            " ".join(rules),
            " & ".join(titles) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def shown_keys(cells: pd.DataFrame) -> list[str]:
    """Columns that name a row: dataset and variant only where rows differ in them."""
    return [key for key in ROW if key in ROW[:2] or cells.index.get_level_values(key).nunique() > 1]


def describe(evaluations: Sequence[Evaluation]) -> str:
    """What was measured, on how many images, over how many seeds."""
    sets = dict.fromkeys(f"{e.dataset} {e.split} ({e.images} images)" for e in evaluations)
    seeds = len({evaluation.seed for evaluation in evaluations})
    spread = f"; mean ± standard deviation over up to {seeds} seeds" if seeds > 1 else ""
    return f"Percent, on {', '.join(sets)}{spread}."


def escape_latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)


def _rows(cells: pd.DataFrame) -> list[Row]:
    return list(cells.index)


def _columns(cells: pd.DataFrame) -> list[Column]:
    columns: list[Any] = cells.columns.to_list()
    return columns


def _runtime(column: Column) -> tuple[str, str]:
    """fp32 goes without saying."""
    runtime, precision, _ = column
    return RUNTIME_NAMES.get(runtime, runtime), "" if precision == "fp32" else precision


def _row_texts(row: Row, keys: Sequence[str]) -> list[str]:
    return [text or "-" for key, text in zip(ROW, row, strict=True) if key in keys]


def _best(cells: pd.DataFrame, decimals: int) -> dict[tuple[str, Column], float]:
    """(dataset, column) -> highest mean as printed, so that equal texts are all bold; none where there is nothing to compare."""
    best: dict[tuple[str, Column], list[float]] = {}
    for row, values in zip(_rows(cells), cells.to_numpy(), strict=True):
        for column, cell in zip(_columns(cells), values, strict=True):
            if cell is not None:
                best.setdefault((row[DATASET], column), []).append(round(cell.mean, decimals))
    return {key: max(means) for key, means in best.items() if len(means) > 1}
