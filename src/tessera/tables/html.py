"""A comparison table as a page of its own: sortable, readable with a screen reader, without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tessera.metrics.resampling import LEVEL
from tessera.tables.collect import Evaluation, RowName
from tessera.tables.table import (
    DIFFERS,
    PARAMETERS,
    Cell,
    ComparisonTable,
    Row,
    Standing,
    interval_text,
    number_text,
    parameters_text,
)

LEGEND = "Bold is best, underlined second."


def to_html(table: ComparisonTable, evaluations: Sequence[Evaluation], decimals: int) -> str:
    """``evaluations`` are those that the table was made of: footnotes name the commit and the data of each row."""
    environment = Environment(
        loader=PackageLoader("tessera.tables", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    blocks: list[dict[str, Any]] = []
    number = 0
    for title, block in table.blocks:
        rows = []
        for row, ranks in zip(block.rows, block.standings(decimals), strict=True):
            number += 1
            cells = [_cell(cell, standing, decimals) for cell, standing in zip(row.cells, ranks, strict=True)]
            rows.append(
                {
                    "number": number,
                    "names": block.row_texts(row),
                    "parameters": row.parameters,
                    "parameters_text": parameters_text(row),
                    "cells": cells,
                    "sources": _sources(row, evaluations),
                }
            )
        first = [*block.keys, *([PARAMETERS] if block.shows_parameters else [])]
        blocks.append({"title": title, "table": block, "first": first, "rows": rows})
    ranked = any(cell["standing"] for block in blocks for row in block["rows"] for cell in row["cells"])
    return environment.get_template("table.html.jinja").render(
        table=table, legend=LEGEND if ranked else "", differs=DIFFERS, blocks=blocks
    )


def _cell(cell: Cell | None, standing: Standing, decimals: int) -> dict[str, Any]:
    if cell is None:
        return {"value": None, "text": "–", "standing": "", "interval": "", "differs": False}
    return {
        "value": cell.mean,
        "text": number_text(cell, decimals),
        "standing": standing,
        "interval": interval_text(cell, decimals),
        "differs": cell.differs,
        "title": _details(cell),
    }


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


def _sources(row: Row, evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """One for every experiment, commit and data."""
    name = RowName(row.model, row.backbone, row.dataset, row.variant)
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for evaluation in evaluations:
        if evaluation.row == name:
            commit = str(evaluation.facts.get("commit") or "unknown")
            data = sorted((split, str(digest)) for split, digest in evaluation.lineage["data"].items())
            source = {"experiment": evaluation.experiment, "commit": commit, "data": data}
            found[evaluation.experiment, commit, *map(str, data)] = source
    return list(found.values())
