"""Reading images and the one preprocessing that every runtime shares: resize, pad, stack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import ImageOps
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torchvision.io import ImageReadMode, decode_png
from torchvision.transforms.v2 import functional

from tessera.files import UserError, open_input
from tessera.ops.image_size import open_image
from tessera.spec.schema import MAX_PIXELS, AugmentationSpec
from tessera.structures import Batch, ImageMeta

_BITS, _SAMPLE_FORMAT = 258, 339
"""Tags of TIFF."""
_ORIENTATION = 0x0112
_MIRRORED = (2, 4, 5, 7)
_TURNS = {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}
"""Quarter turns against the clock, after mirroring, by EXIF orientation."""


def read_image(path: Path, value_range: tuple[float, float] | None = None, max_pixels: int = MAX_PIXELS) -> Tensor:
    """(3, H, W) uint8 RGB as it is displayed: EXIF orientation applied, gray and palette expanded, alpha dropped, deep images as
    ``scale_values`` makes them.

    Raises UserError when the file is missing, truncated or no image, when it holds more than would be used (``open_image``), and when it is
    deep and no range is given.
    """
    with open_image(path, max_pixels) as image:
        values = _deep_values(image, path)
        if values is None:
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        else:
            pixels = scale_values(values, value_range, str(path))
            pixels = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def scale_values(values: npt.NDArray[Any], value_range: tuple[float, float] | None, what: str) -> npt.NDArray[np.uint8]:
    """Values of more than 8 bits to 0..255: the lower end of ``value_range`` and what is below to 0, the upper one and what is above to 255.

    Raises UserError, which begins with ``what``, where there is no range, and where a value is no number.
    """
    if values.dtype.kind == "f" and np.isnan(values).any():
        raise UserError(f"{what}: has pixels that are no number (NaN); fill them")
    if value_range is None:
        kind = "floating-point pixels" if values.dtype.kind == "f" else "more than 8 bits per channel"
        extent = f"{values.min():g} to {values.max():g}" if values.size else "none"
        raise UserError(
            f"{what}: has {kind}, of which 256 steps are used (values found: {extent}); set dataset.value_range to the values of all images that "
            "become black and white, such as [0, 4095] for a sensor of 12 bits or [0, 65535]"
        )
    low, high = value_range
    if values.dtype == np.uint16:
        # Each possible value once is faster than each pixel.
        table = scale_values(np.arange(65536, dtype=np.float64), value_range, what)
        return np.take(table, values)
    share = (np.clip(values, low, high, dtype=np.float64) - low) / (high - low)
    scaled: npt.NDArray[np.uint8] = np.rint(share * 255).astype(np.uint8)
    return scaled


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


@dataclass(frozen=True)
class ScaledDown:
    """What does not fit into a graph of fixed size at its test size."""

    images: int
    factor: float
    """The smallest, of sides, below 1."""
    test_size: tuple[int, int]
    """(height, width) that the image with that factor would have."""
    resized_size: tuple[int, int]
    """(height, width) that it has."""

    def describe(self, images: int, graph: tuple[int, int] | None) -> str:
        """``images``: of how many; ``graph``: (height, width)."""
        inside = f"the graph's {graph[0]}x{graph[1]}" if graph else "what the runtime takes"
        wanted, found = (f"{height}x{width}" for height, width in (self.test_size, self.resized_size))
        return (
            f"{self.images} of {images} images are scaled down to fit {inside} (height x width), to {self.factor:.3f} of their test size in "
            f"the worst case, {found} for {wanted}"
        )


def scaled_down(
    sizes: Iterable[tuple[tuple[int, int], tuple[int, int]]],
    augmentation: AugmentationSpec,
    target_size: tuple[int, int] | None,
) -> ScaledDown | None:
    """``sizes``: of every image (height, width) originally and as the network sees it. None where all have their test size."""
    count, worst = 0, None
    for original, resized in sizes:
        wanted = input_size(*(target_size or original), augmentation)
        factor = min(resized[0] / wanted[0], resized[1] / wanted[1])
        if factor < 1:
            count += 1
            if worst is None or factor < worst[0]:
                worst = factor, wanted, resized
    return None if worst is None else ScaledDown(count, *worst)


def input_record(graph: tuple[int, int] | None, found: ScaledDown | None) -> dict[str, Any]:
    """What records say under ``input``. ``graph``: (height, width) that the runtime takes, None where it takes any."""
    return {
        "size": None if graph is None else list(graph),
        "scaled_down": None if found is None else {"images": found.images, "factor": found.factor},
    }


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


def _deep_values(image: ImageFile, path: Path) -> npt.NDArray[Any] | None:
    """(H, W) or (H, W, 3) of more than 8 bits, upright; None for an image of 8."""
    if image.mode.startswith("I") or image.mode == "F":
        codec = image.tile[0].args if image.tile else None
        values: npt.NDArray[Any] = np.asarray(ImageOps.exif_transpose(image))
        if (
            isinstance(image, TiffImageFile)
            and values.dtype == np.int32
            and image.tag_v2.get(_SAMPLE_FORMAT, (1,))[0] == 1
        ):
            return values.view(np.uint32)  # Pillow has no name for these, and takes them for signed.
        if image.format == "PPM" and isinstance(codec, tuple):
            values = np.rint(values * (codec[1] / 65535))  # Pillow has stretched them to 16 bits.
        return values
    if isinstance(image, TiffImageFile) and max(image.tag_v2.get(_BITS, (8,))) > 8:
        raise UserError(
            f"{path}: is a colour TIFF of {max(image.tag_v2[_BITS])} bits per channel, of which the upper 8 would be used; save it as PNG of 16 bits "
            "(and set dataset.value_range), or of 8"
        )
    if image.format == "PPM" and image.tile and isinstance(image.tile[0].args, tuple) and image.tile[0].args[1] > 255:
        raise UserError(f"{path}: is a colour PPM of more than 8 bits per channel; save it as PNG of 16 bits, or of 8")
    if image.format == "PNG" and image.tile and str(image.tile[0].args).endswith(";16B"):
        return _deep_png(image, path)
    return None


def _deep_png(image: ImageFile, path: Path) -> npt.NDArray[np.uint16]:
    """Colours of 16 bits, which Pillow has no mode for."""
    orientation = image.getexif().get(_ORIENTATION, 1)
    with open_input(path) as stream:
        content = torch.frombuffer(bytearray(stream.read()), dtype=torch.uint8)
    try:
        pixels: npt.NDArray[np.uint16] = decode_png(content, ImageReadMode.RGB).permute(1, 2, 0).numpy()
    except RuntimeError as error:
        raise ValueError(str(error).partition("\n")[0]) from None
    if orientation in _MIRRORED:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(np.rot90(pixels, _TURNS.get(orientation, 0)))
