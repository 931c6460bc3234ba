"""Sheets of pictures: a row per experiment or image, pictures of equal height beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from tessera.pictures.style import DPI, INK, TEXT_WIDTH

TITLE = 0.2
CAPTION = 0.14
GAP = 0.06
"""Inches."""
TALLEST = 2.4
"""Inches, of a picture."""


@dataclass(frozen=True)
class Row:
    title: str
    pictures: Sequence[tuple[str, Image.Image]]
    """With their captions."""


def evenly_spread(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of the numbers 0..count-1, the middles of equal shares; so both ends count the same."""
    wanted = min(count, wanted)
    return [(2 * number + 1) * count // (2 * wanted) for number in range(wanted)]


def draw_sheet(rows: Sequence[Row], columns: int = 1, width: float = TEXT_WIDTH, dpi: int = DPI) -> Figure:
    """Rows fill ``columns`` side by side, left to right. ``width`` is in inches; pictures are scaled down to ``dpi``, never up."""
    if not rows or not all(row.pictures for row in rows):
        raise ValueError("a sheet needs rows, and every row a picture")
    block = (width - (columns - 1) * 3 * GAP) / columns
    heights = [_picture_height(row, block) for row in rows]
    lines = [heights[start : start + columns] for start in range(0, len(rows), columns)]
    line_heights = [(TITLE if any(row.title for row in rows) else 0) + max(line) + CAPTION + GAP for line in lines]
    total = sum(line_heights)
    figure = Figure(figsize=(width, total), dpi=dpi)
    top = total
    for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        line, column = divmod(number, columns)
        if column == 0 and line:
            top -= line_heights[line - 1]
        left, under_title = column * (block + 3 * GAP), top
        if any(row.title for row in rows):
            text = figure.text(left / width, (top - TITLE / 2) / total, row.title, fontsize=8, va="center", color=INK)
            text.set_fontweight("bold")
            under_title -= TITLE
        for caption, picture in row.pictures:
            wide = height * picture.width / picture.height
            axes = figure.add_axes(
                (left / width, (under_title - height) / total, wide / width, height / total), frameon=False
            )
            axes.imshow(_scaled(picture, round(wide * dpi)), aspect="auto", interpolation="antialiased")
            axes.set_axis_off()
            figure.text(
                (left + wide / 2) / width,
                (under_title - height - CAPTION / 2) / total,
                _shortened(caption, wide),
                fontsize=6,
                ha="center",
                va="center",
                color=INK,
            )
            left += wide + GAP
    return figure


def _picture_height(row: Row, block: float) -> float:
    shapes = sum(picture.width / picture.height for _, picture in row.pictures)
    return min(TALLEST, (block - GAP * (len(row.pictures) - 1)) / shapes)


def _scaled(picture: Image.Image, wide: int) -> np.ndarray:
    picture = picture.convert("RGB")
    if wide < picture.width:
        size = (wide, max(1, round(picture.height * wide / picture.width)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(picture)


def _shortened(text: str, inches: float) -> str:
    """Shortens to about what fits, keeping the end, which tells file names apart."""
    letters = max(8, int(inches / 0.052))
    return text if len(text) <= letters else "…" + text[1 - letters :]
