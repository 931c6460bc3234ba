"""What can be predicted on: files, folders, addresses, lists of images for a test server, arrays, tensors and pictures in memory."""

from __future__ import annotations

import http.client
import os
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tessera.data.coco_index import open_index
from tessera.data.reader import Findings
from tessera.files import UserError
from tessera.ops.image_size import IMAGE_SUFFIXES
from tessera.ops.images import read_image, scale_values
from tessera.spec.schema import MAX_PIXELS

LARGEST_DOWNLOAD = 256 * 2**20
"""Bytes of an image that is read from an address."""
DOWNLOAD_SECONDS = 60.0
"""What one may take."""


@dataclass(frozen=True)
class ImageSource:
    content: Path | str | Tensor
    """A file or an http(s) address, read when its turn comes, or (3, H, W) uint8 RGB."""
    file_name: str
    """Relative, with forward slashes; what results are named after."""
    image_id: int

    def read(self, value_range: tuple[float, float] | None = None, max_pixels: int = MAX_PIXELS) -> Tensor:
        """(3, H, W) uint8 RGB; the keys are those of `dataset`. Raises UserError for what is no image or cannot be read."""
        if isinstance(self.content, str):
            return _download(self.content, value_range, max_pixels)
        return read_image(self.content, value_range, max_pixels) if isinstance(self.content, Path) else self.content


def open_source(source: Any, value_range: tuple[float, float] | None = None) -> list[ImageSource]:
    """Numbered from 1. A folder gives its images by name, those of its sub-folders too, and leaves out files of other kinds.

    Accepted are a path, an http(s) address, a Pillow image, an array or a tensor as ``to_rgb`` takes them, and lists of these.
    ``value_range``: of arrays deeper than 8 bits. Raises UserError on anything else.
    """
    if isinstance(source, str | Path) and not is_address(source):
        path = Path(source)
        return number_files(list_images(path), path) if path.is_dir() else number_files([path], path.parent)
    if isinstance(source, list | tuple):
        root = _common_folder(item for item in source if isinstance(item, str | Path) and not is_address(item))
        return _with_own_names([_one(item, number, root, value_range) for number, item in enumerate(source, 1)])
    return [_one(source, 1, None, value_range)]


def gather(places: Sequence[str], folder: Path | None = None) -> tuple[list[ImageSource], list[str]]:
    """The images of files, folders, addresses, or of one JSON file as ``read_image_list`` reads it, whose images lie in ``folder`` (left out:
    beside it); and what there is to say of files that were left out."""
    lists = [place for place in places if place.lower().endswith(".json")]
    if lists:
        if len(places) > 1:
            raise UserError(f"{lists[0]}: a list of images stands alone, without other places")
        path = Path(lists[0])
        return read_image_list(path, path.parent if folder is None else folder), []
    if folder is not None:
        raise UserError(f"--images {folder}: belongs to a list of images in a .json file, and {places[0]} is none")
    notes, found = [], []
    folders = [Path(place) for place in places if not is_address(place) and Path(place).is_dir()]
    for place in places:
        if is_address(place):
            found.append(place)
        elif Path(place).is_dir():
            images, others = find_images(Path(place))
            notes += [describe_others(Path(place), others)] if others else []
            found += map(str, images)
        elif Path(place).exists():
            found.append(place)
        else:
            raise UserError(f"{place}: no such file or folder")
    if not found:
        raise UserError("; ".join(_nothing_in(path) for path in folders))
    if folders and len(places) == 1:
        return number_files([Path(path) for path in found], folders[0]), notes
    return open_source(found), notes


def is_many(source: Any) -> bool:
    """Whether the answer to ``source`` is a list."""
    if isinstance(source, list | tuple):
        return True
    return isinstance(source, str | Path) and not is_address(source) and Path(source).is_dir()


def is_address(value: Any) -> bool:
    return isinstance(value, str) and value.lower().startswith(("http://", "https://"))


def find_images(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The images of a folder and its sub-folders by name, and how many files of which other kind (``.heic``, ``hidden``, ``linked folder``)
    are there. Hidden folders and links to folders are not entered."""
    found: list[Path] = []
    others: Counter[str] = Counter()
    for place, folders, names in os.walk(folder, onerror=_raise):
        for name in list(folders):
            hidden = name.startswith(".")
            if hidden or Path(place, name).is_symlink():
                folders.remove(name)
                others["hidden" if hidden else "linked folder"] += 1
        for name in names:
            path = Path(place, name)
            if name.startswith("."):
                others["hidden"] += 1
            elif path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                found.append(path)
            else:
                others[path.suffix.lower() or "without an ending"] += 1
    return sorted(found), others


def describe_others(folder: Path, others: Counter[str]) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
    return f"{folder}: {sum(others.values())} other entries are not read ({kinds})"


def list_images(folder: Path) -> list[Path]:
    """``find_images`` without the rest. Raises UserError when there is none."""
    found, _ = find_images(folder)
    if not found:
        raise UserError(_nothing_in(folder))
    return found


def _nothing_in(folder: Path) -> str:
    _, others = find_images(folder)
    kinds = ", ".join(sorted(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES))
    rest = f"; {describe_others(folder, others)}" if others else ""
    return f"{folder}: holds no image; expected files of the kinds {kinds}{rest}"


def read_image_list(path: Path, folder: Path) -> list[ImageSource]:
    """The images that a COCO file lists, as test servers give it out (``image_info``), by ascending id: annotations need not be there.

    Raises UserError with all that is wrong with the file.
    """
    with tempfile.TemporaryDirectory() as kept:
        index = open_index(path, folder=Path(kept))
        findings = Findings()
        index.report([number for number, _ in index.categories()], findings)
        findings.raise_errors(str(path))
        listed = list(zip(index.file_names, index.image_ids.tolist(), strict=True))
    if not listed:
        raise UserError(f"{path}: expected a COCO file with a list `images` of objects with `id` and `file_name`")
    return [ImageSource(folder / name, name, identity) for name, identity in listed]


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


def to_rgb(pixels: np.ndarray | Tensor, what: str, value_range: tuple[float, float] | None = None) -> Tensor:
    """(3, H, W) uint8 RGB of an array (H, W), (H, W, 1) or (H, W, 3), or of a tensor (H, W), (1, H, W) or (3, H, W).

    uint8 holds 0..255. All else is scaled from ``value_range``, or left out from 0..65535 of uint16 and 0..1 of floating point. Raises
    UserError, which begins with ``what``, for other shapes and types, and where the values do not tell their range: floats outside 0..1,
    uint16 of at most 255.
    """
    shape = tuple(pixels.shape)
    if isinstance(pixels, Tensor):
        expected = "(height, width), (1, height, width) or (3, height, width)"
        planes = pixels.shape[0] if pixels.ndim == 3 else 1
        values = (pixels.detach().float() if pixels.is_floating_point() else pixels.detach()).cpu().numpy()
        values = values[None] if values.ndim == 2 else values
    else:
        expected = "(height, width), (height, width, 1) or (height, width, 3)"
        planes = pixels.shape[2] if pixels.ndim == 3 else 1
        values = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels
    if len(shape) not in (2, 3) or planes not in (1, 3) or not values.size:
        raise UserError(f"{what}: has the shape {shape}, expected {expected}, RGB or gray")
    low, high = values.min(), values.max()
    if value_range is not None and values.dtype != np.uint8:
        values = scale_values(values, value_range, what)
    elif values.dtype == np.uint16:
        if 0 < high <= 255:
            raise UserError(
                f"{what}: is of type uint16 but holds nothing above {high}; convert it to uint8 where its values are 0..255, or to "
                "floating point divided by the largest possible value"
            )
        values = scale_values(values, (0, 65535), what)
    elif np.issubdtype(values.dtype, np.floating):
        if not (low >= 0 and high <= 1):
            raise UserError(
                f"{what}: holds values from {low:g} to {high:g}, expected 0..1 in floating point; divide it by the largest possible value"
            )
        values = scale_values(values, (0, 1), what)
    elif values.dtype != np.uint8:
        raise UserError(
            f"{what}: is of type {values.dtype}, which does not tell the range of its values; expected uint8, uint16 or floating point in 0..1"
        )
    return torch.from_numpy(np.ascontiguousarray(np.broadcast_to(values, (3, *values.shape[1:]))).copy())


def _one(item: Any, number: int, root: Path | None, value_range: tuple[float, float] | None) -> ImageSource:
    if is_address(item):
        return ImageSource(item, _name_of(item, number), number)
    if isinstance(item, str | Path):
        path = Path(item)
        if path.is_dir():
            raise UserError(
                f"{path}: is a folder inside a list; expected image files (a folder is predicted by itself)"
            )
        name = os.path.relpath(path.absolute(), root) if root is not None else path.name
        return ImageSource(path, Path(name).as_posix(), number)
    name, what = f"image_{number:06d}.png", f"image {number}"
    if isinstance(item, Image.Image):
        upright = ImageOps.exif_transpose(item)
        deep = upright.mode.startswith("I") or upright.mode == "F"
        values = np.asarray(upright) if deep else np.array(upright.convert("RGB"))
        if values.dtype == np.int32 and values.size and values.min() >= 0 and values.max() <= 65535:
            values = values.astype(np.uint16)  # how Pillow opens some files of 16 bits
        return ImageSource(to_rgb(values, what, value_range), name, number)
    if isinstance(item, np.ndarray | Tensor):
        return ImageSource(to_rgb(item, what, value_range), name, number)
    raise UserError(
        f"{what}: is a {type(item).__name__}; expected a path, an http(s) address, an array, a tensor or a Pillow image"
    )


def _with_own_names(sources: list[ImageSource]) -> list[ImageSource]:
    """Addresses of one name get their number in front; files of one name are told apart by their folders already."""
    count = Counter(source.file_name for source in sources)
    return [
        ImageSource(source.content, f"{source.image_id:06d}_{source.file_name}", source.image_id)
        if isinstance(source.content, str) and count[source.file_name] > 1
        else source
        for source in sources
    ]


def _name_of(address: str, number: int) -> str:
    """What the address ends in, or a number where that is no name of an image."""
    try:
        name = PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(address).path)).name
    except ValueError as error:
        raise UserError(f"{address}: is no address ({error})") from None
    usable = PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES and "\\" not in name and name.isprintable()
    return name if usable else f"image_{number:06d}.png"


def _download(address: str, value_range: tuple[float, float] | None, max_pixels: int) -> Tensor:
    """Raises UserError for what does not answer, answers with something else than an image, is too large or too slow."""
    try:
        content = _fetched(address)
    except urllib.error.HTTPError as error:
        raise UserError(f"{address}: the server answers {error.code} ({error.reason}), expected an image") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{address}: cannot be fetched ({reason})") from None
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            return read_image(Path(file.name), value_range, max_pixels)
        except UserError as error:
            raise UserError(str(error).replace(file.name, address)) from None


def _fetched(address: str) -> bytes:
    request = urllib.request.Request(address, headers={"User-Agent": "tessera"})
    limit = f"more than {LARGEST_DOWNLOAD >> 20} MiB, which is the limit of an image from an address; fetch the file by itself"
    end = time.monotonic() + DOWNLOAD_SECONDS
    pieces, size = [], 0
    with urllib.request.urlopen(request, timeout=DOWNLOAD_SECONDS / 2) as answer:
        expected = answer.headers.get("Content-Length")
        if expected is not None and int(expected) > LARGEST_DOWNLOAD:
            raise UserError(f"{address}: has {limit}")
        while piece := answer.read1(1 << 20):
            pieces.append(piece)
            size += len(piece)
            if size > LARGEST_DOWNLOAD:
                raise UserError(f"{address}: has {limit}")
            if time.monotonic() > end:
                raise UserError(f"{address}: took longer than {DOWNLOAD_SECONDS:.0f} s; fetch the file by itself")
    if expected is not None and size < int(expected):
        raise UserError(f"{address}: ends after {size} of {expected} bytes; try again")
    return b"".join(pieces)


def _common_folder(paths: Iterable[str | Path]) -> Path | None:
    """Root below which files of equal name in different folders keep different names."""
    parents = [str(Path(path).absolute().parent) for path in paths]
    return Path(os.path.commonpath(parents)) if parents else None


def _raise(error: OSError) -> None:
    raise error
