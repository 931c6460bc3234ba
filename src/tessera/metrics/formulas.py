"""How every metric follows from per-image statistics, said once: for eval.json, validation, tables and ``verify``.

A resample is a vector of weights: how often it holds each image. Without weights each image counts once: the evaluation itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tessera.metrics.statistics import KINDS, THRESHOLDS, Columns, Statistics

ROUNDING = 1e-9
"""Between two values of a metric that are equal: sums in another order."""

RECALLS = np.linspace(0.0, 1.0, 101)
"""At which COCO reads the precision."""

ROOM = 4_000_000
"""Numbers in the largest array at a time."""


def metrics_of(
    statistics: Statistics, weights: np.ndarray | None = None, names: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
    """Every metric, or those of ``names`` that the mode has, for each of the (R, images) resamples: (R,) fractions, NaN where a resample
    holds nothing to measure. Without weights R is 1.

    Among predictions of one image and class with equal scores, a resample repeats each in turn, where COCO run on copies of the image would
    take the copies one after another.
    """
    if weights is not None and (weights.ndim != 2 or weights.shape[1] != len(statistics)):
        raise ValueError(f"weights have the shape {weights.shape}, expected (resamples, {len(statistics)})")
    wanted = None if names is None else set(names)
    found: dict[str, np.ndarray] = {}
    if "panoptic" in statistics.parts:
        found |= _panoptic(statistics, weights)
    for kind, prefix in KINDS.items():
        if kind in statistics.parts:
            asked = [name for name in statistics.limits.averages() if wanted is None or prefix + name in wanted]
            found |= {prefix + name: values for name, values in _coco(statistics, kind, weights, asked).items()}
    if "semantic" in statistics.parts:
        found |= _semantic(statistics, weights)
    return {name: values for name, values in found.items() if wanted is None or name in wanted}


def evaluated(statistics: Statistics) -> dict[str, float]:
    """The metrics of the evaluation itself: those that are defined."""
    found = {name: float(values[0]) for name, values in metrics_of(statistics).items()}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def by_class(statistics: Statistics) -> list[dict[str, Any]]:
    """What each class contributes, in the order of ``classes``: fractions, None where undefined, and counts. Average precision is there for
    the countable classes that count alone."""
    rows: list[dict[str, Any]] = [{} for _ in statistics.classes]

    def add(name: str, labels: Iterable[int], values: Iterable[float]) -> None:
        for label, value in zip(labels, values, strict=True):
            rows[label][name] = None if math.isnan(value) else value

    every = range(len(rows))
    if "panoptic" in statistics.parts:
        for name, values in _quality(statistics, None).items():
            add(name, every, values[0].tolist())
        for name, values in zip(("tp", "fp", "fn"), _sums(statistics, "panoptic", None)[1:], strict=True):
            add(name, every, values[0].astype(int).tolist())
    most, _ = statistics.limits.marks
    for kind, prefix in KINDS.items():
        if kind not in statistics.parts:
            continue
        ranked = _ranked(statistics, kind, statistics.limits.detections[-1])
        every_image = np.ones((1, len(statistics)), np.int64)
        precision, recall, present = _curves(statistics, kind, every_image, "all", ranked, range(THRESHOLDS), True)
        for name, curves in (("AP", precision[:, 0]), ("AP50", precision[:, 0, 0]), ("AR", recall[:, 0])):
            means = [
                float(curve.ravel().mean()) if there else math.nan
                for curve, there in zip(curves, present[0], strict=True)
            ]
            add(f"{prefix}{name}{most}", _detected(statistics), means)
    if "semantic" in statistics.parts:
        hits, truth, predicted = _sums(statistics, "semantic", None)
        add("IoU", every, divide(hits, truth + predicted - hits)[0].tolist())
        add("accuracy", every, divide(hits, truth)[0].tolist())
        add("pixels", every, truth[0].astype(int).tolist())
    return rows


def disagreements(written: Mapping[str, Any], statistics: Statistics) -> list[str]:
    """A line for each metric that is not the one that the statistics give."""
    own = evaluated(statistics)

    def same(name: str) -> bool:
        value = written.get(name)
        return name in own and isinstance(value, int | float) and abs(value - own[name]) <= ROUNDING

    return [
        f"{name} is {written.get(name)}, the statistics beside it give {own.get(name)}"
        for name in sorted(written.keys() | own.keys())
        if not same(name)
    ]


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN where the denominator is zero."""
    ratio: np.ndarray = np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)
    return ratio


def _quality(statistics: Statistics, weights: np.ndarray | None) -> dict[str, np.ndarray]:
    """(R, C) each, NaN for classes without a true positive, false positive or false negative."""
    iou, tp, fp, fn = _sums(statistics, "panoptic", weights)
    weight = tp + 0.5 * fp + 0.5 * fn
    return {
        "PQ": divide(iou, weight),
        "SQ": np.where(weight > 0, iou / np.maximum(tp, 1), np.nan),
        "RQ": divide(tp, weight),
    }


def _panoptic(statistics: Statistics, weights: np.ndarray | None) -> dict[str, np.ndarray]:
    counted, things = set(statistics.counted), set(statistics.things)
    quality = _quality(statistics, weights)
    found = {}
    for suffix, group in (("", counted), ("_things", counted & things), ("_stuff", counted - things)):
        for name, values in quality.items():
            of_group = values[:, sorted(group)]
            found[f"{name}{suffix}"] = _mean(of_group.T, ~np.isnan(of_group))
    return found


def _semantic(statistics: Statistics, weights: np.ndarray | None) -> dict[str, np.ndarray]:
    """Means are over the classes that occur: in truth or prediction for mIoU, in truth for the accuracy."""
    hits, truth, predicted = (values[:, statistics.counted] for values in _sums(statistics, "semantic", weights))
    found = {"pixel_accuracy": divide(hits.sum(1), truth.sum(1))}
    for name, ratio in (
        ("mIoU", divide(hits, truth + predicted - hits)),
        ("mean_accuracy", divide(hits, truth)),
    ):
        mean = divide(np.nansum(ratio, 1), (~np.isnan(ratio)).sum(1))
        found[name] = np.where(truth.any(1), mean, np.nan)
    return {name: found[name] for name in ("mIoU", "mean_accuracy", "pixel_accuracy")}


def _sums(statistics: Statistics, part: str, weights: np.ndarray | None) -> list[np.ndarray]:
    """The part's counts summed over each resample's images, (R, C) each; of the evaluation itself without rounding."""
    columns = statistics.parts[part]
    images, classes = len(statistics), len(statistics.classes)
    found = []
    for name in list(columns)[2:]:
        table = np.zeros((images, classes))
        np.add.at(table, (columns["image"], columns["label"]), columns[name])
        found.append(np.array([[math.fsum(column) for column in table.T]]) if weights is None else weights @ table)
    return found


def _detected(statistics: Statistics) -> list[int]:
    """Labels of the classes that average precision is of."""
    return sorted(set(statistics.things) & set(statistics.counted))


def _coco(statistics: Statistics, kind: str, weights: np.ndarray | None, names: Sequence[str]) -> dict[str, np.ndarray]:
    averages = statistics.limits.averages()
    weights = np.ones((1, len(statistics)), np.int64) if weights is None else weights
    found = {name: np.full(len(weights), np.nan) for name in names}
    step = max(1, ROOM // (THRESHOLDS * len(RECALLS) * max(1, len(_detected(statistics)))))
    ranked = {most: _ranked(statistics, kind, most) for most in {averages[name].most for name in names}}
    for start in range(0, len(weights), step):
        part = slice(start, start + step)
        for size, most in dict.fromkeys((averages[name].size, averages[name].most) for name in names):
            asked = {name: one for name in names if ((one := averages[name]).size, one.most) == (size, most)}
            thresholds = sorted({threshold for one in asked.values() for threshold in one.thresholds})
            with_precision = not all(one.recall for one in asked.values())
            precision, recall, present = _curves(
                statistics, kind, weights[part], size, ranked[most], thresholds, with_precision
            )
            for name, average in asked.items():
                places = [thresholds.index(threshold) for threshold in average.thresholds]
                found[name][part] = _mean((recall if average.recall else precision)[:, :, places], present)
    return found


def _curves(
    statistics: Statistics,
    kind: str,
    weights: np.ndarray,
    size: str,
    ranked: Sequence[Columns],
    thresholds: Sequence[int],
    with_precision: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(K, R, T, 101) precision at ``RECALLS`` (empty unless asked for), (K, R, T) recall that all predictions together reach, and (R, K) whether
    the resample has an object of the class; K are the ``_detected`` classes."""
    truth, labels = statistics.parts[f"{kind}_truth"], _detected(statistics)
    recall = np.zeros((len(labels), len(weights), len(thresholds)))
    precision = np.zeros((*recall.shape, len(RECALLS) if with_precision else 0))
    present = np.zeros((len(weights), len(labels)), bool)
    for place, (label, found) in enumerate(zip(labels, ranked, strict=True)):
        of_class = truth["label"] == label
        objects = weights[:, truth["image"][of_class]] @ truth[size][of_class]
        present[:, place] = objects > 0
        for row, threshold in enumerate(thresholds):
            counts = (found[f"ignored_{size}"] >> threshold & 1) == 0
            image = found["image"][counts]
            matched = (found[f"matched_{size}"][counts] >> threshold & 1).astype(bool)
            step = max(1, ROOM // max(1, image.size))
            for start in range(0, len(weights) if matched.any() else 0, step):
                part = slice(start, start + step)
                drawn = weights[part][:, image]
                hits = np.cumsum(drawn[:, matched], 1)
                recall[place, part, row] = hits[:, -1] / np.maximum(objects[part], 1)
                if with_precision:
                    seen = np.cumsum(drawn, 1)[:, matched]
                    # The precision of a recall is the best that this recall or a higher one has.
                    best = np.maximum.accumulate((hits / np.maximum(seen, 1))[:, ::-1], 1)[:, ::-1]
                    precision[place, part, row] = _read(best, hits, objects[part])
    return precision, recall, present


def _ranked(statistics: Statistics, kind: str, most: int) -> list[Columns]:
    """Of each of the ``_detected`` classes the predictions, ``most`` of an image, by descending score, images in order where scores are equal."""
    columns = statistics.parts[kind]
    classes = []
    for label in _detected(statistics):
        found = {key: values[columns["label"] == label] for key, values in columns.items()}
        _, starts = np.unique(found["image"], return_index=True)
        rank = np.arange(found["image"].size) - np.repeat(starts, np.diff([*starts, found["image"].size]))
        kept = np.flatnonzero(rank < most)
        order = kept[np.argsort(-found["score"][kept], kind="stable")]
        classes.append({key: values[order] for key, values in found.items()})
    return classes


def _read(best: np.ndarray, hits: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """(R, 101): ``best`` at the first place of each row where ``hits`` reach each of ``RECALLS``; 0 where they never do."""
    rows, places = hits.shape
    needed = _hits_needed(tuple(objects.tolist()))
    # One search for all rows: each gets numbers of its own, above those of the row before.
    shift = np.arange(rows)[:, None] * (max(int(hits.max()), int(needed.max())) + 1)
    index = np.searchsorted((hits + shift).ravel(), needed + shift) - np.arange(rows)[:, None] * places
    padded = np.concatenate([best, np.zeros((rows, 1))], 1)
    return np.take_along_axis(padded, np.minimum(index, places), 1)


@functools.lru_cache(maxsize=64)
def _hits_needed(objects: tuple[int, ...]) -> np.ndarray:
    """(R, 101): the smallest number of hits whose recall, rounded as COCO rounds it, is at least each of ``RECALLS``."""
    total = np.maximum(np.array(objects, np.int64), 1)[:, None]
    needed = np.ceil(RECALLS * total).astype(np.int64)
    needed -= (needed - 1) / total >= RECALLS
    needed += needed / total < RECALLS
    return np.maximum(needed, 0)


def _mean(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    """(R,) means of (K, R, ...) values over the entries of the classes that each row has, (R, K); NaN where it has none. Row by row and classes
    last, as COCO adds them up, so that no zero of an absent class changes the order of a sum."""
    rows = [np.moveaxis(values[has, row], 0, -1).ravel() for row, has in enumerate(present)]
    return np.array([row.mean() if row.size else np.nan for row in rows])
