"""COCO average precision and recall of masks and boxes, computed by faster-coco-eval as pycocotools computes them."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from tessera.metrics.statistics import SIZES, THRESHOLDS, Average, Columns, Limits, as_columns
from tessera.ops.rle import Rle, encode_masks
from tessera.structures import ClassCatalog, ImageMeta, Instances, Target

NAMES = tuple(Limits().averages())
"""COCO's twelve numbers in its order: over IoU 0.50:0.95 unless named, small below 32 x 32 pixels, large from 96 x 96."""

FARTHEST = 1e5**2
"""Square pixels that an object may have, as COCO has it."""

_logger = logging.getLogger(__name__)


class InstanceMetric:
    """Gathers instances, or detections, image by image; the countable classes alone take part.

    Mask metrics are reported when the predictions have masks; box metrics, prefixed ``box_``, always. A metric that COCO
    reports as -1, because no true object could be found, is absent. Crowd regions are no objects to be found, and what falls into
    them is no mistake.
    """

    def __init__(
        self, catalog: ClassCatalog, classes: Collection[int] | None = None, limits: Limits = Limits()
    ) -> None:
        """``classes``: contiguous ids that alone take part."""
        self.catalog = catalog
        self.limits = limits
        self.things = [label for label in catalog.thing_ids if classes is None or label in classes]
        self.images: list[dict[str, Any]] = []
        self.truths: list[dict[str, Any]] = []
        self.predictions: list[dict[str, Any]] = []
        self._runs: dict[str, COCOeval_faster] = {}

    def update(self, prediction: Instances, rles: Sequence[Rle] | None, truth: Target, meta: ImageMeta) -> None:
        """``rles`` are the encoded masks of ``prediction``, None from pure detectors."""
        height, width = meta.original_size
        self.images.append({"id": meta.image_id, "height": height, "width": width})
        labels = truth.labels.tolist()
        kept = [index for index, label in enumerate(labels) if label in self.things]
        masks = encode_masks(truth.required_masks()[kept]) if rles is not None else None
        boxes, areas, crowds = _xyxy_to_xywh(truth.boxes), truth.areas.tolist(), truth.iscrowd.tolist()
        for position, index in enumerate(kept):
            record = {
                "image_id": meta.image_id,
                "category_id": labels[index] + 1,
                "bbox": boxes[index],
                "area": areas[index],
                "iscrowd": int(crowds[index]),
            }
            self.truths.append(record if masks is None else record | {"segmentation": masks[position]})
        scores, labels, boxes = prediction.scores.tolist(), prediction.labels.tolist(), _xyxy_to_xywh(prediction.boxes)
        for index, score in enumerate(scores):
            if labels[index] not in self.things:
                continue
            record = {
                "image_id": meta.image_id,
                "category_id": labels[index] + 1,
                "score": score,
                "bbox": boxes[index],
            }
            self.predictions.append(record if rles is None else record | {"segmentation": rles[index]})

    def merge(self, other: InstanceMetric) -> None:
        self.images += other.images
        self.truths += other.truths
        self.predictions += other.predictions

    def result(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics, named as ``Limits`` says, and one row per class with ``AP``, ``AP50``, ``AR`` (of as many predictions) and their box forms.

        They are None for classes without a true object, and not there for stuff.
        """
        metrics: dict[str, float] = {}
        rows: list[dict[str, Any]] = [{} for _ in self.catalog.categories]
        if not self.things:
            return metrics, rows
        with_masks = all("segmentation" in record for record in (*self.truths, *self.predictions))
        for kind, prefix in (("segm", ""), ("bbox", "box_")):
            if kind == "segm" and not with_masks:
                continue
            run = self._runs[kind] = self._coco(kind)
            precision, recall = run.eval["precision"], run.eval["recall"]
            for name, average in self.limits.averages().items():
                value = self._average(run, average)
                if value is not None:
                    metrics[f"{prefix}{name}"] = value
            most, _ = self.limits.marks
            for index, label in enumerate(self.things):
                rows[label][f"{prefix}AP{most}"] = _mean(precision[:, :, index, 0, -1])
                rows[label][f"{prefix}AP50{most}"] = _mean(precision[0, :, index, 0, -1])
                rows[label][f"{prefix}AR{most}"] = _mean(recall[:, index, 0, -1])
        return metrics, rows

    def _average(self, run: COCOeval_faster, average: Average) -> float | None:
        """COCO's summary of the curves, over the classes that have an object."""
        thresholds, size = list(average.thresholds), SIZES.index(average.size)
        most = self.limits.detections.index(average.most)
        if average.recall:
            return _mean(run.eval["recall"][thresholds, :, size, most])
        return _mean(run.eval["precision"][thresholds, :, :, size, most])

    def objects(self) -> Counter[tuple[int, int]]:
        """By image id and label, how many are to be found."""
        return Counter((item["image_id"], item["category_id"] - 1) for item in self.truths if not item["iscrowd"])

    def statistics(self) -> dict[str, Columns]:
        """What each image contributed to the last ``result``; see ``metrics.statistics``. Images are numbered by ascending id."""
        found = {}
        for kind, run in self._runs.items():
            found[kind], found[f"{kind}_truth"] = self._matches(run)
        return found

    def _matches(self, run: COCOeval_faster) -> tuple[Columns, Columns]:
        # The evaluator's answers by class, range of sizes and image; pickling is its way to show one: matches of the predictions (ids, by
        # threshold), matches of the truths, scores, whether each truth is ignored, whether each prediction is (by threshold).
        answers, images = run._evalImgs_cpp, len(run.params.imgIds)
        bits = 1 << np.arange(THRESHOLDS)
        predictions: list[tuple[float, ...]] = []
        truths: list[tuple[float, ...]] = []
        for image, (place, label) in itertools.product(range(images), enumerate(self.things)):
            numbers = [(place * len(SIZES) + size) * images + image for size in range(len(SIZES))]
            _, _, scores, truth_ignored, _, _ = answers[numbers[0]].__getstate__()
            if not scores and not truth_ignored:
                continue
            by_size = [answers[number].__getstate__() for number in numbers]
            flags = []
            for matches, _, _, _, ignores, _ in by_size:
                ignored = np.array(ignores, bool).reshape(THRESHOLDS, len(scores))
                matched = (np.array(matches).reshape(THRESHOLDS, len(scores)) > 0) & ~ignored
                flags += [(bits @ matched).tolist(), (bits @ ignored).tolist()]
            predictions += [(image, label, *line) for line in zip(scores, *flags, strict=True)]
            if truth_ignored:
                truths.append((image, label, *(len(state[3]) - sum(state[3]) for state in by_size)))
        kind = run.params.iouType
        return as_columns(kind, predictions), as_columns(f"{kind}_truth", truths)

    def _coco(self, kind: str) -> COCOeval_faster:
        """Evaluated and accumulated."""
        keep = ("bbox",) if kind == "bbox" else ("segmentation",)
        shared = ("image_id", "category_id")
        categories = [{"id": label + 1, "name": self.catalog.names[label]} for label in self.things]
        images = sorted(self.images, key=lambda image: image["id"])
        # Ids start at 1: COCO's matching takes id 0 for "unmatched". One geometry at a time: given a box, COCO would take
        # the box's area for the mask's.
        truths = [
            {"id": number, **_pick(record, (*shared, "area", "iscrowd", *keep))}
            for number, record in enumerate(self.truths, 1)
        ]
        predictions = [_pick(record, (*shared, "score", *keep)) for record in self.predictions]
        truth = COCO({"info": {}, "images": images, "categories": categories, "annotations": truths})
        found = truth.loadRes(predictions)
        # Separately, because then the matches of every image are kept.
        evaluator = COCOeval_faster(truth, found, kind, print_function=_logger.debug, separate_eval=True)
        evaluator.params.maxDets = list(self.limits.detections)
        small, large = (side**2 for side in self.limits.borders)
        evaluator.params.areaRng = [[0, FARTHEST], [0, small], [small, large], [large, FARTHEST]]
        evaluator.evaluate()
        evaluator.accumulate()
        return evaluator


def _pick(record: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: record[key] for key in keys}


def _mean(values: np.ndarray) -> float | None:
    """Over the entries that exist; -1 marks the others."""
    found = values[values > -1]
    return float(found.mean()) if found.size else None


def _xyxy_to_xywh(boxes: Any) -> list[list[float]]:
    corners = boxes.double()
    return [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in corners.tolist()]
