"""A finished comparison table, and what it looks like in Markdown and LaTeX. Nothing here computes: see ``compare``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from tessera.metrics.record import RowName, runtime_name

ROW = list(RowName._fields)
"""What names a row."""

Standing = Literal["best", "second", ""]


@dataclass(frozen=True)
class Cell:
    """Percent."""

    mean: float
    """Over seeds."""
    std: float | None
    """Over seeds, of the sample (n - 1); None where there is one seed."""
    interval: tuple[float, float] | None = None
    """Bootstrap interval of ``mean`` over images; None unless the table asks for it and there are images enough."""
    difference: float | None = None
    """``mean`` less the baseline's in the same column; None in the baseline's own row and where nothing is compared."""
    p: float | None = None
    """Two-sided, of that difference."""
    differs: bool = False
    """``p`` is below the table's level."""


@dataclass(frozen=True)
class Column:
    runtime: str
    precision: str
    metric: str
    testing: str = ""
    """Empty where rows tell ways of testing apart, or none has a name."""

    @property
    def group(self) -> str:
        return runtime_name(self.runtime, self.precision, self.testing)


@dataclass(frozen=True)
class Row:
    model: str
    backbone: str
    dataset: str
    variant: str
    """Variants joined by ``-``; empty for the plain recipe."""
    parameters: int | None
    """None where the table does not show them."""
    cells: tuple[Cell | None, ...]
    """One for each column; None where nothing was measured."""
    mode: str = ""
    """The task: panoptic, instance, semantic or detection."""


@dataclass(frozen=True)
class ComparisonTable:
    name: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    """Both in the order of the table's definition."""
    notes: tuple[str, ...]
    """What the numbers are, in plain text: parts of one sentence."""
    sources: str
    """Commits and digests of data that the numbers come from, as one sentence."""
    footnotes: tuple[str, ...] = ()
    """What must be known of some of the numbers, a sentence each without its full stop."""
    whole: ComparisonTable | None = None
    """Of one task's block, the table that it is cut from."""

    @property
    def keys(self) -> list[str]:
        """What names a row: dataset and variant only where rows of the whole table differ in them."""
        rows = (self.whole or self).rows
        return [key for key in ROW if key in ROW[:2] or len({getattr(row, key) for row in rows}) > 1]

    @property
    def blocks(self) -> list[tuple[str, ComparisonTable]]:
        """A table for each task, with the columns in which it has a number, since metrics of two tasks are no competitors; one without a
        heading where there is one task."""
        modes = list(dict.fromkeys(row.mode for row in self.rows))
        if len(modes) == 1:
            return [("", self)]
        found = []
        for mode in modes:
            rows = [row for row in self.rows if row.mode == mode]
            kept = [place for place in range(len(self.columns)) if any(row.cells[place] for row in rows)]
            columns = tuple(self.columns[place] for place in kept)
            cut = tuple(replace(row, cells=tuple(row.cells[place] for place in kept)) for row in rows)
            found.append((mode.capitalize(), replace(self, columns=columns, rows=cut, whole=self)))
        return found

    @property
    def shows_parameters(self) -> bool:
        return any(row.parameters is not None for row in self.rows)

    @property
    def groups(self) -> list[tuple[str, int]]:
        """(name, number of columns) of the runtimes, from left to right."""
        return list(Counter(column.group for column in self.columns).items())

    def row_texts(self, row: Row) -> list[str]:
        """Its name, under ``keys``."""
        return [getattr(row, key) or "-" for key in self.keys]

    def standings(self, decimals: int) -> list[list[Standing]]:
        """By row and column: the highest and second highest mean of a column among the rows of one dataset, as printed, so that equal
        texts stand alike; nothing stands out among fewer than two rows, nothing is second of two, nothing beside two best, and no zero."""
        found: list[list[Standing]] = [[""] * len(self.columns) for _ in self.rows]
        for place in range(len(self.columns)):
            for dataset in {row.dataset for row in self.rows}:
                means = {
                    number: round(cell.mean, decimals)
                    for number, row in enumerate(self.rows)
                    if row.dataset == dataset and (cell := row.cells[place]) is not None
                }
                ranked = sorted(means.values(), reverse=True)
                for number, mean in means.items():
                    if mean == 0:
                        continue
                    if len(means) > 1 and mean == ranked[0]:
                        found[number][place] = "best"
                    elif len(means) > 2 and mean == ranked[1]:
                        found[number][place] = "second"
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "table": self.name,
            "notes": list(self.notes),
            "sources": self.sources,
            "footnotes": list(self.footnotes),
            "columns": [asdict(column) for column in self.columns],
            "rows": [asdict(row) for row in self.rows],
        }


def number_text(cell: Cell, decimals: int, plus_minus: str = "±") -> str:
    """Mean, and spread over seeds where there are several."""
    spread = "" if cell.std is None else f" {plus_minus} {cell.std:.{decimals}f}"
    return f"{cell.mean:.{decimals}f}{spread}"


def interval_text(cell: Cell, decimals: int) -> str:
    """Empty without an interval."""
    return "" if cell.interval is None else f"[{cell.interval[0]:.{decimals}f}, {cell.interval[1]:.{decimals}f}]"


def parameters_text(row: Row) -> str:
    """Millions, three digits at least."""
    if row.parameters is None:
        return "-"
    millions = row.parameters / 1e6
    return f"{millions:.1f}" if millions >= 10 else f"{millions:.2f}"


PARAMETERS = "params (M)"
DIFFERS = "†"
MARKDOWN = "bold is best, italic second"
LATEX = "bold is best, underlined second"


def to_markdown(table: ComparisonTable, decimals: int) -> str:
    """Pipe tables aligned for a terminal, one for each task, and lines that say what the numbers are and where they come from."""
    parts = []
    for title, block in table.blocks:
        parts += [*([f"### {title}", ""] if title else []), *_pipe_table(block, decimals), ""]
    parts += [_caption(table, decimals, MARKDOWN), ""]
    for footnote in table.footnotes:
        parts += [f"{footnote}.", ""]
    return "\n".join([*parts, table.sources, ""])


def _pipe_table(table: ComparisonTable, decimals: int) -> list[str]:
    names = len(table.keys)
    header = [*table.keys, *([PARAMETERS] if table.shows_parameters else [])]
    header += [f"{column.group} {column.metric}" for column in table.columns]
    marks = {"best": "**", "second": "_", "": ""}

    def text(cell: Cell | None, standing: Standing) -> str:
        if cell is None:
            return "-"
        number = f"{marks[standing]}{number_text(cell, decimals)}{marks[standing]}"
        return " ".join(filter(None, (number, interval_text(cell, decimals)))) + DIFFERS * cell.differs

    lines = _texts(table, table.standings(decimals), text)
    widths = [max(len(line[place]) for line in [header, *lines]) for place in range(len(header))]
    aligned = [
        "| "
        + " | ".join(
            item.ljust(width) if place < names else item.rjust(width)
            for place, (item, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in [header, *lines]
    ]
    rule = "|" + "|".join(
        "-" * (width + 2) if place < names else "-" * (width + 1) + ":" for place, width in enumerate(widths)
    )
    return [aligned[0], rule + "|", *aligned[1:]]


def to_latex(table: ComparisonTable, decimals: int) -> str:
    """A booktabs tabular for each task, and below in small print what the numbers are; where they come from is a comment."""
    parts = []
    for title, block in table.blocks:
        if title:
            parts.append(rf"\par\medskip\textbf{{{escape_latex(title)}}}\par\smallskip")
        parts += _tabular(block, decimals)
    notes = [_caption(table, decimals, LATEX), *(f"{footnote}." for footnote in table.footnotes)]
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            f"% {table.sources}",
            *parts,
            rf"\par\smallskip{{\footnotesize {escape_latex(' '.join(notes))}\par}}",
            "",
        ]
    )


def _tabular(table: ComparisonTable, decimals: int) -> list[str]:
    keys = table.keys
    styles = {"best": r"\textbf", "second": r"\underline", "": ""}

    def text(cell: Cell | None, standing: Standing) -> str:
        if cell is None:
            return "--"
        number = number_text(cell, decimals, r"$\pm$")
        return (f"{styles[standing]}{{{number}}}" if standing else number) + r"$^{\dagger}$" * cell.differs

    first = [*keys, *([PARAMETERS] if table.shows_parameters else [])]
    heads, rules, start = [], [], len(first) + 1
    for name, width in table.groups:
        heads.append(f"\\multicolumn{{{width}}}{{c}}{{{escape_latex(name)}}}")
        rules.append(f"\\cmidrule(lr){{{start}-{start + width - 1}}}")
        start += width
    titles = [escape_latex(title) for title in [*first, *(column.metric for column in table.columns)]]
    body = []
    for row, line in zip(table.rows, _texts(table, table.standings(decimals), text, escape_latex), strict=True):
        body.append(" & ".join(line) + r" \\")
        intervals = [interval_text(cell, decimals) if cell is not None else "" for cell in row.cells]
        if any(intervals):
            # Below its number: beside it, two columns would fill a page.
            small = [rf"{{\scriptsize {interval}}}" if interval else "" for interval in intervals]
            body += [" & ".join([""] * len(first) + small).strip() + r" \\", r"\addlinespace[2pt]"]
    return [
        f"\\begin{{tabular}}{{{'l' * len(keys)}{'r' * (len(titles) - len(keys))}}}",
        r"\toprule",
        " & ".join([""] * len(first) + heads).strip() + r" \\",
        " ".join(rules),
        " & ".join(titles) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]


def _texts(
    table: ComparisonTable,
    standings: list[list[Standing]],
    text: Callable[[Cell | None, Standing], str],
    escape: Callable[[str], str] = str,
) -> list[list[str]]:
    return [
        [
            *map(escape, table.row_texts(row)),
            *([parameters_text(row)] if table.shows_parameters else []),
            *(text(cell, standing) for cell, standing in zip(row.cells, ranks, strict=True)),
        ]
        for row, ranks in zip(table.rows, standings, strict=True)
    ]


def _caption(table: ComparisonTable, decimals: int, legend: str) -> str:
    """With what bold and the like mean, where anything stands out."""
    ranked = any(standing for _, block in table.blocks for line in block.standings(decimals) for standing in line)
    return f"{'; '.join([*table.notes, *([legend] if ranked else [])])}."


def escape_latex(text: str) -> str:
    special = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        DIFFERS: r"$^{\dagger}$",
        "<": "$<$",
        ">": "$>$",
    }
    return "".join(special.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)
