"""What one key alone cannot tell: values that are each legal and together are not."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tessera.spec.schema import DatasetSpec, Spec

MODES = {
    "mask_pairs": ("semantic",),
    "coco": ("instance",),
    "coco_panoptic": ("panoptic", "instance", "semantic"),
}
"""What annotations of a type can teach."""


def mistakes(spec: Spec) -> list[tuple[str, str]]:
    """(key, what is wrong and what to do) for every disagreement of a spec whose keys are legal one by one."""
    return [*_model(spec), *_annotations_against_mode(spec), *_augmentation(spec), *_train(spec)]


def dataset_mistakes(dataset: DatasetSpec) -> list[tuple[str, str]]:
    """The same for a dataset alone; keys are relative to it."""
    return list(_dataset(dataset))


def _dataset(dataset: DatasetSpec) -> Iterator[tuple[str, str]]:
    paths = {"label_map": dataset.label_map}
    for name in ("train", "val", "test"):
        split = getattr(dataset, name)
        paths |= {f"{name}.{key}": getattr(split, key) for key in ("images", "annotations", "panoptic")}
    for key, path in paths.items():
        if path is not None and not _stays_inside(path):
            yield key, f"expected a path inside the data root, without '..' and not absolute, found {path!r}"
    if not dataset.contiguous_id and dataset.num_classes is None:
        yield "num_classes", "required when contiguous_id is false: classes are then the ids 1..num_classes"


def _stays_inside(path: str) -> bool:
    pure = PurePosixPath(path)
    return path.strip() != "" and not pure.is_absolute() and ".." not in pure.parts and "\0" not in path


def _model(spec: Spec) -> Iterator[tuple[str, str]]:
    model = spec.model
    width = model.pixel_decoder.hidden_dim
    if width % 32:
        nearest = max(32, round(width / 32) * 32)
        yield "model.pixel_decoder.hidden_dim", f"expected a multiple of 32 (group norm), found {width}; take {nearest}"
    for section in ("pixel_decoder", "decoder"):
        heads = getattr(model, section).nheads
        if width % heads:
            yield (
                f"model.{section}.nheads",
                f"expected a divisor of model.pixel_decoder.hidden_dim, which is {width}, found {heads}",
            )
    loss = model.loss
    if loss.class_weight == loss.mask_weight == loss.dice_weight == 0:
        yield "model.loss.class_weight", "class_weight, mask_weight and dice_weight are all 0: nothing is learned"
    swin = model.backbone.swin
    if not model.backbone.name.startswith("swin"):
        for key in type(swin).model_fields:
            if getattr(swin, key) is not None:
                yield (
                    f"model.backbone.swin.{key}",
                    f"only a Swin backbone has it, and model.backbone.name is {model.backbone.name!r}; remove it",
                )
    elif swin.embed_dim is not None and swin.num_heads is not None:
        for stage, heads in enumerate(swin.num_heads):
            channels = swin.embed_dim * 2**stage
            if channels % heads:
                yield (
                    "model.backbone.swin.num_heads",
                    f"stage {stage + 1} has {channels} channels, which {heads} heads do not divide",
                )


def _annotations_against_mode(spec: Spec) -> Iterator[tuple[str, str]]:
    allowed = MODES[spec.dataset.type]
    if spec.model.mode not in allowed:
        yield (
            "model.mode",
            f"the dataset {spec.dataset.name!r} has annotations of type {spec.dataset.type}, which serve "
            f"{' or '.join(allowed)}, found {spec.model.mode}; set model.mode: {allowed[0]}, or choose a dataset of another type",
        )


def _augmentation(spec: Spec) -> Iterator[tuple[str, str]]:
    section, prefix = spec.dataset.augmentation, "dataset.augmentation"
    if section.test_min_size > section.test_max_size:
        yield f"{prefix}.test_min_size", f"{section.test_min_size} is above test_max_size, {section.test_max_size}"
    largest = max(section.train_min_size)
    if largest > section.train_max_size:
        yield f"{prefix}.train_min_size", f"{largest} is above train_max_size, {section.train_max_size}"
    if section.train_scale is not None and section.train_scale[0] > section.train_scale[1]:
        yield f"{prefix}.train_scale", f"expected [smallest, largest], found {list(section.train_scale)}"


def _train(spec: Spec) -> Iterator[tuple[str, str]]:
    milestones = spec.train.optim.milestones
    if any(later <= earlier for earlier, later in pairwise(milestones)):
        yield "train.optim.milestones", f"expected increasing epochs, found {milestones}"
    if len(set(spec.train.gpu_ids)) != len(spec.train.gpu_ids):
        yield "train.gpu_ids", f"a GPU is named twice: {spec.train.gpu_ids}"
