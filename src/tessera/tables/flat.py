"""Metrics of the listed experiments in two flat files: what `dvc metrics` and `dvc plots` compare between commits."""

from __future__ import annotations

from pathlib import Path

from tessera.files import UserError, write_json, write_text
from tessera.spec.compose import Grid
from tessera.spec.planning import listed_evaluations
from tessera.tables.collect import read_evaluation
from tessera.tables.compare import choose_metrics, long_form


def write_metrics(grid: Grid, results: Path) -> None:
    document, numbers = make_metrics(grid, results)
    write_text(results / "metrics.csv", numbers)
    write_json(results / "metrics.json", document)


def make_metrics(grid: Grid, results: Path) -> tuple[dict[str, dict[str, dict[str, float]]], str]:
    """``metrics.json``: experiment -> runtime, behind it and a dot each the precision unless it is fp32 and the way of testing where it has a
    name -> main metric -> fraction. ``metrics.csv``: every metric, one row per number in the columns of a table's CSV, with one more in front
    to label a bar with. A metric without a value is in neither. Raises UserError where no experiment is listed.
    """
    evaluations = [read_evaluation(grid, results, *row) for row in listed_evaluations(grid)]
    if not evaluations:
        raise UserError("config/config.yaml, experiments: lists none, so there are no metrics; list some, or `all`")
    main = choose_metrics("", evaluations, ())
    document: dict[str, dict[str, dict[str, float]]] = {}
    for found in evaluations:
        runtime = ".".join(filter(None, (found.runtime, found.precision.replace("fp32", ""), found.testing)))
        document.setdefault(found.experiment, {})[runtime] = {
            name: found.metrics[name] for name in main if name in found.metrics
        }
    numbers = long_form(evaluations)
    texts = numbers[["experiment", "runtime", "precision", "testing", "metric"]].itertuples(index=False)
    numbers.insert(0, "label", [" ".join(filter(None, text)) for text in texts])
    return document, numbers.to_csv(index=False, lineterminator="\n")
