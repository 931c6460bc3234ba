"""Which task a training image is shown with, of models that are told one, and what there is to find then (OneFormer, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tessera.data.transforms import select, task_generator
from tessera.ops.masks import masks_to_boxes
from tessera.spec.networks import ModelSpec, OneFormerSpec, TaskProbabilitySpec
from tessera.structures import ClassCatalog, Target

Task = Literal["semantic", "instance", "panoptic"]


@dataclass(frozen=True)
class Tasks:
    """``probability`` None: ``only`` this task, for which the targets are made already."""

    only: Task
    probability: TaskProbabilitySpec | None
    things: tuple[int, ...]
    """Contiguous ids of the countable classes."""

    @classmethod
    def of(cls, model: ModelSpec, catalog: ClassCatalog) -> Tasks | None:
        """None for a model that is not told a task."""
        if not isinstance(model, OneFormerSpec):
            return None
        return cls(model.mode, model.task_probability if model.mode == "panoptic" else None, catalog.thing_ids)

    def draw(self, seed: int, passage: int, index: int) -> Task:
        """Of image ``index`` in the ``passage``-th pass over the data; augmentation draws the same numbers whatever comes out."""
        if self.probability is None:
            return self.only
        odds = self.probability
        place = task_generator(seed, passage, index).random() * (odds.semantic + odds.instance + odds.panoptic)
        if place < odds.semantic:
            return "semantic"
        return "instance" if place < odds.semantic + odds.instance else "panoptic"

    def target(self, target: Target, task: Task) -> Target:
        """What is to be found of the mode's ``target`` under ``task``; there may be nothing."""
        if self.probability is None or task == "panoptic":
            return target
        return merge_classes(target) if task == "semantic" else keep_classes(target, self.things)


def keep_classes(target: Target, labels: tuple[int, ...]) -> Target:
    return select(target, torch.isin(target.labels, torch.tensor(labels, dtype=torch.int64)))


def merge_classes(target: Target) -> Target:
    """One object per class, in the order of the ids: the union of the masks, tight boxes, the sum of the areas. Crowds are left out."""
    target = select(target, ~target.iscrowd)
    source = target.required_masks()
    labels, which = torch.unique(target.labels, return_inverse=True)
    masks = torch.zeros(len(labels), *source.shape[1:], dtype=torch.bool)
    for place, mask in zip(which.tolist(), source, strict=True):
        masks[place] |= mask
    return Target(
        labels=labels,
        masks=masks,
        boxes=masks_to_boxes(masks),
        iscrowd=torch.zeros(len(labels), dtype=torch.bool),
        areas=torch.zeros(len(labels), dtype=torch.float64).index_add(0, which, target.areas),
        semantic=target.semantic,
        size=target.size,
    )
