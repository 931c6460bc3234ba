"""Panoptic quality (Kirillov et al., Panoptic Segmentation, section 4), counted as the COCO panoptic evaluation counts.

- A predicted and a true segment of one class match when their IoU, leaving out the prediction's pixels on void, exceeds 0.5;
  at most one pair can. Crowd segments never match.
- An unmatched true segment that is no crowd is a false negative.
- An unmatched predicted segment is a false positive, unless more than half of it lies on void and on its class's crowd segment
  (where an image has several of one class, the last one counts, as there).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tessera.structures import ClassCatalog, Panoptic, Target

VOID = -1
"""Class of the pixels that belong to no segment."""


@dataclass
class PanopticCounts:
    """Per class, (C,) each."""

    iou: np.ndarray
    """float64, summed over the matched pairs."""
    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray

    @classmethod
    def sum(cls, images: Sequence[PanopticCounts], num_classes: int) -> PanopticCounts:
        """Without rounding in between, so that the order of images changes no bit."""
        nothing = np.zeros(num_classes, np.int64)
        return cls(
            np.array([math.fsum(image.iou[label] for image in images) for label in range(num_classes)]),
            tp=sum((image.tp for image in images), nothing),
            fp=sum((image.fp for image in images), nothing),
            fn=sum((image.fn for image in images), nothing),
        )


def panoptic_counts(prediction: Panoptic, truth: Target, num_classes: int) -> PanopticCounts:
    """Of one image. Raises ValueError on sizes that differ, truth that overlaps and a map that does not fit its segments."""
    true_map = _truth_map(truth)
    predicted_map, predicted_labels = _prediction_map(prediction)
    if true_map.shape != predicted_map.shape:
        raise ValueError(
            f"panoptic prediction has shape {predicted_map.shape}, truth {true_map.shape}; expected the same"
        )
    # Row 0 is void in the truth, column 0 void in the prediction.
    true_labels = np.concatenate(([VOID], truth.labels.cpu().numpy()))
    crowd = np.concatenate(([False], truth.iscrowd.cpu().numpy().astype(bool)))
    shape = (len(true_labels), len(predicted_labels))
    pixels = np.bincount((true_map * shape[1] + predicted_map).ravel(), minlength=shape[0] * shape[1]).reshape(shape)
    true_areas, predicted_areas = pixels.sum(1), pixels.sum(0)

    union = true_areas[:, None] + predicted_areas[None] - pixels - pixels[0][None]
    iou = np.divide(pixels, union, out=np.zeros(shape), where=union > 0)
    iou[true_labels[:, None] != predicted_labels[None]] = 0
    iou[crowd] = 0
    iou[0] = iou[:, 0] = 0
    matches = iou > 0.5

    ignored = pixels[0].copy()
    for row in {int(true_labels[row]): row for row in np.flatnonzero(crowd)}.values():
        ignored += np.where(predicted_labels == true_labels[row], pixels[row], 0)
    spurious = ~matches.any(0) & (2 * ignored <= predicted_areas)
    spurious[0] = False
    missed = ~matches.any(1) & ~crowd
    missed[0] = False

    matched_labels = true_labels[np.nonzero(matches)[0]]
    return PanopticCounts(
        iou=np.bincount(matched_labels, weights=iou[matches], minlength=num_classes),
        tp=np.bincount(matched_labels, minlength=num_classes),
        fp=np.bincount(predicted_labels[spurious], minlength=num_classes),
        fn=np.bincount(true_labels[missed], minlength=num_classes),
    )


class PanopticMetric:
    """PQ, SQ and RQ are means over the classes (those of ``classes`` alone, contiguous ids, where given) that have a true positive,
    false positive or false negative."""

    def __init__(self, catalog: ClassCatalog, classes: Collection[int] | None = None) -> None:
        self.catalog = catalog
        self.counted = np.array([classes is None or label in classes for label in range(len(catalog))], bool)
        self.images: list[PanopticCounts] = []

    def update(self, prediction: Panoptic, truth: Target) -> PanopticCounts:
        """Returns this image's own counts."""
        counts = panoptic_counts(prediction, truth, len(self.catalog))
        self.images.append(counts)
        return counts

    def merge(self, other: PanopticMetric) -> None:
        self.images += other.images

    def result(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics, and one row per class with ``PQ``, ``SQ``, ``RQ`` (None for a class that never occurred) and the counts."""
        counts = PanopticCounts.sum(self.images, len(self.catalog))
        weight = counts.tp + 0.5 * counts.fp + 0.5 * counts.fn
        occurred = weight > 0
        safe = np.where(occurred, weight, 1)
        quality = {
            "PQ": counts.iou / safe,
            "SQ": counts.iou / np.maximum(counts.tp, 1),
            "RQ": counts.tp / safe,
        }
        counted = occurred & self.counted
        thing = np.array([category.isthing for category in self.catalog.categories], bool)
        metrics: dict[str, float] = {}
        for suffix, group in (("", counted), ("_things", counted & thing), ("_stuff", counted & ~thing)):
            if group.any():
                metrics |= {f"{name}{suffix}": float(values[group].mean()) for name, values in quality.items()}
        rows: list[dict[str, Any]] = []
        for index in range(len(self.catalog)):
            row: dict[str, Any] = {
                name: float(values[index]) if occurred[index] else None for name, values in quality.items()
            }
            rows.append(row | {name: int(getattr(counts, name)[index]) for name in ("tp", "fp", "fn")})
        return metrics, rows


def _truth_map(truth: Target) -> np.ndarray:
    """(H, W) int64: 1 + index of the segment, 0 for void."""
    masks = truth.required_masks().cpu().numpy().astype(bool)
    found = np.zeros(masks.shape[1:], np.int64)
    for index, mask in enumerate(masks):
        found[mask] = index + 1
    if np.count_nonzero(found) != np.count_nonzero(masks):
        raise ValueError("the true segments overlap; panoptic truth gives each pixel to at most one of them")
    return found


def _prediction_map(prediction: Panoptic) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) int64: 1 + index of the segment, 0 for void; and (1 + N,) labels, VOID first."""
    ids = np.array([0] + [segment.id for segment in prediction.segments], np.int64)
    found, inverse = np.unique(prediction.ids.cpu().numpy(), return_inverse=True)
    unknown = np.setdiff1d(found, ids)
    empty = np.setdiff1d(ids[1:], found)
    if len(np.unique(ids)) != len(ids) or unknown.size or empty.size:
        raise ValueError(
            f"the panoptic map does not fit its segments: ids {unknown.tolist()} only in the map, {empty.tolist()} only in "
            f"the list of {len(ids) - 1} segments, whose ids must be unique and above 0"
        )
    order = np.argsort(ids)
    indices = order[np.searchsorted(ids[order], found)]
    labels = np.array([VOID] + [segment.label for segment in prediction.segments], np.int64)
    return indices[inverse].reshape(prediction.ids.shape), labels
