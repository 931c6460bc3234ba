"""Predictions of a split as one compressed JSON file, with each image's own counts, which serve confidence intervals later.

``{"format", "mode", "catalog", "images": [...]}``; an image has ``image_id``, ``file_name``, ``original_size``,
``resized_size`` and, where the mode has them:

- ``semantic``: ``{"segments": [{"label", "counts"}], "confusion": [[true label, predicted label, pixels], ...]}``
- ``instances``: ``[{"score", "label", "box": [x1, y1, x2, y2], "counts"}]``, by descending score; detections have no counts
- ``panoptic``: ``{"segments": [{"id", "label", "score", "counts"}], "quality": [[label, iou, tp, fp, fn], ...]}``

``counts`` is COCO's compressed run-length encoding at original size. Labels are contiguous ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tessera.metrics.panoptic import PanopticCounts
from tessera.metrics.statistics import reading_compressed, write_compressed
from tessera.ops.rle import Rle, decode_masks, encode_masks
from tessera.structures import ClassCatalog, ImageMeta, Instances, Panoptic, Predictions, Segment

FORMAT = 1


@dataclass
class SavedPredictions:
    mode: str
    catalog: ClassCatalog
    records: list[dict[str, Any]]
    """As in the file, in the order of the evaluation."""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Predictions:
        """Decoded; equal to what was evaluated."""
        return decode_record(self.records[index], masks=self.mode != "detection")


def write_predictions(path: Path, mode: str, catalog: ClassCatalog, records: Sequence[dict[str, Any]]) -> None:
    """Byte-identical for equal input."""
    write_compressed(path, {"format": FORMAT, "mode": mode, "catalog": catalog.to_json(), "images": list(records)})


def read_predictions(path: Path) -> SavedPredictions:
    """Raises UserError when the file is missing, cut off or something else."""
    with reading_compressed(path, "predictions", FORMAT) as document:
        return SavedPredictions(document["mode"], ClassCatalog.from_json(document["catalog"]), document["images"])


def encode_record(
    prediction: Predictions,
    rles: Sequence[Rle] | None = None,
    confusion: np.ndarray | None = None,
    quality: PanopticCounts | None = None,
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
        labels = torch.bincount(prediction.semantic.flatten()).nonzero().squeeze(1)
        masks = encode_masks(prediction.semantic[None] == labels[:, None, None])
        record["semantic"] = {
            "segments": [
                {"label": label, "counts": rle["counts"]} for label, rle in zip(labels.tolist(), masks, strict=True)
            ],
            "confusion": [] if confusion is None else _sparse(confusion),
        }
    if prediction.instances is not None:
        record["instances"] = _instance_records(prediction.instances, rles)
    if prediction.panoptic is not None:
        segments = prediction.panoptic.segments
        ids = torch.tensor([segment.id for segment in segments], device=prediction.panoptic.ids.device)
        masks = encode_masks(prediction.panoptic.ids[None] == ids[:, None, None])
        record["panoptic"] = {
            "segments": [
                {"id": segment.id, "label": segment.label, "score": segment.score, "counts": rle["counts"]}
                for segment, rle in zip(segments, masks, strict=True)
            ],
            "quality": [] if quality is None else _quality(quality),
        }
    return record


def decode_record(record: dict[str, Any], masks: bool = True) -> Predictions:
    """``masks`` False: its instances are boxes alone, which an image without any does not tell."""
    height, width = record["original_size"]
    size = (height, width)
    resized = record["resized_size"]
    found = Predictions(ImageMeta(record["image_id"], record["file_name"], size, (resized[0], resized[1])))
    if "semantic" in record:
        segments = record["semantic"]["segments"]
        found.semantic = torch.zeros(size, dtype=torch.int64)
        for segment, mask in zip(segments, _decode(segments, size), strict=True):
            found.semantic[torch.from_numpy(mask)] = segment["label"]
    if "instances" in record:
        items = record["instances"]
        has_masks = masks and all("counts" in item for item in items)
        found.instances = Instances(
            scores=torch.tensor([item["score"] for item in items], dtype=torch.float32),
            labels=torch.tensor([item["label"] for item in items], dtype=torch.int64),
            boxes=torch.tensor([item["box"] for item in items], dtype=torch.float32).reshape(-1, 4),
            masks=torch.from_numpy(_decode(items, size)) if has_masks else None,
        )
    if "panoptic" in record:
        segments = record["panoptic"]["segments"]
        ids = torch.zeros(size, dtype=torch.int32)
        for segment, mask in zip(segments, _decode(segments, size), strict=True):
            ids[torch.from_numpy(mask)] = segment["id"]
        found.panoptic = Panoptic(ids, [Segment(item["id"], item["label"], item["score"]) for item in segments])
    return found


def _decode(items: Sequence[dict[str, Any]], size: tuple[int, int]) -> np.ndarray:
    return decode_masks([{"size": list(size), "counts": item["counts"]} for item in items], size)


def _instance_records(instances: Instances, rles: Sequence[Rle] | None) -> list[dict[str, Any]]:
    fields = zip(instances.scores.tolist(), instances.labels.tolist(), instances.boxes.tolist(), strict=True)
    records: list[dict[str, Any]] = [{"score": score, "label": label, "box": box} for score, label, box in fields]
    if rles is not None:
        for record, rle in zip(records, rles, strict=True):
            record["counts"] = rle["counts"]
    return records


def _sparse(confusion: np.ndarray) -> list[list[int]]:
    rows, columns = np.nonzero(confusion)
    return [[int(row), int(column), int(confusion[row, column])] for row, column in zip(rows, columns, strict=True)]


def _quality(counts: PanopticCounts) -> list[list[float]]:
    occurred = np.flatnonzero(counts.tp + counts.fp + counts.fn)
    return [
        [int(label), float(counts.iou[label]), int(counts.tp[label]), int(counts.fp[label]), int(counts.fn[label])]
        for label in occurred
    ]
