"""Reading images and the one preprocessing that every runtime shares: resize, pad, stack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional

from tessera.files import UserError
from tessera.ops.image_size import open_image
from tessera.spec.schema import AugmentationSpec
from tessera.structures import Batch, ImageMeta


def read_image(path: Path) -> Tensor:
    """(3, H, W) uint8 RGB as it is displayed: EXIF orientation applied, gray and palette expanded, alpha dropped, 16 bits cut to 8.

    Raises UserError when the file is missing, truncated or no image.
    """
    with open_image(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            upright = _to_eight_bits(upright, path)
        elif upright.mode == "F":
            raise UserError(f"{path}: has floating-point pixels; expected 8 or 16 bits per channel")
        pixels = np.array(upright.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def test_size(height: int, width: int, min_size: int, max_size: float) -> tuple[int, int]:
    """(height, width) whose shorter side is ``min_size``, or smaller so that the longer one stays within ``max_size``."""
    scale = min(min_size / min(height, width), max_size / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


test_size.__test__ = False  # type: ignore[attr-defined]  # pytest must not collect it from modules that import it


def input_size(
    height: int, width: int, augmentation: AugmentationSpec, fixed_size: tuple[int, int] | None = None
) -> tuple[int, int]:
    """(height, width) of an image inside its batch: shortest edge, then scaled down further if ``fixed_size`` cannot hold it."""
    resized = test_size(height, width, augmentation.test_min_size, augmentation.test_max_size)
    if fixed_size is None or (resized[0] <= fixed_size[0] and resized[1] <= fixed_size[1]):
        return resized
    scale = min(fixed_size[0] / height, fixed_size[1] / width)
    return (
        min(fixed_size[0], max(1, int(height * scale + 0.5))),
        min(fixed_size[1], max(1, int(width * scale + 0.5))),
    )


def padded_size(
    sizes: Sequence[tuple[int, int]], divisor: int, fixed_size: tuple[int, int] | None = None
) -> tuple[int, int]:
    """(height, width) of the batch that holds images of these sizes: ``fixed_size``, or the next multiples of ``divisor``."""
    if fixed_size is not None:
        return fixed_size
    height, width = (-(-max(side) // divisor) * divisor for side in zip(*sizes, strict=True))
    return height, width


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, H, W), uint8 or float32, to (3, *size) of the same type: bilinear, with a filter as wide as the reduction."""
    if image.shape[-2:] == size:
        return image
    resized: Tensor = functional.resize(image, list(size), antialias=True)
    return resized


def pad_and_stack(
    images: Sequence[Tensor], size: tuple[int, int], pixel_mean: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Images (3, h, w), uint8 or float32 in [0, 1], no larger than ``size`` to (B, 3, H, W) float32 in [0, 1] and padding (B, H, W), True
    where padded."""
    stacked = torch.tensor(list(pixel_mean), dtype=torch.float32).view(1, 3, 1, 1).repeat(len(images), 1, *size)
    padding = torch.ones(len(images), *size, dtype=torch.bool)
    for index, image in enumerate(images):
        height, width = image.shape[-2:]
        stacked[index, :, :height, :width] = image.to(torch.float32) / 255 if image.dtype == torch.uint8 else image
        padding[index, :height, :width] = False
    return stacked, padding


def make_batch(
    images: Sequence[Tensor],
    image_ids: Sequence[int],
    file_names: Sequence[str],
    augmentation: AugmentationSpec,
    pixel_mean: Sequence[float],
    divisor: int = 32,
    fixed_size: tuple[int, int] | None = None,
    target_size: tuple[int, int] | None = None,
) -> Batch:
    """The preprocessing of validation, test, inference and parity under every runtime; ``targets`` and ``truths`` stay None.

    ``images`` are (3, H, W) uint8 as ``read_image`` gives them, of any sizes. Each is stretched to ``target_size`` where that is
    given, then resized by the shortest edge (``test_min_size``, ``test_max_size``). With ``fixed_size`` (height, width) it is scaled
    down further only where it does not fit, and padded to exactly that; otherwise to a multiple of ``divisor``.
    """
    resized = []
    metas = []
    for image, image_id, file_name in zip(images, image_ids, file_names, strict=True):
        original = (image.shape[1], image.shape[2])
        stretched = resize(image, target_size) if target_size is not None else image
        resized.append(resize(stretched, input_size(stretched.shape[1], stretched.shape[2], augmentation, fixed_size)))
        metas.append(ImageMeta(image_id, file_name, original, (resized[-1].shape[1], resized[-1].shape[2])))
    size = padded_size([meta.resized_size for meta in metas], divisor, fixed_size)
    stacked, padding = pad_and_stack(resized, size, pixel_mean)
    return Batch(images=stacked, padding=padding, metas=metas, targets=None, truths=None)


def _to_eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """16-bit gray keeps its upper byte; Pillow's own conversion would clip at 255."""
    values = np.asarray(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise UserError(f"{path}: has values {values.min()}..{values.max()}; expected 8 or 16 bits per channel")
    return Image.fromarray((values >> 8).astype(np.uint8))
