"""How often intervals hold the truth, and how often chance gets a dagger, by the number of test images.

    python benchmarks/table_statistics.py
    python benchmarks/table_statistics.py --speed

Per-image results are drawn anew in every trial: ``even`` ones about normal, ``uneven`` ones mostly good with a few failures (beta 5:1), and
``AP``, of up to three objects in an image, by detectors of equal quality; ``AP, other scale`` gives one of the two scores that are a tenth
of the other's. The truth of AP is its value on ten thousand images.

``--speed``: seconds of one core and peak memory for AP on as many images, classes, objects and predictions as COCO's validation split may have.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from tessera.metrics.formulas import evaluated
from tessera.metrics.resampling import LEVEL, interval, randomized, resampled, two_sided_p
from tessera.metrics.statistics import SIZES, THRESHOLDS, Columns, Statistics, as_columns

ALL_THRESHOLDS = (1 << THRESHOLDS) - 1


def semantic(accuracies: np.ndarray) -> Statistics:
    """Images of one class and ten thousand pixels each: the pixel accuracy is the mean over images."""
    rows = [(image, 0, round(10_000 * value), 10_000, 10_000) for image, value in enumerate(accuracies)]
    parts = {"semantic": as_columns("semantic", rows)}
    return Statistics("semantic", ["ground"], [], [0], list(range(len(accuracies))), parts)


def detection(found: np.ndarray, scores: np.ndarray, false: np.ndarray) -> Statistics:
    """Of one class. ``found`` (images, 3) bool: which objects are, at every IoU; ``scores`` (images, 4): of those and of a false detection,
    which ``false`` (images,) bool says whether there is."""
    images = len(found)
    rows = []
    for image in range(images):
        true = [(score, ALL_THRESHOLDS) for score, hit in zip(scores[image], found[image], strict=False) if hit]
        wrong = [(scores[image, 3], 0)] if false[image] else []
        flags = [(score, *(value for _ in SIZES for value in (matched, 0))) for score, matched in true + wrong]
        rows += [(image, 0, *line) for line in sorted(flags, reverse=True)]
    truth = [(image, 0, *[found.shape[1]] * len(SIZES)) for image in range(images)]
    parts = {"bbox": as_columns("bbox", rows), "bbox_truth": as_columns("bbox_truth", truth)}
    return Statistics("detection", ["thing"], [0], [0], list(range(images)), parts)


def detector(random: np.random.Generator, hard: np.ndarray, scale: float = 1.0) -> Statistics:
    """``hard`` (images,): how hard each image is, the same for all detectors."""
    images = len(hard)
    found = random.random((images, 3)) > hard[:, None]
    scores = np.concatenate([random.beta(4, 2, (images, 3)), random.beta(2, 3, (images, 1))], 1)
    return detection(found, scores * scale, random.random(images) < 0.5)


def pair(kind: str, random: np.random.Generator, images: int) -> tuple[Statistics, Statistics, str]:
    """Two models that are equally good, and the metric."""
    if kind.startswith("AP"):
        hard = random.beta(1, 2, images)
        return detector(random, hard), detector(random, hard, 0.1 if "scale" in kind else 1.0), "box_AP"
    if kind == "even":
        one, two = random.normal(0.6, 0.1, (2, images)).clip(0, 1)
    else:
        one, two = random.beta(5, 1, (2, images))
    return semantic(one), semantic(two), "pixel_accuracy"


def large(seed: int) -> Statistics:
    """5000 images, 80 classes, 36 000 objects, 100 000 predictions; the same but for scores and matches."""
    same, own = np.random.default_rng(0), np.random.default_rng(seed)
    parts: dict[str, Columns] = {}
    for name, count in (("bbox", 100_000), ("bbox_truth", 36_000)):
        places = np.sort(same.integers(0, 5000 * 80, count))
        parts[name] = {
            "image": places // 80,
            "label": places % 80,
            **{size: np.ones(count, np.int64) for size in SIZES},
        }
    for size in SIZES:
        del parts["bbox"][size]
        parts["bbox"][f"matched_{size}"] = (1 << own.integers(0, THRESHOLDS + 1, 100_000)) - 1
        parts["bbox"][f"ignored_{size}"] = np.zeros(100_000, np.int64)
    parts["bbox"]["score"] = own.random(100_000)
    classes = list(range(80))
    return Statistics("detection", [str(label) for label in classes], classes, classes, list(range(5000)), parts)


def speed(resamples: int) -> None:
    one, two = large(1), large(2)
    start = time.process_time()
    resampled(one, resamples, ["box_AP"])
    middle = time.process_time()
    randomized(one, two, resamples, ["box_AP"])
    print(f"{resamples} resamples: {middle - start:.0f} s, as many exchanges: {time.process_time() - middle:.0f} s")
    print(f"at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=700)
    parser.add_argument("--resamples", type=int, default=400)
    parser.add_argument("--images", type=int, nargs="+", default=[5, 12, 20, 60])
    parser.add_argument("--speed", action="store_true")
    given = parser.parse_args()
    if given.speed:
        speed(1000)
        return
    print("results            images  intervals that hold the truth (%)  daggers among equals (%)")
    for kind in ("even", "uneven", "AP", "AP, other scale"):
        one, _, name = pair(kind, np.random.default_rng(0), 10_000)
        truth = evaluated(one)[name]
        for images in given.images:
            held = called = 0
            for trial in range(given.trials):
                one, two, name = pair(kind, np.random.default_rng([images, trial]), images)
                limits = interval(resampled(one, given.resamples, [name])[name])
                held += limits is not None and limits[0] <= truth <= limits[1]
                p = two_sided_p(randomized(one, two, given.resamples, [name])[name])
                called += p is not None and p < LEVEL
            print(
                f"{kind:<17}  {images:>6}  {100 * held / given.trials:>33.1f}  {100 * called / given.trials:>24.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
