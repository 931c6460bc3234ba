import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tessera.files import UserError
from tessera.ops.image_size import open_image, read_image_size
from tessera.ops.images import input_size, make_batch, padded_size, read_image, resize, test_size
from tessera.spec.schema import AugmentationSpec
from tests.ops.tiff import tiff

MEAN = (0.4, 0.5, 0.6)


def gradient(height: int = 8, width: int = 12) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 20, columns * 20, rows + columns], axis=-1).astype(np.uint8)


def rgb(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("mode", "make"),
    [
        ("rgb", lambda pixels: Image.fromarray(pixels)),
        (
            "alpha is dropped",
            lambda pixels: Image.fromarray(np.dstack([pixels, np.full(pixels.shape[:2], 7, np.uint8)])),
        ),
    ],
)
def test_colours_come_through(mode: str, make, tmp_path: Path) -> None:
    make(gradient()).save(tmp_path / "a.png")
    assert np.array_equal(rgb(read_image(tmp_path / "a.png")), gradient())


def test_gray_palette_and_one_bit(tmp_path: Path) -> None:
    gray = gradient()[..., 0]
    Image.fromarray(gray).save(tmp_path / "gray.png")
    assert np.array_equal(rgb(read_image(tmp_path / "gray.png")), np.dstack([gray] * 3))
    palette = Image.fromarray((gray % 3).astype(np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.save(tmp_path / "palette.png")
    colors = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]], np.uint8)
    assert np.array_equal(rgb(read_image(tmp_path / "palette.png")), colors[gray % 3])
    Image.fromarray(gray > 60).save(tmp_path / "bit.png")
    assert np.array_equal(rgb(read_image(tmp_path / "bit.png"))[..., 0], np.where(gray > 60, 255, 0))


def test_sixteen_bit_gray_is_scaled_to_its_range(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 4096], [32768, 65535, 1000, 12345]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.fromarray(values).save(tmp_path / "deep.tif")
    for name in ("deep.png", "deep.tif"):
        full = read_image(tmp_path / name, (0, 65535))
        assert full.dtype == torch.uint8 and np.array_equal(full[0].numpy(), np.rint(values / 257))
        sensor = read_image(tmp_path / name, (1000, 4000))[2].tolist()
        assert sensor == [[0, 0, 0, 255], [255, 255, 0, 255]]
        with pytest.raises(UserError, match=r"more than 8 bits .*values found: 0 to 65535\); set dataset\.value_range"):
            read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[-200, 0, 600]], np.int16), [[0, 64, 255]]),
        (np.array([[-200, 0, 600]], np.int32), [[0, 64, 255]]),
        (np.array([[0, 600, 4_000_000_000]], np.uint32), [[64, 255, 255]]),
        (np.array([[-200.0, 0.0, np.inf]], np.float32), [[0, 64, 255]]),
    ],
)
def test_other_deep_tiff_files(values: np.ndarray, expected: list[list[int]], tmp_path: Path) -> None:
    (tmp_path / "deep.tif").write_bytes(tiff(values))
    assert read_image(tmp_path / "deep.tif", (-200, 600))[1].tolist() == expected
    with pytest.raises(UserError, match=r"deep\.tif: has .* set dataset\.value_range"):
        read_image(tmp_path / "deep.tif")


def test_what_is_no_number_has_no_brightness(tmp_path: Path) -> None:
    (tmp_path / "deep.tif").write_bytes(tiff(np.array([[1, np.nan]], np.float32)))
    with pytest.raises(UserError, match=r"no number \(NaN\)"):
        read_image(tmp_path / "deep.tif", (0, 1))


def test_a_deep_pgm_has_the_values_of_its_file(tmp_path: Path) -> None:
    values = np.array([[0, 1000, 4095]], ">u2")
    (tmp_path / "deep.pgm").write_bytes(b"P5 3 1 4095\n" + values.tobytes())
    assert read_image(tmp_path / "deep.pgm", (0, 4095))[0].tolist() == [[0, 62, 255]]
    with pytest.raises(UserError, match="values found: 0 to 4095"):
        read_image(tmp_path / "deep.pgm")
    (tmp_path / "deep.ppm").write_bytes(b"P6 1 1 4095\n" + values.tobytes())
    with pytest.raises(UserError, match="colour PPM of more than 8 bits"):
        read_image(tmp_path / "deep.ppm", (0, 4095))


CASES: dict[str, tuple[bytes, str | None]] = {
    "gray": (tiff(np.zeros((2, 3), np.uint8)), None),
    "colours": (tiff(np.zeros((2, 3, 3), np.uint8)), None),
    "alpha": (tiff(np.zeros((2, 3, 4), np.uint8), extra=[2]), None),
    "gray and alpha": (tiff(np.zeros((2, 3, 2), np.uint8), colours=1, extra=[2]), None),
    "smaller versions": (tiff(np.zeros((4, 6), np.uint8), np.zeros((2, 3), np.uint8), kinds=[0, 1]), None),
    "near infrared": (tiff(np.zeros((2, 3, 4), np.uint8), extra=[0]), "has 4 bands beside alpha, of which 3 would be"),
    "fourth band unsaid": (tiff(np.zeros((2, 3, 4), np.uint8)), "has 4 bands beside alpha, of which 3 would be used"),
    "five bands": (tiff(np.zeros((2, 3, 5), np.uint8), extra=[0, 0]), "has 5 bands beside alpha, of which 3"),
    "two gray bands": (
        tiff(np.zeros((2, 3, 2), np.uint8), colours=1, extra=[0]),
        "has 2 bands beside alpha, of which 1",
    ),
    "pages": (tiff(*[np.zeros((2, 3), np.uint8)] * 4), "has 4 pages or frames, of which the first would be used"),
    "deep colours": (tiff(np.zeros((2, 3, 3), np.uint16)), "is a colour TIFF of 16 bits per channel"),
}


@pytest.mark.parametrize("name", CASES)
def test_no_band_or_page_is_dropped_without_a_word(name: str, tmp_path: Path) -> None:
    content, message = CASES[name]
    (tmp_path / "a.tif").write_bytes(content)
    if message is None:
        assert read_image(tmp_path / "a.tif").shape[0] == 3
        return
    with pytest.raises(UserError, match=rf"a\.tif: {message}"):
        read_image(tmp_path / "a.tif", (0, 1))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_so_are_frames(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind.lower()}"
    frames = [Image.fromarray(gradient() + np.uint8(number * 9)) for number in range(3)]
    frames[0].save(path, kind, save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="has 3 pages or frames, of which the first would be used"):
        read_image(path)
    frames[0].save(path, kind)
    read_image(path)


def test_the_number_of_pixels_has_a_limit_that_a_key_lifts(tmp_path: Path) -> None:
    Image.new("L", (14_000, 13_000)).save(tmp_path / "large.png", compress_level=1)
    with pytest.raises(UserError, match=r"has 14000x13000 pixels, more than dataset\.max_pixels, which is 178956970"):
        read_image(tmp_path / "large.png")
    with open_image(tmp_path / "large.png", 182_000_000) as image:
        assert image.size == (14_000, 13_000)
    Image.new("L", (30, 20)).save(tmp_path / "small.tif")
    for read in (lambda path: read_image(path, None, 599), lambda path: read_image_size(path, 599)):
        with pytest.raises(UserError, match="has 30x20 pixels, more than"):
            read(tmp_path / "small.tif")


def test_sixteen_bit_colour(tmp_path: Path) -> None:
    """Pillow cannot write it, so the file is made by hand."""
    values = (np.arange(2 * 3 * 3, dtype=np.uint16).reshape(2, 3, 3) * 3000).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(content)
    assert np.array_equal(rgb(read_image(tmp_path / "deep.png", (0, 65535))), np.rint(values / 257))
    with pytest.raises(UserError, match=r"values found: 0 to 51000\); set dataset\.value_range"):
        read_image(tmp_path / "deep.png")
    for orientation, turned in ((2, values[:, ::-1]), (5, values.transpose(1, 0, 2)), (6, np.rot90(values, -1))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        extra = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
        (tmp_path / "turned.png").write_bytes(content[:33] + extra + content[33:])
        assert np.array_equal(rgb(read_image(tmp_path / "turned.png", (0, 65535))), np.rint(turned / 257))
    (tmp_path / "cut.png").write_bytes(content[:-20])
    with pytest.raises(UserError, match=r"cut\.png: cannot be decoded"):
        read_image(tmp_path / "cut.png", (0, 65535))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(gradient()).save(tmp_path / "a.png", exif=exif)
    by_hand = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }[orientation](gradient())
    image = read_image(tmp_path / "a.png")
    assert np.array_equal(rgb(image), by_hand)
    assert read_image_size(tmp_path / "a.png") == tuple(image.shape[1:])


def test_broken_files_are_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:3000])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    for name in ("cut.png", "text.png", "empty.jpg", "missing.png"):
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name)
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match="floating-point"):
        read_image(tmp_path / "float.tif")


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((480, 640), (640, 2560), (640, 853)),
        ((640, 480), (640, 2560), (853, 640)),
        ((100, 1000), (640, 1280), (128, 1280)),
        ((1, 5000), (64, 128), (1, 128)),
        ((64, 64), (64, 64), (64, 64)),
    ],
)
def test_shortest_edge(size: tuple[int, int], limits: tuple[int, int], expected: tuple[int, int]) -> None:
    assert test_size(*size, *limits) == expected


def test_fixed_size_only_shrinks_what_does_not_fit() -> None:
    augmentation = AugmentationSpec(test_min_size=64, test_max_size=256)
    assert input_size(32, 48, augmentation, (96, 96)) == (64, 96)
    assert input_size(32, 96, augmentation, (96, 96)) == (32, 96)
    assert input_size(32, 48, augmentation, None) == (64, 96)
    assert padded_size([(64, 90), (70, 33)], 32) == (96, 96)
    assert padded_size([(64, 90)], 32, (128, 128)) == (128, 128)
    for height in range(1, 300, 7):
        for width in range(1, 300, 11):
            fitted = input_size(height, width, augmentation, (96, 160))
            assert 1 <= fitted[0] <= 96 and 1 <= fitted[1] <= 160


def test_make_batch_pads_with_the_mean_and_keeps_the_sizes() -> None:
    augmentation = AugmentationSpec(test_min_size=32, test_max_size=64)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((32, 40), (50, 45))]
    batch = make_batch(images, [3, 4], ["a", "b"], augmentation, MEAN)
    assert batch.images.shape == (2, 3, 64, 64) and batch.images.dtype == torch.float32
    assert [meta.original_size for meta in batch.metas] == [(32, 40), (50, 45)]
    assert [meta.resized_size for meta in batch.metas] == [(32, 40), (36, 32)]
    assert torch.equal(batch.images[0, :, :32, :40], images[0].float() / 255)
    assert torch.equal(batch.images[1, :, :36, :32], resize(images[1], (36, 32)).float() / 255)
    for index, meta in enumerate(batch.metas):
        inside = torch.zeros(64, 64, dtype=torch.bool)
        inside[: meta.resized_size[0], : meta.resized_size[1]] = True
        assert torch.equal(batch.padding[index], ~inside)
        assert torch.equal(
            batch.images[index][:, ~inside], torch.tensor(MEAN).view(3, 1).expand(3, int((~inside).sum()))
        )
    assert batch.targets is None and batch.truths is None


def test_make_batch_with_fixed_and_target_size() -> None:
    augmentation = AugmentationSpec(test_min_size=64, test_max_size=256)
    image = torch.zeros(3, 30, 90, dtype=torch.uint8)
    assert make_batch([image], [1], ["a"], augmentation, MEAN, fixed_size=(96, 128)).images.shape == (1, 3, 96, 128)
    stretched = make_batch([image], [1], ["a"], augmentation, MEAN, target_size=(40, 40))
    assert stretched.metas[0].resized_size == (64, 64) and stretched.metas[0].original_size == (30, 90)
