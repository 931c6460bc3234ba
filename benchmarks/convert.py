"""KITTI folders to COCO shards: images per second beside a straightforward script, and peak memory from 10 thousand to 1 million labels.

    python benchmarks/convert.py --speed
    python benchmarks/convert.py --memory
    python benchmarks/convert.py --planning
    python benchmarks/convert.py --open

Inputs are written to a temporary folder: every image is a hard link to one file. Each measurement is a process of its own. Peak memory is the
largest resident set that the kernel counted.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from tessera.interop.kitti import convert_dataset
from tessera.spec.digests import folder_digest, names_digest
from tessera.spec.lineage import data_digest
from tessera.spec.schema import ConvertSpec, DatasetSpec, SplitSpec

CLASSES = ("Car", "Van", "Pedestrian", "Cyclist", "DontCare")
MAPPING = {"car": "vehicle", "van": "vehicle", "pedestrian": "person", "cyclist": "cyclist"}
DATASET = DatasetSpec(name="kitti", type="coco", convert=ConvertSpec(input_source=["kitti"], mapping_path="map.json"))
LINKS = 60_000
"""Hard links to one file; ext4 allows 65 000."""


def write(images: int, labels: int, size: tuple[int, int]) -> None:
    """Below raw/kitti, ``labels`` to an image; ``size`` (width, height) of PNG files whose pixels compress as badly as those of photos."""
    for kind in ("images", "labels"):
        Path(f"raw/kitti/{kind}").mkdir(parents=True)
    Path("raw/map.json").write_text(json.dumps(MAPPING))
    noise = np.random.default_rng(0).integers(0, 24, (size[1], size[0], 3), np.uint8)
    dice = random.Random(0)
    for number in range(images):
        if number % LINKS == 0:
            Image.fromarray(noise).save(f"{number}.png")
        os.link(f"{number - number % LINKS}.png", f"raw/kitti/images/{number:07d}.png")
        rows = []
        for _ in range(labels):
            x, y = dice.uniform(0, size[0] - 2), dice.uniform(0, size[1] - 2)
            corners = f"{x:.2f} {y:.2f} {dice.uniform(x + 1, size[0]):.2f} {dice.uniform(y + 1, size[1]):.2f}"
            rows.append(f"{dice.choice(CLASSES)} 0.00 0 -1.57 {corners} 1.50 1.60 3.90 -0.70 1.80 12.30 -1.60\n")
        Path(f"raw/kitti/labels/{number:07d}.txt").write_text("".join(rows))


def ours(processes: int = 1) -> None:
    convert_dataset(DATASET, "raw", processes, progress=False)


def peer() -> None:
    """As conversion scripts usually are, TAO's among them: every image decoded for its size after EXIF, everything in lists, one dump."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    names = sorted(set(MAPPING.values()))
    for image_id, path in enumerate(sorted(Path("raw/kitti/images").iterdir()), 1):
        image = ImageOps.exif_transpose(Image.open(path))
        images.append({"id": image_id, "file_name": path.name, "width": image.width, "height": image.height})
        for line in Path(f"raw/kitti/labels/{path.stem}.txt").read_text().splitlines():
            columns = line.split()
            name = MAPPING.get(columns[0].lower())
            x1, y1, x2, y2 = map(float, columns[4:8])
            if name is None or x2 <= x1 or y2 <= y1:
                continue
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": names.index(name) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    with Path("peer.json").open("w") as stream:
        json.dump({"images": images, "annotations": annotations, "categories": categories}, stream)


def measured(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds and peak MiB of a process that does nothing else."""
    context = get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_measure, args=(work, results))
    process.start()
    process.join()
    seconds, peak = results.get()
    return seconds, peak


def _measure(work: Callable[[], None], results: object) -> None:
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    results.put((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))  # type: ignore[attr-defined]  # a queue of a context


def in_folder(work: Callable[[], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        before = Path.cwd()
        os.chdir(folder)
        try:
            work()
        finally:
            os.chdir(before)


def speed(images: int, size: tuple[int, int]) -> None:
    write(images, 10, size)
    measured(ours)  # Both read from the page cache.
    print("| | seconds | images per second |\n| --- | --- | --- |")
    for name, work in (("tessera, one process", ours), ("straightforward script", peer)):
        seconds, _ = measured(work)
        print(f"| {name} | {seconds:.2f} | {images / seconds:.0f} |", flush=True)


def memory(images: int) -> None:
    write(images, 10, (64, 48))
    cells = [measured(work) for work in (ours, peer)]
    shown = " | ".join(f"{seconds:.1f} s, {peak:.0f} MiB" for seconds, peak in cells)
    print(f"| {images:,} | {10 * images:,} | {shown} |", flush=True)


def planning() -> None:
    write(100_000, 10, (64, 48))
    time.sleep(3)  # What changed just now is not remembered.
    for when in ("first", "second"):
        start = time.perf_counter()
        data_digest(DATASET, "raw")
        print(f"{when} time: {time.perf_counter() - start:.2f} s", flush=True)
        folder_digest.cache_clear()
        names_digest.cache_clear()


def read(shards: int) -> None:
    from tessera.data.catalog import load_catalog  # brings torch, which would count in every other row
    from tessera.data.datasets import open_dataset

    split = SplitSpec(images=".", annotations="kitti/converted/shards/train-*.json")
    dataset = DATASET.model_copy(update={"train": split})
    start = time.perf_counter()
    catalog = load_catalog(dataset, "raw", "detection")
    images = len(open_dataset(dataset, "train", catalog, "detection", "raw"))
    print(f"{shards} shards, {images} images: open in {time.perf_counter() - start:.2f} s", flush=True)


def opening() -> None:
    """Twice each: the first time makes the indices."""
    write(100_000, 10, (64, 48))
    for shards in (8, 1_000):
        convert = DATASET.convert.model_copy(update={"num_shards": shards})  # type: ignore[union-attr]  # it has one
        convert_dataset(DATASET.model_copy(update={"convert": convert}), "raw", progress=False)
        for _ in range(2):
            measured(functools.partial(read, shards))
            time.sleep(3)  # What changed just now is not remembered.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true", help="2 000 images of KITTI's size, 1242x375")
    parser.add_argument("--memory", action="store_true", help="1 000, 10 000 and 100 000 images of 10 labels")
    parser.add_argument("--planning", action="store_true", help="digest of 100 000 images and label files, twice")
    parser.add_argument(
        "--open", action="store_true", help="100 000 images in 8 and in 1 000 shards, without and with an index"
    )
    options = parser.parse_args()
    if options.speed:
        in_folder(lambda: speed(2_000, (1242, 375)))
    if options.memory:
        print("| images | labels | tessera | straightforward script |\n| --- | --- | --- | --- |")
        for images in (1_000, 10_000, 100_000):
            in_folder(lambda images=images: memory(images))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
    if options.planning:
        in_folder(planning)
    if options.open:
        in_folder(opening)


if __name__ == "__main__":
    main()
