"""Overlays of predictions and of truth in the label map's colours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from tessera.ops.masks import masks_to_boxes
from tessera.pictures.canvas import Canvas, largest_part, shade
from tessera.spec.networks import Mode
from tessera.structures import IGNORE, ClassCatalog, Instances, Panoptic, Predictions, Target


def draw_predictions(
    image: Tensor,
    predictions: Predictions,
    catalog: ClassCatalog,
    mode: Mode,
    opacity: float = 0.5,
    score_threshold: float = 0.5,
    outline: int | None = None,
) -> Image.Image:
    """``image``: (3, H, W) uint8 at original size. A panoptic prediction can be drawn in any mode.

    ``score_threshold`` is that of instances; without masks, boxes alone are drawn, each in its class's own colour. ``outline`` is the width of
    boxes and contours in pixels of the picture, which is enlarged where the image is small.
    """
    canvas = Canvas(image, outline)
    if mode == "panoptic" and predictions.panoptic is not None:
        _draw_panoptic(canvas, predictions.panoptic, catalog, opacity)
    elif mode in ("instance", "detection") and predictions.instances is not None:
        if predictions.instances.masks is None and outline is None:
            canvas.stroke *= 2  # Nothing else shows where the object is.
        _draw_instances(canvas, predictions.instances, catalog, opacity, score_threshold)
    elif mode == "semantic" and predictions.semantic is not None:
        _draw_semantic(canvas, predictions.semantic, catalog, opacity)
    else:
        raise ValueError(f"{predictions.meta.file_name}: the prediction has no {mode} part to draw")
    return canvas.finish()


def draw_truth(image: Tensor, truth: Target, catalog: ClassCatalog, mode: Mode, opacity: float = 0.5) -> Image.Image:
    """The same for a target at original size; crowd regions are drawn as stuff is, without box, in panoptic mode."""
    canvas = Canvas(image)
    if mode != "semantic":
        boxed = (~truth.iscrowd).tolist()
        _draw_objects(canvas, truth.labels.tolist(), truth.masks, truth.boxes, catalog, opacity, boxed=boxed)
    elif truth.semantic is None:
        raise ValueError("the target has no semantic map to draw")
    else:
        _draw_semantic(canvas, truth.semantic, catalog, opacity)
    return canvas.finish()


def _draw_semantic(canvas: Canvas, semantic: Tensor, catalog: ClassCatalog, opacity: float) -> None:
    """IGNORE stays uncovered. Each class is named once, in its largest part."""
    labels, areas = (values.tolist() for values in torch.unique(semantic, return_counts=True))
    for label, _ in sorted(zip(labels, areas, strict=True), key=lambda found: -found[1]):
        if label == IGNORE:
            continue
        mask = semantic == label
        category = catalog.categories[label]
        canvas.mask(mask, category.color, opacity)
        canvas.label_mask(largest_part(mask), category.name, category.color)


def _draw_panoptic(canvas: Canvas, panoptic: Panoptic, catalog: ClassCatalog, opacity: float) -> None:
    """Things have a box and a score, stuff has its name inside; void stays uncovered."""
    segments = sorted(panoptic.segments, key=lambda segment: -segment.score)
    ids = torch.tensor([segment.id for segment in segments], dtype=panoptic.ids.dtype)
    masks = panoptic.ids[None] == ids[:, None, None]
    labels = [segment.label for segment in segments]
    scores = [segment.score if catalog.categories[segment.label].isthing else None for segment in segments]
    _draw_objects(canvas, labels, masks, masks_to_boxes(masks), catalog, opacity, scores)


def _draw_instances(
    canvas: Canvas, instances: Instances, catalog: ClassCatalog, opacity: float, score_threshold: float
) -> None:
    kept = instances.scores >= score_threshold
    masks = None if instances.masks is None else instances.masks[kept]
    labels, scores = instances.labels[kept].tolist(), instances.scores[kept].tolist()
    _draw_objects(canvas, labels, masks, instances.boxes[kept], catalog, opacity, scores)


def _draw_objects(
    canvas: Canvas,
    labels: Sequence[int],
    masks: Tensor | None,
    boxes: Tensor,
    catalog: ClassCatalog,
    opacity: float,
    scores: Sequence[float | None] | None = None,
    boxed: Sequence[bool] | None = None,
) -> None:
    """Objects by descending importance. Larger masks are painted first, so that smaller ones stay visible.

    Masks of one class differ in shade; boxes alone need not.
    """
    seen: Counter[int] = Counter()
    colors = []
    for label in labels:
        category = catalog.categories[label]
        shaded = category.isthing and masks is not None
        colors.append(shade(category.color, seen[label]) if shaded else category.color)
        seen[label] += 1
    if masks is not None:
        areas = masks.sum((1, 2)).tolist()
        for index in sorted(range(len(labels)), key=lambda index: -areas[index]):
            canvas.mask(masks[index], colors[index], opacity)
    for index, label in enumerate(labels):
        category = catalog.categories[label]
        score = scores[index] if scores is not None else None
        text = category.name if score is None else f"{category.name} {score:.2f}"
        if category.isthing and (boxed is None or boxed[index]):
            canvas.box(boxes[index].tolist(), colors[index])
            canvas.label_box(boxes[index].tolist(), text, colors[index])
        elif masks is not None:
            canvas.label_mask(largest_part(masks[index]), text, colors[index])
