"""Metrics of resamples of the images, their confidence intervals, and paired comparisons. Numpy alone; no image is opened.

A resample is a vector of weights: how often it holds each image. All ones is the evaluation itself. The uncertainty is that of the choice
of test images; that of training is what seeds show.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tessera.metrics.statistics import Columns, Statistics, divide

LEVEL = 0.05
"""Intervals hold 1 - LEVEL; a difference with a smaller p counts as one."""

INTERVAL_IMAGES = 20
"""Of fewer images there are no intervals: they would hold the truth too rarely (benchmarks/table_statistics.py)."""

ROUNDING = 1e-9
"""Between two values of a metric that are equal: sums in another order."""

RECALLS = np.linspace(0.0, 1.0, 101)
"""At which COCO reads the precision."""

ROOM = 4_000_000
"""Numbers in the largest array at a time."""


def resample_weights(images: int, numbers: range) -> np.ndarray:
    """(resamples, images) int64: each resample draws as many images as there are, with replacement.

    Resample r depends on (images, r) alone: a thousand of them begin with the same hundred as a hundred.
    """
    weights = np.empty((len(numbers), images), np.int64)
    for place, number in enumerate(numbers):
        # The upper 53 bits as a fraction: the stream is the same in every version of numpy, which its distributions need not be.
        drawn = ((_random(0, number, images) >> np.uint64(11)) * (images / 2.0**53)).astype(np.int64)
        weights[place] = np.bincount(drawn, minlength=images)
    return weights


def count_swaps(images: int, randomizations: int) -> int:
    """All that there are, or, where those are more, ``randomizations`` and the one that swaps nothing."""
    return 2**images if 2**images <= randomizations else randomizations + 1


def swaps(images: int, randomizations: int, numbers: range) -> np.ndarray:
    """(R, images) bool: which images two models exchange in those of ``count_swaps``; number 0 exchanges none, any other each with
    probability 1/2."""
    if 2**images <= randomizations:
        return (np.array(numbers)[:, None] >> np.arange(images) & 1).astype(bool)
    drawn = [_random(1, number, images) >> np.uint64(63) for number in numbers]
    return np.array(drawn).astype(bool) & (np.array(numbers) > 0)[:, None]


def _random(key: int, number: int, count: int) -> np.ndarray:
    """(count,) uint64."""
    return np.random.Philox(key=key, counter=[0, 0, 0, number]).random_raw(count)


def resampled(statistics: Statistics, resamples: int, names: Collection[str]) -> dict[str, np.ndarray]:
    """Metric -> its value on each of the ``resample_weights``: (R,) fractions, NaN where undefined."""
    images = len(statistics)
    return _in_blocks(
        lambda numbers: metrics_of(statistics, resample_weights(images, numbers), names), resamples, images
    )


def randomized(one: Statistics, two: Statistics, randomizations: int, names: Collection[str]) -> dict[str, np.ndarray]:
    """Metric -> ``one`` less ``two`` after each of the ``swaps``: (R,) fractions, as observed first, NaN where undefined.

    Both models evaluate every image once, whatever was swapped. Only metrics that both have, of the same classes. Raises ValueError for
    models of other images.
    """
    both, images = _interleaved(one, two), len(one)

    def differences(numbers: range) -> dict[str, np.ndarray]:
        swapped = swaps(images, randomizations, numbers)
        weights = np.stack([~swapped, swapped], 2).reshape(len(numbers), 2 * images).astype(np.int64)
        first, second = metrics_of(both, weights, names), metrics_of(both, 1 - weights, names)
        return {name: values - second[name] for name, values in first.items()}

    return _in_blocks(differences, count_swaps(images, randomizations), 2 * images)


def _in_blocks(measure: Callable[[range], Mapping[str, np.ndarray]], count: int, images: int) -> dict[str, np.ndarray]:
    """What ``measure`` gives for all numbers below ``count``, asked for as many at a time as ``ROOM`` has room for."""
    step = max(1, ROOM // images)
    found = [measure(range(start, min(count, start + step))) for start in range(0, count, step)]
    return {name: np.concatenate([block[name] for block in found]) for name in found[0]}


def _interleaved(one: Statistics, two: Statistics) -> Statistics:
    """Image i of ``one`` as image 2i and that of ``two`` as 2i + 1, in which order equal scores are ranked as well: so weights that choose one
    of the two give what an evaluation of the chosen would."""
    if one.image_ids != two.image_ids:
        raise ValueError("two models can be compared on the same images only")
    classes = list(dict.fromkeys([*one.classes, *two.classes]))
    parts = {}
    for name in one.parts:
        if name not in two.parts or _measured(one, name) != _measured(two, name):
            continue
        if one.limits != two.limits and name not in ("semantic", "panoptic"):
            continue  # Their names say that they are other metrics.
        both = []
        for offset, statistics in enumerate((one, two)):
            columns = statistics.parts[name]
            labels = np.array([classes.index(label) for label in statistics.classes])[columns["label"]]
            both.append({**columns, "image": 2 * columns["image"] + offset, "label": labels})
        order = np.argsort(np.concatenate([columns["image"] for columns in both]), kind="stable")
        parts[name] = {key: np.concatenate([columns[key] for columns in both])[order] for key in both[0]}
    ids = [image for image in one.image_ids for _ in range(2)]
    return Statistics(one.mode, classes, one.things, one.counted, ids, parts, one.limits)


def _measured(statistics: Statistics, part: str) -> tuple[set[str], set[str]]:
    """The classes whose mean a metric is: the countable ones, and of pixels and segments the others."""
    counted, things = set(statistics.counted), set(statistics.things)
    others = counted - things if part in ("semantic", "panoptic") else set()
    return {statistics.classes[label] for label in counted & things}, {statistics.classes[label] for label in others}


def metrics_of(
    statistics: Statistics, weights: np.ndarray | None = None, names: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
    """Every metric of eval.json, or those of ``names`` that the mode has, for each of the (R, images) resamples: (R,) fractions, NaN where
    a resample holds nothing to measure. Without weights R is 1 and the resample the evaluation itself.

    Among predictions of one image and class with equal scores, a resample repeats each in turn, where COCO run on copies of the image would
    take the copies one after another.
    """
    if weights is None:
        weights = np.ones((1, len(statistics)), np.int64)
    if weights.ndim != 2 or weights.shape[1] != len(statistics):
        raise ValueError(f"weights have the shape {weights.shape}, expected (resamples, {len(statistics)})")
    wanted = None if names is None else set(names)
    found: dict[str, np.ndarray] = {}
    if "panoptic" in statistics.parts:
        found |= _panoptic(statistics, weights)
    for kind, prefix in (("segm", ""), ("bbox", "box_")):
        if kind in statistics.parts:
            asked = [name for name in statistics.limits.averages() if wanted is None or prefix + name in wanted]
            found |= {prefix + name: values for name, values in _coco(statistics, kind, weights, asked).items()}
    if "semantic" in statistics.parts:
        found |= _semantic(statistics, weights)
    return {name: values for name, values in found.items() if wanted is None or name in wanted}


def evaluated(statistics: Statistics) -> dict[str, float]:
    """The metrics of the evaluation itself, as in eval.json: those that are defined."""
    found = {name: float(values[0]) for name, values in metrics_of(statistics).items()}
    return {name: value for name, value in found.items() if not math.isnan(value)}


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


def interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float] | None:
    """Percentile bootstrap interval (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3).

    Resamples that hold nothing to measure are left out; None when they are more than half, for then the rest says little.
    """
    defined = values[~np.isnan(values)]
    if 2 * defined.size <= values.size:
        return None
    low, high = np.quantile(defined, [level / 2, 1 - level / 2])
    return float(low), float(high)


def two_sided_p(differences: np.ndarray) -> float | None:
    """Of the hypothesis that of every image either model could have had the other's result, from (R,) differences as ``randomized`` gives
    them; None where nothing was observed.

    The paired randomization test (Noreen, Computer-Intensive Methods for Testing Hypotheses, 1989; for metrics that are no means Yeh, More
    accurate tests for the statistical significance of result differences, COLING 2000): the share of swaps with a difference at least as
    large as the observed one, which is among them (Phipson and Smyth, Permutation P-values Should Never Be Zero, SAGMB 9(1), 2010). So chance
    is called a difference no more often than the level says, with any number of images. Swaps that leave nothing to measure count as large.
    """
    if math.isnan(differences[0]):
        return None
    return float(np.mean(~(np.abs(differences) < abs(differences[0]) - ROUNDING)))


def _panoptic(statistics: Statistics, weights: np.ndarray) -> dict[str, np.ndarray]:
    iou, tp, fp, fn = _per_class(statistics, "panoptic", weights, ("iou", "tp", "fp", "fn"))
    denominator = tp + 0.5 * fp + 0.5 * fn
    occurred = denominator > 0
    safe = np.where(occurred, denominator, 1)
    quality = {"PQ": iou / safe, "SQ": iou / np.maximum(tp, 1), "RQ": tp / safe}
    counted = _flags(statistics.counted, statistics)
    thing = _flags(statistics.things, statistics)
    found = {}
    for suffix, group in (("", counted), ("_things", counted & thing), ("_stuff", counted & ~thing)):
        for name, values in quality.items():
            found[f"{name}{suffix}"] = _mean(np.where(occurred & group, values, np.nan))
    return found


def _semantic(statistics: Statistics, weights: np.ndarray) -> dict[str, np.ndarray]:
    parts = _per_class(statistics, "semantic", weights, ("hits", "truth", "predicted"))
    hits, truth, predicted = (values[:, statistics.counted] for values in parts)
    measured = truth.any(1)
    found = {
        "mIoU": _mean(divide(hits, truth + predicted - hits)),
        "mean_accuracy": _mean(divide(hits, truth)),
        "pixel_accuracy": divide(hits.sum(1), truth.sum(1)),
    }
    return {name: np.where(measured, values, np.nan) for name, values in found.items()}


def _per_class(statistics: Statistics, part: str, weights: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
    """Sums over each resample's images, (R, C) each."""
    columns = statistics.parts[part]
    found = []
    for name in names:
        table = np.zeros((len(statistics), len(statistics.classes)))
        np.add.at(table, (columns["image"], columns["label"]), columns[name])
        found.append(weights @ table)
    return found


def _coco(statistics: Statistics, kind: str, weights: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    columns, truth = statistics.parts[kind], statistics.parts[f"{kind}_truth"]
    averages = statistics.limits.averages()
    sums = {name: np.zeros(len(weights)) for name in names}
    classes = dict.fromkeys(names, np.zeros(len(weights), np.int64))
    for label in sorted(set(statistics.things) & set(statistics.counted)):
        of_class = truth["label"] == label
        found = _ranked(columns, label)
        for size, most in dict.fromkeys((averages[name].size, averages[name].most) for name in names):
            objects = weights[:, truth["image"][of_class]] @ truth[size][of_class]
            kept = {key: values[found["rank"] < most] for key, values in found.items()}
            asked = [name for name in names if (averages[name].size, averages[name].most) == (size, most)]
            curves = {
                threshold: _curve(kept, size, threshold, weights, objects, any(not averages[n].recall for n in asked))
                for threshold in sorted({threshold for name in asked for threshold in averages[name].thresholds})
            }
            for name in asked:
                average = averages[name]
                values = [curves[threshold][1 if average.recall else 0] for threshold in average.thresholds]
                sums[name] += np.where(objects > 0, np.mean(values, 0), 0)
                classes[name] = classes[name] + (objects > 0)
    return {name: divide(sums[name], classes[name]) for name in names}


def _ranked(columns: Columns, label: int) -> Columns:
    """One class's predictions by descending score, images in order where scores are equal; ``rank`` is that within the image."""
    found = {key: values[columns["label"] == label] for key, values in columns.items()}
    _, starts = np.unique(found["image"], return_index=True)
    found["rank"] = np.arange(found["image"].size) - np.repeat(starts, np.diff([*starts, found["image"].size]))
    order = np.argsort(-found["score"], kind="stable")
    return {key: values[order] for key, values in found.items()}


def _curve(
    found: Columns, size: str, threshold: int, weights: np.ndarray, objects: np.ndarray, with_precision: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(R,) precision averaged over ``RECALLS``, and the recall that all predictions together reach; meaningless without objects."""
    counts = (found[f"ignored_{size}"] >> threshold & 1) == 0
    image = found["image"][counts]
    matched = (found[f"matched_{size}"][counts] >> threshold & 1).astype(bool)
    precision, recall = np.zeros(len(weights)), np.zeros(len(weights))
    if not matched.any():
        return precision, recall
    step = max(1, ROOM // image.size)
    for start in range(0, len(weights), step):
        part = slice(start, start + step)
        drawn = weights[part][:, image]
        hits = np.cumsum(drawn[:, matched], 1)
        recall[part] = hits[:, -1] / np.maximum(objects[part], 1)
        if with_precision:
            seen = np.cumsum(drawn, 1)[:, matched]
            # The precision of a recall is the best that this recall or a higher one has.
            best = np.maximum.accumulate((hits / np.maximum(seen, 1))[:, ::-1], 1)[:, ::-1]
            precision[part] = _read(best, hits, objects[part])
    return precision, recall


def _read(best: np.ndarray, hits: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """(R,) means of ``best`` at the first place of each row where ``hits`` reach each of ``RECALLS``; 0 where they never do."""
    rows, places = hits.shape
    needed = _hits_needed(tuple(objects.tolist()))
    # One search for all rows: each gets numbers of its own, above those of the row before.
    shift = np.arange(rows)[:, None] * (max(int(hits.max()), int(needed.max())) + 1)
    index = np.searchsorted((hits + shift).ravel(), needed + shift) - np.arange(rows)[:, None] * places
    padded = np.concatenate([best, np.zeros((rows, 1))], 1)
    values: np.ndarray = np.take_along_axis(padded, np.minimum(index, places), 1).mean(1)
    return values


@functools.lru_cache(maxsize=64)
def _hits_needed(objects: tuple[int, ...]) -> np.ndarray:
    """(R, 101): the smallest number of hits whose recall, rounded as COCO rounds it, is at least each of ``RECALLS``."""
    total = np.maximum(np.array(objects, np.int64), 1)[:, None]
    needed = np.ceil(RECALLS * total).astype(np.int64)
    needed -= (needed - 1) / total >= RECALLS
    needed += needed / total < RECALLS
    return np.maximum(needed, 0)


def _flags(labels: Sequence[int], statistics: Statistics) -> np.ndarray:
    """(C,) bool."""
    return np.isin(np.arange(len(statistics.classes)), labels)


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the entries of each row that are not NaN; NaN where there is none."""
    defined = ~np.isnan(values)
    return divide(np.where(defined, values, 0).sum(1), defined.sum(1))
