"""Opening images, and their sizes from a few bytes of the file. Needs no torch."""

from __future__ import annotations

import contextlib
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from tessera.files import UserError, missing, open_input
from tessera.spec.schema import MAX_PIXELS

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ``max_pixels`` decides

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
"""Lower case; what a folder of images is searched for."""

_EXIF_ORIENTATION = 0x0112
_EXIF_TRANSPOSED = (5, 6, 7, 8)
_PILLOW_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    LookupError,
    ArithmeticError,
    struct.error,
    zlib.error,
)
"""Damaged headers lead to any of these."""
_BANDS, _EXTRA_BANDS, _COLOURS, _KIND_OF_PAGE = 277, 338, 262, 254
"""Tags of TIFF."""
_BANDS_OF = {0: 1, 1: 1, 3: 1, 5: 4}
"""Bands by what TIFF says of colours, where they are not three: gray, palette, CMYK."""
_ALPHA = (1, 2)
_REDUCED_OR_MASK = 1 | 4
_MANY_PAGES = ("TIFF", "GIF", "PNG", "WEBP", "AVIF")
"""Formats in which further pages are content; what cameras put behind the picture of a JPEG is the same picture in small."""

_HEAD = 2048
"""Bytes that are read first; most headers end before."""
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_METADATA = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""Keywords of text chunks that may hold an orientation."""
_JPEG = b"\xff\xd8\xff"
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_APP1, _JPEG_SCAN = 0xE1, 0xDA


@contextlib.contextmanager
def open_image(path: Path, max_pixels: int = MAX_PIXELS) -> Iterator[ImageFile]:
    """A Pillow image; every way in which Pillow gives up, also while decoding inside the block, becomes a UserError.

    So do more than ``max_pixels`` (``dataset.max_pixels``), further pages, and bands beyond colours and alpha, which nobody would see.
    """
    # Pillow has one limit for the whole process. It is raised so that ours decides, and never lowered.
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        stream = open_input(path)
    except FileNotFoundError:
        raise UserError(f"{missing(path)}; expected an image") from None
    except OSError as error:
        raise UserError(f"{path}: is not a readable image ({error.strerror})") from None
    with stream:
        try:
            image = Image.open(stream)
        except Image.DecompressionBombError as error:
            pixels = re.search(r"[0-9]+", str(error))
            raise _too_large(path, pixels[0] if pixels else "too many", max_pixels) from None
        except _PILLOW_ERRORS as error:
            raise UserError(f"{path}: is not a readable image ({error})") from None
        try:
            with image:
                if image.width * image.height > max_pixels:
                    raise _too_large(path, f"{image.width}x{image.height}", max_pixels)
                _require_plain(image, path)
                yield image
        except _PILLOW_ERRORS as error:
            raise UserError(f"{path}: cannot be decoded ({error}); is the file cut off?") from None


def _too_large(path: Path, pixels: str, max_pixels: int) -> UserError:
    return UserError(
        f"{path}: has {pixels} pixels, more than dataset.max_pixels, which is {max_pixels}; if the file is what it should be, raise that key"
    )


def _require_plain(image: ImageFile, path: Path) -> None:
    pages = getattr(image, "n_frames", 1) if image.format in _MANY_PAGES else 1
    if not isinstance(image, TiffImageFile):
        reduced = 0
    else:
        # Smaller versions of the first page, and masks of it, may follow.
        reduced = sum(_is_reduced(image, page) for page in range(1, pages))
        image.seek(0)
        extra = image.tag_v2.get(_EXTRA_BANDS, ())
        bands = image.tag_v2.get(_BANDS, 1) - sum(kind in _ALPHA for kind in extra)
        used = _BANDS_OF.get(image.tag_v2.get(_COLOURS, 2), 3)
        if bands != used:
            raise UserError(
                f"{path}: has {bands} bands beside alpha, of which {used} would be used; expected {used}. Models take three channels: choose the "
                "bands, and save them as an image of three"
            )
    if pages - reduced > 1:
        raise UserError(
            f"{path}: has {pages - reduced} pages or frames, of which the first would be used; expected one. Models take three channels of one "
            "picture: save each page, or three of them as bands, as a file of its own"
        )


def _is_reduced(image: TiffImageFile, page: int) -> bool:
    image.seek(page)
    return bool(image.tag_v2.get(_KIND_OF_PAGE, 0) & _REDUCED_OR_MASK)


def read_image_size(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) after EXIF orientation.

    Of PNG and JPEG files that hold no orientation, from their headers alone. Pillow answers for all others, and decodes a PNG for it.
    """
    return _header_size(path) or _pillow_size(path, max_pixels)


def _pillow_size(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    with open_image(path, max_pixels) as image:
        width, height = image.size
        # Of a TIFF file Pillow states the size as displayed already.
        if image.format != "TIFF" and image.getexif().get(_EXIF_ORIENTATION) in _EXIF_TRANSPOSED:
            width, height = height, width
    return height, width


def _header_size(path: Path) -> tuple[int, int] | None:
    """None where the file is of another kind, damaged, or may hold an orientation."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        file = _Bytes(handle)
        head = file.at(0, 8)
        if head == _PNG:
            return _png_size(file)
        return _jpeg_size(file) if head.startswith(_JPEG) else None
    except (OSError, ValueError, struct.error):
        return None
    finally:
        os.close(handle)


class _Bytes:
    """A file by position; its head is read once."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._head = os.pread(handle, _HEAD, 0)

    def at(self, position: int, count: int) -> bytes:
        """Fewer than ``count`` at the end of the file."""
        if position + count <= len(self._head):
            return self._head[position : position + count]
        return os.pread(self._handle, count, position)


def _png_size(file: _Bytes) -> tuple[int, int] | None:
    """Walks all chunks: an orientation may stand behind the pixels."""
    kind, width, height = struct.unpack(">4sII", file.at(12, 12))
    if kind != b"IHDR" or width == 0 or height == 0:
        return None
    position = 8
    while kind != b"IEND":
        length, kind = struct.unpack(">I4s", file.at(position, 8))
        if kind == b"eXIf":
            return None
        if kind in (b"tEXt", b"zTXt", b"iTXt") and file.at(position + 8, 24).startswith(_PNG_METADATA):
            return None
        position += length + 12
    return height, width


def _jpeg_size(file: _Bytes) -> tuple[int, int] | None:
    """Walks the segments up to the first scan; APP1 holds EXIF or XMP."""
    position, size = 2, None
    while True:
        prefix, marker = file.at(position, 2)
        if prefix != 0xFF or marker == _JPEG_APP1:
            return None
        if marker == 0xFF:
            position += 1
            continue
        if marker == _JPEG_SCAN:
            return size
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack(">HH", file.at(position + 5, 4))
            if size is not None or height == 0 or width == 0:
                return None
            size = (height, width)
        (length,) = struct.unpack(">H", file.at(position + 2, 2))
        position += length + 2
