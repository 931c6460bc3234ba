"""What one key alone cannot tell: values that are each legal and together are not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from tessera.spec.networks import (
    SWIN_SIZES,
    BackboneSpec,
    DeformableDetrSpec,
    EncoderDecoderSpec,
    Mask2FormerSpec,
    Mode,
    OneFormerSpec,
)
from tessera.spec.sources import CONVERTED, as_list, kitti_sources, source_folder

if TYPE_CHECKING:
    from tessera.spec.schema import ConvertSpec, DatasetSpec, Spec

MODES: dict[str, tuple[Mode, ...]] = {
    "mask_pairs": ("semantic",),
    "coco": ("instance", "detection"),
    "coco_panoptic": ("panoptic", "instance", "semantic", "detection"),
}
"""What annotations of a type can teach."""


_OF_INSTANCES = r"(AP(50|75|s|m|l)?|AR(\d+|s|m|l))(@[\d.@-]+)?"
_OF_PIXELS = "mIoU|mean_accuracy|pixel_accuracy"
METRICS: dict[Mode, str] = {
    "panoptic": rf"(PQ|SQ|RQ)(_things|_stuff)?|(box_)?{_OF_INSTANCES}|{_OF_PIXELS}",
    "instance": rf"(box_)?{_OF_INSTANCES}",
    "semantic": _OF_PIXELS,
    "detection": f"box_{_OF_INSTANCES}",
}
"""Regular expressions of the names of what a mode's evaluations measure."""


def mistakes(spec: Spec) -> list[tuple[str, str]]:
    """(key, what is wrong and what to do) for every disagreement of a spec whose keys are legal one by one."""
    return [
        *_model(spec),
        *_annotations_against_mode(spec),
        *_augmentation(spec),
        *_one_pixel(spec),
        *_testing(spec),
        *_export(spec),
        *_train(spec),
    ]


def stage_mistakes(spec: Spec, verb: str, runtime: str) -> Iterator[tuple[str, str]]:
    """The same for what a stage refuses although others of the experiment do not, so that it is told before any of them runs."""
    splits = {name: getattr(spec.dataset, name).annotations is not None for name in ("train", "val", "test")}
    split, graph = spec.evaluate.split, (spec.export.input_height, spec.export.input_width)
    reads_split = verb in ("parity", "evaluate") or (verb == "infer" and spec.inference.images is None)
    if reads_split and splits["train"] and not splits[split]:
        other = next((name for name in ("val", "test") if splits[name]), None)
        advice = f"evaluate.split={other} (in the file: `evaluate: {{split: {other}}}`), or " if other else ""
        yield "evaluate.split", f"the dataset {spec.dataset.name!r} has no {split} split; set {advice}dataset.{split}"
    if verb == "train" and splits["train"]:
        yield from lacks_validation(spec)
    if verb in ("parity", "evaluate", "infer") and runtime != "torch" and not spec.export.dynamic_size:
        testing = spec.testing
        # A size that is left out follows from the images, which planning does not open.
        if testing.mode == "slide" and None not in graph and testing.crop_size != graph:
            yield (
                "testing.crop_size",
                f"is {list(testing.crop_size)}, but the graph takes {list(graph)} (height, width) only; set crop_size to that, or "
                "export.dynamic_size=true",
            )
        if testing.mode == "whole" and testing.scales != [1.0]:
            yield (
                "testing.scales",
                f"is {testing.scales}, but the graph has one size (height, width); set testing.mode=slide, or export.dynamic_size=true",
            )
    if verb == "export" and (sizes := SWIN_SIZES.get(spec.model.backbone.name)):
        sizes = sizes._replace(**spec.model.backbone.swin.model_dump(exclude_none=True))
        weights = sum(12 * depth * (sizes.embed_dim * 2**stage) ** 2 for stage, depth in enumerate(sizes.depths))
        if 4 * weights >= 2**31:
            yield (
                "model.backbone.name",
                f"{spec.model.backbone.name} has {4 * weights / 2**30:.1f} GiB of weights in its blocks alone, and an ONNX file holds less "
                "than 2; ask for eval.json and inference/index.json, which need no graph, or choose a smaller backbone",
            )
    if verb == "engine":
        engine = spec.engine
        wanted = (engine.min_batch_size, engine.opt_batch_size, engine.max_batch_size)
        if spec.export.dynamic_size:
            yield "export.dynamic_size", "leaves height and width free, and an engine is built for one size; set false"
        if spec.export.batch_size != -1 and set(wanted) != {spec.export.batch_size}:
            yield (
                "export.batch_size",
                f"fixes the batch to {spec.export.batch_size}, but engine.min/opt/max_batch_size are {wanted}; set all to the same, or "
                "export.batch_size=-1",
            )


def lacks_validation(spec: Spec) -> Iterator[tuple[str, str]]:
    """Keys of the training that need a val split, where there is none."""
    optim, advice = spec.train.optim, f"but the dataset {spec.dataset.name!r} has no dataset.val.annotations"
    if spec.dataset.val.annotations is not None:
        return
    if spec.train.select == "best":
        yield "train.select", f"best needs validation, {advice}"
    if optim.lr_scheduler == "ReduceOnPlateau" and optim.monitor_name == "val_loss":
        yield "train.optim.monitor_name", f"val_loss needs validation, {advice}"


def dataset_mistakes(dataset: DatasetSpec) -> list[tuple[str, str]]:
    """The same for a dataset alone; keys are relative to it."""
    return list(_dataset(dataset))


def _dataset(dataset: DatasetSpec) -> Iterator[tuple[str, str]]:
    paths: dict[str, str | list[str] | None] = {"label_map": dataset.label_map}
    for name in ("train", "val", "test"):
        split = getattr(dataset, name)
        paths |= {f"{name}.{key}": getattr(split, key) for key in ("images", "annotations", "panoptic", "names")}
        entries = len(as_list(split.annotations))
        for key in ("images", "panoptic"):
            value = getattr(split, key)
            if isinstance(value, list) and len(value) != entries:
                yield (
                    f"{name}.{key}",
                    f"expected one folder for all, or one for each of the {entries} entries of {name}.annotations, found {len(value)}",
                )
    for key, value in paths.items():
        for path in as_list(value):
            if not _stays_inside(path):
                yield key, f"expected a path inside the data root, without '..' and not absolute, found {path!r}"
    if dataset.value_range is not None and dataset.value_range[0] >= dataset.value_range[1]:
        yield "value_range", f"expected [low, high] with low below high, found {list(dataset.value_range)}"
    yield from _fetch(dataset)
    if dataset.convert is not None:
        yield from _convert(dataset, dataset.convert)
    if not dataset.contiguous_id and dataset.num_classes is None:
        yield "num_classes", "required when contiguous_id is false: classes are then the ids 1..num_classes"


def _fetch(dataset: DatasetSpec) -> Iterator[tuple[str, str]]:
    if dataset.fetch and dataset.generator is not None:
        yield "fetch", "a dataset with a generator is made, not fetched; remove one of the two"
    for folder, archive in dataset.fetch.items():
        pure = PurePosixPath(folder)
        if not _stays_inside(folder) or pure.as_posix() != folder or folder.startswith("."):
            yield "fetch", f"expected folders below data/{dataset.name}/, such as images, found {folder!r}"
        if others := [other for other in dataset.fetch if PurePosixPath(other) in pure.parents]:
            yield "fetch", f"the folder {folder!r} lies in {others[0]!r}; every archive needs a folder of its own"
        if not _is_address(archive.address):
            yield (
                f"fetch.{folder}.address",
                f"expected s3://bucket/key or a path inside the data root, without '..' and not absolute, found {archive.address!r}",
            )
        if archive.address.lower().endswith((".zip", ".7z", ".rar", ".zst", ".tzst", ".lz4")):
            yield (
                f"fetch.{folder}.address",
                f"expected a tar archive or a plain file, found {archive.address!r}; pack it as .tar.gz",
            )


def _convert(dataset: DatasetSpec, convert: ConvertSpec) -> Iterator[tuple[str, str]]:
    if dataset.type != "coco":
        yield "type", f"KITTI labels are boxes, which convert makes into type coco, found {dataset.type}"
    if convert.mapping_path is None and dataset.label_map is None:
        yield "convert.mapping_path", "neither it nor label_map is set, so the classes are unknown; set one of them"
    elif convert.mapping_path is not None and not _stays_inside(convert.mapping_path):
        yield (
            "convert.mapping_path",
            f"expected a path inside the data root, without '..' and not absolute, found {convert.mapping_path!r}",
        )
    every = [source for listed in kitti_sources(convert).values() for source in listed]
    for source in every:
        for key, name in (("image_dir_name", convert.image_dir_name), ("label_dir_name", convert.label_dir_name)):
            if not _stays_inside(source) or not _stays_inside(name) or not _stays_inside(source_folder(source, name)):
                yield (
                    f"convert.{key}",
                    f"expected folders inside the data root, without '..' and not absolute, found {source!r} with {name!r}",
                )
    folders = Counter(source_folder(source, convert.image_dir_name) for source in every)
    for folder, count in folders.items():
        if count > 1:
            yield "convert.input_source", f"the images of {folder} are listed {count} times, expected once"
    if convert.val_split and convert.val_source:
        yield "convert.val_source", "val is drawn from input_source (val_split); remove one of the two"
    if convert.num_partitions > 1 and (convert.val_split or convert.val_source):
        yield "convert.num_partitions", "folds take the place of train and val; remove val_split and val_source"
    place = f"{dataset.name}/{CONVERTED}/shards/"
    for name in ("train", "val", "test"):
        split = getattr(dataset, name)
        for entry in as_list(split.annotations):
            if not entry.startswith(place):
                yield (
                    f"{name}.annotations",
                    f"expected shards that convert makes, such as {place}{name}-*.json, found {entry!r}",
                )
        if split.annotations is not None and set(as_list(split.images)) != {"."}:
            yield (
                f"{name}.images",
                f"expected ., because names in the shards start at the data root, found {split.images!r}",
            )
    if CONVERTED in dataset.fetch:
        yield "fetch", f"the folder {CONVERTED} is where convert writes; choose another name"


def _is_address(text: str) -> bool:
    scheme, mark, rest = text.partition("://")
    bucket, _, key = rest.partition("/")
    if mark:
        return scheme == "s3" and bool(bucket and key) and not key.endswith("/")
    return _stays_inside(text)


def _stays_inside(path: str) -> bool:
    pure = PurePosixPath(path)
    return path.strip() != "" and not pure.is_absolute() and ".." not in pure.parts and "\0" not in path


def _model(spec: Spec) -> Iterator[tuple[str, str]]:
    model = spec.model
    yield from _backbone(model.backbone)
    if isinstance(model, Mask2FormerSpec):
        yield from _mask_transformer(model)
    elif isinstance(model, OneFormerSpec):
        yield from _mask_transformer(model)
        yield from _oneformer(model)
    elif isinstance(model, DeformableDetrSpec):
        yield from _deformable_detr(model)
    elif isinstance(model, EncoderDecoderSpec):
        yield from _encoder_decoder(model)


def _mask_transformer(model: Mask2FormerSpec | OneFormerSpec) -> Iterator[tuple[str, str]]:
    sections = {"pixel_decoder": model.pixel_decoder.nheads, "decoder": model.decoder.nheads}
    if isinstance(model, OneFormerSpec):
        sections["class_decoder"] = model.class_decoder.nheads
    yield from _width("pixel_decoder.hidden_dim", model.pixel_decoder.hidden_dim, sections)
    loss = model.loss
    if loss.class_weight == loss.mask_weight == loss.dice_weight == 0:
        yield "model.loss.class_weight", "class_weight, mask_weight and dice_weight are all 0: nothing is learned"


def _width(key: str, width: int, heads: dict[str, int]) -> Iterator[tuple[str, str]]:
    """``heads``: section, empty for the model itself, and its number of heads."""
    if width % 32:
        nearest = max(32, round(width / 32) * 32)
        yield f"model.{key}", f"expected a multiple of 32 (group norm), found {width}; take {nearest}"
    for section, count in heads.items():
        if width % count:
            name = f"model.{section}.nheads" if section else "model.nheads"
            yield name, f"expected a divisor of model.{key}, which is {width}, found {count}"


def _oneformer(model: OneFormerSpec) -> Iterator[tuple[str, str]]:
    if model.text.width % 64:
        nearest = max(64, round(model.text.width / 64) * 64)
        yield (
            "model.text.width",
            f"expected a multiple of 64 (the width of a head), found {model.text.width}; take {nearest}",
        )
    if model.text.num_context >= model.decoder.num_object_queries:
        yield (
            "model.text.num_context",
            f"expected fewer than model.decoder.num_object_queries, {model.decoder.num_object_queries}, found {model.text.num_context}",
        )
    odds = model.task_probability
    if odds.semantic + odds.instance + odds.panoptic == 0:
        yield "model.task_probability", "all three are 0: no task is ever trained"


def _deformable_detr(model: DeformableDetrSpec) -> Iterator[tuple[str, str]]:
    yield from _width("hidden_dim", model.hidden_dim, {"": model.nheads})
    if any(later <= earlier for earlier, later in pairwise(model.strides)):
        yield "model.strides", f"expected ascending strides, found {model.strides}"
    if model.num_feature_levels < len(model.strides):
        yield (
            "model.num_feature_levels",
            f"expected at least one level per map in model.strides, {len(model.strides)}, found {model.num_feature_levels}",
        )
    loss = model.loss
    if not loss.aux_loss and model.with_box_refine and model.dec_layers > 1:
        yield (
            "model.loss.aux_loss",
            "false leaves the heads of all layers but the last untrained, whose boxes model.with_box_refine builds upon; set one of the two "
            "the other way",
        )
    if loss.class_weight == loss.box_weight == loss.giou_weight == 0:
        yield "model.loss.class_weight", "class_weight, box_weight and giou_weight are all 0: nothing is learned"


def _encoder_decoder(model: EncoderDecoderSpec) -> Iterator[tuple[str, str]]:
    if not any(loss.weight for loss in model.losses.values()):
        yield "model.losses", "no loss has a weight above 0: nothing is learned"
    for section, names in (("losses", model.losses), ("auxiliary", model.auxiliary)):
        for name in names:
            if not re.fullmatch(r"[A-Za-z0-9_]+", name):
                yield f"model.{section}", f"{name!r} is no name: expected letters, digits and underscores only"
    if model.ohem is not None and all(loss.type != "cross_entropy" for loss in model.losses.values()):
        yield "model.ohem", "samples pixels for the cross-entropy, but model.losses has none; remove it"
    counted = ("cross_entropy", "focal")
    if model.class_weights is not None:
        if all(loss.type not in counted for loss in model.losses.values()):
            yield "model.class_weights", "weighs cross-entropy and focal loss, but model.losses has neither; remove it"
        if not any(model.class_weights):
            yield "model.class_weights", "are all 0: nothing is learned"
    decoder = model.decoder
    if decoder.type in ("fpn", "linknet") and model.output_stride != 32:
        yield (
            "model.output_stride",
            f"{decoder.type} doubles the size from map to map: expected 32, found {model.output_stride}",
        )
    if decoder.type == "fpn" and decoder.channels % 64:
        nearest = max(64, round(decoder.channels / 64) * 64)
        yield (
            "model.decoder.channels",
            f"fpn: expected a multiple of 64 (group norm), found {decoder.channels}; take {nearest}",
        )


def _testing(spec: Spec) -> Iterator[tuple[str, str]]:
    testing, default = spec.testing, type(spec.testing)()
    if spec.model.mode != "semantic":
        for key in type(testing).model_fields:
            if getattr(testing, key) != getattr(default, key):
                yield f"testing.{key}", f"averages semantic predictions, but model.mode is {spec.model.mode}; remove it"
        return
    for side, crop, stride in zip(("height", "width"), testing.crop_size, testing.stride, strict=True):
        if crop % 32:
            nearest = max(32, round(crop / 32) * 32)
            yield "testing.crop_size", f"expected a {side} that is a multiple of 32, found {crop}; take {nearest}"
        if testing.mode == "slide" and stride > crop:
            yield (
                "testing.stride",
                f"steps of {stride} leave gaps between windows whose {side} is {crop}; expected at most that",
            )


def _backbone(backbone: BackboneSpec) -> Iterator[tuple[str, str]]:
    swin = backbone.swin
    if not backbone.name.startswith("swin"):
        for key in type(swin).model_fields:
            if getattr(swin, key) is not None:
                yield (
                    f"model.backbone.swin.{key}",
                    f"only a Swin backbone has it, and model.backbone.name is {backbone.name!r}; remove it",
                )
    elif backbone.name in SWIN_SIZES:
        sizes = SWIN_SIZES[backbone.name]._asdict() | swin.model_dump(exclude_none=True)
        for stage, heads in enumerate(sizes["num_heads"]):
            channels = sizes["embed_dim"] * 2**stage
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
            f"{' or '.join(allowed)}, found {spec.model.mode}; {_mode_advice(spec, allowed)}choose a dataset of another type",
        )


def _mode_advice(spec: Spec, allowed: tuple[str, ...]) -> str:
    common = [mode for mode in type(spec.model).modes if mode in allowed]
    return f"set model.mode: {common[0]}, or " if common else ""


def _augmentation(spec: Spec) -> Iterator[tuple[str, str]]:
    section, prefix = spec.dataset.augmentation, "dataset.augmentation"
    if section.test_min_size > section.test_max_size:
        yield f"{prefix}.test_min_size", f"{section.test_min_size} is above test_max_size, {section.test_max_size}"
    largest = max(section.train_min_size)
    if largest > section.train_max_size:
        yield f"{prefix}.train_min_size", f"{largest} is above train_max_size, {section.train_max_size}"
    if section.train_scale is not None and section.train_scale[0] > section.train_scale[1]:
        yield f"{prefix}.train_scale", f"expected [smallest, largest], found {list(section.train_scale)}"
    if section.train_scale is not None and section.train_crop_size is None:
        yield f"{prefix}.train_scale", "is a factor on train_crop_size, which is null; set train_crop_size"
    crop = section.train_random_crop
    if (crop is None) != (section.train_random_resize is None):
        yield f"{prefix}.train_random_crop", "goes together with train_random_resize; set both or neither"
    if crop is not None and crop[0] > crop[1]:
        yield f"{prefix}.train_random_crop", f"expected [smallest, largest], found {list(crop)}"
    if crop is not None and section.train_scale is not None:
        yield (
            f"{prefix}.train_random_crop",
            "crops before train_min_size resizes, but train_scale is set and takes its place",
        )
    if section.fixed_padding is not None and section.train_crop_size is not None:
        yield (
            f"{prefix}.fixed_padding",
            f"batches have the size of train_crop_size already, {list(section.train_crop_size)}; set train_crop_size: null",
        )


def _one_pixel(spec: Spec) -> Iterator[tuple[str, str]]:
    """A group norm of one channel per group has nothing to normalise on a map of one pixel; PyTorch refuses it for single images."""
    model = spec.model
    if isinstance(model, DeformableDetrSpec):
        key, width = "hidden_dim", model.hidden_dim
        # Dilation keeps the backbone's last map at 16; convolutions of stride 2 make the levels beyond its maps.
        last = min(model.strides[-1], 16) if model.dilation else model.strides[-1]
        stride = last * 2 ** max(0, model.num_feature_levels - len(model.strides))
    elif isinstance(model, Mask2FormerSpec | OneFormerSpec):
        key, width, stride = "pixel_decoder.hidden_dim", model.pixel_decoder.hidden_dim, 32
    else:
        return
    sizes, prefix = spec.dataset.augmentation, "dataset.augmentation"
    sides = {f"{prefix}.test_min_size": sizes.test_min_size}
    if sizes.train_crop_size is not None:
        sides[f"{prefix}.train_crop_size"] = max(sizes.train_crop_size)
    elif sizes.fixed_padding is not None:
        sides[f"{prefix}.fixed_padding"] = max(sizes.fixed_padding)
    else:
        sides[f"{prefix}.train_min_size"] = min(sizes.train_min_size)
    if not spec.export.dynamic_size and spec.export.input_height and spec.export.input_width:
        # What is left out is no smaller than test_min_size.
        sides["export.input_height and input_width"] = max(spec.export.input_height, spec.export.input_width)
    small = [f"{name} {side}" for name, side in sides.items() if side <= stride]
    if width == 32 and small:
        yield (
            f"model.{key}",
            f"32 makes groups of one channel (group norm), and the coarsest level, of stride {stride}, may be a single pixel with "
            f"{' and '.join(small)}; take 64, or larger images",
        )


def _export(spec: Spec) -> Iterator[tuple[str, str]]:
    if spec.export.task is None:
        return
    if not isinstance(spec.model, OneFormerSpec):
        yield "export.task", f"only oneformer takes a task, and model.name is {spec.model.name}; remove it"
    elif spec.model.mode not in ("panoptic", spec.export.task):
        yield "export.task", f"model.mode is {spec.model.mode}, which is not trained for {spec.export.task}"


def _train(spec: Spec) -> Iterator[tuple[str, str]]:
    optim, milestones = spec.train.optim, spec.train.optim.milestones
    if optim.min_lr > optim.lr:
        yield "train.optim.min_lr", f"expected at most train.optim.lr, {optim.lr}, found {optim.min_lr}"
    if any(later <= earlier for earlier, later in pairwise(milestones)):
        yield "train.optim.milestones", f"expected increasing epochs, found {milestones}"
    if len(set(spec.train.gpu_ids)) != len(spec.train.gpu_ids):
        yield "train.gpu_ids", f"a GPU is named twice: {spec.train.gpu_ids}"
    if spec.train.num_epochs == 0:
        if spec.train.pretrained_model_path is None:
            yield (
                "train.num_epochs",
                "0 takes the weights of train.pretrained_model_path as they are; set that, or train",
            )
        if spec.train.resume_training_checkpoint_path is not None:
            yield (
                "train.resume_training_checkpoint_path",
                "there is nothing to resume with train.num_epochs=0; remove it",
            )
