"""Semantic segmentation: IoU and accuracy from one confusion matrix summed over all images."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from torch import Tensor

from tessera.metrics.statistics import divide
from tessera.structures import IGNORE, ClassCatalog


def confusion_matrix(prediction: np.ndarray, truth: np.ndarray, num_classes: int, ignore: int = IGNORE) -> np.ndarray:
    """(C, C) int64 pixel counts, rows by truth, columns by prediction.

    Pixels whose truth is ``ignore`` do not count. Raises ValueError on shapes that differ and on labels outside 0..C-1.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"semantic prediction has shape {prediction.shape}, truth {truth.shape}; expected the same")
    if ignore < num_classes:
        raise ValueError(
            f"label {ignore} means ignored, so at most {ignore} classes can be told apart, not {num_classes}"
        )
    counted = truth != ignore
    rows, columns = truth[counted].astype(np.int64), prediction[counted].astype(np.int64)
    for name, labels in (("truth", rows), ("prediction", columns)):
        if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(
                f"semantic {name} has labels {labels.min()}..{labels.max()}, expected 0..{num_classes - 1}"
            )
    return np.bincount(rows * num_classes + columns, minlength=num_classes**2).reshape(num_classes, num_classes)


class SemanticMetric:
    """mIoU is the mean over the classes that occur in truth or prediction: a class that is only predicted counts 0, one that
    is in neither is left out. The mean accuracy is over the classes that occur in truth, the pixel accuracy over their pixels.
    """

    def __init__(self, catalog: ClassCatalog, classes: Collection[int] | None = None) -> None:
        """``classes``: contiguous ids that alone take part in the means; pixels of the others still count against them."""
        self.catalog = catalog
        self.counted = [label for label in range(len(catalog)) if classes is None or label in classes]
        self.confusion = np.zeros((len(catalog), len(catalog)), np.int64)

    def update(self, prediction: Tensor, truth: Tensor) -> np.ndarray:
        """(H, W) class ids each; returns this image's own confusion matrix."""
        counts = confusion_matrix(prediction.cpu().numpy(), truth.cpu().numpy(), len(self.catalog))
        self.confusion += counts
        return counts

    def merge(self, other: SemanticMetric) -> None:
        self.confusion += other.confusion

    def result(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics, and one row per class with ``IoU`` and ``accuracy`` (None where undefined)."""
        hits = self.confusion.diagonal().astype(np.float64)
        in_truth, predicted = self.confusion.sum(1), self.confusion.sum(0)
        iou = divide(hits, in_truth + predicted - self.confusion.diagonal())
        accuracy = divide(hits, in_truth)
        metrics = {}
        counted = self.counted
        if in_truth[counted].any():
            metrics["mIoU"] = float(np.nanmean(iou[counted]))
            metrics["mean_accuracy"] = float(np.nanmean(accuracy[counted]))
            metrics["pixel_accuracy"] = float(hits[counted].sum() / in_truth[counted].sum())
        rows = [
            {"IoU": _number(iou[index]), "accuracy": _number(accuracy[index]), "pixels": int(in_truth[index])}
            for index in range(len(self.catalog))
        ]
        return metrics, rows


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
