"""Augmentation of one training sample. Everything random comes from a generator that (seed, pass over the data, index) determine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from tessera.ops.boxes import clip_boxes, scale_boxes
from tessera.ops.images import resize, test_size
from tessera.ops.masks import masks_to_boxes, nearest_index, resize_nearest
from tessera.spec.schema import AugmentationSpec
from tessera.structures import IGNORE, Target

Pixels = npt.NDArray[np.uint8]

_CROP_TRIES = 10
_BRIGHTNESS = 32
_CONTRAST = (0.5, 1.5)
_SATURATION = (0.5, 1.5)
_HUE_DEGREES = 36


def sample_generator(seed: int, passage: int, index: int) -> np.random.Generator:
    """For the augmentation of image ``index`` in the ``passage``-th pass over the data."""
    return np.random.Generator(np.random.Philox(key=_words(seed, passage), counter=_words(0, 0, index, 0)))


def order_generator(seed: int, passage: int) -> np.random.Generator:
    """For the order of the images in the ``passage``-th pass; independent of every ``sample_generator``."""
    return np.random.Generator(np.random.Philox(key=_words(seed, passage), counter=_words(0, 0, 0, 1)))


def task_generator(seed: int, passage: int, index: int) -> np.random.Generator:
    """For the task that image ``index`` is shown with in the ``passage``-th pass; independent of the others."""
    return np.random.Generator(np.random.Philox(key=_words(seed, passage), counter=_words(0, 0, index, 2)))


def augment(
    image: Tensor,
    target: Target,
    augmentation: AugmentationSpec,
    target_size: tuple[int, int] | None,
    generator: np.random.Generator,
) -> tuple[Tensor, Target]:
    """(3, H, W) uint8 to (3, h, w) uint8 with h, w no larger than ``train_crop_size`` or ``fixed_padding``, and the target at that size.

    In order: stretch to ``target_size``, horizontal flip, colour jitter, resizing and cropping as the spec says.
    Crowd regions and what the crop leaves no pixel of are dropped; boxes become tight again, or are clipped where there are no masks;
    ``areas`` stay those of the original.
    """
    kept = ~target.iscrowd
    view = _View.of(image, target.boxes[kept])
    if target_size is not None:
        view.resize(target_size)
    flip = generator.random() < augmentation.flip
    if augmentation.color_jitter:
        view.image = jitter_colors(view.image, generator)
    if flip:
        view.flip()
    if augmentation.train_random_resize is not None and generator.random() < 0.5:
        _zoom(view, augmentation.train_random_resize, augmentation.train_random_crop, generator)
    view.resize(train_size(*view.size, augmentation, generator))
    if augmentation.train_crop_size is not None:
        view.crop(*_choose_crop(view, target.semantic, augmentation.train_crop_size, augmentation, generator))
    elif augmentation.fixed_padding is not None:
        view.resize(_fitting(view.size, augmentation.fixed_padding))

    # Masks and map are looked up at the pixels that are left only: many masks at full size would cost most of the time.
    masks = None if target.masks is None else view.look_up(target.masks[kept])
    changed = Target(
        labels=target.labels[kept],
        masks=masks,
        boxes=clip_boxes(view.boxes, view.size) if masks is None else masks_to_boxes(masks),
        iscrowd=target.iscrowd[kept],
        areas=target.areas[kept],
        semantic=None if target.semantic is None else view.look_up(target.semantic),
        size=view.size,
    )
    return view.image.contiguous(), select(changed, has_pixels(changed))


@dataclass
class _View:
    """What is left of an image on its way through resizing, flipping and cropping, and where its pixels came from."""

    image: Tensor
    """(3, h, w) uint8."""
    rows: Tensor
    """(h,) int64, the row of the original that each row is nearest to."""
    columns: Tensor
    """(w,) int64, the same for columns."""
    boxes: Tensor
    """(N, 4) float64, corner format in pixels of ``image``; may reach out of it."""

    @classmethod
    def of(cls, image: Tensor, boxes: Tensor) -> _View:
        height, width = image.shape[-2:]
        return cls(image, torch.arange(height), torch.arange(width), boxes.double())

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[-2], self.image.shape[-1]

    def resize(self, size: tuple[int, int]) -> None:
        self.rows = self.rows[nearest_index(self.size[0], size[0])]
        self.columns = self.columns[nearest_index(self.size[1], size[1])]
        self.boxes = scale_boxes(self.boxes, self.size, size)
        self.image = resize(self.image, size)

    def flip(self) -> None:
        x1, y1, x2, y2 = self.boxes.unbind(-1)
        width = self.size[1]
        self.boxes = torch.stack((width - x2, y1, width - x1, y2), dim=-1)
        self.columns = self.columns.flip(0)
        self.image = self.image.flip(-1)

    def crop(self, top: int, left: int, height: int, width: int) -> None:
        self.boxes = self.boxes - torch.tensor([left, top, left, top])
        self.rows = self.rows[top : top + height]
        self.columns = self.columns[left : left + width]
        self.image = self.image[:, top : top + height, left : left + width]

    def look_up(self, maps: Tensor) -> Tensor:
        """(..., H, W) at the size of the original, of any type, to (..., h, w)."""
        return maps.index_select(-2, self.rows).index_select(-1, self.columns)


def _zoom(view: _View, shortest: Sequence[int], crop: tuple[int, int] | None, generator: np.random.Generator) -> None:
    """DETR's cropping (Carion et al. 2020, section A.4): a window with sides drawn from ``crop``, of the image resized to ``shortest``."""
    if crop is None:
        raise ValueError("train_random_resize is set, train_random_crop is not; the spec refuses that")
    view.resize(test_size(*view.size, int(generator.choice(shortest)), math.inf))
    sides = [int(generator.integers(min(crop[0], side), min(crop[1], side) + 1)) for side in view.size]
    top, left = (int(generator.integers(whole - side + 1)) for whole, side in zip(view.size, sides, strict=True))
    view.crop(top, left, *sides)


def _fitting(size: tuple[int, int], limits: tuple[int, int]) -> tuple[int, int]:
    """(height, width) scaled down where it is larger than the limits."""
    scale = min(1.0, *(limit / side for limit, side in zip(limits, size, strict=True)))
    height, width = (min(limit, max(1, int(side * scale + 0.5))) for limit, side in zip(limits, size, strict=True))
    return height, width


def train_size(
    height: int, width: int, augmentation: AugmentationSpec, generator: np.random.Generator
) -> tuple[int, int]:
    """(height, width) to resize to before the crop of ``train_crop_size``, if any."""
    if augmentation.train_scale is None or augmentation.train_crop_size is None:
        shortest = int(generator.choice(augmentation.train_min_size))
        return test_size(height, width, shortest, augmentation.train_max_size)
    factor = generator.uniform(*augmentation.train_scale)
    crop_height, crop_width = augmentation.train_crop_size
    scale = factor * min(crop_height / height, crop_width / width)
    scale = min(scale, augmentation.train_max_size / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def jitter_colors(image: Tensor, generator: np.random.Generator) -> Tensor:
    """SSD's photometric distortion of a (3, H, W) uint8 image: each step with probability one half (Liu et al. 2016, its Caffe code)."""
    pixels = image.permute(1, 2, 0).numpy()
    brightness, contrast_first, contrast, saturation, hue = (bool(draw < 0.5) for draw in generator.random(5))
    shift = generator.uniform(-_BRIGHTNESS, _BRIGHTNESS)
    gain = generator.uniform(*_CONTRAST)
    strength = generator.uniform(*_SATURATION) if saturation else 1.0
    turn = generator.uniform(-_HUE_DEGREES, _HUE_DEGREES) if hue else 0.0
    if brightness:
        pixels = _linear(pixels, 1.0, shift)
    if contrast and contrast_first:
        pixels = _linear(pixels, gain, 0.0)
    if saturation or hue:
        pixels = _saturate_and_turn(pixels, strength, turn)
    if contrast and not contrast_first:
        pixels = _linear(pixels, gain, 0.0)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def select(target: Target, kept: Tensor) -> Target:
    """The objects where ``kept`` (N,) bool is true."""
    return replace(
        target,
        labels=target.labels[kept],
        masks=None if target.masks is None else target.masks[kept],
        boxes=target.boxes[kept],
        iscrowd=target.iscrowd[kept],
        areas=target.areas[kept],
    )


def has_pixels(target: Target) -> Tensor:
    """(N,) bool, told from the boxes, which must be tight or clipped to the image."""
    x1, y1, x2, y2 = target.boxes.unbind(-1)
    return (x2 > x1) & (y2 > y1)


def resize_target(target: Target, size: tuple[int, int]) -> Target:
    """Nearest neighbour to (height, width) ``size``; boxes become tight again; objects without a pixel stay, empty.

    Boxes without masks are scaled and clipped.
    """
    semantic = None if target.semantic is None else resize_nearest(target.semantic, size)
    if target.masks is None:
        if target.size is None:
            raise ValueError("the target has neither masks nor the size of its image, so its boxes cannot be scaled")
        boxes = clip_boxes(scale_boxes(target.boxes.double(), target.size, size), size)
        return replace(target, boxes=boxes, semantic=semantic, size=size)
    masks = resize_nearest(target.masks, size)
    return replace(target, masks=masks, boxes=masks_to_boxes(masks), semantic=semantic, size=size)


def pad_target(target: Target, size: tuple[int, int]) -> Target:
    """Pads bottom and right to (height, width) ``size``: masks False, semantic IGNORE."""
    masks = semantic = None
    if target.masks is not None:
        height, width = target.masks.shape[-2:]
        masks = torch.zeros(len(target.masks), *size, dtype=torch.bool)
        masks[:, :height, :width] = target.masks
    if target.semantic is not None:
        height, width = target.semantic.shape
        semantic = torch.full(size, IGNORE, dtype=torch.uint8)
        semantic[:height, :width] = target.semantic
    return replace(target, masks=masks, semantic=semantic)


def _choose_crop(
    view: _View,
    semantic: Tensor | None,
    crop_size: tuple[int, int],
    augmentation: AugmentationSpec,
    generator: np.random.Generator,
) -> tuple[int, int, int, int]:
    """(top, left, height, width) inside the view; ``semantic`` is at the size of the original."""
    height, width = (min(crop, side) for crop, side in zip(crop_size, view.size, strict=True))
    limit = augmentation.single_class_max_area
    top = left = 0
    for _ in range(_CROP_TRIES):
        top = int(generator.integers(view.size[0] - height + 1))
        left = int(generator.integers(view.size[1] - width + 1))
        if semantic is None or limit >= 1:
            break
        crop = semantic[view.rows[top : top + height]][:, view.columns[left : left + width]]
        counts = np.bincount(crop.numpy().ravel(), minlength=256)[:IGNORE]
        if 0 < counts.max() <= limit * counts.sum():
            break
    return top, left, height, width


def _linear(pixels: Pixels, gain: float, shift: float) -> Pixels:
    table = np.clip(np.arange(256) * gain + shift, 0, 255).astype(np.uint8)
    return np.take(table, pixels)


def _saturate_and_turn(pixels: Pixels, strength: float, degrees: float) -> Pixels:
    hsv = np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV"))
    hsv[..., 0] += np.uint8(round(degrees * 256 / 360) % 256)
    hsv[..., 1] = _linear(hsv[..., 1], strength, 0.0)
    return np.array(
        Image.merge("HSV", [Image.fromarray(np.ascontiguousarray(hsv[..., channel])) for channel in range(3)]).convert(
            "RGB"
        )
    )


def _words(*values: int) -> npt.NDArray[np.uint64]:
    return np.array(values, dtype=np.uint64)
