"""Runs predictions over a split and measures them: the body of the evaluate stage, and of validation during training."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tessera import provenance
from tessera.files import UserError
from tessera.metrics.coco import coco_image, coco_matches
from tessera.metrics.formulas import by_class, evaluated
from tessera.metrics.panoptic import panoptic_counts
from tessera.metrics.predictions import encode_record, write_predictions
from tessera.metrics.semantic import confusion_matrix
from tessera.metrics.statistics import Columns, Limits, Statistics, as_columns, write_statistics
from tessera.ops.rle import encode_masks
from tessera.progress import track
from tessera.spec.networks import DeformableDetrSpec, Mask2FormerSpec, Mode, OneFormerSpec
from tessera.spec.schema import Spec
from tessera.structures import Batch, ClassCatalog, Predictions, Target, unknown_class

if TYPE_CHECKING:
    from tessera.ops.images import ScaledDown


@dataclass
class Result:
    metrics: dict[str, float]
    """Fractions in [0, 1]. A metric that is undefined on this split, such as APl without large objects, is absent."""
    per_class: list[dict[str, Any]]
    """One row per class of the catalogue, or of those asked for: ``id`` (the dataset's), ``name``, ``isthing``, then its metrics, None
    where undefined."""
    seconds: float
    """From the first image read to the last one measured; includes loading."""
    predictions: list[dict[str, Any]]
    """See ``metrics.predictions``."""
    statistics: Statistics
    catalog: ClassCatalog

    @property
    def images(self) -> int:
        return len(self.predictions)

    def to_json(
        self,
        experiment: str,
        parts: Mapping[str, Any],
        spec: Spec,
        runtime: str,
        precision: str,
        lineage: dict[str, Any],
        testing: str = "",
        input_size: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """What eval.json holds, the same for every runtime. ``parts`` are what the experiment's name stands for: model, backbone, ...;
        ``input_size``: (height, width) that the runtime takes, None where it takes any."""
        from tessera.ops.images import input_record

        smaller = self.scaled_down(spec)
        scaling = [] if smaller is None else [smaller.describe(self.images, input_size)]
        return {
            "experiment": experiment,
            **parts,
            "mode": self.statistics.mode,
            "split": spec.evaluate.split,
            "runtime": runtime,
            "precision": precision,
            "testing": testing,
            "images": self.images,
            "metrics": self.metrics,
            "per_class": self.per_class,
            "input": input_record(input_size, smaller),
            "remarks": scaling + self.remarks(spec),
            "seconds": round(self.seconds, 3),
            "lineage": lineage,
            "facts": provenance.collect(),
        }

    def scaled_down(self, spec: Spec) -> ScaledDown | None:
        """Images that the network saw smaller than at their test size."""
        from tessera.ops.images import scaled_down  # needs torch, which figures of an evaluation do not

        sizes = ((tuple(one["original_size"]), tuple(one["resized_size"])) for one in self.predictions)
        return scaled_down(sizes, spec.dataset.augmentation, spec.evaluated.target_size)

    def remarks(self, spec: Spec) -> list[str]:
        """What keeps the numbers below 1 whatever the model: keys that let fewer objects of an image count than it has."""
        if "bbox_truth" not in self.statistics.parts:
            return []
        truth, ids = self.statistics.parts["bbox_truth"], self.statistics.image_ids
        of_image: Counter[int] = Counter()
        of_class: Counter[int] = Counter()
        for place, count in zip(truth["image"].tolist(), truth["all"].tolist(), strict=True):
            of_image[ids[place]] += count
            of_class[ids[place]] = max(of_class[ids[place]], count)
        names = {record["image_id"]: record["file_name"] for record in self.predictions}
        found = []
        counted = ("evaluate.max_detections", self.statistics.limits.detections[-1])
        for (key, most), counts in [(counted, of_class), *((one, of_image) for one in _kept(spec))]:
            beyond = [image for image, count in counts.items() if count > most]
            if beyond:
                worst = max(beyond, key=lambda image: (counts[image], -image))
                found.append(
                    f"{len(beyond)} of {self.images} images hold more objects {'of one class ' if counts is of_class else ''}than the {most} "
                    f"of {key} (the most: {counts[worst]} in {names[worst]}), so that no model finds all"
                )
        return found

    def write_predictions(self, path: Path) -> None:
        write_predictions(path, self.statistics.mode, self.catalog, self.predictions)

    def write_statistics(self, path: Path) -> None:
        write_statistics(path, self.statistics)

    def summary(self) -> str:
        """A few lines for a terminal."""
        lines = [f"{self.images} images in {self.seconds:.1f} s"]
        # Of an instance model the boxes are by the way; of a detector they are all there is.
        names = [name for name in self.metrics if self.statistics.mode == "detection" or not name.startswith("box_")]
        for start in range(0, len(names), 6):
            lines.append("  ".join(f"{name} {self.metrics[name]:.4f}" for name in names[start : start + 6]))
        return "\n".join(lines)


class Evaluator:
    """Gathers image by image what the mode asks for; evaluators of several processes merge into one."""

    def __init__(
        self, catalog: ClassCatalog, mode: Mode, classes: Sequence[str] | None = None, limits: Limits = Limits()
    ) -> None:
        """``classes``: keys of the catalogue that the metrics are restricted to; pixels of the others still count against them. Raises UserError
        for one that the catalogue lacks."""
        self.catalog = catalog
        self.mode = mode
        self.limits = Limits() if mode == "semantic" else limits
        self.counted = _labels(classes, catalog)
        self.things = [label for label in catalog.thing_ids if label in self.counted]
        self.records: dict[int, dict[str, Any]] = {}
        """By image id, as ``metrics.predictions`` writes them."""
        self.objects: dict[int, dict[str, Any]] = {}
        """By image id, see ``coco_image``; empty where the mode has no instances."""

    def add(self, prediction: Predictions, truth: Target) -> None:
        """Both at original size. Raises UserError for an image id seen before, ValueError for a part that the mode needs and lacks."""
        meta = prediction.meta
        self._refuse_again(meta.image_id, meta.file_name)
        size = truth.size if truth.masks is None else tuple(truth.masks.shape[1:])
        if size != meta.original_size:
            raise ValueError(f"{meta.file_name}: truth has size {size}, expected {meta.original_size}")
        quality = confusion = rles = None
        if self.mode == "panoptic":
            quality = panoptic_counts(_present(prediction.panoptic, "panoptic", meta.file_name), truth)
        if self.mode != "semantic":
            instances = _present(prediction.instances, "instances", meta.file_name)
            rles = None if instances.masks is None or self.mode == "detection" else encode_masks(instances.masks)
            self.objects[meta.image_id] = coco_image(instances, rles, truth, meta, self.things)
        if self.mode in ("panoptic", "semantic"):
            if truth.semantic is None:
                raise UserError(
                    f"{meta.file_name}: the annotations do not say the class of every pixel; mIoU needs a dataset that does "
                    "(coco_panoptic or mask_pairs), or set model.mode to instance"
                )
            semantic = _present(prediction.semantic, "semantic", meta.file_name)
            confusion = confusion_matrix(semantic.cpu().numpy(), truth.semantic.cpu().numpy(), len(self.catalog))
        self.records[meta.image_id] = encode_record(prediction, rles, confusion, quality)

    def merge(self, other: Evaluator) -> None:
        """Takes over what another process gathered; an image that both saw is an error."""
        for image_id, record in other.records.items():
            self._refuse_again(image_id, record["file_name"])
        self.records |= other.records
        self.objects |= other.objects

    def statistics(self) -> Statistics:
        """What each image contributes to the metrics, by ascending image id."""
        ids = sorted(self.records)
        parts = _pixel_counts([self.records[image] for image in ids], len(self.catalog))
        if self.objects and self.things:
            for kind in ("bbox",) if self.mode == "detection" else ("segm", "bbox"):
                parts |= coco_matches([self.objects[image] for image in ids], self.things, self.limits, kind)
        names, things = list(self.catalog.keys), list(self.catalog.thing_ids)
        return Statistics(self.mode, names, things, self.counted, ids, parts, self.limits)

    def result(self, seconds: float = 0.0) -> Result:
        """Raises UserError when there was no image, or nothing on the images that could be measured."""
        if not self.records:
            raise UserError("no image was evaluated; is the split empty?")
        statistics = self.statistics()
        metrics = evaluated(statistics)
        if not metrics:
            raise UserError(
                f"the {len(self.records)} evaluated images have no annotated object of any class, so no metric is defined; "
                "check the split's annotations and the label map"
            )
        categories, measured = self.catalog.categories, by_class(statistics)
        rows = [
            {"id": categories[label].id, "name": categories[label].name, "isthing": int(categories[label].isthing)}
            | measured[label]
            for label in self.counted
        ]
        return Result(metrics, rows, seconds, list(self.records.values()), statistics, self.catalog)

    def _refuse_again(self, image_id: int, file_name: str) -> None:
        if image_id in self.records:
            raise UserError(
                f"image id {image_id} occurs twice ({self.records[image_id]['file_name']} and {file_name}); every image counts once, "
                "so ids must be unique within a split"
            )


def evaluate(
    predict: Callable[[Batch], list[Predictions]],
    loader: Iterable[Batch],
    catalog: ClassCatalog,
    mode: Mode,
    progress: bool = True,
    classes: Sequence[str] | None = None,
    limits: Limits = Limits(),
) -> Result:
    """Every batch of ``loader`` must carry ``truths``. Raises UserError for no image, and for one that comes twice."""
    start = time.perf_counter()
    evaluator = Evaluator(catalog, mode, classes, limits)
    accumulate(evaluator, predict, loader, progress)
    return evaluator.result(time.perf_counter() - start)


def accumulate(
    evaluator: Evaluator,
    predict: Callable[[Batch], list[Predictions]],
    loader: Iterable[Batch],
    progress: bool = True,
) -> None:
    """The images of ``loader``, which may be one process's share of the split."""
    total = len(loader) if isinstance(loader, Sized) else None
    for batch in track(loader, "evaluate: batch", total, progress):
        if batch.truths is None:
            raise ValueError("the batch carries no truths; expected a loader made for evaluation")
        predictions = predict(batch)
        if [prediction.meta for prediction in predictions] != batch.metas:
            raise ValueError(
                f"{len(predictions)} predictions do not answer the {len(batch.metas)} images of the batch in order"
            )
        for prediction, truth in zip(predictions, batch.truths, strict=True):
            evaluator.add(prediction, truth)


def _kept(spec: Spec) -> list[tuple[str, int]]:
    """Keys that say how many instances or detections of an image a model gives at most."""
    model, kept = spec.model, spec.postprocess
    if isinstance(model, DeformableDetrSpec):
        return [("postprocess.num_select", kept.num_select), ("model.num_queries", model.num_queries)]
    if isinstance(model, Mask2FormerSpec | OneFormerSpec):
        queries = ("model.decoder.num_object_queries", model.decoder.num_object_queries)
        return [("postprocess.test_topk_per_image", kept.test_topk_per_image), queries]
    return []


def _pixel_counts(records: Sequence[Mapping[str, Any]], num_classes: int) -> dict[str, Columns]:
    """The parts ``semantic`` and ``panoptic`` of the statistics."""
    semantic: list[tuple[float, ...]] = []
    panoptic: list[tuple[float, ...]] = []
    for image, record in enumerate(records):
        confusion = np.zeros((num_classes, num_classes), np.int64)
        for row, column, pixels in record.get("semantic", {}).get("confusion", ()):
            confusion[row, column] = pixels
        counts = np.stack([confusion.diagonal(), confusion.sum(1), confusion.sum(0)], 1)
        semantic += [(image, label, *counts[label].tolist()) for label in np.flatnonzero(counts.any(1)).tolist()]
        panoptic += [(image, *row) for row in record.get("panoptic", {}).get("quality", ())]
    rows = {"semantic": semantic, "panoptic": panoptic}
    return {name: as_columns(name, rows[name]) for name in rows if any(name in record for record in records)}


def _labels(names: Sequence[str] | None, catalog: ClassCatalog) -> list[int]:
    """Contiguous ids in order, all of them without ``names``."""
    keys = catalog.keys
    for name in names or ():
        if name not in keys:
            raise UserError(f"evaluate.classes: {unknown_class(name, catalog)}")
    return [label for label, key in enumerate(keys) if names is None or key in names]


def _present(part: Any, name: str, file_name: str) -> Any:
    if part is None:
        raise ValueError(f"{file_name}: the prediction has no {name} part, which this mode measures")
    return part
