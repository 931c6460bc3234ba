"""The comparison of models: one row per model, backbone, dataset and variant, one column per runtime, precision and metric."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd

from tessera import provenance
from tessera.evaluation.statistics import read_statistics
from tessera.files import UserError, write_json, write_text
from tessera.reporting.collect import Evaluation, collect, read_document
from tessera.reporting.html import to_html
from tessera.reporting.statistics import LEVEL, evaluated, interval, metrics_of, resample_weights, two_sided_p
from tessera.reporting.table import DIFFERS, RUNTIME_NAMES, Cell, Column, ComparisonTable, Row, to_latex, to_markdown
from tessera.spec.compose import Grid, Table
from tessera.spec.lineage import lineage
from tessera.spec.planning import COMPARE_VERSION, evaluation_file, statistics_file

MAIN_METRICS = ("PQ", "SQ", "RQ", "AP", "AP50", "box_AP", "mIoU", "pixel_accuracy")
"""Shown where a table names no metrics, in this order, as far as there are any."""

__all__ = ["RUNTIME_NAMES", "choose_metrics", "compare", "long_form"]

ROW = ["model", "backbone", "dataset", "variant"]
COLUMN = ["runtime", "precision", "metric"]

Names = tuple[str, str, str, str]
"""What ``ROW`` holds of a row."""


@dataclass(frozen=True)
class Resampled:
    """One evaluation on every resample."""

    values: dict[str, np.ndarray]
    """Metric -> (R,) fractions."""
    image_ids: list[int]


def compare(grid: Grid, table: str, results: Path) -> None:
    """Writes ``results/tables/<table>.csv`` (every number, in full), ``.md``, ``.tex`` and ``.html`` (percent, mean and spread over seeds), and
    ``.json`` (the cells in full, and what all of it was made from)."""
    evaluations = collect(grid, table, results)
    definition = grid.tables[table]
    files = {_key(evaluation): _file(results, evaluation) for evaluation in evaluations}
    inputs = list(files.values())
    resamples: dict[tuple[str, str, str], Resampled] = {}
    if definition.resampled:
        inputs += [statistics_file(path) for path in files.values()]
        metrics = choose_metrics(table, evaluations, definition.metrics)
        resamples = resample(evaluations, files, metrics, definition.resamples)
    trainings = {name: results / name / "train.json" for name in dict.fromkeys(e.experiment for e in evaluations)}
    reports = {name: _training(grid, name, path) for name, path in trainings.items()} if definition.parameters else {}
    inputs += [trainings[name] for name in reports]
    numbers = long_form(evaluations, {name: parameters for name, (parameters, _) in reports.items()}, resamples)
    commits = [*(commit for _, commit in reports.values()), *(e.facts.get("commit") for e in evaluations)]
    made = make_table(table, definition, evaluations, numbers, resamples, commits)

    folder = results / "tables"
    text = to_markdown(made, definition.decimals)
    contents = {
        f"{table}.csv": numbers.to_csv(index=False, lineterminator="\n"),
        f"{table}.md": text,
        f"{table}.tex": to_latex(made, definition.latex_decimals),
        f"{table}.html": to_html(made, evaluations, definition.decimals),
    }
    for name, content in contents.items():
        write_text(folder / name, content)
    document = {
        **made.to_json(),
        "lineage": {"version": COMPARE_VERSION, "definition": definition.model_dump(mode="json")},
        "facts": provenance.collect(),
    }
    outputs = provenance.digests(folder, (folder / name for name in contents))
    write_json(folder / f"{table}.json", provenance.sealed(document, provenance.digests(folder, inputs), outputs))
    print(text, end="", flush=True)


def make_table(
    name: str,
    definition: Table,
    evaluations: Sequence[Evaluation],
    numbers: pd.DataFrame,
    resamples: Mapping[tuple[str, str, str], Resampled],
    commits: Sequence[str | None],
) -> ComparisonTable:
    """``numbers`` as ``long_form`` gives them; rows and columns in order of appearance there."""
    metrics = choose_metrics(name, evaluations, definition.metrics)
    columns = [
        Column(runtime, precision, metric)
        for runtime, precision in numbers[COLUMN[:2]].drop_duplicates().itertuples(index=False)
        for metric in metrics
    ]
    groups = {
        key: (100 * values.mean(), 100 * values.std() if len(values) > 1 else None)
        for key, values in numbers.groupby(ROW + COLUMN, sort=False)["value"]
    }
    members: dict[Names, list[Evaluation]] = {}
    for evaluation in evaluations:
        members.setdefault(_names(evaluation), []).append(evaluation)
    baseline = next((_names(e) for e in evaluations if e.experiment == definition.baseline), None)

    def cell(row: Names, column: Column) -> Cell | None:
        found = groups.get((*row, column.runtime, column.precision, column.metric))
        if found is None:
            return None
        mean, std = float(found[0]), None if found[1] is None else float(found[1])
        limits = difference = p = None
        drawn = _mean_of(members[row], column, resamples)
        if definition.intervals and drawn is not None:
            limits = interval(100 * drawn)
        other = None if baseline is None else groups.get((*baseline, column.runtime, column.precision, column.metric))
        if baseline is not None and other is not None and row != baseline:
            reference = _mean_of(members[baseline], column, resamples)
            if drawn is not None and reference is not None and _same_images(members[row], members[baseline], resamples):
                difference, p = mean - float(other[0]), two_sided_p(drawn - reference)
        return Cell(mean, std, limits, difference, p, p is not None and p < LEVEL)

    rows = [
        Row(*row, parameters=_parameters(numbers, row), cells=tuple(cell(row, column) for column in columns))
        for row in members
    ]
    return ComparisonTable(
        name, tuple(columns), tuple(rows), describe(evaluations, definition), sources(evaluations, commits)
    )


def resample(
    evaluations: Sequence[Evaluation],
    files: Mapping[tuple[str, str, str], Path],
    metrics: Sequence[str],
    resamples: int,
) -> dict[tuple[str, str, str], Resampled]:
    """The metrics of every evaluation on the same resamples of its images. Raises UserError for statistics that do not give the evaluation's
    own metrics, all of them."""
    found = {}
    weights: dict[int, np.ndarray] = {}
    for number, evaluation in enumerate(evaluations, 1):
        path = statistics_file(files[_key(evaluation)])
        statistics = read_statistics(path)
        images = len(statistics)
        print(f"compare: resampling {images} images {resamples} times: {number} of {len(evaluations)}", file=sys.stderr)
        if images != evaluation.images:
            raise UserError(
                f"{path}: has {images} images, {files[_key(evaluation)].name} beside it {evaluation.images}; evaluate again"
            )
        own = evaluated(statistics)
        for name, value in evaluation.metrics.items():
            if value is not None and not abs(own.get(name, math.inf) - value) < 1e-9:
                raise UserError(
                    f"{path}: gives {name} {own.get(name, 'no value')}, {files[_key(evaluation)].name} beside it says {value}; one of them "
                    "was changed, so evaluate again"
                )
        if images not in weights:
            weights[images] = resample_weights(images, resamples)
        found[_key(evaluation)] = Resampled(metrics_of(statistics, weights[images], metrics), statistics.image_ids)
    return found


def choose_metrics(table: str, evaluations: Sequence[Evaluation], asked: Sequence[str]) -> list[str]:
    """Those asked for, or the main ones that any evaluation has. Raises UserError for one that none has."""
    known = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.metrics))
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise UserError(
            f"config/config.yaml, tables.{table}.metrics: no evaluation has {', '.join(unknown)}; there are {', '.join(known)}"
        )
    return list(asked) or [name for name in MAIN_METRICS if name in known] or known


def long_form(
    evaluations: Sequence[Evaluation],
    parameters: Mapping[str, int] = MappingProxyType({}),
    resamples: Mapping[tuple[str, str, str], Resampled] = MappingProxyType({}),
) -> pd.DataFrame:
    """One row per number, as it was measured; a metric without a value has no row. ``low`` and ``high``, where images were resampled, are the
    interval of this number alone; the table's metrics have one."""
    found = []
    for evaluation in evaluations:
        drawn = resamples.get(_key(evaluation))
        for metric, value in evaluation.metrics.items():
            if value is None:
                continue
            line = {
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
            if drawn is not None and metric in drawn.values:
                limits = interval(drawn.values[metric])
                line["low"], line["high"] = (None, None) if limits is None else limits
            if parameters:
                line["parameters"] = parameters[evaluation.experiment]
            found.append(line)
    return pd.DataFrame(found)


def describe(evaluations: Sequence[Evaluation], definition: Table) -> tuple[str, ...]:
    """What was measured, on how many images, over how many seeds, and what the signs mean."""
    sets = dict.fromkeys(f"{e.dataset} {e.split} ({e.images} images)" for e in evaluations)
    seeds = len({evaluation.seed for evaluation in evaluations})
    notes = [f"Percent, on {', '.join(sets)}"]
    if seeds > 1:
        notes.append(f"mean ± standard deviation over up to {seeds} seeds")
    how = f"{definition.resamples} resamples of the images"
    if definition.intervals:
        notes.append(f"in brackets the {100 * (1 - LEVEL):.0f} % bootstrap interval ({how})")
    if definition.baseline is not None:
        notes.append(f"{DIFFERS} differs from {definition.baseline} (paired bootstrap, two-sided p < {LEVEL}, {how})")
    return tuple(notes)


def sources(evaluations: Sequence[Evaluation], commits: Sequence[str | None]) -> str:
    """Commits and digests of data, each once."""
    known = [commit[:12] + "-dirty" * commit.endswith("-dirty") for commit in commits if commit]
    data = dict.fromkeys(
        f"{e.dataset} {' '.join(f'{split} {digest}' for split, digest in sorted(e.lineage['data'].items()))}"
        for e in evaluations
    )
    named = f"commit{'s' * (len(set(known)) > 1)} {', '.join(dict.fromkeys(known))}" if known else "no known commit"
    return f"From {named}; digests of the data: {', '.join(data)}."


def _training(grid: Grid, experiment: str, path: Path) -> tuple[int, str | None]:
    """Number of parameters, and the commit that trained."""
    report = read_document(path, experiment, lineage(grid.resolve(experiment).spec, "train"))
    try:
        return int(report["parameters"]["total"]), report["facts"]["commit"]
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path}: expected `parameters.total` and `facts.commit`, as the stage train writes them; make it again with "
            f"`snakemake --cores 2 {path}`"
        ) from None


def _parameters(numbers: pd.DataFrame, row: Names) -> int | None:
    """Of any seed: they build the same network."""
    if "parameters" not in numbers:
        return None
    return int(numbers.loc[(numbers[ROW] == row).all(axis=1), "parameters"].iloc[0])


def _mean_of(
    evaluations: Sequence[Evaluation], column: Column, resamples: Mapping[tuple[str, str, str], Resampled]
) -> np.ndarray | None:
    """(R,) fractions: the mean over seeds on each resample; None where nothing was resampled or measured."""
    drawn = [
        resamples[_key(evaluation)].values[column.metric]
        for evaluation in evaluations
        if (evaluation.runtime, evaluation.precision) == (column.runtime, column.precision)
        and evaluation.metrics.get(column.metric) is not None
        and _key(evaluation) in resamples
    ]
    return np.mean(drawn, 0) if drawn else None


def _same_images(
    one: Sequence[Evaluation], two: Sequence[Evaluation], resamples: Mapping[tuple[str, str, str], Resampled]
) -> bool:
    """False for other datasets or splits, which are not compared. Raises UserError where one split has other images."""
    if (one[0].dataset, one[0].split) != (two[0].dataset, two[0].split):
        return False
    lists = {tuple(resamples[_key(evaluation)].image_ids) for evaluation in (*one, *two)}
    if len(lists) > 1:
        raise UserError(
            f"{one[0].experiment} and {two[0].experiment} were evaluated on other images of {one[0].dataset} {one[0].split}, so they cannot be "
            "compared image by image; evaluate them on the same data, or remove `baseline` from the table"
        )
    return True


def _key(evaluation: Evaluation) -> tuple[str, str, str]:
    return evaluation.experiment, evaluation.runtime, evaluation.precision


def _file(results: Path, evaluation: Evaluation) -> Path:
    return results / evaluation.experiment / evaluation_file(evaluation.runtime, evaluation.precision)


def _names(evaluation: Evaluation) -> Names:
    return evaluation.model, evaluation.backbone, evaluation.dataset, "-".join(evaluation.variants)
