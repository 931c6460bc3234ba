"""Generated scenes, written at once in every supported format: the data set that needs neither network nor licence.

A scene has four kinds of things (disc, square, triangle, cross), each with a shape and a colour of its own, before three kinds of
stuff (sky, grass, road). Things may hide each other in part; masks show what is visible. The horizon is one row of unlabeled pixels.
Every scene depends on (seed, split, index) alone.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.progress import Progress

from tessera.files import atomic_folder, digest_file, encoded, write_json, write_text
from tessera.ops.masks import mask_to_box
from tessera.ops.rle import encode_masks
from tessera.spec.schema import DemoSpec
from tessera.structures import Category, ClassCatalog

CATALOG = ClassCatalog(
    (
        Category(1, "disc", (220, 40, 40), True),
        Category(2, "square", (240, 200, 40), True),
        Category(3, "triangle", (170, 60, 200), True),
        Category(4, "cross", (30, 190, 200), True),
        Category(5, "sky", (160, 190, 225), False),
        Category(6, "grass", (60, 140, 60), False),
        Category(7, "road", (110, 110, 110), False),
    )
)
SPLITS = ("train", "val", "test")

_HUES = {1: (-0.03, 0.02), 2: (0.12, 0.16), 3: (0.76, 0.84), 4: (0.48, 0.52)}
_SKY, _GRASS, _ROAD = 5, 6, 7
_DIAMETER = (0.24, 0.40)
_TILT = math.radians(15)
_LEAST_VISIBLE = 0.5
_PLACING_TRIES = 10
_COMPRESS_LEVEL = 6


@dataclass(frozen=True)
class Thing:
    category: int
    """Dataset id."""
    visible: npt.NDArray[np.bool_]
    """(H, W)."""
    hidden: bool
    """Another thing covers a part of it."""


@dataclass(frozen=True)
class Scene:
    image: npt.NDArray[np.uint8]
    """(H, W, 3) RGB."""
    semantic: npt.NDArray[np.uint8]
    """(H, W) dataset ids, 0 where unlabeled."""
    things: list[Thing]
    """Back to front."""


class _Dice:
    """Draws from the raw counter stream, which numpy promises to keep; its distributions carry no such promise."""

    def __init__(self, seed: int, split: int, index: int) -> None:
        self._bits = np.random.Philox(
            key=np.array([seed, split], np.uint64), counter=np.array([0, 0, index, 0], np.uint64)
        )

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def whole(self, low: int, high: int) -> int:
        """low..high, both included."""
        return low + int(self.uniform(0, 1) * (high - low + 1))

    def noise(self, *shape: int) -> npt.NDArray[np.float64]:
        """Uniform in [-1, 1)."""
        count = math.prod(shape)
        raw = self._bits.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count]
        return raw.reshape(shape) / 128.0 - 1.0


def generate_scene(spec: DemoSpec, split: str, index: int) -> Scene:
    dice = _Dice(spec.seed, SPLITS.index(split), index)
    image, semantic = _background(dice, spec.height, spec.width)
    placed: list[tuple[int, npt.NDArray[np.bool_]]] = []
    for _ in range(dice.whole(1, spec.max_objects)):
        category = dice.whole(1, 4)
        found = _place(dice, category, spec.height, spec.width, [whole for _, whole in placed])
        if found is None:
            continue
        shape, inner = found
        placed.append((category, shape))
        low, high = _HUES[category]
        color = colorsys.hsv_to_rgb(dice.uniform(low, high) % 1, dice.uniform(0.75, 0.95), dice.uniform(0.75, 1.0))
        texture = np.array(color) * 255 + 8 * dice.noise(spec.height, spec.width, 1)
        # The darker rim tells two things of one class apart where they overlap.
        image[shape] = (texture * np.where(inner, 1.0, 0.6)[..., None])[shape]
        semantic[shape] = category
    things = [
        Thing(category, visible, bool(visible.sum() < whole.sum()))
        for (category, whole), visible in zip(placed, _visible([whole for _, whole in placed]), strict=True)
    ]
    return Scene(np.clip(image, 0, 255).astype(np.uint8), semantic, things)


def write_demo(root: Path, spec: DemoSpec, progress: bool = True) -> dict[str, Any]:
    """Writes the folder ``root`` whole or not at all and returns its manifest (``counts`` per split, sha256 of each of ``files``).

    Per split: ``images/<split>/*.png``; ``panoptic_<split>.json`` with ``panoptic/<split>/*.png`` (COCO panoptic);
    ``instances_<split>.json`` (COCO instances, compressed RLE); ``<split>.jsonl`` with ``masks/<split>/*.png`` (image and mask pairs);
    ``labels/<split>/*.txt`` (KITTI, 15 columns). Beside them ``label_map.json`` and ``manifest.json``.
    """
    sizes = {"train": spec.train_images, "val": spec.val_images, "test": spec.test_images}
    with atomic_folder(root) as folder, Progress(disable=not progress) as bar:
        write_json(folder / "label_map.json", CATALOG.to_json())
        task = bar.add_task("demo scenes", total=sum(sizes.values()))
        counts = {}
        for split, size in sizes.items():
            writer = _SplitWriter(folder, split)
            for index in range(size):
                writer.add(generate_scene(spec, split, index), index)
                bar.advance(task)
            counts[split] = writer.finish()
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        manifest = {
            "generator": spec.model_dump(mode="json"),
            "counts": counts,
            "files": {path.relative_to(folder).as_posix(): digest_file(path) for path in files},
        }
        write_json(folder / "manifest.json", manifest)
    return manifest


class _SplitWriter:
    def __init__(self, folder: Path, split: str) -> None:
        self.folder = folder
        self.split = split
        self.images: list[dict[str, Any]] = []
        self.instances: list[dict[str, Any]] = []
        self.panoptic: list[dict[str, Any]] = []
        self.pairs: list[str] = []
        self.totals = {category.name: 0 for category in CATALOG.categories}
        for kind in ("images", "panoptic", "masks", "labels"):
            (folder / kind / split).mkdir(parents=True)

    def add(self, scene: Scene, index: int) -> None:
        stem = f"{self.split}_{index:05d}"
        height, width = scene.semantic.shape
        # Ids are unique over the splits, so that a mix-up of splits shows itself.
        image_id = SPLITS.index(self.split) * 100_000 + index + 1
        self.images.append({"id": image_id, "file_name": f"{stem}.png", "width": width, "height": height})
        _save(scene.image, self.folder / "images" / self.split / f"{stem}.png")
        _save(scene.semantic, self.folder / "masks" / self.split / f"{stem}.png")
        self.pairs.append(f'{{"img": "images/{self.split}/{stem}.png", "segm": "masks/{self.split}/{stem}.png"}}\n')

        ids = np.zeros((height, width), np.int64)
        segments = []
        labels = []
        for category in (_SKY, _GRASS, _ROAD):
            visible = scene.semantic == category
            if visible.any():
                ids[visible] = category * 1000
                segments.append(_segment(category * 1000, category, visible))
        for number, thing in enumerate(scene.things, 1):
            ids[thing.visible] = thing.category * 1000 + number
            segment = _segment(thing.category * 1000 + number, thing.category, thing.visible)
            segments.append(segment)
            self.instances.append(
                {
                    **segment,
                    "id": len(self.instances) + 1,
                    "image_id": image_id,
                    "segmentation": encode_masks(thing.visible[None])[0],
                }
            )
            labels.append(_kitti_row(thing, segment["bbox"]))
        for segment in segments:
            self.totals[CATALOG.categories[segment["category_id"] - 1].name] += 1
        colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
        _save(colors, self.folder / "panoptic" / self.split / f"{stem}.png")
        self.panoptic.append({"image_id": image_id, "file_name": f"{stem}.png", "segments_info": segments})
        (self.folder / "labels" / self.split / f"{stem}.txt").write_text("".join(labels))

    def finish(self) -> dict[str, Any]:
        """Writes the annotation files; gives the number of images and of segments per class."""
        categories = CATALOG.to_json()
        things = CATALOG.things().to_json()
        for name, records, listed in (
            ("panoptic", self.panoptic, categories),
            ("instances", self.instances, things),
        ):
            content = {"images": self.images, "annotations": records, "categories": listed}
            write_json(self.folder / f"{name}_{self.split}.json", content)
        write_text(self.folder / f"{self.split}.jsonl", "".join(self.pairs))
        return {"images": len(self.images), "segments": self.totals}


def _background(dice: _Dice, height: int, width: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8]]:
    rows, columns = np.mgrid[:height, :width]
    horizon = int(height * dice.uniform(0.3, 0.5))
    sky = rows < horizon
    depth = (rows - horizon) / max(1, height - horizon)
    near, far = dice.uniform(0.2, 0.7) * width, dice.uniform(0.3, 0.7) * width
    half = (0.04 + dice.uniform(0.14, 0.24) * depth) * width
    road = ~sky & (np.abs(columns - (far + (near - far) * depth)) <= half)

    noise = dice.noise(height, width, 1)
    image = np.array([60.0, 140.0, 60.0]) + 35 * noise
    image[road] = (np.array([110.0, 110.0, 112.0]) + 8 * noise)[road]
    height_above = (1 - rows / max(1, horizon))[..., None]
    image[sky] = (np.array([200.0, 215.0, 235.0]) + height_above * np.array([-80.0, -50.0, 0.0]) + 2 * noise)[sky]

    semantic = np.full((height, width), _GRASS, np.uint8)
    semantic[road] = _ROAD
    semantic[sky] = _SKY
    semantic[horizon] = 0
    return image, semantic


def _place(
    dice: _Dice, category: int, height: int, width: int, before: list[npt.NDArray[np.bool_]]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]] | None:
    """A shape (H, W) and its inner part, inside the image; every earlier one stays visible by half. None when there is no room."""
    for _ in range(_PLACING_TRIES):
        radius = dice.uniform(*_DIAMETER) * min(height, width) / 2
        center_x = dice.uniform(radius, width - radius)
        center_y = dice.uniform(radius, height - radius)
        tilt = dice.uniform(-_TILT, _TILT)
        shape = _shape(category, height, width, center_x, center_y, radius, tilt)
        together = [*before, shape]
        seen = zip(_visible(together), together, strict=True)
        if all(visible.sum() >= _LEAST_VISIBLE * whole.sum() for visible, whole in seen):
            return shape, _shape(category, height, width, center_x, center_y, 0.88 * radius, tilt)
    return None


def _shape(
    category: int, height: int, width: int, center_x: float, center_y: float, radius: float, tilt: float
) -> npt.NDArray[np.bool_]:
    rows, columns = np.mgrid[:height, :width]
    x = (columns + 0.5 - center_x) / radius
    y = (rows + 0.5 - center_y) / radius
    u = np.cos(tilt) * x + np.sin(tilt) * y
    v = np.cos(tilt) * y - np.sin(tilt) * x
    inside: npt.NDArray[np.bool_]
    if category == 1:
        inside = u * u + v * v <= 0.9
    elif category == 2:
        inside = np.maximum(np.abs(u), np.abs(v)) <= 0.75
    elif category == 3:
        inside = (v <= 0.7) & (np.abs(u) <= 0.55 * (v + 1))
    else:
        inside = (np.minimum(np.abs(u), np.abs(v)) <= 0.28) & (np.maximum(np.abs(u), np.abs(v)) <= 0.92)
    return inside


def _visible(shapes: list[npt.NDArray[np.bool_]]) -> list[npt.NDArray[np.bool_]]:
    """What later shapes leave of each."""
    return [
        shape & ~np.logical_or.reduce(shapes[number + 1 :]) if number + 1 < len(shapes) else shape
        for number, shape in enumerate(shapes)
    ]


def _segment(identity: int, category: int, visible: npt.NDArray[np.bool_]) -> dict[str, Any]:
    x1, y1, x2, y2 = mask_to_box(visible)
    return {
        "id": identity,
        "category_id": category,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": int(visible.sum()),
        "iscrowd": 0,
    }


def _kitti_row(thing: Thing, bbox: list[int]) -> str:
    """type, truncated, occluded, alpha, box (left, top, right, bottom), and seven 3-D columns that are zero."""
    x, y, width, height = bbox
    name = CATALOG.categories[thing.category - 1].name
    return f"{name} 0.00 {int(thing.hidden)} 0.00 {x:.2f} {y:.2f} {x + width:.2f} {y + height:.2f}{' 0.00' * 7}\n"


def _save(pixels: npt.NDArray[np.uint8], path: Path) -> None:
    path.write_bytes(encoded(Image.fromarray(pixels), path.suffix, compress_level=_COMPRESS_LEVEL))
