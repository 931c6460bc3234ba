"""How figures look and how they are written: for a column of a paper, readable without colour vision, the same bytes every time."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.optimize import isotonic_regression

from tessera.files import write_bytes

COLUMN_WIDTH = 3.5
TEXT_WIDTH = 7.16
"""Inches, of two-column papers (IEEE)."""

DPI = 200
"""Of PNG files, which are for screens and the report; papers take the PDF."""

INK = "#222222"
LABEL_SIZE = 6.5
"""Points."""

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's set for all kinds of colour vision, without its black and its yellow, which is hard to see on white."""

DASHES = ("-", (0, (2.5, 1.2)))

SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # shipped with matplotlib, so that every machine draws the same
    "font.size": 7,
    "axes.titlesize": 8,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "lines.linewidth": 1.2,
    "text.parse_math": False,
    "pdf.fonttype": 42,  # outlines that publishers accept and readers can search
    "svg.hashsalt": "tessera",
}


@dataclass(frozen=True)
class Look:
    """Of one row of the table in every figure."""

    color: str
    dash: str | tuple[float, tuple[float, ...]]


def look(number: int) -> Look:
    return Look(COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)])


def save(figure: Figure, path: Path, dpi: int = DPI) -> None:
    """PNG, JPEG or PDF by the suffix, whole or not at all, without a date or a version inside."""
    metadata = {".png": {"Software": None}, ".pdf": dict.fromkeys(("CreationDate", "Creator", "Producer"))}
    stream = (
        io.BytesIO()
    )  # what matplotlib writes itself stays open where a disk refuses it, with a traceback when it is closed at last
    with matplotlib.rc_context(SETTINGS):
        for text in figure.findobj(Text):
            text.set_parse_math(False)  # Names of classes and files may have dollars.
        figure.savefig(stream, format=path.suffix[1:], dpi=dpi, metadata=metadata.get(path.suffix))
    write_bytes(path, stream.getvalue())


def label_beside(
    axes: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str], looks: Sequence[Look]
) -> None:
    """Names each point (in data coordinates) to the right of the axes, as near to its height as the other names let it.

    Call it last: limits and size of the axes must be final.
    """
    if not points:
        return
    axes.get_xlim(), axes.get_ylim()  # matplotlib finds them late; what it transforms with is old until then
    figure = axes.get_figure(root=True)
    assert figure is not None
    wide, high = axes.get_position().size * figure.get_size_inches()
    line = LABEL_SIZE * 1.25 / 72 / high
    places = axes.transAxes.inverted().transform(axes.transData.transform(np.asarray(points, float)))
    order = np.argsort(-places[:, 1], kind="stable")
    heights = np.array([line * (texts[index].count("\n") + 1) for index in order]) + 0.25 * line
    # From the top down, centres keep the distance of half of both heights: shifted by it, that is a monotonous fit.
    offsets = np.concatenate([[0], np.cumsum((heights[1:] + heights[:-1]) / 2)])
    fitted = isotonic_regression(places[order, 1] + offsets, increasing=False).x
    top, bottom = 1 - heights[0] / 2, offsets[-1] + heights[-1] / 2
    centres = np.clip(fitted, min(bottom, top), top) - offsets
    start, end, text = 1 + np.array([0.07, 0.27, 0.31]) / wide
    for index, height in zip(order, centres, strict=True):
        x, y = places[index]
        color, dash = looks[index].color, looks[index].dash
        outside: dict[str, Any] = {"color": color, "transform": axes.transAxes, "clip_on": False}
        axes.plot([x, start], [y, height], linewidth=0.5, linestyle=(0, (1, 1.5)), alpha=0.8, zorder=1, **outside)
        axes.plot([start, end], [height, height], linestyle=dash, linewidth=1.3, **outside)
        axes.text(
            text, height, texts[index], fontsize=LABEL_SIZE, va="center", linespacing=1.1, transform=axes.transAxes
        )
