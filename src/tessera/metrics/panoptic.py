"""Panoptic quality (Kirillov et al., Panoptic Segmentation, section 4), counted as the COCO panoptic evaluation counts.

- A predicted and a true segment of one class match when their IoU, leaving out the prediction's pixels on void, exceeds 0.5;
  at most one pair can. Crowd segments never match.
- An unmatched true segment that is no crowd is a false negative.
- An unmatched predicted segment is a false positive, unless more than half of it lies on void and on its class's crowd segment
  (where an image has several of one class, the last one counts, as there).
"""

from __future__ import annotations

import numpy as np

from tessera.structures import Panoptic, Target

VOID = -1
"""Class of the pixels that belong to no segment."""


def panoptic_counts(prediction: Panoptic, truth: Target) -> list[list[float]]:
    """One image's ``[label, iou, tp, fp, fn]`` of every class that occurs in it, ``iou`` summed over the matched pairs. Raises ValueError on
    sizes that differ, truth that overlaps and a map that does not fit its segments."""
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

    matched = true_labels[np.nonzero(matches)[0]]
    labels = np.unique(np.concatenate([matched, predicted_labels[spurious], true_labels[missed]]))
    return [
        [
            int(label),
            float(np.bincount(matched, iou[matches], label + 1)[label]),
            int((matched == label).sum()),
            int((predicted_labels[spurious] == label).sum()),
            int((true_labels[missed] == label).sum()),
        ]
        for label in labels
    ]


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
