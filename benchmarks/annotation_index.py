"""Annotations of a million images: the project's index beside pycocotools and torchvision.

    python benchmarks/annotation_index.py --images 1000000 --boxes 10000000 --readers index
    python benchmarks/annotation_index.py --images 100000 --boxes 1000000

writes a COCO file of boxes (once; it stays in --folder), reads it each way in a process of its own, and lets forked processes read every
box, as loaders do in an epoch. Prints a Markdown table: seconds to build (the index alone), seconds to open, the main process' memory
(RSS), and of each further process what belongs to it alone (USS) and its share of all (PSS), by the kernel's own count.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

from tessera.data.coco import CocoInstances
from tessera.data.coco_index import FOLDER, open_index
from tessera.data.reader import Findings
from tessera.structures import Category, ClassCatalog

CATALOG = ClassCatalog(tuple(Category(number, f"class {number}", (0, 0, 0), True) for number in range(1, 81)))
SIZE = (1000, 1000)
MIB = 2**20
CHUNK = 100_000


def write(path: Path, images: int, boxes: int) -> None:
    """Boxes in random order of their images, as COCO's own files have them."""
    dice = np.random.default_rng(0)
    temporary = path.with_suffix(".part")
    with temporary.open("w") as stream:
        stream.write('{"images": [')
        for start in range(0, images, CHUNK):
            rows = (
                f'{{"id": {n}, "file_name": "{n:012d}.jpg", "height": {SIZE[0]}, "width": {SIZE[1]}}}'
                for n in range(start, min(start + CHUNK, images))
            )
            stream.write(("," if start else "") + ",".join(rows))
        stream.write('], "annotations": [')
        for start in range(0, boxes, CHUNK):
            count = min(CHUNK, boxes - start)
            owners, classes = dice.integers(images, size=count).tolist(), dice.integers(1, 81, count).tolist()
            sides = dice.integers(100, 50_000, (count, 4)).tolist()
            rows = (
                f'{{"id": {n}, "image_id": {owner}, "category_id": {label}, "bbox": [{x / 100}, {y / 100}, {w / 100}, {h / 100}], '
                f'"area": {w * h / 10_000}, "iscrowd": 0}}'
                for n, (owner, label, (x, y, w, h)) in enumerate(zip(owners, classes, sides, strict=True), start + 1)
            )
            stream.write(("," if start else "") + ",".join(rows))
        names = ",".join(f'{{"id": {c.id}, "name": "{c.name}"}}' for c in CATALOG.categories)
        stream.write(f'], "categories": [{names}]}}')
    temporary.replace(path)


def index(path: Path) -> Callable[[], int]:
    reader = CocoInstances(path, path.parent, CATALOG, CATALOG.from_dataset_id, "detection", Findings())
    return lambda: sum(len(reader.target(place, SIZE, Findings()).boxes) for place in range(len(reader)))


def pycocotools(path: Path) -> Callable[[], int]:
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
    return lambda: sum(len(coco.loadAnns(coco.getAnnIds(imgIds=[image]))) for image in coco.getImgIds())


def torchvision(path: Path) -> Callable[[], int]:
    """CocoDetection without the images."""
    from torchvision.datasets import CocoDetection

    with contextlib.redirect_stdout(io.StringIO()):
        dataset = CocoDetection(str(path.parent), str(path))
    return lambda: sum(len(dataset._load_target(image)) for image in dataset.ids)


READERS = {reader.__name__: reader for reader in (index, pycocotools, torchvision)}


def memory() -> dict[str, float]:
    """MiB of this process: ``Rss``, ``Pss`` and ``Uss``."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    found = {key: int(value.split()[0]) / 1024 for key, value in (line.split(":") for line in lines)}
    return {"Rss": found["Rss"], "Pss": found["Pss"], "Uss": found["Private_Clean"] + found["Private_Dirty"]}


def work(read: Callable[[], int], boxes: int, barrier: Barrier, results: Any) -> None:
    assert read() == boxes
    barrier.wait()  # A page counts as private once the other processes have ended.
    results.put(memory())
    barrier.wait()


def measure(name: str, path: Path, boxes: int, workers: int, built: str) -> None:
    """Prints a row; in a process of its own, so that what another way of reading left behind does not count."""
    context = get_context("fork")
    before = memory()["Rss"]
    started = time.perf_counter()
    read = READERS[name](path)
    opened = time.perf_counter() - started
    own = memory()["Rss"] - before
    barrier, results = context.Barrier(workers), context.Queue()
    processes = [context.Process(target=work, args=(read, boxes, barrier, results)) for _ in range(workers)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    uss, pss = (sum(one[key] for one in found) / workers for key in ("Uss", "Pss"))
    print(f"| {name} | {built} | {opened:.2f} s | {own:.0f} MiB | {uss:.0f} MiB | {pss:.0f} MiB |", flush=True)


def build(path: Path, results: Any) -> None:
    started, before = time.perf_counter(), memory()["Rss"]
    open_index(path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    results.put(f"{time.perf_counter() - started:.0f} s, {peak:.0f} MiB at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--boxes", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--readers", default=",".join(READERS))
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/out"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    os.environ[FOLDER] = str(options.folder / "index")
    path = options.folder / f"boxes_{options.images}_{options.boxes}.json"
    if not path.exists():
        write(path, options.images, options.boxes)
    print(f"{path}: {path.stat().st_size / MIB:.0f} MiB, {options.workers} workers", file=sys.stderr)
    context = get_context("fork")
    print(
        "| read by | build | open | main process | worker alone | worker's share |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name in options.readers.split(","):
        built = "-"
        if name == "index":
            results = context.Queue()
            child = context.Process(target=build, args=(path, results))
            child.start()
            built = results.get()
            child.join()
        child = context.Process(target=measure, args=(name, path, options.boxes, options.workers, built))
        child.start()
        child.join()
        if child.exitcode:
            sys.exit(f"{name} ended with {child.exitcode}")


if __name__ == "__main__":
    main()
