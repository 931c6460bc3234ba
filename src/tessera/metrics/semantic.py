"""Semantic segmentation: the confusion matrix of an image."""

from __future__ import annotations

import numpy as np

from tessera.structures import IGNORE


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
