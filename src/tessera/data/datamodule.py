"""Loaders: which images, in which order, in which batches. Neither depends on worker count, restarts or the clock."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.utils.data import Dataset, Sampler

from tessera.data.datasets import SegmentationDataset
from tessera.data.loader import Loader
from tessera.data.opened import OpenedData
from tessera.data.tasks import Task, Tasks
from tessera.data.transforms import (
    augment,
    has_pixels,
    order_generator,
    pad_target,
    resize_target,
    sample_generator,
    select,
)
from tessera.files import UserError
from tessera.ops.images import input_size, make_batch, pad_and_stack, padded_size
from tessera.spec.schema import AugmentationSpec, Spec
from tessera.structures import Batch, ImageMeta, Sample, Target

_DIVISOR = 32


def require_objects(data: OpenedData, split: str) -> None:
    """Raises UserError for a split whose annotations, as far as they tell without a look at masks, hold nothing to learn or to measure."""
    dataset = data.split(split)
    nothing = dataset.nothing_to_learn()
    if nothing is not None:
        what = "learned from it" if split == "train" else "measured on it"
        raise UserError(f"{dataset.source}: nothing can be {what}: {nothing}")


def train_loader(
    spec: Spec, data: OpenedData, epoch: int, start_batch: int = 0, rank: int = 0, world_size: int = 1
) -> Loader:
    """The batches of one epoch (counted from 0) for one process; the first one yielded is number ``start_batch``.

    ``len()`` is the number of batches of the full epoch, whatever ``start_batch`` is. An epoch is one pass over the split without
    its incomplete last batch; with ``train.iters_per_epoch``, that many batches out of an endless row of passes, in which the next
    epoch goes on where this one ends.
    """
    dataset = data.split("train")
    section = spec.dataset.train
    batches = TrainBatches(
        len(dataset),
        section.batch_size,
        spec.seed,
        epoch,
        spec.train.iters_per_epoch,
        start_batch,
        rank,
        world_size,
    )
    augmentation = spec.dataset.augmentation
    return Loader(
        AugmentedDataset(dataset, augmentation, section.target_size, spec.seed, Tasks.of(spec.model, data.catalog)),
        batches,
        TrainCollate(augmentation.train_crop_size or augmentation.fixed_padding, spec.model.pixel_mean),
        section.num_workers,
        "dataset.train",
        functools.partial(data.require_same_pictures, "train"),
    )


def eval_loader(
    spec: Spec,
    data: OpenedData,
    split: str,
    fixed_size: tuple[int, int] | None = None,
    limit: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    max_batch: int | None = None,
) -> Loader:
    """Every image of the split once (over all ranks), with ``targets`` at the network's input size and ``truths`` at the original.

    A batch holds images of one padded size only, so that batch-mates never change an image's input. ``limit`` takes the first
    so many images; ``fixed_size`` and ``max_batch`` are what a runtime accepts.
    """
    dataset = data.split(split)
    section = getattr(spec.dataset, split)
    augmentation = spec.dataset.augmentation
    count = len(dataset) if limit is None else min(limit, len(dataset))
    size = section.batch_size if max_batch is None else min(section.batch_size, max_batch)
    sizes = []
    for index in range(count):
        height, width = section.target_size or dataset.size(index)
        sizes.append(padded_size([input_size(height, width, augmentation, fixed_size)], _DIVISOR, fixed_size))
    return Loader(
        dataset,
        group_batches(sizes, size)[rank::world_size],
        EvalCollate(augmentation, spec.model.pixel_mean, fixed_size, section.target_size),
        section.num_workers,
        f"dataset.{split}",
        functools.partial(data.require_same_pictures, split),
    )


def group_batches(sizes: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Indices 0..N-1 in batches of at most ``batch_size`` with equal sizes: by size, then by index."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    return [
        groups[size][start : start + batch_size]
        for size in sorted(groups)
        for start in range(0, len(groups[size]), batch_size)
    ]


class TrainBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (pass, index). The row of batches over all passes is one for all ranks; each takes its share of every batch."""

    def __init__(
        self,
        images: int,
        batch_size: int,
        seed: int,
        epoch: int,
        batches_per_epoch: int | None = None,
        start_batch: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._images = images
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._together = batch_size * world_size
        self._per_pass = images // self._together
        if not self._per_pass:
            raise UserError(
                f"dataset.train: {images} image(s), fewer than one step takes (batch_size {batch_size} x {world_size} process(es)); "
                "lower dataset.train.batch_size or train.num_gpus"
            )
        self._length = batches_per_epoch or self._per_pass
        self._first = epoch * self._length
        self._start = start_batch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order: list[int] = []
        ordered = -1
        for number in range(self._first + self._start, self._first + self._length):
            passage, place = divmod(number, self._per_pass)
            if passage != ordered:
                order = order_generator(self._seed, passage).permutation(self._images).tolist()
                ordered = passage
            start = place * self._together + self._rank * self._batch_size
            yield [(passage, index) for index in order[start : start + self._batch_size]]


Augmented = tuple[Sample, tuple[int, int], Task | None]
"""A sample, the (height, width) of its image as read, and the task it is shown with, of models that are told one."""


class AugmentedDataset(Dataset[Augmented]):
    """Samples by (pass, index), resized and cropped but not yet padded."""

    def __init__(
        self,
        dataset: SegmentationDataset,
        augmentation: AugmentationSpec,
        target_size: tuple[int, int] | None,
        seed: int,
        tasks: Tasks | None = None,
    ) -> None:
        self._dataset = dataset
        self._augmentation = augmentation
        self._target_size = target_size
        self._seed = seed
        self._tasks = tasks

    def __getitem__(self, key: tuple[int, int]) -> Augmented:
        passage, index = key
        sample = self._dataset.read(index)
        generator = sample_generator(self._seed, passage, index)
        image, target = augment(sample.image, sample.target, self._augmentation, self._target_size, generator)
        task = None
        if self._tasks is not None:
            task = self._tasks.draw(self._seed, passage, index)
            target = self._tasks.target(target, task)
        return replace(sample, image=image, target=target), _size(sample.image), task


@dataclass(frozen=True)
class TrainCollate:
    size: tuple[int, int] | None
    """(height, width) that holds every image; None: a batch is as large as its largest image."""
    pixel_mean: tuple[float, float, float]

    def __call__(self, items: list[Augmented]) -> Batch:
        samples = [sample for sample, _, _ in items]
        size = padded_size([self.size] if self.size else [_size(sample.image) for sample in samples], _DIVISOR)
        images, padding = pad_and_stack([sample.image for sample in samples], size, self.pixel_mean)
        metas = [
            ImageMeta(sample.image_id, sample.file_name, original, _size(sample.image)) for sample, original, _ in items
        ]
        targets = [pad_target(sample.target, size) for sample in samples]
        tasks: list[str] = [task for _, _, task in items if task is not None]
        stamps = [sample.stamp for sample in samples]
        return Batch(images, padding, metas, targets, truths=None, tasks=tasks or None, stamps=stamps)


@dataclass(frozen=True)
class EvalCollate:
    augmentation: AugmentationSpec
    pixel_mean: tuple[float, float, float]
    fixed_size: tuple[int, int] | None
    target_size: tuple[int, int] | None

    def __call__(self, samples: list[Sample]) -> Batch:
        batch = make_batch(
            [sample.image for sample in samples],
            [sample.image_id for sample in samples],
            [sample.file_name for sample in samples],
            self.augmentation,
            self.pixel_mean,
            _DIVISOR,
            self.fixed_size,
            self.target_size,
        )
        size = _size(batch.images)
        batch.targets = [
            _training_target(sample.target, meta.resized_size, size)
            for sample, meta in zip(samples, batch.metas, strict=True)
        ]
        batch.truths = [sample.target for sample in samples]
        batch.stamps = [sample.stamp for sample in samples]
        return batch


def _training_target(truth: Target, resized: tuple[int, int], padded: tuple[int, int]) -> Target:
    """What the losses see: without crowd regions and without what has no pixel left at this size."""
    target = resize_target(select(truth, ~truth.iscrowd), resized)
    return pad_target(select(target, has_pixels(target)), padded)


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]
