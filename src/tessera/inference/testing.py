"""Semantic predictions averaged over views of an image: windows, scales and mirror images, under any runtime.

Scores, not decisions, are averaged, and the class is chosen at the original size. A window lies wholly inside the image, as in
MMSegmentation: the last one of a row or column moves back, and the overlap is averaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from tessera.files import UserError
from tessera.inference.predictor import Predictor
from tessera.models.base import SemanticPostprocess
from tessera.models.common.resizing import to_original
from tessera.ops.images import pad_and_stack, padded_size, resize
from tessera.spec.schema import ViewsSpec
from tessera.structures import Batch, ImageMeta, Predictions

WINDOWS_AT_ONCE = 4
"""Views at once where the runtime takes any batch."""


def with_views(predictor: Predictor, testing: ViewsSpec) -> Predictor:
    """``predictor`` itself where ``testing`` is the default: one view of every image.

    Raises UserError where the model is not semantic, or its graph has one size that the views do not have.
    """
    if testing == ViewsSpec():
        return predictor
    name = f"{predictor.runtime} {predictor.precision}"
    if predictor.mode != "semantic":
        raise UserError(f"testing: averages semantic predictions, but the model's mode is {predictor.mode}; remove it")
    fixed = predictor.input_size
    if fixed is not None and testing.mode == "slide" and testing.crop_size != fixed:
        raise UserError(
            f"testing.crop_size is {list(testing.crop_size)}, but the {name} graph takes {list(fixed)} (height, width) only; set "
            f"crop_size to that, or export with export.input_height={testing.crop_size[0]} export.input_width={testing.crop_size[1]} or "
            "export.dynamic_size=true"
        )
    if fixed is not None and testing.mode == "whole" and testing.scales != [1.0]:
        raise UserError(
            f"testing.scales is {testing.scales}, but the {name} graph takes {list(fixed)} (height, width) only; leave it out, use "
            "testing.mode=slide, or export with export.dynamic_size=true"
        )
    return ViewsPredictor(predictor, testing)


def one_view(predictor: Predictor) -> Predictor:
    """What ``with_views`` was given."""
    return predictor.inner if isinstance(predictor, ViewsPredictor) else predictor


class ViewsPredictor(Predictor):
    """The runtime of another predictor, asked several times for every image."""

    def __init__(self, inner: Predictor, testing: ViewsSpec) -> None:
        # With windows, an image may be larger than what the graph takes.
        fixed = None if testing.mode == "slide" else inner.input_size
        super().__init__(inner.header, inner.postprocess, inner.input_names, fixed)
        self.runtime = inner.runtime  # type: ignore[misc]  # a constant of the classes that it stands for
        self.size_divisor = inner.size_divisor
        self.inner = inner
        self.testing = testing
        self.scoring = cast(SemanticPostprocess, inner.postprocess)

    def outputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.inner.outputs(inputs)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> list[Predictions]:
        found = []
        for image, meta in zip(batch.images, batch.metas, strict=True):
            height, width = meta.resized_size
            scores = self.scores(image[:, :height, :width], meta)
            found.append(Predictions(meta, semantic=scores.argmax(0).cpu()))
        return found

    def scores(self, image: Tensor, meta: ImageMeta) -> Tensor:
        """(C, *original_size), the mean over all views of a (3, *resized_size) image."""
        views = list(self._views(image))
        total = torch.zeros(())
        for view, mirrored in views:
            size = (view.shape[-2], view.shape[-1])
            described = replace(meta, resized_size=size)
            found = self._slide(view, described) if self.testing.mode == "slide" else self._whole(view, described)
            total = (found.flip(-1) if mirrored else found) + total.to(found.device)
        return total / len(views)

    def _views(self, image: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """The image at every scale, and the same mirrored."""
        height, width = image.shape[-2:]
        for scale in self.testing.scales:
            scaled = resize(image, (max(1, round(height * scale)), max(1, round(width * scale))))
            yield scaled, False
            if self.testing.flip:
                yield scaled.flip(-1), True

    def _whole(self, view: Tensor, meta: ImageMeta) -> Tensor:
        return self._ask([view], [meta], padded_size([meta.resized_size], self.size_divisor, self.input_size))[0]

    def _slide(self, view: Tensor, meta: ImageMeta) -> Tensor:
        height, width = meta.resized_size
        crop, stride = self.testing.crop_size, self.testing.stride
        places = [
            (slice(top, min(top + crop[0], height)), slice(left, min(left + crop[1], width)))
            for top in window_starts(height, crop[0], stride[0])
            for left in window_starts(width, crop[1], stride[1])
        ]
        step = self.inner.max_batch or WINDOWS_AT_ONCE
        total, count = torch.zeros(()), view.new_zeros(height, width)
        for start in range(0, len(places), step):
            some = places[start : start + step]
            windows = [view[:, rows, columns] for rows, columns in some]
            sizes = [(window.shape[-2], window.shape[-1]) for window in windows]
            metas = [replace(meta, original_size=size, resized_size=size) for size in sizes]
            for (rows, columns), scores in zip(some, self._ask(windows, metas, crop), strict=True):
                if not total.ndim:
                    total = scores.new_zeros(len(scores), height, width)
                total[:, rows, columns] += scores
                count[rows, columns] += 1
        return to_original(total / count.to(total.device), meta, meta.resized_size)

    def _ask(self, views: list[Tensor], metas: list[ImageMeta], size: tuple[int, int]) -> list[Tensor]:
        """Scores (C, *original_size) of views padded to ``size``."""
        (task,) = self.tasks
        images, padding = pad_and_stack(views, size, self.header.spec.model.pixel_mean)
        outputs = self.inner.ask(images, padding, task)
        self._require_sound(outputs, metas)
        return self.scoring.scores(outputs, metas, size, task)


def window_starts(side: int, crop: int, stride: int) -> list[int]:
    """Starts of windows along one side: every ``stride``, the last one moved back to end with the side."""
    last = max(0, side - crop)
    return [*range(0, last, stride), last]
