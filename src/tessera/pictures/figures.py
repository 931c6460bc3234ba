"""Figures of a table's experiments: training curves, accuracy against time, scores by class, and pictures.

Rows of the table keep their colour and dash in all of them; seeds of a row share it.
"""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from tessera.files import UserError, canonical_json
from tessera.metrics.record import Evaluation, runtime_name
from tessera.metrics.statistics import base_name
from tessera.pictures import panels
from tessera.pictures.style import (
    COLUMN_WIDTH,
    INK,
    TEXT_WIDTH,
    label_beside,
    look,
)
from tessera.spec.planning import Condition
from tessera.structures import told_apart

BY_CLASS = {name: name for name in ("PQ", "SQ", "RQ", "AP", "AP50", "box_AP", "box_AP50")}
BY_CLASS |= {"mIoU": "IoU", "mean_accuracy": "accuracy"}
"""Metric -> what a class contributes to it, as per-class rows call it."""

MARKERS = {"torch": "o", "onnx": "s", "trt": "^"}
"""Filled for fp32, hollow for lower precisions."""

MAX_CLASSES = 40

LEFT, BOTTOM, GAP = 0.5, 0.36, 0.34
"""Inches: room for tick labels and titles of axes."""


@dataclass(frozen=True)
class Run:
    """One experiment."""

    experiment: str
    seed: int
    evaluations: list[Evaluation]
    """In the order of the table's columns."""
    curves: pd.DataFrame
    """metrics.csv, with ``epoch`` as the share of the training that lies behind, so that steps inside an epoch have their place."""
    inference: Path
    images: list[dict[str, Any]]
    """Entries of inference/index.json; ``overlay`` is relative to ``inference``. None where `inference.draw` is off."""


@dataclass(frozen=True)
class Row:
    """The runs that differ in nothing but their seed."""

    label: str
    """Those parts that tell it from the other rows, on one or two lines."""
    runs: list[Run]


def leading_metrics(rows: Sequence[Row], metrics: Sequence[str]) -> list[str]:
    """Those of the table's metrics that lead a row: the first that it has, and that classes have a share in where there is one."""
    leading = []
    for row in rows:
        found = row.runs[0].evaluations[0].metrics
        has = [name for name in metrics if name in found]
        leading += ([name for name in has if base_name(name) in BY_CLASS] or has)[:1]
    return [name for name in metrics if name in leading]


def draw_curves(rows: Sequence[Row], metrics: Sequence[str]) -> Figure:
    """Training loss above, validation metrics below, against epochs; of several seeds the mean, each of them faint behind it."""
    # Validations keep to COCO's limits.
    measured = dict.fromkeys(map(base_name, metrics))
    titles = {"train_loss": "training loss"} | {f"val_{name}": f"validation {name} (%)" for name in measured}
    shown = [column for column in titles if any(_has(run.curves, column) for row in rows for run in row.runs)]
    if not shown:
        return _nothing("no curves: no weights were trained, published ones were taken over")
    figure, stack = _stack(len(shown), rows)
    longest = max(float(run.curves["epoch"].max()) for row in rows for run in row.runs if len(run.curves))
    for axes, column in zip(stack, shown, strict=True):
        ends = {}
        for number, row in enumerate(rows):
            curves = [_curve(run.curves, column) for run in row.runs if _has(run.curves, column)]
            if not curves:
                continue
            style = look(number)
            mean = pd.concat(curves, axis=1).dropna().mean(axis=1).sort_index()
            for curve in curves if len(curves) > 1 else []:
                axes.plot(curve.index, curve, color=style.color, linewidth=0.5, alpha=0.45)
            axes.plot(
                mean.index,
                mean,
                color=style.color,
                linestyle=style.dash,
                marker="o" if longest <= 20 else None,
                markersize=2.2,
            )
            named = mean if len(mean) else curves[0]  # seeds need not have an epoch in common
            ends[number] = (float(named.index[-1]), float(named.iloc[-1]))
        lowest, highest = axes.dataLim.y0, axes.dataLim.y1
        if column == "train_loss" and lowest > 0 and highest > 20 * lowest:
            axes.set_yscale("log")
            _label_log(axes.yaxis)
        elif lowest >= 0:
            axes.set_ylim(0, 1.06 * max(highest, 0.01 if column == "train_loss" else 1))
        axes.set_ylabel(titles[column])
        axes.set_xlim(0, longest * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        _label_rows(axes, rows, ends)
    stack[-1].set_xlabel("epoch")
    return figure


def draw_accuracy_time(rows: Sequence[Row], metrics: Sequence[str]) -> Figure:
    """Metrics against what the evaluation took per image, loading and post-processing included; a marker for every runtime and way of testing."""
    evaluations = [evaluation for row in rows for run in row.runs for evaluation in run.evaluations]
    columns = list(dict.fromkeys(evaluation.column for evaluation in evaluations))
    times = [evaluation.seconds / evaluation.images for evaluation in evaluations]
    key = [
        Line2D([], [], color=INK, linestyle="none", label=runtime_name(*column), **_marker(column, INK))
        for column in columns
    ]
    figure, stack = _stack(len(metrics), rows, below=BOTTOM + 0.18 + 0.15 * math.ceil(len(key) / 3))
    for axes, metric in zip(stack, metrics, strict=True):
        axes.set_xscale("log")
        _label_log(axes.xaxis)
        axes.set_xlim(min(times) / 1.3, max(times) * 1.3)
        ends = {}
        for number, row in enumerate(rows):
            points = [(column, *point) for column in columns if (point := _mean_point(row, column, metric))]
            if not points:
                continue
            style = look(number)
            axes.plot(
                [x for _, x, _ in points],
                [y for _, _, y in points],
                color=style.color,
                linewidth=0.7,
                linestyle=style.dash,
            )
            for column, x, y in points:
                axes.plot([x], [y], color=style.color, zorder=3, **_marker(column, style.color))
            ends[number] = max((x, y) for _, x, y in points)
        lowest, highest = axes.dataLim.y0, axes.dataLim.y1
        room = max(0.12 * (highest - lowest), 1 - (highest - lowest) / 2)  # runtimes that agree must not look far apart
        axes.set_ylim(max(lowest - room, -0.1 * room), highest + room)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.set_ylabel(f"{metric} (%)")
        _label_rows(axes, rows, ends)
    stack[-1].set_xlabel(f"seconds per image of the evaluation, loading included\n{_hardware(evaluations)}")
    figure.legend(
        handles=key, loc="lower left", ncols=3, frameon=False, handletextpad=0.1, columnspacing=1.2, borderaxespad=0.2
    )
    return figure


def draw_classes(rows: Sequence[Row], metrics: Sequence[str]) -> Figure:
    """A block for every metric and set of images: classes from top to bottom, a panel of bars for every row, the best number bold."""
    blocks = [block for metric in metrics for block in _class_blocks(rows, metric)]
    if not blocks:
        return _nothing(f"no scores by class for {', '.join(metrics)}")
    width = COLUMN_WIDTH if max(len(block.numbers) for block in blocks) == 1 else TEXT_WIDTH
    names = min(1.5, max(0.052 * len(str(name)) for block in blocks for name in block.scores.index) + 0.12)
    gap, bar, head = 0.14, 0.13, 0.26
    most = min(4, int((width - names) / (_widest(rows) + gap)) or 1)
    layout = []
    for block in blocks:
        across = min(most, len(block.numbers))
        title = 0.17 * max(1 + rows[number].label.count("\n") for number in block.numbers) + 0.04
        layout.append((block, across, title, title + bar * len(block.scores) + 0.1))
    total = 0.05 + sum(head + math.ceil(len(block.numbers) / across) * height for block, across, _, height in layout)
    figure = Figure(figsize=(width, total))
    top = total
    for block, across, title, height in layout:
        figure.text(0.05 / width, (top - 0.13) / total, block.title, fontsize=8, fontweight="bold", va="center")
        top -= head
        panel = (width - names - 0.05) / across - gap
        percent = block.scores.to_numpy(float) * 100
        highest = 1.28 * max(0.1, float(np.nan_to_num(percent).max()))
        for place, number in enumerate(block.numbers):
            line, column = divmod(place, across)
            if column == 0 and line:
                top -= height
            left, under, deep = names + column * (panel + gap), top - title, bar * len(percent)
            axes = figure.add_axes((left / width, (under - deep) / total, panel / width, deep / total))
            best = np.nan_to_num(percent).max(axis=1) if len(block.numbers) > 1 else None
            _draw_bars(axes, percent[:, place], best, look(number).color, highest)
            labels = [_short(str(name)) for name in block.scores.index] if column == 0 else []
            axes.set_yticks(range(len(labels)), labels)
            label = rows[number].label
            figure.text(left / width, (under + 0.06) / total, label, fontsize=7, va="baseline", linespacing=1.1)
        top -= height
    return figure


def draw_pictures(rows: Sequence[Row]) -> Figure:
    """Predictions of PyTorch, of each row's first seed, on images spread over those of the infer stage; rows without pictures are left out."""
    columns, wanted = (1, 3) if len(rows) <= 6 else (2, 2)
    sheet = []
    for row in rows:
        run = row.runs[0]
        if not run.images:
            print(f"figures: {run.experiment}: no pictures, inference.draw is off", file=sys.stderr, flush=True)
            continue
        images = [run.images[index] for index in panels.evenly_spread(len(run.images), wanted)]
        pictures = [(image["file_name"], _open(run.inference / image["overlay"])) for image in images]
        sheet.append(panels.Row(" · ".join(row.label.split("\n")), pictures))
    return panels.draw_sheet(sheet, columns) if sheet else _nothing("no pictures: inference.draw is off")


@dataclass(frozen=True)
class ClassBlock:
    title: str
    scores: pd.DataFrame
    """Fractions, NaN where undefined: a row per class, a column per row of the table that has the metric."""
    numbers: list[int]
    """Which rows of the table the columns are."""


def _class_blocks(rows: Sequence[Row], metric: str) -> list[ClassBlock]:
    """One for every set of images."""
    key = BY_CLASS.get(metric, metric)
    found: dict[str, dict[int, pd.Series]] = {}
    for number, row in enumerate(rows):
        firsts = [run.evaluations[0] for run in row.runs]
        scores = [scores for scores in (_class_scores(first, key) for first in firsts) if len(scores)]
        if scores:
            first = firsts[0]
            title = f"{key} (%) by class, {first.dataset} {first.split}, {runtime_name(*first.column)}"
            found.setdefault(title, {})[number] = pd.concat(scores, axis=1).mean(axis=1)
    blocks = []
    for title, columns in found.items():
        table = pd.DataFrame(columns)
        order = next(iter(columns.values())).index.to_list()
        table = table.reindex([*order, *(name for name in table.index if name not in order)])
        if len(table) > MAX_CLASSES:
            ranks = table.mean(axis=1).rank(method="first", na_option="bottom", ascending=False)
            half = MAX_CLASSES // 2
            title += f": the best and the worst {half} of {len(table)}"
            table = table[(ranks <= half) | (ranks > len(table) - half)]
        blocks.append(ClassBlock(title, table, list(columns)))
    return blocks


def _class_scores(evaluation: Evaluation, key: str) -> pd.Series:
    """Scores by class; NaN where undefined, empty where no class has the key."""
    rows = evaluation.per_class
    classes = told_apart(
        [str(row.get("name")) for row in rows], [row.get("id", place) for place, row in enumerate(rows)]
    )
    values = {name: row[key] for name, row in zip(classes, rows, strict=True) if key in row}
    return pd.Series(values, dtype=float)


def _draw_bars(axes: Axes, percent: np.ndarray, best: np.ndarray | None, color: str, highest: float) -> None:
    widths = np.nan_to_num(percent)
    axes.barh(np.arange(len(percent)), widths, height=0.72, color=color)
    for place, value in enumerate(percent):
        text = "–" if math.isnan(value) else f"{value:.1f}"
        leads = best is not None and text == f"{best[place]:.1f}" and text != "0.0"
        weight = "bold" if leads else "normal"
        right = float(widths[place]) + highest * 0.015
        axes.text(right, place, text, fontsize=6, va="center_baseline", fontweight=weight)
    axes.set_ylim(len(percent) - 0.5, -0.5)
    axes.set_xlim(0, highest)
    axes.grid(False)
    axes.tick_params(left=False, bottom=False, labelbottom=False)
    axes.spines["bottom"].set_visible(False)


def _stack(count: int, rows: Sequence[Row], below: float = BOTTOM) -> tuple[Figure, list[Axes]]:
    """Axes of a paper's column, one above the other, with room for the rows' names at their right."""
    lines = sum(1 + row.label.count("\n") for row in rows)
    high = max(1.55, 0.125 * lines)
    names = _widest(rows) + 0.38
    width = max(COLUMN_WIDTH, LEFT + 1.9 + names)
    total = 0.08 + count * high + (count - 1) * GAP + below
    figure = Figure(figsize=(width, total))
    stack = []
    for number in range(count):
        bottom = total - 0.08 - high - number * (high + GAP)
        stack.append(figure.add_axes((LEFT / width, bottom / total, (width - LEFT - names) / width, high / total)))
    return figure, stack


def _widest(rows: Sequence[Row]) -> float:
    """About, of the rows' names in inches."""
    return max(len(line) for row in rows for line in row.label.split("\n")) * 0.052


def _label_rows(axes: Axes, rows: Sequence[Row], ends: dict[int, tuple[float, float]]) -> None:
    label_beside(axes, list(ends.values()), [rows[number].label for number in ends], [look(number) for number in ends])


def _nothing(text: str) -> Figure:
    figure = Figure(figsize=(COLUMN_WIDTH, 0.6))
    figure.text(0.5, 0.5, textwrap.fill(text, 56), ha="center", va="center")
    return figure


def _has(curves: pd.DataFrame, column: str) -> bool:
    return column in curves and bool(curves[column].notna().any())


def _curve(curves: pd.DataFrame, column: str) -> pd.Series:
    """Values by epoch; metrics in percent."""
    return curves[["epoch", column]].dropna().set_index("epoch")[column] * (1 if column == "train_loss" else 100)


def _mean_point(row: Row, column: Condition, metric: str) -> tuple[float, float] | None:
    """Seconds per image and percent, over seeds."""
    found = [
        (one.seconds / one.images, 100 * one.metrics[metric])
        for run in row.runs
        for one in run.evaluations
        if one.column == column and metric in one.metrics
    ]
    if not found:
        return None
    seconds, percent = np.mean(found, axis=0)
    return float(seconds), float(percent)


def _hardware(evaluations: Sequence[Evaluation]) -> str:
    """Times of different machines must not be taken for differences of models."""
    machines = {
        canonical_json(evaluation.facts.get("hardware")): evaluation.facts.get("hardware") for evaluation in evaluations
    }
    if len(machines) > 1:
        return f"on {len(machines)} different machines: times do not compare"
    hardware = next(iter(machines.values()))
    if not isinstance(hardware, dict):
        return "on a machine that the evaluations do not name"
    gpus = hardware.get("gpus") or []
    return _short(f"on {gpus[0] if gpus else hardware.get('cpu')}, {hardware.get('cores')} cores", 56)


def _marker(column: Condition, color: str) -> dict[str, Any]:
    runtime, precision, testing = column
    face = color if precision == "fp32" else "white"
    half = {"fillstyle": "left", "markerfacecoloralt": "white"} if testing else {}
    return {"marker": MARKERS[runtime], "markersize": 4.5, "markerfacecolor": face, **half}


def _label_log(axis: Axis) -> None:
    """With numbers to read even where the range lies within one power of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, but the index beside it lists it; make the folder again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be opened as a picture ({error})") from None


def _short(text: str, letters: int = 26) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"
