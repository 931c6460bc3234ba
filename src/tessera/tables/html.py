"""A comparison table as a page of its own: readable with a screen reader, without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from tessera.metrics.record import Evaluation
from tessera.metrics.resampling import LEVEL
from tessera.tables.table import (
    DIFFERS,
    PARAMETERS,
    Cell,
    ComparisonTable,
    Row,
    interval_text,
    number_text,
    parameters_text,
)

LEGEND = "Bold is best, underlined second."


def to_html(table: ComparisonTable, evaluations: Sequence[Evaluation], decimals: int) -> str:
    """``evaluations`` are those that the table was made of: footnotes name the commit and the data of each row."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tessera.tables", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    blocks = [(title, block, block.standings(decimals)) for title, block in table.blocks]
    ranked = any(standing for _, _, standings in blocks for row in standings for standing in row)
    return environment.get_template("table.html.jinja").render(
        table=table,
        legend=LEGEND if ranked else "",
        differs=DIFFERS,
        parameters=PARAMETERS,
        blocks=blocks,
        decimals=decimals,
        number_text=number_text,
        interval_text=interval_text,
        parameters_text=parameters_text,
        details=_details,
        sources=lambda row: _sources(row, evaluations),
    )


def _details(cell: Cell) -> str:
    """More digits than are printed, and what else is known of the number."""
    parts = [f"{cell.mean:.4f}"]
    if cell.std is not None:
        parts.append(f"standard deviation {cell.std:.4f}")
    if cell.interval is not None:
        parts.append(f"{100 * (1 - LEVEL):.0f} % interval {interval_text(cell, 4)}")
    if cell.difference is not None:
        parts.append(f"{cell.difference:+.4f} against the baseline")
    if cell.p is not None:
        parts.append(f"p = {cell.p:.3g}")
    return "; ".join(parts)


def _sources(row: Row, evaluations: Sequence[Evaluation]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Experiment, commit and data, each once."""
    found: list[tuple[str, str, list[tuple[str, str]]]] = []
    for evaluation in evaluations:
        if evaluation.row == (row.model, row.backbone, row.dataset, row.variant):
            commit = str(evaluation.facts.get("commit") or "unknown")
            data = sorted((split, str(digest)) for split, digest in evaluation.lineage["data"].items())
            if (evaluation.experiment, commit, data) not in found:
                found.append((evaluation.experiment, commit, data))
    return found
