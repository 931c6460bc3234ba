"""Predictions of a split as one compressed JSON file, with each image's own counts.

``{"format", "mode", "catalog", "images": [...]}``; an image has ``image_id``, ``file_name``, ``original_size``,
``resized_size`` and, where the mode has them:

- ``semantic``: ``{"segments": [{"label", "counts"}], "confusion": [[true label, predicted label, pixels], ...]}``
- ``instances``: ``[{"score", "label", "box": [x1, y1, x2, y2], "counts"}]``, by descending score; detections have no counts
- ``panoptic``: ``{"segments": [{"id", "label", "score", "counts"}], "quality": [[label, iou, tp, fp, fn], ...]}``

``counts`` is COCO's compressed run-length encoding at original size. Labels are contiguous ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tessera.metrics.statistics import write_compressed
from tessera.ops.rle import Rle, encode_masks
from tessera.structures import ClassCatalog, Predictions

FORMAT = 1


def write_predictions(path: Path, mode: str, catalog: ClassCatalog, records: Sequence[dict[str, Any]]) -> None:
    """Byte-identical for equal input."""
    write_compressed(path, {"format": FORMAT, "mode": mode, "catalog": catalog.to_json(), "images": list(records)})


def encode_record(
    prediction: Predictions,
    rles: Sequence[Rle] | None,
    confusion: np.ndarray | None,
    quality: Sequence[Sequence[float]] | None,
) -> dict[str, Any]:
    """``rles``: encoded masks of the instances; ``confusion`` and ``quality``: this image's own counts."""
    meta = prediction.meta
    record: dict[str, Any] = {
        "image_id": meta.image_id,
        "file_name": meta.file_name,
        "original_size": list(meta.original_size),
        "resized_size": list(meta.resized_size),
    }
    if prediction.semantic is not None:
        semantic = prediction.semantic.cpu().numpy()
        segments = [{"label": label} for label in np.unique(semantic).tolist()]
        record["semantic"] = {
            "segments": _with_masks(segments, semantic, "label"),
            "confusion": [] if confusion is None else _sparse(confusion),
        }
    if prediction.instances is not None:
        found = prediction.instances
        fields = zip(found.scores.tolist(), found.labels.tolist(), found.boxes.tolist(), strict=True)
        record["instances"] = [{"score": score, "label": label, "box": box} for score, label, box in fields]
        for item, rle in zip(record["instances"], rles or (), strict=rles is not None):
            item["counts"] = rle["counts"]
    if prediction.panoptic is not None:
        segments = [vars(segment).copy() for segment in prediction.panoptic.segments]
        record["panoptic"] = {
            "segments": _with_masks(segments, prediction.panoptic.ids.cpu().numpy(), "id"),
            "quality": list(quality or ()),
        }
    return record


def _sparse(confusion: np.ndarray) -> list[list[int]]:
    rows, columns = np.nonzero(confusion)
    found: list[list[int]] = np.stack([rows, columns, confusion[rows, columns]], 1).tolist()
    return found


def _with_masks(segments: Sequence[dict[str, Any]], ids: np.ndarray, key: str) -> list[dict[str, Any]]:
    """Each with the ``counts`` of the pixels that ``ids`` gives it."""
    numbers = np.array([segment[key] for segment in segments], np.int64)
    masks = encode_masks(ids[None] == numbers[:, None, None])
    return [{**segment, "counts": rle["counts"]} for segment, rle in zip(segments, masks, strict=True)]
