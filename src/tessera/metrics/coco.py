"""Matches of masks and boxes with true objects, by faster-coco-eval as pycocotools finds them; average precision follows in ``formulas``.

Crowd regions are no objects to be found, and what falls into them is no mistake.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from tessera.metrics.statistics import SIZES, THRESHOLDS, Columns, Limits, as_columns
from tessera.ops.rle import Rle, encode_masks
from tessera.structures import ImageMeta, Instances, Target

FARTHEST = 1e5**2
"""Square pixels that an object may have, as COCO has it."""

_logger = logging.getLogger(__name__)


def coco_image(
    prediction: Instances, rles: Sequence[Rle] | None, truth: Target, meta: ImageMeta, things: Sequence[int]
) -> dict[str, Any]:
    """One image's objects and instances of the classes ``things`` as COCO writes them: ``image``, ``truths``, ``predictions``. ``rles`` are the
    encoded masks of ``prediction``, None from pure detectors."""
    height, width = meta.original_size
    labels, areas, crowds, boxes = (
        values.tolist() for values in (truth.labels, truth.areas, truth.iscrowd, _xyxy_to_xywh(truth.boxes))
    )
    kept = [index for index, label in enumerate(labels) if label in things]
    masks = encode_masks(truth.required_masks()[kept]) if rles is not None else None
    truths = [
        {
            "category_id": labels[index] + 1,
            "bbox": boxes[index],
            "area": areas[index],
            "iscrowd": int(crowds[index]),
            "segmentation": None if masks is None else masks[place],
        }
        for place, index in enumerate(kept)
    ]
    found = zip(
        prediction.labels.tolist(), prediction.scores.tolist(), _xyxy_to_xywh(prediction.boxes).tolist(), strict=True
    )
    predictions = [
        {
            "category_id": label + 1,
            "score": score,
            "bbox": box,
            "segmentation": None if rles is None else rles[index],
        }
        for index, (label, score, box) in enumerate(found)
        if label in things
    ]
    image = {"id": meta.image_id, "height": height, "width": width}
    return {"image": image, "truths": truths, "predictions": predictions}


def coco_matches(
    images: Sequence[Mapping[str, Any]], things: Sequence[int], limits: Limits, kind: str
) -> dict[str, Columns]:
    """The parts ``kind`` and ``<kind>_truth`` of the statistics of ``coco_image`` records in the order of ``image_ids``."""
    # Ids start at 1: COCO's matching takes id 0 for "unmatched". One geometry at a time: given a box, COCO would take
    # the box's area for the mask's.
    other = "segmentation" if kind == "bbox" else "bbox"

    def gather(name: str) -> list[dict[str, Any]]:
        found = [(image["image"]["id"], record) for image in images for record in image[name]]
        return [
            {"id": number, "image_id": image, **{key: value for key, value in record.items() if key != other}}
            for number, (image, record) in enumerate(found, 1)
        ]

    truth = COCO(
        {
            "info": {},
            "images": [image["image"] for image in images],
            "categories": [{"id": label + 1, "name": str(label)} for label in things],
            "annotations": gather("truths"),
        }
    )
    found = truth.loadRes(gather("predictions"))
    # Separately, because then the matches of every image are kept.
    run = COCOeval_faster(truth, found, kind, print_function=_logger.debug, separate_eval=True)
    run.params.maxDets = list(limits.detections)
    small, large = (side**2 for side in limits.borders)
    run.params.areaRng = [[0, FARTHEST], [0, small], [small, large], [large, FARTHEST]]
    run.evaluate()

    # The answers by class, range of sizes and image; pickling is the evaluator's way to show one: matches of the predictions (ids, by
    # threshold), matches of the truths, scores, whether each truth is ignored, whether each prediction is (by threshold).
    answers = run._evalImgs_cpp
    bits = 1 << np.arange(THRESHOLDS)
    predictions: list[tuple[float, ...]] = []
    truths: list[tuple[float, ...]] = []
    for image, (place, label) in itertools.product(range(len(images)), enumerate(things)):
        numbers = [(place * len(SIZES) + size) * len(images) + image for size in range(len(SIZES))]
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
    return {kind: as_columns(kind, predictions), f"{kind}_truth": as_columns(f"{kind}_truth", truths)}


def _xyxy_to_xywh(boxes: Any) -> np.ndarray:
    corners = boxes.double().cpu().numpy()
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
