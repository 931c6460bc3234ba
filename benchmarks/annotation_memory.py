"""What one more loader process costs in memory: annotations in one shared buffer, as readers keep them, beside a list of dictionaries.

    python benchmarks/annotation_memory.py

writes a COCO file of 20 000 images and 100 000 boxes, reads it both ways, and lets forked processes read every annotation, as loaders
do in an epoch. It prints a Markdown table: the memory that belongs to one such process alone (USS), by the kernel's own count.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from tessera.data.coco import CocoInstances
from tessera.data.reader import Findings, box_target
from tessera.structures import Category, ClassCatalog

CATALOG = ClassCatalog(tuple(Category(number, f"class {number}", (0, 0, 0), True) for number in range(1, 81)))
SIZE = (1000, 1000)
MIB = 2**20


def write(path: Path, images: int, boxes: int) -> None:
    dice = random.Random(0)
    annotations = [
        {
            "id": number,
            "image_id": dice.randrange(images),
            "category_id": dice.randint(1, len(CATALOG)),
            "bbox": [round(dice.uniform(0, 500), 2) for _ in range(4)],
            "area": round(dice.uniform(10, 10_000), 2),
            "iscrowd": 0,
        }
        for number in range(1, boxes + 1)
    ]
    listed = [{"id": n, "file_name": f"{n:012d}.jpg", "height": SIZE[0], "width": SIZE[1]} for n in range(images)]
    path.write_text(json.dumps({"images": listed, "annotations": annotations}))


def dictionaries(path: Path) -> Callable[[], int]:
    """Annotations by image, as torchvision's CocoDetection keeps them."""
    by_image: dict[int, list[dict[str, Any]]] = {}
    for item in json.loads(path.read_text())["annotations"]:
        by_image.setdefault(item["image_id"], []).append(item)
    labels = CATALOG.from_dataset_id
    return lambda: sum(len(box_target(group, labels, SIZE, Findings()).boxes) for group in by_image.values())


def shared(path: Path) -> Callable[[], int]:
    reader = CocoInstances(path, path.parent, CATALOG, CATALOG.from_dataset_id, "detection", Findings())
    return lambda: sum(len(reader.target(index, SIZE, Findings()).boxes) for index in range(len(reader)))


def own_memory() -> int:
    """Bytes that no other process shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


def work(read: Callable[[], int], boxes: int, barrier: Barrier, results: Any) -> None:
    before = own_memory()
    assert read() == boxes
    barrier.wait()  # A page counts as private once the other processes have ended.
    results.put((before, own_memory()))
    barrier.wait()


def measure(load: Callable[[Path], Callable[[], int]], path: Path, boxes: int, workers: int) -> None:
    """Prints a row; in a process of its own, so that what the other way of reading left behind does not count."""
    context = get_context("fork")
    read = load(path)
    barrier, results = context.Barrier(workers), context.Queue()
    processes = [context.Process(target=work, args=(read, boxes, barrier, results)) for _ in range(workers)]
    for process in processes:
        process.start()
    pairs = [results.get() for _ in processes]
    for process in processes:
        process.join()
    before, after = (sum(values) / len(values) / MIB for values in zip(*pairs, strict=True))
    print(f"| {load.__name__} | {own_memory() / MIB:.0f} MiB | {before:.1f} MiB | {after:.1f} MiB |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--boxes", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances.json"
        write(path, options.images, options.boxes)
        print(
            "| annotations as | main process | one worker, started | one worker, after an epoch |\n| --- | --- | --- | --- |",
            flush=True,
        )

        for load in (dictionaries, shared):
            child = get_context("fork").Process(target=measure, args=(load, path, options.boxes, options.workers))
            child.start()
            child.join()


if __name__ == "__main__":
    main()
