"""Opening images, and their sizes from a few bytes of the file. Needs no torch."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from tessera.files import UserError, open_input

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
"""Lower case; what a folder of images is searched for."""

_EXIF_ORIENTATION = 0x0112
_EXIF_TRANSPOSED = (5, 6, 7, 8)
_PILLOW_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)

_HEAD = 2048
"""Bytes that are read first; most headers end before."""
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_METADATA = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""Keywords of text chunks that may hold an orientation."""
_JPEG = b"\xff\xd8\xff"
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_APP1, _JPEG_SCAN = 0xE1, 0xDA


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """A Pillow image; every way in which Pillow gives up, also while decoding inside the block, becomes a UserError."""
    try:
        stream = open_input(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected an image") from None
    except OSError as error:
        raise UserError(f"{path}: is not a readable image ({error.strerror})") from None
    with stream:
        try:
            image = Image.open(stream)
        except _PILLOW_ERRORS as error:
            raise UserError(f"{path}: is not a readable image ({error})") from None
        try:
            with image:
                yield image
        except _PILLOW_ERRORS as error:
            raise UserError(f"{path}: cannot be decoded ({error}); is the file cut off?") from None


def read_image_size(path: Path) -> tuple[int, int]:
    """(height, width) after EXIF orientation.

    Of PNG and JPEG files that hold no orientation, from their headers alone. Pillow answers for all others, and decodes a PNG for it.
    """
    return _header_size(path) or _pillow_size(path)


def _pillow_size(path: Path) -> tuple[int, int]:
    with open_image(path) as image:
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
