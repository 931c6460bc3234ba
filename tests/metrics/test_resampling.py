from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from tessera.metrics.formulas import disagreements, evaluated, metrics_of
from tessera.metrics.resampling import (
    count_swaps,
    interval,
    randomized,
    resample_weights,
    resampled,
    swaps,
    two_sided_p,
)
from tessera.metrics.statistics import Statistics, as_columns

IMAGES = 60


def semantic(accuracies: np.ndarray) -> Statistics:
    """Images of one class and a hundred pixels each, so that the pixel accuracy of a resample is the mean over its images."""
    hits = np.round(100 * accuracies).astype(int)
    rows = [(image, 0, hit, 100, hit) for image, hit in enumerate(hits)]
    return Statistics(
        "semantic", ["ground"], [], [0], list(range(1, len(hits) + 1)), {"semantic": as_columns("semantic", rows)}
    )


def accuracy(statistics: Statistics, resamples: int) -> np.ndarray:
    return resampled(statistics, resamples, ["pixel_accuracy"])["pixel_accuracy"]


def p_of(one: np.ndarray, two: np.ndarray, randomizations: int = 1000) -> float:
    found = two_sided_p(randomized(semantic(one), semantic(two), randomizations, ["pixel_accuracy"])["pixel_accuracy"])
    assert found is not None
    return found


def values(seed: int, centre: float) -> np.ndarray:
    return np.round(np.random.default_rng(seed).normal(centre, 0.05, IMAGES).clip(0, 1), 2)


def test_a_bootstrap_of_a_mean_is_that_of_scipy() -> None:
    sample = values(1, 0.6)
    drawn = accuracy(semantic(sample), 20_000)
    # The standard error of a mean, and scipy's percentile interval of it.
    assert drawn.std() == pytest.approx(sample.std() / math.sqrt(IMAGES), rel=0.02)
    expected = stats.bootstrap((sample,), np.mean, n_resamples=20_000, method="percentile", random_state=0)
    assert interval(drawn) == pytest.approx(tuple(expected.confidence_interval), abs=4e-4)
    assert drawn.mean() == pytest.approx(sample.mean(), abs=2e-4)


def test_resamples_depend_on_their_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = resample_weights(17, range(30))
    assert (weights.sum(1) == 17).all() and (weights >= 0).all()
    np.testing.assert_array_equal(resample_weights(17, range(10, 20)), weights[10:20])
    # The stream is Philox's, which numpy promises to keep.
    assert weights[0].tolist() == [1, 1, 1, 1, 5, 0, 0, 0, 1, 2, 0, 0, 2, 0, 1, 0, 2]
    # However few fit into memory at a time.
    one, two = semantic(values(1, 0.6)), semantic(values(2, 0.6))
    whole = accuracy(one, 50), randomized(one, two, 50, ["mIoU"])["mIoU"]
    monkeypatch.setattr("tessera.metrics.resampling.ROOM", 7 * IMAGES)
    np.testing.assert_array_equal(accuracy(one, 50), whole[0])
    np.testing.assert_array_equal(randomized(one, two, 50, ["mIoU"])["mIoU"], whole[1])


def test_every_image_is_drawn_equally_often() -> None:
    drawn = resample_weights(10, range(20_000)).sum(0)
    assert stats.chisquare(drawn).pvalue > 0.01


def test_every_image_is_swapped_half_of_the_time_and_by_itself() -> None:
    assert count_swaps(12, 4000) == 4001
    swapped = swaps(12, 4000, range(4001))
    assert not swapped[0].any()
    # How many of twelve are: as in twelve tosses of a coin.
    counts = np.bincount(swapped[1:].sum(1), minlength=13)
    assert stats.chisquare(counts, 4000 * stats.binom.pmf(range(13), 12, 0.5)).pvalue > 0.01
    assert stats.chisquare(swapped[1:].sum(0)).pvalue > 0.01
    # All that there are, where those are few.
    assert count_swaps(5, 32) == 32
    few = swaps(5, 32, range(32))
    assert not few[0].any() and len(np.unique(few, axis=0)) == 32


def test_a_model_against_itself_differs_in_nothing() -> None:
    assert p_of(values(2, 0.6), values(2, 0.6)) == 1


@pytest.mark.parametrize(("images", "p"), [(1, 1), (2, 0.5), (3, 0.25), (5, 0.0625), (12, 1 / 1001)])
def test_few_images_prove_little(images: int, p: float) -> None:
    """All of them favour one model: as the sign test has it, where all swaps are tried."""
    worse = values(1, 0.6)[:images]
    assert p_of(worse + 0.1, worse) == p_of(worse, worse + 0.1) == p


def test_a_known_difference_is_found_and_pairing_finds_it() -> None:
    base = values(3, 0.6)
    assert p_of(base + 0.01, base) == 1 / 1001
    # The intervals of the models alone overlap by far.
    first, second = (interval(accuracy(semantic(sample), 1000)) for sample in (base, base + 0.01))
    assert first is not None and second is not None and second[0] < first[1]


def test_p_is_that_of_scipys_permutation_test() -> None:
    one, two = values(4, 0.60), values(5, 0.612)
    expected = stats.permutation_test(
        (one, two),
        lambda x, y, axis: np.mean(x - y, axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=1,
    ).pvalue
    assert 0.02 < expected < 0.98
    assert p_of(one, two, 5000) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("images", "level"), [(5, 2 / 32), (12, 0.05), (60, 0.05)])
def test_chance_is_called_a_difference_as_often_as_it_says(images: int, level: float) -> None:
    """Six thousand pairs of equally good models whose images are unlike each other: the band is three standard errors wide on either side."""
    pairs, randomizations = 6000, 199
    spread = np.linspace(0.2, 3, images)[:, None]
    differences = np.random.default_rng(7).normal(0, spread, (images, pairs))
    swapped = swaps(images, randomizations, range(count_swaps(images, randomizations)))
    after = np.where(swapped, -1, 1) @ differences / images
    p = np.array([two_sided_p(after[:, pair]) for pair in range(pairs)])
    assert (p <= level).mean() == pytest.approx(level, abs=3 * math.sqrt(level * (1 - level) / pairs))


def test_what_differs_from_the_statistics_is_named() -> None:
    statistics = semantic(values(1, 0.6))
    own = evaluated(statistics)
    assert disagreements({name: value + 1e-12 for name, value in own.items()}, statistics) == []
    (line,) = disagreements({**own, "mIoU": 0.9}, statistics)
    assert line.startswith("mIoU is 0.9, ") and str(own["mIoU"]) in line
    assert len(disagreements({"PQ": 0.5, "mIoU": "0.6"}, statistics)) == 4


def test_resamples_without_anything_to_measure_are_left_out() -> None:
    statistics = Statistics(
        "semantic", ["ground"], [], [0], [1, 2], {"semantic": as_columns("semantic", [(0, 0, 3, 4, 5)])}
    )
    drawn = metrics_of(statistics, np.array([[2, 0], [0, 2], [1, 1]]))["mIoU"]
    assert drawn[0] == drawn[2] == 0.5 and np.isnan(drawn[1])
    assert interval(drawn) == (0.5, 0.5)
    assert interval(np.array([np.nan, np.nan, 0.5])) is None
    assert two_sided_p(np.array([np.nan, 1.0])) is None
    assert two_sided_p(np.array([0.5, np.nan, 0.1, -0.2])) == 0.5
    assert evaluated(statistics) == {"mIoU": 0.5, "mean_accuracy": 0.75, "pixel_accuracy": 0.75}


def test_weights_of_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="expected \\(resamples, 60\\)"):
        metrics_of(semantic(values(1, 0.5)), np.ones((1, 59), np.int64))


def test_models_of_other_images_are_refused() -> None:
    one, two = semantic(values(1, 0.5)), semantic(values(1, 0.5)[:59])
    with pytest.raises(ValueError, match="the same images"):
        randomized(one, two, 100, ["mIoU"])
