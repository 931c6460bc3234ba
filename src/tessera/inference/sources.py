"""What can be predicted on: files, folders, arrays, pictures in memory, and lists of these."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tessera.files import UserError
from tessera.ops.image_size import IMAGE_SUFFIXES
from tessera.ops.images import read_image


@dataclass(frozen=True)
class ImageSource:
    content: Path | Tensor
    """A file, read when its turn comes, or (3, H, W) uint8 RGB."""
    file_name: str
    """Relative, with forward slashes; what results are named after."""
    image_id: int

    def read(self) -> Tensor:
        """(3, H, W) uint8 RGB. Raises UserError on a file that is no image."""
        return read_image(self.content) if isinstance(self.content, Path) else self.content


def open_source(source: Any) -> list[ImageSource]:
    """Numbered from 1. A folder gives its images by name, without those of its sub-folders.

    Accepted are a path, an (H, W, 3) uint8 RGB array, a Pillow image, and lists of these. Raises UserError on anything else.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        return number_files(list_images(path), path) if path.is_dir() else number_files([path], path.parent)
    if isinstance(source, list | tuple):
        root = _common_folder(item for item in source if isinstance(item, str | Path))
        return [_one(item, number, root) for number, item in enumerate(source, 1)]
    return [_one(source, 1, None)]


def is_many(source: Any) -> bool:
    """Whether the answer to ``source`` is a list."""
    return isinstance(source, list | tuple) or (isinstance(source, str | Path) and Path(source).is_dir())


def list_images(folder: Path) -> list[Path]:
    """The images of a folder by name; hidden files are left out. Raises UserError when there is none."""
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        kinds = ", ".join(sorted(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES))
        raise UserError(f"{folder}: holds no image; expected files of the kinds {kinds} (sub-folders are not searched)")
    return found


def number_files(paths: Sequence[Path], root: Path) -> list[ImageSource]:
    return [ImageSource(path, path.relative_to(root).as_posix(), number) for number, path in enumerate(paths, 1)]


def safe_name(file_name: str) -> PurePosixPath:
    """Raises UserError for a name that could leave the folder it is put into, and for one that JSON cannot hold."""
    path = PurePosixPath(file_name)
    try:
        file_name.encode()
    except UnicodeEncodeError:
        raise UserError(f"image name {file_name!r}: is not UTF-8; rename the file") from None
    if path.is_absolute() or ".." in path.parts or not path.name or "\\" in file_name:
        raise UserError(f"image name {file_name!r}: expected a relative name with forward slashes and without '..'")
    return path


def _one(item: Any, number: int, root: Path | None) -> ImageSource:
    if isinstance(item, str | Path):
        path = Path(item)
        if path.is_dir():
            raise UserError(
                f"{path}: is a folder inside a list; expected image files (a folder is predicted by itself)"
            )
        name = os.path.relpath(path.absolute(), root) if root is not None else path.name
        return ImageSource(path, Path(name).as_posix(), number)
    name = f"image_{number:06d}.png"
    if isinstance(item, Image.Image):
        upright = np.array(ImageOps.exif_transpose(item).convert("RGB"))
        return ImageSource(_to_tensor(upright), name, number)
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or item.ndim != 3 or item.shape[2] != 3 or not item.size:
            raise UserError(
                f"image {number}: is an array of shape {item.shape} and type {item.dtype}; expected (height, width, 3) uint8, RGB"
            )
        return ImageSource(_to_tensor(item), name, number)
    raise UserError(f"image {number}: is a {type(item).__name__}; expected a path, an array or a Pillow image")


def _to_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _common_folder(paths: Iterable[str | Path]) -> Path | None:
    """So that files of equal name in different folders keep different names."""
    parents = [str(Path(path).absolute().parent) for path in paths]
    return Path(os.path.commonpath(parents)) if parents else None
