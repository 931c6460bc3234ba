"""Metrics of resamples of the images, their confidence intervals, and paired comparisons. Numpy alone; no image is opened.

A resample is a vector of weights: how often it holds each image. All ones is the evaluation itself. The uncertainty is that of the choice
of test images; that of training is what seeds show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

import numpy as np

from tessera.metrics.formulas import ROOM, ROUNDING, metrics_of
from tessera.metrics.statistics import Statistics

LEVEL = 0.05
"""Intervals hold 1 - LEVEL; a difference with a smaller p counts as one."""

INTERVAL_IMAGES = 20
"""Of fewer images there are no intervals: they would hold the truth too rarely (benchmarks/table_statistics.py)."""


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
