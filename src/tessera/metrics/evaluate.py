"""Runs predictions over a split and measures them: the body of the evaluate stage, and of validation during training."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tessera import provenance
from tessera.files import UserError
from tessera.metrics.coco import InstanceMetric
from tessera.metrics.panoptic import PanopticMetric
from tessera.metrics.predictions import encode_record, write_predictions
from tessera.metrics.semantic import SemanticMetric
from tessera.metrics.statistics import Limits, Statistics, per_image_counts, write_statistics
from tessera.ops.images import ScaledDown, input_record, scaled_down
from tessera.ops.rle import encode_masks
from tessera.progress import track
from tessera.spec.networks import DeformableDetrSpec, Mask2FormerSpec, Mode, OneFormerSpec
from tessera.spec.schema import Spec
from tessera.structures import Batch, ClassCatalog, Predictions, Target, unknown_class


@dataclass
class Evaluation:
    metrics: dict[str, float]
    """Fractions in [0, 1]. A metric that is undefined on this split, such as APl without large objects, is absent."""
    per_class: list[dict[str, Any]]
    """One row per class of the catalogue, or of those asked for: ``id`` (the dataset's), ``name``, ``isthing``, then its metrics, None
    where undefined."""
    images: int
    seconds: float
    """From the first image read to the last one measured; includes loading."""
    predictions: list[dict[str, Any]]
    """See ``evaluation.predictions``."""
    mode: Mode
    catalog: ClassCatalog
    counted: list[int]
    """Labels of the classes that take part."""
    instances: InstanceMetric | None = None

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
        smaller = self.scaled_down(spec)
        scaling = [] if smaller is None else [smaller.describe(self.images, input_size)]
        return {
            "experiment": experiment,
            **parts,
            "mode": self.mode,
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
        sizes = ((tuple(one["original_size"]), tuple(one["resized_size"])) for one in self.predictions)
        return scaled_down(sizes, spec.dataset.augmentation, spec.evaluated.target_size)

    def remarks(self, spec: Spec) -> list[str]:
        """What keeps the numbers below 1 whatever the model: keys that let fewer objects of an image count than it has."""
        if self.instances is None:
            return []
        objects = self.instances.objects()
        of_image: Counter[int] = Counter()
        for (image, _), count in objects.items():
            of_image[image] += count
        of_class = {image: count for (image, _), count in sorted(objects.items(), key=lambda item: item[1])}
        names = {record["image_id"]: record["file_name"] for record in self.predictions}
        found = []
        counted = ("evaluate.max_detections", self.instances.limits.detections[-1])
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
        write_predictions(path, self.mode, self.catalog, self.predictions)

    def statistics(self) -> Statistics:
        """What each image contributes to the metrics, by ascending image id."""
        records = sorted(self.predictions, key=lambda record: record["image_id"])
        detections = {} if self.instances is None else self.instances.statistics()
        return Statistics(
            mode=self.mode,
            classes=list(self.catalog.keys),
            things=list(self.catalog.thing_ids),
            counted=self.counted,
            image_ids=[record["image_id"] for record in records],
            parts=per_image_counts(records, len(self.catalog)) | detections,
            limits=Limits() if self.instances is None else self.instances.limits,
        )

    def write_statistics(self, path: Path) -> None:
        write_statistics(path, self.statistics())

    def summary(self) -> str:
        """A few lines for a terminal."""
        lines = [f"{self.images} images in {self.seconds:.1f} s"]
        # Of an instance model the boxes are by the way; of a detector they are all there is.
        names = [name for name in self.metrics if self.mode == "detection" or not name.startswith("box_")]
        for start in range(0, len(names), 6):
            lines.append("  ".join(f"{name} {self.metrics[name]:.4f}" for name in names[start : start + 6]))
        return "\n".join(lines)


class Evaluator:
    """Accumulates image by image what the mode asks for; evaluators of several processes merge into one."""

    def __init__(
        self, catalog: ClassCatalog, mode: Mode, classes: Sequence[str] | None = None, limits: Limits = Limits()
    ) -> None:
        """``classes``: keys of the catalogue that the metrics are restricted to. Raises UserError for one that the catalogue lacks."""
        self.catalog = catalog
        self.mode = mode
        self.classes = _labels(classes, catalog)
        self.panoptic = PanopticMetric(catalog, self.classes) if mode == "panoptic" else None
        self.instances = InstanceMetric(catalog, self.classes, limits) if mode != "semantic" else None
        self.semantic = SemanticMetric(catalog, self.classes) if mode in ("panoptic", "semantic") else None
        self.records: list[dict[str, Any]] = []
        self._seen: dict[int, str] = {}

    def add(self, prediction: Predictions, truth: Target) -> None:
        """Both at original size. Raises UserError for an image id seen before, ValueError for a part that the mode needs and lacks."""
        meta = prediction.meta
        self._note(meta.image_id, meta.file_name)
        size = truth.size if truth.masks is None else tuple(truth.masks.shape[1:])
        if size != meta.original_size:
            raise ValueError(f"{meta.file_name}: truth has size {size}, expected {meta.original_size}")
        quality = confusion = rles = None
        if self.panoptic is not None:
            quality = self.panoptic.update(_present(prediction.panoptic, "panoptic", meta.file_name), truth)
        if self.instances is not None:
            instances = _present(prediction.instances, "instances", meta.file_name)
            rles = None if instances.masks is None or self.mode == "detection" else encode_masks(instances.masks)
            self.instances.update(instances, rles, truth, meta)
        if self.semantic is not None:
            if truth.semantic is None:
                raise UserError(
                    f"{meta.file_name}: the annotations do not say the class of every pixel; mIoU needs a dataset that does "
                    "(coco_panoptic or mask_pairs), or set model.mode to instance"
                )
            confusion = self.semantic.update(_present(prediction.semantic, "semantic", meta.file_name), truth.semantic)
        self.records.append(encode_record(prediction, rles, confusion, quality))

    def merge(self, other: Evaluator) -> None:
        """Takes over what another process accumulated; an image that both saw is an error."""
        for image_id, file_name in other._seen.items():
            self._note(image_id, file_name)
        if self.panoptic is not None and other.panoptic is not None:
            self.panoptic.merge(other.panoptic)
        if self.instances is not None and other.instances is not None:
            self.instances.merge(other.instances)
        if self.semantic is not None and other.semantic is not None:
            self.semantic.merge(other.semantic)
        self.records += other.records

    def result(self, seconds: float = 0.0) -> Evaluation:
        """Raises UserError when there was no image, or nothing on the images that could be measured."""
        if not self.records:
            raise UserError("no image was evaluated; is the split empty?")
        metrics: dict[str, float] = {}
        rows: list[dict[str, Any]] = [
            {"id": category.id, "name": category.name, "isthing": int(category.isthing)}
            for category in self.catalog.categories
        ]
        for metric in (self.panoptic, self.instances, self.semantic):
            if metric is None:
                continue
            found, per_class = metric.result()
            metrics |= found
            for row, extra in zip(rows, per_class, strict=True):
                row |= extra
        if self.classes is not None:
            rows = [rows[label] for label in sorted(self.classes)]
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            raise ValueError(f"metrics {', '.join(broken)} are not finite")
        if not metrics:
            raise UserError(
                f"the {len(self.records)} evaluated images have no annotated object of any class, so no metric is defined; "
                "check the split's annotations and the label map"
            )
        counted = list(range(len(self.catalog))) if self.classes is None else sorted(self.classes)
        return Evaluation(
            metrics, rows, len(self.records), seconds, self.records, self.mode, self.catalog, counted, self.instances
        )

    def _note(self, image_id: int, file_name: str) -> None:
        if image_id in self._seen:
            raise UserError(
                f"image id {image_id} occurs twice ({self._seen[image_id]} and {file_name}); every image counts once, "
                "so ids must be unique within a split"
            )
        self._seen[image_id] = file_name


def evaluate(
    predict: Callable[[Batch], list[Predictions]],
    loader: Iterable[Batch],
    catalog: ClassCatalog,
    mode: Mode,
    progress: bool = True,
    classes: Sequence[str] | None = None,
    limits: Limits = Limits(),
) -> Evaluation:
    """Every batch of ``loader`` must carry ``truths``. Raises UserError for no image, and for one that comes twice."""
    start = time.perf_counter()
    evaluator = Evaluator(catalog, mode, classes, limits)
    accumulate(evaluator, predict, loader, progress)
    return evaluator.result(time.perf_counter() - start)


@torch.inference_mode()
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


def _labels(names: Sequence[str] | None, catalog: ClassCatalog) -> set[int] | None:
    """Contiguous ids."""
    if names is None:
        return None
    keys = catalog.keys
    for name in names:
        if name not in keys:
            raise UserError(f"evaluate.classes: {unknown_class(name, catalog)}")
    return {keys.index(name) for name in names}


def _present(part: Any, name: str, file_name: str) -> Any:
    if part is None:
        raise ValueError(f"{file_name}: the prediction has no {name} part, which this mode measures")
    return part
