from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tessera.files import UserError
from tessera.metrics.evaluate import Evaluator, Result
from tessera.metrics.formulas import evaluated, metrics_of
from tessera.metrics.resampling import randomized, resample_weights, swaps
from tessera.metrics.statistics import COLUMNS, Limits, Statistics, read_statistics, write_statistics
from tessera.spec.checks import METRICS
from tessera.spec.networks import Mode
from tessera.structures import Instances, Predictions, Target
from tests.metrics.scenes import (
    NAMES,
    disturbed_instances,
    disturbed_panoptic,
    make_catalog,
    make_meta,
    random_target,
)

CATALOG = make_catalog(3, 2)
Images = list[tuple[Predictions, Target]]


def make_images(mode: str, seed: int = 0, counts: tuple[int, ...] = (5, 0, 9, 14, 3, 7), ties: bool = True) -> Images:
    """Small, medium and large objects."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for number, count in enumerate(counts):
        size = (60 + 50 * number, 220)
        truth = random_target(CATALOG, size, count, generator)
        instances = disturbed_instances(truth, CATALOG, generator)
        if not ties:
            instances.scores = torch.rand(len(instances.scores), generator=generator).sort(descending=True).values
        assert truth.semantic is not None
        semantic = torch.where(truth.semantic == 255, 0, truth.semantic.long()).roll(2, 0)
        found = Predictions(make_meta(number + 1, size))
        if mode == "detection":
            truth.masks, truth.size = None, size
            found.instances = Instances(instances.scores, instances.labels, instances.boxes, None)
        elif mode == "instance":
            found.instances = instances
        if mode in ("semantic", "panoptic"):
            found.semantic = semantic
        if mode == "panoptic":
            found.instances, found.panoptic = instances, disturbed_panoptic(truth, CATALOG, generator)
        images.append((found, truth))
    return images


def measure(images: Images, mode: Any, classes: list[str] | None = None, order: list[int] | None = None) -> Result:
    evaluator = Evaluator(CATALOG, mode, classes)
    for index in order or range(len(images)):
        evaluator.add(*images[index])
    return evaluator.result()


def repeated(images: Images, weights: np.ndarray) -> Images:
    """Copies of the images under ids of their own, in order."""
    found: Images = []
    for (prediction, truth), weight in zip(images, weights, strict=True):
        for _ in range(weight):
            meta = make_meta(len(found) + 1, prediction.meta.original_size)
            copy = Predictions(meta, prediction.semantic, prediction.instances, prediction.panoptic)
            found.append((copy, truth))
    return found


MODES: tuple[Mode, ...] = ("semantic", "instance", "detection", "panoptic")


@pytest.mark.parametrize("mode", MODES)
def test_planning_knows_the_names_of_all_that_a_mode_measures(mode: Mode) -> None:
    limits = Limits((1, 300), (16, 64))
    prefixes = {"instance": ("", "box_"), "panoptic": ("", "box_"), "detection": ("box_",), "semantic": ()}[mode]
    marked = [f"{prefix}{name}" for prefix in prefixes for name in limits.averages()]
    for name in [*measure(make_images(mode), mode).metrics, *marked]:
        assert re.fullmatch(METRICS[mode], name), name
    assert not any(re.fullmatch(METRICS[mode], name) for name in ("mAP", "PQ_", "box_mIoU", "box_PQ", "AP@", "AR"))


@pytest.mark.parametrize("classes", [None, ["class_0", "class_1"]])
@pytest.mark.parametrize("mode", MODES)
def test_the_statistics_give_the_metrics(mode: str, classes: list[str] | None, tmp_path: Path) -> None:
    evaluation = measure(make_images(mode, seed=1), mode, classes)
    path = tmp_path / "eval.statistics.json.gz"
    evaluation.write_statistics(path)
    found = evaluated(read_statistics(path))
    assert found.keys() == evaluation.metrics.keys()
    assert found == pytest.approx(evaluation.metrics, abs=1e-12)
    if mode != "semantic" and classes is None:
        assert {"box_APs", "box_APm", "box_APl"} <= found.keys()


@pytest.mark.parametrize("mode", MODES)
def test_a_resample_is_an_evaluation_of_copies(mode: str) -> None:
    """By faster-coco-eval as well, which knows nothing of weights."""
    images = make_images(mode, seed=3, ties=False)
    statistics = measure(images, mode).statistics
    weights = np.array([[1, 1, 0, 2, 0, 2], [0, 3, 1, 0, 2, 0], [0, 0, 6, 0, 0, 0], [2, 0, 0, 1, 3, 0]])
    found = metrics_of(statistics, weights)
    for number, drawn in enumerate(weights):
        expected = measure(repeated(images, drawn), mode).metrics
        defined = {name: values[number] for name, values in found.items() if not np.isnan(values[number])}
        assert defined == pytest.approx(expected, abs=1e-12)


def another(images: Images) -> Images:
    """A second model on the same images, worse at some of them."""
    found: Images = []
    for number, (prediction, truth) in enumerate(images):
        first = prediction.instances
        instances = None
        if first is not None:
            masks = None if first.masks is None else first.masks.roll(number, -1)
            instances = Instances(first.scores * 0.9, first.labels, first.boxes + 2 * number, masks)
        semantic = None if prediction.semantic is None else prediction.semantic.roll(3 - number, 1)
        found.append((Predictions(prediction.meta, semantic, instances, prediction.panoptic), truth))
    return found


@pytest.mark.parametrize("mode", MODES)
def test_swapped_images_are_an_evaluation_of_the_mixture(mode: str) -> None:
    """By faster-coco-eval as well. Equal scores in several images included."""
    images = make_images(mode, seed=3)
    two = another(images)
    one, other = measure(images, mode).statistics, measure(two, mode).statistics
    found = randomized(one, other, 64, {*NAMES, "box_AP", "box_AR10", "PQ", "SQ_things", "mIoU"})
    for number in (0, 1, 22, 63):
        (swapped,) = swaps(6, 64, range(number, number + 1))
        pairs = [(b, a) if swap else (a, b) for a, b, swap in zip(images, two, swapped, strict=True)]
        first, second = (measure(list(mixture), mode).metrics for mixture in zip(*pairs, strict=True))
        assert first != second
        expected = {name: first[name] - second[name] for name in found if name in first}
        defined = {name: values[number] for name, values in found.items() if not np.isnan(values[number])}
        assert defined == pytest.approx(expected, abs=1e-12) and expected


def test_models_with_other_lists_of_classes_are_compared_by_name() -> None:
    """A detector knows the countable classes only, and may have them in another order."""
    images = make_images("panoptic", seed=3)
    one = measure(images, "panoptic").statistics
    detector = another(make_images("detection", seed=3))
    two = measure(detector, "detection").statistics
    order = [int(label) for label in reversed(CATALOG.thing_ids)]
    places = np.array([order.index(label) if label in order else -1 for label in range(len(CATALOG))])
    parts = {name: {**part, "label": places[part["label"]]} for name, part in two.parts.items()}
    names, labels = [CATALOG.names[label] for label in order], list(range(len(order)))
    reordered = Statistics("detection", names, labels, labels, two.image_ids, parts)
    found = randomized(one, reordered, 100, ["PQ", "mIoU", "AP", "box_AP", "box_AR1"])
    assert found.keys() == {"box_AP", "box_AR1"}
    for name, values in randomized(one, two, 100, found).items():
        np.testing.assert_array_equal(found[name], values)
    assert found["box_AP"][0] == pytest.approx(evaluated(one)["box_AP"] - evaluated(two)["box_AP"])
    fewer = Statistics("detection", two.classes, two.things, two.counted[:1], two.image_ids, two.parts)
    assert randomized(one, fewer, 100, ["box_AP"]) == {}


def test_a_subset_of_the_metrics_is_the_same() -> None:
    statistics = measure(make_images("panoptic"), "panoptic").statistics
    weights = resample_weights(6, range(5))
    everything = metrics_of(statistics, weights)
    for name in ("PQ", "mIoU", *NAMES, "box_AR10"):
        (alone,) = metrics_of(statistics, weights, [name]).items()
        np.testing.assert_array_equal(alone[1], everything[name])


def test_more_than_a_hundred_predictions_of_a_class() -> None:
    ((prediction, truth),) = make_images("detection", seed=5, counts=(12,))
    count = 130
    boxes = truth.boxes[:1].float().repeat(count, 1) + torch.rand(count, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.full((count,), int(CATALOG.thing_ids[0]))
    prediction.instances = Instances(torch.linspace(0.99, 0.01, count), labels, boxes, None)
    evaluation = measure([(prediction, truth)], "detection")
    assert len(evaluation.statistics.parts["bbox"]["score"]) == 100
    assert evaluated(evaluation.statistics) == evaluation.metrics


def test_bytes_depend_on_nothing_but_the_images(tmp_path: Path) -> None:
    images = make_images("panoptic")
    for name, order in (("one", None), ("two", [3, 5, 0, 1, 4, 2])):
        measure(images, "panoptic", order=order).write_statistics(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_nothing_found_and_nothing_to_find() -> None:
    images = make_images("detection")
    for prediction, _ in images:
        prediction.instances = Instances(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), None)
    evaluation = measure(images, "detection")
    statistics = evaluation.statistics
    assert evaluated(statistics) == evaluation.metrics
    assert evaluation.metrics["box_AP"] == 0
    empty = np.array([[0, 6, 0, 0, 0, 0]])
    assert np.isnan(metrics_of(statistics, empty)["box_AP"]).all()


def broken(content: Any) -> bytes:
    return gzip.compress(json.dumps(content).encode())


def with_label(good: dict[str, Any], label: int) -> dict[str, Any]:
    part = good["parts"]["semantic"]
    return {**good, "parts": {"semantic": {**part, "label": [label, *part["label"][1:]]}}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text, good: text[:-20], "end-of-stream marker"),
        (lambda text, good: b"", "cannot be read"),
        (lambda text, good: b"hello", "cannot be read"),
        (lambda text, good: broken([]), "format"),
        (lambda text, good: broken({**good, "format": 99}), "format"),
        (lambda text, good: broken({**good, "parts": {"semantic": {"image": [0]}}}), "expected image, label"),
        (lambda text, good: broken({**good, "image_ids": [1]}), "not listed"),
        (lambda text, good: broken({**good, "parts": {"other": {}}}), "other"),
        (lambda text, good: broken(with_label(good, 5)), "classes that are not listed"),
        (lambda text, good: broken(with_label(good, -1)), "classes that are not listed"),
        (lambda text, good: broken({**good, "things": None}), "things is no list"),
        (lambda text, good: broken({**good, "classes": [1, 2]}), "classes is no list of str"),
        (
            lambda text, good: broken({**good, "limits": {"detections": ["9"], "borders": [1, 2]}}),
            "limits are no numbers",
        ),
        (lambda text, good: broken({**good, "counted": [9]}), "classes that are not listed"),
        (lambda text, good: broken({**good, "image_ids": ["1"] * 6}), "image_ids is no list of int"),
        (lambda text, good: broken({**good, "parts": {"segm": {key: [] for key in COLUMNS["segm"]}}}), "segm_truth"),
        (lambda text, good: broken({key: good[key] for key in good if key != "mode"}), "mode"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, change: Any, words: str) -> None:
    path = tmp_path / "eval.statistics.json.gz"
    measure(make_images("semantic"), "semantic").write_statistics(path)
    good = json.loads(gzip.decompress(path.read_bytes()))
    path.write_bytes(change(path.read_bytes(), good))
    with pytest.raises(UserError) as caught:
        read_statistics(path)
    assert str(path) in str(caught.value) and words in str(caught.value) and "evaluate again" in str(caught.value)


def test_a_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="snakemake"):
        read_statistics(tmp_path / "eval.statistics.json.gz")


def test_columns_are_equally_long(tmp_path: Path) -> None:
    part = {key: np.zeros(2 if key == "iou" else 1) for key in COLUMNS["panoptic"]}
    path = tmp_path / "x.json.gz"
    write_statistics(path, Statistics("panoptic", ["a"], [0], [0], [1], {"panoptic": part}))
    with pytest.raises(UserError, match="equally long"):
        read_statistics(path)
