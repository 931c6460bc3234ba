"""Time and memory of one training step and one evaluation pass: our Mask2Former beside the transformers library's, same weights.

Swin-T, 512x512, batch 2, 100 queries, 80 classes, 12544 points, fp32. Every measurement runs in a process of its own::

    python benchmarks/mask2former_step.py

prints a Markdown table: median seconds of the repeats and the peak of the process's resident memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
import transformers
from torch import Tensor

from tessera.interop.published import load_strictly, mask2former
from tessera.models import build_model
from tessera.ops.masks import masks_to_boxes
from tessera.spec.networks import BackboneSpec, Mask2FormerSpec
from tessera.structures import Category, ClassCatalog, ImageMeta, Target

SIZE, BATCH, CLASSES, OBJECTS = 512, 2, 80, 8
CATALOG = ClassCatalog(tuple(Category(i + 1, f"class {i}", (i, i, i), True) for i in range(CLASSES)))


def published() -> transformers.Mask2FormerForUniversalSegmentation:
    torch.manual_seed(0)
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(
            embed_dim=96,
            depths=[2, 2, 6, 2],
            num_heads=[3, 6, 12, 24],
            window_size=7,
            drop_path_rate=0.0,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        num_labels=CLASSES,
        use_auxiliary_loss=True,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)


def scenes() -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Images, and per image (N, H, W) bool rectangles with their classes."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(BATCH, 3, SIZE, SIZE, generator=generator)
    masks, labels = [], []
    for _ in range(BATCH):
        mask = torch.zeros(OBJECTS, SIZE, SIZE, dtype=torch.bool)
        for index in range(OBJECTS):
            top, left = torch.randint(0, SIZE - 96, (2,), generator=generator).tolist()
            mask[index, top : top + 96, left : left + 96] = True
        masks.append(mask)
        labels.append(torch.randint(0, CLASSES, (OBJECTS,), generator=generator))
    return images, masks, labels


def ours() -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step and an evaluation pass (network and post-processing)."""
    spec = Mask2FormerSpec(backbone=BackboneSpec(drop_path_rate=0.0), mode="instance")
    model = build_model(spec, CATALOG)
    load_strictly(model.network, mask2former.rename(published().state_dict()), "transformers' weights")
    images, masks, labels = scenes()
    targets = [
        Target(label, mask, masks_to_boxes(mask), torch.zeros(OBJECTS, dtype=torch.bool), mask.sum((1, 2)).double())
        for mask, label in zip(masks, labels, strict=True)
    ]
    metas = [ImageMeta(index, f"{index}", (SIZE, SIZE), (SIZE, SIZE)) for index in range(BATCH)]
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=1e-5)

    def train() -> None:
        model.network.train()
        optimizer.zero_grad()
        sum(model.criterion(model.network(images), targets).values()).backward()
        optimizer.step()

    def evaluate() -> None:
        model.network.eval()
        with torch.inference_mode():
            model.postprocess(model.network(images), metas, (SIZE, SIZE))

    return train, evaluate


def theirs() -> tuple[Callable[[], None], Callable[[], None]]:
    network = published()
    images, masks, labels = scenes()
    floats = [mask.float() for mask in masks]
    processor = transformers.Mask2FormerImageProcessor()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)

    def train() -> None:
        network.train()
        optimizer.zero_grad()
        network(pixel_values=images, mask_labels=floats, class_labels=labels).loss.backward()
        optimizer.step()

    def evaluate() -> None:
        network.eval()
        with torch.inference_mode():
            outputs = network(pixel_values=images)
            processor.post_process_instance_segmentation(outputs, threshold=0.0, target_sizes=[(SIZE, SIZE)] * BATCH)

    return train, evaluate


def measure(side: str, what: str, repeats: int) -> dict[str, float]:
    """One untimed warm-up, then the median of ``repeats``."""
    train, evaluate = {"tessera": ours, "transformers": theirs}[side]()
    run = {"training step": train, "evaluation pass": evaluate}[what]
    run()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return {
        "seconds": statistics.median(seconds),
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "WHAT"), help="measure one cell in this process")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.one:
        print(json.dumps(measure(*arguments.one, arguments.repeats)))
        return
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads\n")
    print("| | tessera | transformers |\n| --- | --- | --- |", flush=True)
    for what in ("training step", "evaluation pass"):
        cells = []
        for side in ("tessera", "transformers"):
            command = [sys.executable, __file__, "--repeats", str(arguments.repeats), "--one", side, what]
            answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            found = json.loads(answer)
            cells.append(f"{found['seconds']:.2f} s, {found['gib']:.2f} GiB")
        print(f"| {what} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
