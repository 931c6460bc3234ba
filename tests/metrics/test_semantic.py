import math

import numpy as np
import pytest
import torch

from tessera.metrics.evaluate import Evaluator
from tessera.metrics.formulas import by_class, evaluated
from tessera.metrics.semantic import confusion_matrix
from tessera.structures import Predictions
from tests.metrics.scenes import make_catalog, make_meta, make_target


def measured(pairs, num_classes):
    evaluator = Evaluator(make_catalog(num_classes, 0), "semantic")
    for number, (prediction, truth) in enumerate(pairs):
        target = make_target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, *truth.shape, dtype=torch.bool))
        target.semantic = truth
        evaluator.add(Predictions(make_meta(number, tuple(truth.shape)), prediction), target)
    statistics = evaluator.statistics()
    return evaluated(statistics), by_class(statistics)


def slow_metrics(pairs, num_classes):
    """Pixel by pixel, class by class, with Python's exact integers."""
    hits, in_truth, predicted, total = [0] * num_classes, [0] * num_classes, [0] * num_classes, 0
    for prediction, truth in pairs:
        for p, t in zip(prediction.flatten().tolist(), truth.flatten().tolist(), strict=True):
            if t == 255:
                continue
            total += 1
            in_truth[t] += 1
            predicted[p] += 1
            hits[t] += p == t
    unions = [in_truth[c] + predicted[c] - hits[c] for c in range(num_classes)]
    ious = [hits[c] / unions[c] if unions[c] else None for c in range(num_classes)]
    accuracies = [hits[c] / in_truth[c] if in_truth[c] else None for c in range(num_classes)]
    found = [iou for iou in ious if iou is not None]
    recalls = [accuracy for accuracy in accuracies if accuracy is not None]
    return (
        {
            "mIoU": sum(found) / len(found),
            "mean_accuracy": sum(recalls) / len(recalls),
            "pixel_accuracy": sum(hits) / total,
        },
        ious,
        accuracies,
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_classes", [1, 2, 7, 255])
def test_equals_the_slow_reference(num_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for size in ((5, 7), (1, 1), (16, 3)):
        prediction = torch.randint(0, num_classes, size, generator=generator)
        truth = torch.where(torch.rand(size, generator=generator) < 0.5, prediction, prediction.roll(1)).to(torch.uint8)
        truth[torch.rand(size, generator=generator) < 0.2] = 255
        truth[0, 0] = 0
        pairs.append((prediction, truth))
    metrics, rows = measured(pairs, num_classes)
    expected, ious, accuracies = slow_metrics(pairs, num_classes)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert math.isclose(metrics[name], value, abs_tol=1e-9), name
    assert [row["IoU"] for row in rows] == pytest.approx(ious, abs=1e-9)
    assert [row["accuracy"] for row in rows] == pytest.approx(accuracies, abs=1e-9)


@pytest.mark.parametrize(
    ("truth", "prediction", "expected"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], {"mIoU": 1.0, "mean_accuracy": 1.0, "pixel_accuracy": 1.0}),
        # Class 2 is only predicted: it counts 0 in the mIoU, and takes no part in the mean accuracy.
        ([0, 0, 0, 0], [0, 0, 0, 2], {"mIoU": 0.375, "mean_accuracy": 0.75, "pixel_accuracy": 0.75}),
        # What is predicted on ignored pixels is nobody's fault.
        ([0, 0, 255, 255], [0, 0, 2, 1], {"mIoU": 1.0, "mean_accuracy": 1.0, "pixel_accuracy": 1.0}),
        ([255, 255], [0, 1], {}),
    ],
)
def test_rules_for_absent_classes(truth, prediction, expected):
    pair = torch.tensor([prediction]), torch.tensor([truth], dtype=torch.uint8)
    assert measured([pair], 3)[0] == pytest.approx(expected, abs=1e-12)


def test_more_classes_than_a_byte_holds():
    truth = np.array([[0, 299, 300]])
    counts = confusion_matrix(np.array([[0, 299, 5]]), truth, 301, ignore=65535)
    assert counts[299, 299] == counts[300, 5] == 1 and counts.sum() == 3


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        ([[3]], [[0]], r"prediction has labels 3\.\.3, expected 0\.\.2"),
        ([[-1]], [[0]], r"prediction has labels -1"),
        ([[0]], [[7]], r"truth has labels 7\.\.7"),
        ([[0, 1]], [[0]], r"shape \(1, 2\)"),
    ],
)
def test_refuses_labels_that_would_be_counted_wrongly(prediction, truth, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(np.array(prediction), np.array(truth), 3)
