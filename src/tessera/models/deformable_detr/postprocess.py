"""Predictions from the outputs of Deformable DETR. Boxes compete by score alone: there is no non-maximum suppression."""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.ops.boxes import cxcywh_to_xyxy
from tessera.spec.schema import PostprocessSpec
from tessera.structures import ImageMeta, Instances, Predictions


class DetectionPostprocess:
    """``postprocess(outputs, metas, input_size)``: the ``num_select`` best (query, class) pairs of every image, less those below
    ``conf_threshold``; boxes are clipped to the image. An image where nothing is left has no instances and keeps its place."""

    def __init__(self, spec: PostprocessSpec) -> None:
        self.spec = spec

    @torch.no_grad()
    def __call__(
        self,
        outputs: dict[str, Tensor],
        metas: list[ImageMeta],
        input_size: tuple[int, int],
        task: str | None = None,
    ) -> list[Predictions]:
        probabilities = outputs["pred_logits"].float().sigmoid()
        boxes = cxcywh_to_xyxy(outputs["pred_boxes"].float())
        return [
            Predictions(meta, instances=self._select(probabilities[image], boxes[image], meta.original_size))
            for image, meta in enumerate(metas)
        ]

    def _select(self, probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> Instances:
        """probabilities (Q, C); boxes (Q, 4), corners in [0, 1]; size (height, width)."""
        classes = probabilities.shape[1]
        flat = probabilities.flatten()
        scores, pairs = flat.topk(min(self.spec.num_select, len(flat)))
        kept = scores >= self.spec.conf_threshold
        scores, pairs = scores[kept], pairs[kept]
        height, width = size
        corners = boxes[pairs // classes].clamp(0, 1) * boxes.new_tensor([width, height, width, height])
        return Instances(scores=scores, labels=pairs % classes, boxes=corners, masks=None)
