"""The figures of a table: what they need of its experiments, checked on the way in as evaluations are, drawn and written."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from tessera import provenance
from tessera.files import UserError, missing, workflow_command, write_json
from tessera.metrics.record import Evaluation, RowName
from tessera.pictures import figures as pictures
from tessera.pictures.figures import Row, Run
from tessera.pictures.style import SETTINGS, save
from tessera.spec.compose import Grid
from tessera.spec.lineage import lineage
from tessera.spec.planning import (
    FIGURES,
    MAX_FIGURE_ROWS,
    digests_of,
    figure_files,
    figures_lineage,
    table_columns,
)
from tessera.tables.collect import advice, collect, read_document, rows_of
from tessera.tables.compare import choose_metrics


def figures(grid: Grid, table: str, results: Path) -> None:
    """Writes ``results/figures/<table>/<name>.png`` and ``.pdf`` for every name in ``planning.FIGURES``,
    and ``figures.json``, which says what they were made from."""
    rows = collect_rows(grid, table, results)
    if len(rows) > MAX_FIGURE_ROWS:
        raise UserError(
            f"config/config.yaml, tables.{table}: has {len(rows)} rows, figures can tell {MAX_FIGURE_ROWS} apart; "
            "make a table of those that are to be shown"
        )
    evaluations = [evaluation for row in rows for run in row.runs for evaluation in run.evaluations]
    metrics = pictures.leading_metrics(rows, choose_metrics(table, evaluations, grid.tables[table].metrics))
    draw = {
        "curves": lambda: pictures.draw_curves(rows, metrics),
        "accuracy_time": lambda: pictures.draw_accuracy_time(rows, metrics),
        "classes": lambda: pictures.draw_classes(rows, metrics),
        "pictures": lambda: pictures.draw_pictures(rows),
    }
    folder = results / "figures" / table
    written = []
    with matplotlib.rc_context(SETTINGS):
        drawn = {name: draw[name]() for name in FIGURES}  # all of them, before one is written
        for name, figure in drawn.items():
            for suffix in ("png", "pdf"):
                written.append(folder / f"{name}.{suffix}")
                save(figure, written[-1])
    document = {
        "table": table,
        "lineage": figures_lineage(grid, table, digests_of(grid)),
        "facts": provenance.collect(),
    }
    experiments = [run.experiment for row in rows for run in row.runs]
    sources = [results / name for name in figure_files(experiments, table_columns(grid.tables[table]))]
    inputs, outputs = provenance.digests(folder, sources), provenance.digests(folder, written)
    write_json(folder / "figures.json", provenance.sealed(document, inputs, outputs))


def collect_rows(grid: Grid, table: str, results: Path) -> list[Row]:
    """In the table's order. Raises UserError for files that are missing, damaged, or made from another spec than the present one, and for seeds
    that differ in more than the seed."""
    found: dict[RowName, list[Run]] = {}
    by_experiment: dict[str, list[Evaluation]] = {}
    # A training has one row of curves and pictures, however it was tested.
    collected = [one.model_copy(update={"testing_as": "columns"}) for one in collect(grid, table, results)]
    for evaluation in itertools.chain.from_iterable(rows_of(collected).values()):
        by_experiment.setdefault(evaluation.experiment, []).append(evaluation)
    for experiment, evaluations in by_experiment.items():
        first = evaluations[0]
        folder, spec = results / experiment, grid.resolve(experiment).spec
        read_document(folder / "train.json", experiment, lineage(spec, "train"), grid.data_root)
        inference = folder / "inference"
        index = read_document(inference / "index.json", experiment, lineage(spec, "infer"), grid.data_root)
        images = index.get("images")
        if spec.inference.draw == "off":
            images = []
        elif not isinstance(images, list) or not images or not all(_is_image(image) for image in images):
            raise UserError(
                f"{inference / 'index.json'}: expected a list `images` of objects with `file_name` and `overlay`; "
                f"{advice(inference / 'index.json', grid.data_root)}"
            )
        curves = read_curves(folder / "metrics.csv", grid.data_root)
        run = Run(experiment, first.seed, evaluations, curves, inference, images)
        found.setdefault(first.row, []).append(run)
    labels = row_labels(list(found))
    return [Row(label, runs) for label, runs in zip(labels, found.values(), strict=True)]


def read_curves(path: Path, data_root: str = "data") -> pd.DataFrame:
    """Raises UserError for anything but a table of numbers with the columns ``epoch`` and ``step``; no rows are fine. ``data_root`` is told to
    make it again with."""
    try:
        curves = pd.read_csv(path)
        curves = curves.astype(float)
    except FileNotFoundError:
        raise UserError(f"{missing(path)}; make it with `{workflow_command(path, data_root=data_root)}`") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected what the stage train writes") from None
    except (ValueError, pd.errors.ParserError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: is no table of numbers ({reason}); {advice(path, data_root)}") from None
    lacking = [name for name in ("epoch", "step") if name not in curves]
    if lacking:
        raise UserError(f"{path}: has no column {', '.join(lacking)}; {advice(path, data_root)}")
    ended = curves[curves["train_loss"].notna()] if "train_loss" in curves else curves.iloc[:0]
    if len(ended):
        last = ended.iloc[-1]
        curves["epoch"] = curves["step"] * (last["epoch"] / last["step"])
    return curves


def row_labels(parts: Sequence[tuple[str, str, str, str]]) -> list[str]:
    """Model and backbone on the first line, dataset and variants on the second, each only where rows differ in it."""
    differs = [len({row[place] for row in parts}) > 1 for place in range(4)]
    if not any(differs):
        differs = [True, True, False, False]
    labels = []
    for row in parts:
        lines = [
            " · ".join(
                text for text, shown in zip(row[start : start + 2], differs[start:], strict=False) if shown and text
            )
            for start in (0, 2)
        ]
        labels.append("\n".join(line for line in lines if line) or "plain")
    return labels


def _is_image(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("file_name", "overlay"))
