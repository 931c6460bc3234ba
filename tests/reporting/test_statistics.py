from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from tessera.evaluation.statistics import Statistics, as_columns
from tessera.reporting.statistics import evaluated, interval, metrics_of, resample_weights, two_sided_p

IMAGES = 60


def semantic(accuracies: np.ndarray) -> Statistics:
    """Images of one class and a hundred pixels each, so that the pixel accuracy of a resample is the mean over its images."""
    hits = np.round(100 * accuracies).astype(int)
    rows = [(image, 0, hit, 100, hit) for image, hit in enumerate(hits)]
    return Statistics(
        "semantic", ["ground"], [], [0], list(range(1, len(hits) + 1)), {"semantic": as_columns("semantic", rows)}
    )


def accuracy(statistics: Statistics, weights: np.ndarray) -> np.ndarray:
    return metrics_of(statistics, weights, ["pixel_accuracy"])["pixel_accuracy"]


def values(seed: int, centre: float) -> np.ndarray:
    return np.round(np.random.default_rng(seed).normal(centre, 0.05, IMAGES).clip(0, 1), 2)


def test_a_bootstrap_of_a_mean_is_that_of_scipy() -> None:
    sample = values(1, 0.6)
    drawn = accuracy(semantic(sample), resample_weights(IMAGES, 20_000))
    # The standard error of a mean, and scipy's percentile interval of it.
    assert drawn.std() == pytest.approx(sample.std() / math.sqrt(IMAGES), rel=0.02)
    expected = stats.bootstrap((sample,), np.mean, n_resamples=20_000, method="percentile", random_state=0)
    assert interval(drawn) == pytest.approx(tuple(expected.confidence_interval), abs=4e-4)
    assert drawn.mean() == pytest.approx(sample.mean(), abs=2e-4)


def test_resamples_depend_on_their_number_alone() -> None:
    weights = resample_weights(17, 30)
    assert (weights.sum(1) == 17).all() and (weights >= 0).all()
    np.testing.assert_array_equal(resample_weights(17, 10), weights[:10])
    assert not np.array_equal(resample_weights(17, 10, seed=1), weights[:10])
    # The stream is Philox's, which numpy promises to keep.
    assert weights[0].tolist() == [1, 1, 1, 1, 5, 0, 0, 0, 1, 2, 0, 0, 2, 0, 1, 0, 2]


def test_every_image_is_drawn_equally_often() -> None:
    drawn = resample_weights(10, 20_000).sum(0)
    assert stats.chisquare(drawn).pvalue > 0.01


def test_a_model_against_itself_differs_in_nothing() -> None:
    drawn = accuracy(semantic(values(2, 0.6)), resample_weights(IMAGES, 500))
    assert (drawn - drawn == 0).all() and two_sided_p(drawn - drawn) == 1


def test_a_known_difference_is_found_and_pairing_finds_it() -> None:
    base = values(3, 0.6)
    better = base + 0.01
    weights = resample_weights(IMAGES, 1000)
    one, two = accuracy(semantic(base), weights), accuracy(semantic(better), weights)
    assert two_sided_p(two - one) == pytest.approx(2 / 1001)
    assert two_sided_p(one - two) == pytest.approx(2 / 1001)
    # The intervals of the models alone overlap by far.
    first, second = interval(one), interval(two)
    assert first is not None and second is not None and second[0] < first[1]


def test_p_is_that_of_a_paired_z_test() -> None:
    one, two = values(4, 0.60), values(5, 0.612)
    difference = two - one
    drawn = accuracy(semantic(two), resample_weights(IMAGES, 20_000)) - accuracy(
        semantic(one), resample_weights(IMAGES, 20_000)
    )
    z = difference.mean() / (difference.std() / math.sqrt(IMAGES))
    expected = 2 * stats.norm.sf(abs(z))
    assert 0.02 < expected < 0.98
    assert two_sided_p(drawn) == pytest.approx(expected, abs=0.02)


def test_chance_is_called_a_difference_as_often_as_it_says() -> None:
    """Two hundred pairs of equally good models at the 5 % level."""
    weights = resample_weights(IMAGES, 400)
    called = sum(
        two_sided_p(
            accuracy(semantic(values(2 * n, 0.6)), weights) - accuracy(semantic(values(2 * n + 1, 0.6)), weights)
        )
        < 0.05
        for n in range(100, 300)
    )
    assert 3 <= called <= 22


def test_resamples_without_anything_to_measure_are_left_out() -> None:
    statistics = Statistics(
        "semantic", ["ground"], [], [0], [1, 2], {"semantic": as_columns("semantic", [(0, 0, 3, 4, 5)])}
    )
    drawn = metrics_of(statistics, np.array([[2, 0], [0, 2], [1, 1]]))["mIoU"]
    assert drawn[0] == drawn[2] == 0.5 and np.isnan(drawn[1])
    assert interval(drawn) == (0.5, 0.5)
    assert interval(np.array([np.nan, np.nan, 0.5])) is None and two_sided_p(np.array([np.nan, 1.0])) is None
    assert evaluated(statistics) == {"mIoU": 0.5, "mean_accuracy": 0.75, "pixel_accuracy": 0.75}


def test_weights_of_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="expected \\(resamples, 60\\)"):
        metrics_of(semantic(values(1, 0.5)), np.ones((1, 59), np.int64))
