"""The comparison of models: one row per model, backbone, dataset and variant, one column per runtime, precision and metric."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from tessera import provenance
from tessera.files import UserError, write_json, write_text
from tessera.metrics.formulas import disagreements
from tessera.metrics.record import Evaluation, runtime_name
from tessera.metrics.resampling import INTERVAL_IMAGES, LEVEL, interval, randomized, resampled, two_sided_p
from tessera.metrics.statistics import Statistics, base_name, read_statistics
from tessera.spec.compose import Grid, Table
from tessera.spec.lineage import lineage
from tessera.spec.planning import Condition, digests_of, evaluation_file, statistics_file, table_lineage
from tessera.tables.collect import advice, collect, read_document, rows_of
from tessera.tables.html import to_html
from tessera.tables.table import (
    DIFFERS,
    Cell,
    Column,
    ComparisonTable,
    Row,
    to_latex,
    to_markdown,
)

if TYPE_CHECKING:
    import pandas as pd

MAIN_METRICS = ("PQ", "SQ", "RQ", "AP", "AP50", "box_AP", "mIoU", "pixel_accuracy")
"""Shown where a table names no metrics, in this order, as far as there are any."""

Key = tuple[str, Condition]
"""``Evaluation.key``."""


@dataclass(frozen=True)
class Drawn:
    """One evaluation with its images drawn anew, metric -> (R,) fractions."""

    resampled: dict[str, np.ndarray]
    """On each resample; empty unless the table asks for intervals and there are images enough."""
    swapped: dict[str, np.ndarray]
    """Less the baseline's, after each swap of images between the two, as observed first; empty where nothing is compared."""


def compare(grid: Grid, table: str, results: Path) -> None:
    """Writes ``results/tables/<table>.csv`` (every number, in full), ``.md``, ``.tex`` and ``.html`` (percent, mean and spread over seeds), and
    ``.json`` (the cells in full, and what all of it was made from)."""
    evaluations = collect(grid, table, results)
    definition = grid.tables[table]
    files = {one.key: results / one.experiment / evaluation_file(*one.key[1]) for one in evaluations}
    inputs = list(files.values())
    drawn: dict[Key, Drawn] = {}
    if definition.resampled:
        inputs += [statistics_file(path) for path in files.values()]
        metrics = choose_metrics(table, evaluations, definition.metrics)
        drawn = draw_images(evaluations, files, metrics, definition, grid.data_root)
    parameters: dict[str, int] = {}
    commits: list[str | None] = []
    for experiment in dict.fromkeys(one.experiment for one in evaluations) if definition.parameters else ():
        inputs.append(results / experiment / "train.json")
        parameters[experiment], commit = _training(grid, experiment, inputs[-1])
        commits.append(commit)
    commits += [one.facts.get("commit") for one in evaluations]
    numbers = long_form(evaluations, parameters, drawn)
    made = make_table(table, definition, evaluations, parameters, drawn, commits)

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
        "lineage": table_lineage(grid, table, digests_of(grid)),
        "facts": provenance.collect(),
    }
    outputs = provenance.digests(folder, (folder / name for name in contents))
    write_json(folder / f"{table}.json", provenance.sealed(document, provenance.digests(folder, inputs), outputs))
    print(text, end="", flush=True)


def make_table(
    name: str,
    definition: Table,
    evaluations: Sequence[Evaluation],
    parameters: Mapping[str, int],
    drawn: Mapping[Key, Drawn],
    commits: Sequence[str | None],
) -> ComparisonTable:
    """Rows and columns in order of appearance in ``evaluations``; ``parameters``: of each experiment, where the table shows them."""
    columns = [
        Column(runtime, precision, metric, testing)
        for runtime, precision, testing in dict.fromkeys(evaluation.column for evaluation in evaluations)
        for metric in choose_metrics(name, evaluations, definition.metrics)
    ]

    def cell(members: Sequence[Evaluation], column: Column) -> Cell | None:
        run = (column.runtime, column.precision, column.testing)
        seeds = [one for one in members if one.column == run and column.metric in one.metrics]
        if not seeds:
            return None
        values = np.array([one.metrics[column.metric] for one in seeds])
        std = 100 * float(values.std(ddof=1)) if len(seeds) > 1 else None
        # The images of all seeds are drawn together.
        draws = [drawn[one.key] for one in members if one.column == run and one.key in drawn]
        resamples = _mean([one.resampled.get(column.metric) for one in draws])
        differences = _mean([one.swapped.get(column.metric) for one in draws])
        limits = None if resamples is None else interval(100 * resamples)
        p = None if differences is None else two_sided_p(differences)
        difference = None if differences is None or p is None else 100 * float(differences[0])
        return Cell(100 * float(values.mean()), std, limits, difference, p, p is not None and p < LEVEL)

    rows = [
        Row(
            *row,
            parameters=parameters.get(members[0].experiment),  # seeds build the same network
            cells=tuple(cell(members, column) for column in columns),
            mode=members[0].mode,
        )
        for row, members in rows_of(evaluations).items()
    ]
    return ComparisonTable(
        name,
        tuple(columns),
        tuple(rows),
        describe(evaluations, definition),
        sources(evaluations, commits),
        footnotes(evaluations),
    )


def draw_images(
    evaluations: Sequence[Evaluation],
    files: Mapping[Key, Path],
    metrics: Sequence[str],
    definition: Table,
    data_root: str = "data",
) -> dict[Key, Drawn]:
    """Every evaluation on the same resamples of its images, and against its partner. Raises UserError for statistics that do not give the
    evaluation's own metrics, all of them, and for partners on other images."""
    found = {}
    pairs = partners(evaluations, definition.baseline)
    held: dict[Key, Statistics] = {}
    # The baseline's come first, because the others are compared with them.
    references = set(pairs.values())
    for number, evaluation in enumerate(sorted(evaluations, key=lambda one: one.key not in references), 1):
        key = evaluation.key
        print(f"compare: drawing images of {files[key]}: {number} of {len(evaluations)}", file=sys.stderr)
        statistics = _read_statistics(files[key], evaluation, data_root)
        if key in references:
            held[key] = statistics
        partner = pairs.get(key)
        if partner is not None and statistics.image_ids != held[partner].image_ids:
            raise UserError(
                f"{evaluation.experiment} and {partner[0]} were evaluated on other images of {evaluation.dataset} {evaluation.split}, so they "
                "cannot be compared image by image; evaluate them on the same data, or remove `baseline` from the table"
            )
        with_interval = definition.intervals and evaluation.images >= INTERVAL_IMAGES
        found[key] = Drawn(
            resampled(statistics, definition.resamples, metrics) if with_interval else {},
            randomized(statistics, held[partner], definition.resamples, metrics) if partner is not None else {},
        )
    return found


def partners(evaluations: Sequence[Evaluation], baseline: str | None) -> dict[Key, Key]:
    """Of each evaluation that is compared, the one it is compared with: of the baseline's row, in the same place among its seeds. Rows on
    another dataset or split, or with another number of seeds, are not compared."""
    rows = rows_of(evaluations)
    found: dict[Key, Key] = {}
    # Of several ways of testing in rows, the first is what all is compared with.
    for reference in [one.row for one in evaluations if one.experiment == baseline][:1]:
        for row, members in rows.items():
            ours, theirs = (sorted(one, key=lambda e: (e.column, e.seed)) for one in (members, rows[reference]))
            same_data = (ours[0].dataset, ours[0].split) == (theirs[0].dataset, theirs[0].split)
            if row != reference and same_data and len(ours) == len(theirs):
                found |= {one.key: two.key for one, two in zip(ours, theirs, strict=True)}
    return found


def _read_statistics(path: Path, evaluation: Evaluation, data_root: str) -> Statistics:
    """Of the evaluation file ``path``."""
    statistics = read_statistics(statistics_file(path), data_root)
    again = advice(path, data_root)
    if len(statistics) != evaluation.images:
        raise UserError(
            f"{statistics_file(path)}: has {len(statistics)} images, {path.name} beside it {evaluation.images}; {again}"
        )
    wrong = disagreements(evaluation.metrics, statistics)
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong)}; one of the two files was changed; {again}")
    return statistics


def choose_metrics(table: str, evaluations: Sequence[Evaluation], asked: Sequence[str]) -> list[str]:
    """Those asked for, or the main ones that any evaluation has. Raises UserError for one that none has."""
    known = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.metrics))
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise UserError(
            f"config/config.yaml, tables.{table}.metrics: no evaluation has {', '.join(unknown)}; there are {', '.join(known)}"
        )
    main = [name for first in MAIN_METRICS for name in known if base_name(name) == first]
    return list(asked) or main or known


def long_form(
    evaluations: Sequence[Evaluation],
    parameters: Mapping[str, int] = MappingProxyType({}),
    drawn: Mapping[Key, Drawn] = MappingProxyType({}),
) -> pd.DataFrame:
    """One row per number, as it was measured. ``low`` and ``high``, where images were resampled, are the interval of this number alone; the
    table's metrics have one."""
    import pandas as pd  # a table that is refused is refused sooner

    found = []
    for evaluation in evaluations:
        resampled = drawn[evaluation.key].resampled if evaluation.key in drawn else {}
        for metric, value in evaluation.metrics.items():
            line = {
                "experiment": evaluation.experiment,
                **evaluation.row._asdict(),
                "seed": evaluation.seed,
                "mode": evaluation.mode,
                "split": evaluation.split,
                "images": evaluation.images,
                "runtime": evaluation.runtime,
                "precision": evaluation.precision,
                "testing": evaluation.testing,
                "metric": metric,
                "value": value,
            }
            if metric in resampled:
                limits = interval(resampled[metric])
                line["low"], line["high"] = (None, None) if limits is None else limits
            if parameters:
                line["parameters"] = parameters[evaluation.experiment]
            found.append(line)
    return pd.DataFrame(found)


def describe(evaluations: Sequence[Evaluation], definition: Table) -> tuple[str, ...]:
    """What was measured, on how many images, over how many seeds, and what the signs mean."""
    sets = dict.fromkeys(f"{e.dataset} {e.split} ({e.images} images)" for e in evaluations)
    experiments = [{one.experiment for one in members} for members in rows_of(evaluations).values()]
    seeds = max(map(len, experiments))
    notes = [f"Percent, on {', '.join(sets)}"]
    if seeds > 1:
        notes.append(f"mean ± sample standard deviation over up to {seeds} seeds")
    if len(started := starts(evaluations)) == 1:
        notes += started
    enough = [evaluation.images >= INTERVAL_IMAGES for evaluation in evaluations]
    if definition.intervals and any(enough):
        level = f"{100 * (1 - LEVEL):.0f} %"
        notes.append(f"in brackets the {level} bootstrap interval ({definition.resamples} resamples of the images)")
    if definition.intervals and not all(enough):
        notes.append(f"no interval for fewer than {INTERVAL_IMAGES} images")
    if definition.baseline is not None:
        notes.append(
            f"{DIFFERS} differs from {definition.baseline} (paired randomization test over the images, two-sided p < {LEVEL})"
        )
        compared = {experiment for experiment, _ in partners(evaluations, definition.baseline)}
        if any(compared.isdisjoint(names) and definition.baseline not in names for names in experiments):
            notes.append("rows on other data or with another number of seeds are not compared")
    return tuple(notes)


def starts(evaluations: Sequence[Evaluation]) -> dict[str, list[str]]:
    """What weights started from, and the rows, each by its first experiment, that started from it."""
    found: dict[str, list[str]] = {}
    for members in rows_of(evaluations).values():
        found.setdefault(_start(members[0].lineage), []).append(members[0].experiment)
    return found


def _start(lineage: Mapping[str, Any]) -> str:
    def named(key: str, path: str) -> str:
        return f"{Path(path).name} (sha256 {lineage['weights'][key][:12]})"

    network, backbone = lineage["train"]["pretrained_model_path"], lineage["model"]["backbone"]["pretrained"]
    whole = [] if network is None else [named("train.pretrained_model_path", network)]
    if lineage["train"]["num_epochs"] == 0:
        return f"not trained, weights of {whole[0]}"
    if backbone is not None:
        whole.append(f"a backbone of {'timm' if backbone == 'timm' else named('model.backbone.pretrained', backbone)}")
    return f"trained from {' and '.join(whole) or 'random weights'}"


def footnotes(evaluations: Sequence[Evaluation]) -> tuple[str, ...]:
    """What weights started from, where rows differ in it; and what the evaluations remark, each once, with those that do where not all do."""
    started = starts(evaluations)
    found: dict[str, list[str]] = started if len(started) > 1 else {}
    for evaluation in evaluations:
        what = evaluation.experiment
        if evaluation.runtime != "torch" or evaluation.testing:
            what += f" in {runtime_name(evaluation.runtime, evaluation.precision, evaluation.testing)}"
        for remark in evaluation.remarks:
            found.setdefault(remark, []).append(what)
    return tuple(
        remark
        if len(names) == len(evaluations) and remark not in started
        else f"{', '.join(dict.fromkeys(names))}: {remark}"
        for remark, names in found.items()
    )


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
    report = read_document(path, experiment, lineage(grid.resolve(experiment).spec, "train"), grid.data_root)
    try:
        return int(report["parameters"]["total"]), report["facts"]["commit"]
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path}: expected `parameters.total` and `facts.commit`, as the stage train writes them; {advice(path, grid.data_root)}"
        ) from None


def _mean(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Of arrays of one shape; None without any, or where one is missing."""
    present = [array for array in arrays if array is not None]
    return np.mean(present, 0) if present and len(present) == len(arrays) else None
