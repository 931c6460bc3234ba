"""The size from the header is that of the decoded image, whatever says how to turn it."""

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tessera.files import UserError
from tessera.ops import image_size
from tessera.ops.image_size import read_image_size
from tessera.ops.images import read_image

XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8))


def exif(orientation: int) -> bytes:
    found = Image.Exif()
    found[0x0112] = orientation
    return found.tobytes()


def encoded(kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    PICTURE.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def behind_the_pixels(kind: bytes, data: bytes) -> bytes:
    plain = encoded("PNG")
    return plain[:-12] + chunk(kind, data) + plain[-12:]


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def with_segment(marker: int, data: bytes) -> bytes:
    plain = encoded("JPEG")
    return plain[:2] + segment(marker, data) + plain[2:]


def text_of(keyword: str, value: str) -> PngInfo:
    found = PngInfo()
    found.add_text(keyword, value)
    return found


def international_text_of(keyword: str, value: str) -> PngInfo:
    found = PngInfo()
    found.add_itxt(keyword, value)
    return found


def raw_profile(orientation: int) -> str:
    """As ImageMagick writes EXIF into PNG text."""
    return "\nexif\n    34\n" + exif(orientation).hex()


FROM_HEADER = {
    "png": encoded("PNG"),
    "png with other text": encoded("PNG", pnginfo=text_of("Software", "a program")),
    "png palette": encoded("PNG", bits=4),
    "jpeg": encoded("JPEG"),
    "jpeg progressive": encoded("JPEG", progressive=True),
    "jpeg with a long profile": encoded("JPEG", icc_profile=bytes(9000)),
    "jpeg with fill bytes": encoded("JPEG")[:2] + b"\xff\xff" + encoded("JPEG")[2:],
}
BY_PILLOW = {
    "png turned": encoded("PNG", exif=exif(6)),
    "png turned behind the pixels": behind_the_pixels(b"eXIf", exif(8).removeprefix(b"Exif\0\0")),
    "png turned by a raw profile": encoded("PNG", pnginfo=text_of("Raw profile type exif", raw_profile(5))),
    "png turned by xmp": encoded("PNG", pnginfo=international_text_of("XML:com.adobe.xmp", XMP)),
    "jpeg turned": encoded("JPEG", exif=exif(6)),
    "jpeg mirrored, not turned": encoded("JPEG", exif=exif(2)),
    "jpeg turned by xmp": with_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP.encode()),
    "bmp": encoded("BMP"),
    "tiff": encoded("TIFF"),
    "tiff turned": encoded("TIFF", exif=exif(6)),
    "webp turned": encoded("WEBP", exif=exif(6)),
    "ppm": encoded("PPM"),
}


@pytest.mark.parametrize("name", [*FROM_HEADER, *BY_PILLOW])
def test_equal_to_the_decoded_image(name: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes((FROM_HEADER | BY_PILLOW)[name])
    assert read_image_size(path) == tuple(read_image(path).shape[1:])


@pytest.mark.parametrize("name", FROM_HEADER)
def test_plain_files_need_no_decoder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image"
    path.write_bytes(FROM_HEADER[name])
    monkeypatch.setattr(image_size, "_pillow_size", None)
    assert read_image_size(path) == (40, 70)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damaged_headers_give_an_answer_of_pillows_or_a_clear_error(kind: str, tmp_path: Path) -> None:
    plain, dice, path = encoded(kind), random.Random(0), tmp_path / "image"
    for _ in range(150):
        broken = bytearray(plain)
        for _ in range(dice.randint(1, 4)):
            broken[dice.randrange(min(200, len(plain)))] = dice.randrange(256)
        path.write_bytes(broken[: dice.choice([len(plain), dice.randrange(len(plain))])])
        try:
            height, width = read_image_size(path)
        except UserError as error:
            assert str(path) in str(error)
        else:
            assert height > 0 and width > 0


def test_nothing_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_image_size(tmp_path / "a.png")
    (tmp_path / "empty.png").touch()
    for path in (tmp_path, tmp_path / "empty.png"):
        with pytest.raises(UserError, match="not a readable image"):
            read_image_size(path)
