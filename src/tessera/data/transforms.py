"""Augmentation of one training sample. Everything random comes from a generator that (seed, pass over the data, index) determine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

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


def augment(
    image: Tensor,
    target: Target,
    augmentation: AugmentationSpec,
    target_size: tuple[int, int] | None,
    generator: np.random.Generator,
) -> tuple[Tensor, Target]:
    """(3, H, W) uint8 to (3, h, w) uint8 with h, w no larger than ``train_crop_size``, and the target at that size.

    In order: stretch to ``target_size``, horizontal flip, colour jitter, resize (shortest edge, or large-scale jitter), random crop.
    Crowd regions and what the crop leaves no pixel of are dropped; boxes become tight again; ``areas`` stay those of the original.
    """
    if target_size is not None:
        image = resize(image, target_size)
        target = resize_target(target, target_size)
    flip = generator.random() < augmentation.flip
    if augmentation.color_jitter:
        image = jitter_colors(image, generator)
    if flip:
        image = image.flip(-1)
    height, width = image.shape[-2:]
    size = train_size(height, width, augmentation, generator)
    image = resize(image, size)

    # Masks and map are looked up at the pixels of the crop only: many masks at full size would cost most of the time.
    rows = nearest_index(height, size[0])
    columns = nearest_index(width, size[1])
    if flip:
        columns = width - 1 - columns
    top, left, crop_height, crop_width = _choose_crop(size, target.semantic, rows, columns, augmentation, generator)
    image = image[:, top : top + crop_height, left : left + crop_width]
    rows = rows[top : top + crop_height]
    columns = columns[left : left + crop_width]
    kept = ~target.iscrowd
    masks = target.masks[kept].index_select(1, rows).index_select(2, columns)
    boxes = masks_to_boxes(masks)
    semantic = None if target.semantic is None else target.semantic[rows][:, columns]
    cropped = Target(
        labels=target.labels[kept],
        masks=masks,
        boxes=boxes,
        iscrowd=target.iscrowd[kept],
        areas=target.areas[kept],
        semantic=semantic,
    )
    return image.contiguous(), select(cropped, has_pixels(cropped))


def train_size(
    height: int, width: int, augmentation: AugmentationSpec, generator: np.random.Generator
) -> tuple[int, int]:
    """(height, width) to resize to before the crop."""
    if augmentation.train_scale is None:
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
        masks=target.masks[kept],
        boxes=target.boxes[kept],
        iscrowd=target.iscrowd[kept],
        areas=target.areas[kept],
    )


def has_pixels(target: Target) -> Tensor:
    """(N,) bool, told from the boxes, which must be tight."""
    return target.boxes[:, 2] > 0


def resize_target(target: Target, size: tuple[int, int]) -> Target:
    """Nearest neighbour to (height, width) ``size``; boxes become tight again; objects without a pixel stay, empty."""
    masks = resize_nearest(target.masks, size)
    semantic = None if target.semantic is None else resize_nearest(target.semantic, size)
    return replace(target, masks=masks, boxes=masks_to_boxes(masks), semantic=semantic)


def pad_target(target: Target, size: tuple[int, int]) -> Target:
    """Pads bottom and right to (height, width) ``size``: masks False, semantic IGNORE."""
    height, width = target.masks.shape[-2:]
    masks = torch.zeros(len(target.masks), *size, dtype=torch.bool)
    masks[:, :height, :width] = target.masks
    semantic = None
    if target.semantic is not None:
        semantic = torch.full(size, IGNORE, dtype=torch.uint8)
        semantic[:height, :width] = target.semantic
    return replace(target, masks=masks, semantic=semantic)


def _choose_crop(
    size: tuple[int, int],
    semantic: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    augmentation: AugmentationSpec,
    generator: np.random.Generator,
) -> tuple[int, int, int, int]:
    """(top, left, height, width) inside the resized image; ``rows`` and ``columns`` lead from there into ``semantic``."""
    height, width = (min(crop, side) for crop, side in zip(augmentation.train_crop_size, size, strict=True))
    limit = augmentation.single_class_max_area
    top = left = 0
    for _ in range(_CROP_TRIES):
        top = int(generator.integers(size[0] - height + 1))
        left = int(generator.integers(size[1] - width + 1))
        if semantic is None or limit >= 1:
            break
        crop = semantic[rows[top : top + height]][:, columns[left : left + width]]
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
