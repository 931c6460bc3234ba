"""A picture to draw on: translucent masks, contours, boxes and labels that stay legible on any background."""

from __future__ import annotations

import functools
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor

Color = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

SMALLEST_SIDE = 480
"""Smaller images are enlarged by a whole factor, to a longer side of at most twice this, so that names can be read."""


class Canvas:
    """Masks, boxes and points are given in pixels of the image; the canvas may be larger by a whole ``factor``."""

    def __init__(self, image: Tensor, outline: int | None = None) -> None:
        """``image``: (3, H, W) uint8. ``outline``: width of boxes and contours in pixels of the canvas; None for one that suits its size."""
        height, width = image.shape[-2:]
        self.factor = max(1, min(-(-SMALLEST_SIDE // min(height, width)), 2 * SMALLEST_SIDE // max(height, width)))
        picture = Image.fromarray(image.cpu().permute(1, 2, 0).contiguous().numpy())
        if self.factor > 1:
            picture = picture.resize((width * self.factor, height * self.factor), Image.Resampling.BICUBIC)
        self.pixels = np.array(picture)
        short = min(self.pixels.shape[:2])
        self.stroke = outline or max(1, round(short / 360))
        self.font_size = max(11, round(short / 44))
        self._boxes: list[tuple[Rectangle, Color]] = []
        self._labels: list[tuple[list[tuple[float, float]], str, Color]] = []

    def mask(self, mask: Tensor, color: Color, opacity: float) -> None:
        """(H, W) bool: filled translucently, its contour opaque."""
        found = _crop(mask.cpu().numpy().astype(bool))
        if found is None:
            return
        top, left, small = found
        large = _enlarge(small, self.factor)
        rows = slice(top * self.factor, top * self.factor + large.shape[0])
        columns = slice(left * self.factor, left * self.factor + large.shape[1])
        view = self.pixels[rows, columns]
        inner = ndimage.binary_erosion(large, iterations=self.stroke, border_value=0)
        paint = np.array(color, np.float32)
        view[large] = np.rint(view[large] * (1 - opacity) + paint * opacity).astype(np.uint8)
        view[large & ~inner] = color

    def box(self, box: list[float], color: Color) -> None:
        """(x1, y1, x2, y2), drawn above all masks."""
        x1, y1, x2, y2 = (value * self.factor for value in box)
        self._boxes.append(((x1, y1, x2, y2), color))

    def label_box(self, box: list[float], text: str, color: Color) -> None:
        """Beside the box, where it hides the least; above all masks and boxes. Left out in a crowd without room for it."""
        x1, y1, x2, y2 = (value * self.factor for value in box)
        width, height = self._measure(text)
        left, right = x1, x2 - width
        above, below = y1 - height, y2
        beside = [(x1 - width, y1), (x2, y1), (x1 - width, y2 - height), (x2, y2 - height)]
        places = [
            (left, above),
            (right, above),
            (left, below),
            (right, below),
            *beside,
            (left, y1),
            (left, y2 - height),
        ]
        self._labels.append((places, text, color))

    def label_mask(self, mask: Tensor, text: str, color: Color) -> None:
        """In the middle of the mask's widest place; left out where the mask is too small to carry it."""
        found = _crop(mask.cpu().numpy().astype(bool))
        if found is None:
            return
        top, left, small = found
        step = max(1, min(small.shape) // 128)
        distance = ndimage.distance_transform_edt(np.pad(small[::step, ::step], 1))
        y, x = np.unravel_index(int(distance.argmax()), distance.shape)
        radius = float(distance[y, x]) * step * self.factor
        width, height = self._measure(text)
        if radius < 0.7 * height:
            return
        center_x = (left + (int(x) - 0.5) * step) * self.factor
        center_y = (top + (int(y) - 0.5) * step) * self.factor
        shifts = (0.0, -1.1 * height, 1.1 * height)
        places = [(center_x - width / 2, center_y - height / 2 + shift) for shift in shifts]
        self._labels.append((places, text, color))

    def finish(self) -> Image.Image:
        picture = Image.fromarray(self.pixels)
        draw = ImageDraw.Draw(picture)
        for (x1, y1, x2, y2), color in self._boxes:
            corners = (round(x1), round(y1), max(round(x1), round(x2) - 1), max(round(y1), round(y2) - 1))
            draw.rectangle(corners, outline=color, width=self.stroke)
        taken: list[Rectangle] = []
        # The first given are the most certain and are drawn last, on top; they choose their place first.
        placed = []
        for places, text, color in self._labels:
            spot = self._place(places, self._measure(text), taken)
            if sum(_overlap(spot, other) for other in taken) > 0.3 * _area(spot):
                continue
            taken.append(spot)
            placed.append((spot, text, color))
        for (x1, y1, x2, y2), text, color in reversed(placed):
            draw.rounded_rectangle((x1, y1, x2, y2), radius=self.font_size * 0.25, fill=color)
            draw.text(
                ((x1 + x2) / 2, (y1 + y2) / 2),
                text,
                font=font(self.font_size),
                fill=text_color(color),
                anchor="mm",
            )
        return picture

    def _measure(self, text: str) -> tuple[float, float]:
        return font(self.font_size).getlength(text) + 0.7 * self.font_size, 1.35 * self.font_size

    def _place(self, places: list[tuple[float, float]], size: tuple[float, float], taken: list[Rectangle]) -> Rectangle:
        """The first of the places, moved into the picture, that hide the fewest labels and the least of small objects."""
        bottom, right = self.pixels.shape[0] - 1, self.pixels.shape[1] - 1
        spots = []
        for x, y in places:
            left = min(max(0.0, x), max(0.0, right - size[0]))
            top = min(max(0.0, y), max(0.0, bottom - size[1]))
            spots.append((left, top, left + size[0], top + size[1]))
        area = size[0] * size[1]

        def hidden(spot: Rectangle) -> float:
            labels = sum(_overlap(spot, other) for other in taken)
            objects = sum(_overlap(spot, box) * min(1.0, area / max(1.0, _area(box))) for box, _ in self._boxes)
            return 4 * labels + objects

        return min(spots, key=lambda spot: round(hidden(spot) / area, 1))


def text_color(background: Color) -> Color:
    """Near-black or white, whichever contrasts more (WCAG relative luminance)."""
    channels = [value / 255 for value in background]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (17, 17, 17) if luminance > 0.18 else (255, 255, 255)


def shade(color: Color, number: int) -> Color:
    """Variants of a class's colour that tell its objects apart: the colour itself, lighter, darker, and so on."""
    amount = (0.0, 0.3, -0.2, 0.45, 0.15, -0.3)[number % 6]
    target = 255 if amount > 0 else 0
    red, green, blue = (round(value + (target - value) * abs(amount)) for value in color)
    return red, green, blue


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib ships DejaVu Sans, which has most alphabets."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf", size)


def largest_part(mask: Tensor) -> Tensor:
    """(H, W) bool: its largest connected part."""
    parts, count = ndimage.label(mask.cpu().numpy())
    if count < 2:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return torch.from_numpy(parts == sizes.argmax())


def _crop(mask: np.ndarray) -> tuple[int, int, np.ndarray] | None:
    """Top, left and the tight part of the mask; None for an empty one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return None
    return int(rows[0]), int(columns[0]), mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _enlarge(mask: np.ndarray, factor: int) -> np.ndarray:
    """By a whole factor, with smooth edges."""
    if factor == 1:
        return mask
    size = (mask.shape[1] * factor, mask.shape[0] * factor)
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)) > 127


def _area(rectangle: Rectangle) -> float:
    return (rectangle[2] - rectangle[0]) * (rectangle[3] - rectangle[1])


def _overlap(a: Rectangle, b: Rectangle) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
