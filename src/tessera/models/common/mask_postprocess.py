"""Predictions from the outputs of the mask transformers (Mask2Former, section 3.4 and appendix; upstream's inference code)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tessera.models.common.resizing import to_original
from tessera.ops.masks import masks_to_boxes
from tessera.spec.networks import Mode
from tessera.spec.schema import PostprocessSpec
from tessera.structures import ClassCatalog, ImageMeta, Instances, Panoptic, Predictions, Segment

CHUNK = 2**24
"""Mask values (64 MiB) that are resized at a time, so that memory does not grow with queries times pixels."""


class MaskPostprocess:
    """``postprocess(outputs, metas, input_size)``. Mask logits are resized to the padded input, cropped, and resized to the original
    image before anything is decided."""

    def __init__(self, mode: Mode, catalog: ClassCatalog, spec: PostprocessSpec) -> None:
        self.parts = ("semantic", "instance", "panoptic") if mode == "panoptic" else (mode,)
        self.spec = spec
        self.things = catalog.thing_ids if mode == "panoptic" else tuple(range(len(catalog)))

    @torch.no_grad()
    def __call__(
        self, outputs: dict[str, Tensor], metas: list[ImageMeta], input_size: tuple[int, int], task: str | None = None
    ) -> list[Predictions]:
        probabilities = outputs["pred_logits"].float().softmax(-1)
        masks = outputs["pred_masks"].float()
        return [
            self._predict(
                probabilities[image], Masks(masks[image], input_size, meta), meta, (task,) if task else self.parts
            )
            for image, meta in enumerate(metas)
        ]

    @torch.no_grad()
    def scores(
        self,
        outputs: dict[str, Tensor],
        metas: list[ImageMeta],
        input_size: tuple[int, int],
        task: str | None = None,
    ) -> list[Tensor]:
        """What the semantic prediction is the argmax of, (C, H, W) at original size, for averaging over crops, scales and flips."""
        probabilities = outputs["pred_logits"].float().softmax(-1)
        masks = outputs["pred_masks"].float()
        return [
            semantic_scores(probabilities[image], Masks(masks[image], input_size, meta))
            for image, meta in enumerate(metas)
        ]

    def _predict(self, probabilities: Tensor, masks: Masks, meta: ImageMeta, parts: tuple[str, ...]) -> Predictions:
        found = Predictions(meta)
        if "semantic" in parts:
            found.semantic = semantic(probabilities, masks)
        if "instance" in parts:
            found.instances = instances(probabilities, masks, self.things, self.spec.test_topk_per_image)
        if "panoptic" in parts:
            found.panoptic = panoptic(probabilities, masks, self.things, self.spec)
        return found


class Masks:
    """Mask logits (Q, h, w) of one image, resized to its original size a few queries at a time."""

    def __init__(self, logits: Tensor, input_size: tuple[int, int], meta: ImageMeta) -> None:
        self.logits, self.input_size, self.meta = logits, input_size, meta
        self.size = meta.original_size
        self.device = logits.device

    def chunks(self, queries: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Places in ``queries`` and the logits (n, H, W) of these."""
        pixels = max(self.size[0] * self.size[1], self.input_size[0] * self.input_size[1])
        step = max(1, CHUNK // pixels)
        for start in range(0, len(queries), step):
            place = slice(start, min(start + step, len(queries)))
            yield place, to_original(self.logits[queries[place]], self.meta, self.input_size)


def semantic(probabilities: Tensor, masks: Masks) -> Tensor:
    """(H, W) int64: the class with the largest score."""
    return semantic_scores(probabilities, masks).argmax(0)


def semantic_scores(probabilities: Tensor, masks: Masks) -> Tensor:
    """(C, H, W): the sum over queries of class probability times mask probability."""
    classes = probabilities.shape[1] - 1
    height, width = masks.size
    score = probabilities.new_zeros(classes, height * width)
    for place, logits in masks.chunks(torch.arange(len(probabilities), device=masks.device)):
        score.addmm_(probabilities[place, :-1].T, logits.sigmoid_().flatten(1))
    return score.view(classes, height, width)


def instances(probabilities: Tensor, masks: Masks, things: tuple[int, ...], topk: int) -> Instances:
    """The ``topk`` best (query, class) pairs that are things; score = class probability times mean mask probability inside the mask.

    Pairs whose mask is empty are left out: they have no box.
    """
    classes = probabilities.shape[1] - 1
    flat = probabilities[:, :-1].flatten()
    scores, pairs = flat.topk(min(topk, len(flat)))
    queries, labels = pairs // classes, pairs % classes
    countable = torch.isin(labels, torch.tensor(things, device=labels.device))
    scores, queries, labels = scores[countable], queries[countable], labels[countable]
    distinct, which = torch.unique(queries, return_inverse=True)
    binary = torch.zeros((len(distinct), *masks.size), dtype=torch.bool, device=masks.device)
    quality = scores.new_zeros(len(distinct))
    for place, logits in masks.chunks(distinct):
        inside = torch.gt(logits, 0, out=binary[place])
        share = logits.sigmoid_().mul_(inside).flatten(1).sum(1)
        quality[place] = share / (inside.flatten(1).sum(1) + 1e-6)
    boxes = masks_to_boxes(binary)
    scores = scores * quality[which]
    order = scores.argsort(descending=True, stable=True)
    order = order[quality[which[order]] > 0]
    which = which[order]
    return Instances(scores=scores[order], labels=labels[order], boxes=boxes[which], masks=binary[which])


def panoptic(probabilities: Tensor, masks: Masks, things: tuple[int, ...], spec: PostprocessSpec) -> Panoptic:
    """Every pixel to the query with the largest class times mask probability; see ``PostprocessSpec`` for the two thresholds."""
    scores, labels = probabilities.max(-1)
    void = probabilities.shape[1] - 1
    kept = ((labels != void) & (scores > spec.object_mask_threshold)).nonzero().squeeze(1)
    scores, labels = scores[kept], labels[kept]
    height, width = masks.size
    best = scores.new_full((height, width), -1.0)
    owner = torch.zeros((height, width), dtype=torch.long, device=masks.device)
    inside = torch.zeros((height, width), dtype=torch.bool, device=masks.device)
    full_area = torch.zeros(len(kept), dtype=torch.long, device=masks.device)
    for place, logits in masks.chunks(kept):
        foreground = logits.sigmoid_() >= 0.5
        full_area[place] = foreground.flatten(1).sum(1)
        value, winner = logits.mul_(scores[place].view(-1, 1, 1)).max(0)
        better = value > best
        best = torch.where(better, value, best)
        owner = torch.where(better, winner + place.start, owner)
        inside = torch.where(better, foreground.gather(0, winner.unsqueeze(0)).squeeze(0), inside)
    if not len(kept):
        return Panoptic(torch.zeros((height, width), dtype=torch.int32, device=masks.device), [])
    owned = owner.flatten().bincount(minlength=len(kept)).tolist()
    visible = owner[inside].bincount(minlength=len(kept)).tolist()
    segments: list[Segment] = []
    stuff: dict[int, int] = {}
    ids = [0] * len(kept)
    found = zip(owned, visible, full_area.tolist(), labels.tolist(), scores.tolist(), strict=True)
    for query, (area, left, full, label, score) in enumerate(found):
        if not left or area / full < spec.overlap_threshold:
            continue
        if label in stuff:
            known = segments[stuff[label]]
            segments[stuff[label]] = Segment(known.id, label, max(known.score, score))
            ids[query] = known.id
            continue
        if label not in things:
            stuff[label] = len(segments)
        segments.append(Segment(len(segments) + 1, label, score))
        ids[query] = len(segments)
    lookup = torch.tensor(ids, dtype=torch.int32, device=masks.device)
    return Panoptic(lookup[owner] * inside, segments)
