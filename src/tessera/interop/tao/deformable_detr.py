"""TAO's Deformable DETR spec, key by key; the spec of its `convert` action too, which is a file of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, MinLen

from tessera.files import read_json
from tessera.interop.tao import shared
from tessera.interop.tao.shared import NOT_RUN, Channels, NotNegative, data_paths
from tessera.interop.tao.table import Fixed, LocalPath, Settings, Side, Table, machine, part, revived, same, taken
from tessera.structures import told_apart

GCVIT = tuple(f"gc_vit_{size}" for size in ("xxtiny", "xtiny", "tiny", "small", "base", "large", "large_384"))
PROJECTIONS = ["reference_points", "sampling_offsets"]
SIZES_OF_TEST = "test_random_resize and random_resize_max_size count"
CALIBRATION = "no INT8 engine is built here"
SPLITS = {"train_data_sources": "train", "val_data_sources": "val", "test_data_sources": "test"}
SOURCE = {"images": "image_dir", "annotations": "json_file"}
Source = dict[str, LocalPath]
Sources = list[Source] | Source
Pictures = dict[str, LocalPath | list[LocalPath]]
Sides = Annotated[list[Side], MinLen(1)]
AUGMENTATION = "dataset.augmentation"

KEYS = (
    *(
        part(f"dataset.{key}", [], f"dataset.{split}.{{images,annotations}}", kind=Sources)
        for key, split in SPLITS.items()
    ),
    part("dataset.infer_data_sources", {}, "inference.images dataset.label_map", kind=Pictures),
    taken("dataset.batch_size", 4, "dataset.{train,val,test}.batch_size"),
    machine("dataset.workers", 8, "dataset.{train,val,test}.num_workers"),
    part("dataset.num_classes", 91, "dataset.{num_classes,contiguous_id}", kind=Annotated[int, Ge(2)]),
    part("dataset.eval_class_ids", None, "evaluate.classes", kind=list[int]),
    part(f"{AUGMENTATION}.scales", list(range(480, 801, 32)), f"{AUGMENTATION}.train_min_size", kind=Sides),
    taken(f"{AUGMENTATION}.input_mean", [0.485, 0.456, 0.406], "model.pixel_mean", shared.pixels_0_1, kind=Channels),
    taken(f"{AUGMENTATION}.input_std", [0.229, 0.224, 0.225], "model.pixel_std", shared.pixels_0_1, kind=Channels),
    part(f"{AUGMENTATION}.train_random_resize", [400, 500, 600], kind=list[Side]),
    taken(f"{AUGMENTATION}.horizontal_flip_prob", 0.5, f"{AUGMENTATION}.flip"),
    part(f"{AUGMENTATION}.train_random_crop_min", 384, f"{AUGMENTATION}.train_random_crop"),
    part(f"{AUGMENTATION}.train_random_crop_max", 600, f"{AUGMENTATION}.train_random_crop"),
    taken(f"{AUGMENTATION}.random_resize_max_size", 1333, f"{AUGMENTATION}.{{train,test}}_max_size"),
    taken(f"{AUGMENTATION}.test_random_resize", 800, f"{AUGMENTATION}.test_min_size"),
    part(f"{AUGMENTATION}.fixed_padding", True),
    part(f"{AUGMENTATION}.fixed_random_crop", None, f"{AUGMENTATION}.{{train_crop_size,train_scale}}", kind=Side),
    part("model.backbone", "resnet_50", "model.backbone.name", kind=Literal[("resnet_50", *GCVIT)]),
    taken("model.pretrained_backbone_path", None, "model.backbone.pretrained", kind=LocalPath),
    part("model.train_backbone", True, "train.freeze"),
    taken("model.dilation", False),
    taken("model.num_queries", 300),
    part("model.num_feature_levels", 4),
    part("model.return_interm_indices", [1, 2, 3, 4], "model.strides"),
    taken("model.with_box_refine", True),
    revived("model.num_select", 300, "postprocess.num_select", f"TAO's code always keeps 100 {NOT_RUN}"),
    taken("model.aux_loss", True, "model.loss.aux_loss"),
    taken("model.hidden_dim", 256),
    taken("model.nheads", 8),
    taken("model.{enc,dec}_layers", 6),
    taken("model.dim_feedforward", 1024),
    taken("model.{enc,dec}_n_points", 4),
    taken("model.dropout_ratio", 0.3, "model.dropout"),
    taken("model.cls_loss_coef", 2.0, "model.loss.class_weight"),
    taken("model.bbox_loss_coef", 5.0, "model.loss.box_weight"),
    taken("model.giou_loss_coef", 2.0, "model.loss.giou_weight"),
    taken("model.focal_alpha", 0.25, "model.loss.focal_alpha"),
    same("model.loss_types", ["labels", "boxes"], "give a loss the weight 0 to leave it out"),
    same("model.backbone_names", ["backbone.0"], "name other modules under train.optim.multipliers"),
    part("model.linear_proj_names", PROJECTIONS, "train.optim.multipliers"),
    taken("train.pretrained_model_path", None, kind=LocalPath),
    part("train.clip_grad_norm", 0.1, "train.clip_grad_{norm,type}", kind=NotNegative),
    taken("train.precision", "fp32", kind=Literal["fp32", "fp16"]),
    machine("train.activation_checkpoint", True),
    taken("train.optim.optimizer", "AdamW", "train.optim.type", kind=Literal["AdamW", "SGD"]),
    taken("train.optim.lr", 2e-4),
    part("train.optim.lr_backbone", 2e-5, "train.optim.backbone_multiplier"),
    part("train.optim.lr_linear_proj_mult", 0.1, "train.optim.multipliers"),
    taken("train.optim.weight_decay", 1e-4),
    taken("train.optim.lr_scheduler", "MultiStep", kind=Literal["MultiStep", "StepLR"]),
    taken("train.optim.lr_steps", [40], "train.optim.milestones"),
    machine("train.optim.lr_step_size", 40, "train.optim.step_size"),
    taken("train.optim.lr_decay", 0.1, "train.optim.gamma"),
    taken("evaluate.conf_threshold", 0.0, "postprocess.conf_threshold"),
    taken("inference.conf_threshold", 0.5, "inference.score_threshold"),
    part("inference.color_map", {}, kind=dict[str, str]),
    taken("inference.outline_width", 3),
    *shared.common(epochs=10, seed=1234, gpus=1, width=640, height=640),
)

NOTES = {
    **shared.NOTES,
    "its classmap names the classes everywhere": "dataset.infer_data_sources",
    "the largest id plus 1 there": "dataset.num_classes",
    "ids there, names here": "dataset.eval_class_ids",
    "false: the backbone is frozen": "model.train_backbone",
    "0..3 are the backbone's maps of the strides 4..32; 4 is made by a convolution of stride 2": "model.return_interm_indices",
    shared.OTHER_WEIGHTS: "train.pretrained_model_path",
    "0 is no clipping": "train.clip_grad_norm",
    "a rate there, a factor on lr here": "train.optim.lr_backbone",
    "what is drawn and written as KITTI labels": "inference.conf_threshold",
    "names of colours there, [red, green, blue] here": "inference.color_map",
}

LEFT_OUT = {
    **shared.LEFT_OUT,
    shared.QUANTIZE: f"{shared.LEFT_OUT[shared.QUANTIZE]} dataset.quant_calibration_data_sources",
    "it describes the conversion of KITTI labels to COCO files; here the keys of `dataset.convert` do (docs/convert.md)": (
        "input_source data_root {image,label}_dir_name val_split num_shards num_partitions partition_mode image_extension mapping_path"
    ),
    "all loaders always share one copy of the annotations": "dataset.dataset_type",
    "every process takes its share of every batch, on one node as on several": "dataset.train_sampler",
    "the keys of dataset.augmentation count": "train.{input_width,input_height}",
    "a switch of TAO's own tests": "inference.is_internal",
    SIZES_OF_TEST: "inference.{input_width,input_height}",
    "no DeepStream configuration is written": "export.serialize_nvdsinfer",
    f"{shared.TENSORRT_PRECISION}; {CALIBRATION}": "gen_trt_engine.tensorrt.data_type",
    CALIBRATION: "gen_trt_engine.tensorrt.calibration.{cal_image_dir,cal_cache_file,cal_batch_size,cal_batches}",
}
IGNORED = {
    f"TAO never reads it {NOT_RUN}": "model.dld_model_dir_path",
    f"TAO never reads it; train.clip_grad_norm counts {NOT_RUN}": "model.clip_max_norm",
    shared.MONITOR: "train.optim.monitor_name",
    f"TAO's evaluation ignores it {NOT_RUN}; {SIZES_OF_TEST}": "evaluate.{input_width,input_height}",
}


def _backbone(settings: Settings) -> Mapping[str, Any]:
    name = settings["model.backbone"]
    return {"model.backbone.name": "resnet50" if name == "resnet_50" else name}


def _sources(settings: Settings) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for leaf, split in SPLITS.items():
        key = f"dataset.{leaf}"
        for source in (sources := _listed(settings[key])):
            if source.keys() != set(SOURCE.values()):
                settings.refuse(
                    key, f"a source has the keys {', '.join(source) or 'none'}; expected image_dir and json_file"
                )
                return {}
        if sources:
            found |= {
                f"dataset.{split}.{ours}": data_paths([source[key] for source in sources])
                for ours, key in SOURCE.items()
            }
    if found:
        found |= {"dataset.type": "coco", **shared.evaluated(found)}
    infer = settings["dataset.infer_data_sources"]
    if strange := infer.keys() - {"image_dir", "classmap"}:
        settings.refuse("dataset.infer_data_sources", f"unknown key {min(strange)!r}; legal are image_dir and classmap")
    folders = _listed(infer.get("image_dir"))
    if len(folders) > 1:
        settings.note(
            "dataset.infer_data_sources",
            f"one folder per call here; for the others say `tessera infer <experiment> inference.images=... --out FOLDER`: {', '.join(folders[1:])}",
        )
    named = {"inference.images": folders[:1], "dataset.label_map": infer.get("classmap")}
    return found | {key: data_paths(paths) for key, paths in named.items() if paths}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _classes(settings: Settings) -> Mapping[str, Any]:
    """TAO has a logit for every id from 0 to the largest; here for 1 to the largest."""
    count = settings["dataset.num_classes"] - 1
    names = _class_map(settings)
    if len(names) > count:
        settings.refuse(
            "dataset.num_classes",
            f"{count + 1}, but the class map has {len(names)} classes, so ids go up to {len(names)}; set it to {len(names) + 1}, the largest "
            "id plus 1",
        )
    settings.note(
        "dataset.num_classes",
        "the largest id plus 1 there, the largest id here; `tessera check` compares it with the annotations",
    )
    return {"dataset.contiguous_id": False, "dataset.num_classes": count}


def _class_map(settings: Settings) -> dict[int, str]:
    path = settings["dataset.infer_data_sources"].get("classmap")
    return shared.named_ids(path if isinstance(path, str) else None)


def _evaluated(settings: Settings) -> Mapping[str, Any]:
    if not settings.given("dataset.eval_class_ids"):
        return {}
    ids, names = settings["dataset.eval_class_ids"], _class_map(settings) or _categories(settings)
    if unknown := [number for number in ids if number not in names]:
        known = (
            "the annotations have no such ids"
            if names
            else "no class map and no annotation file of the spec on this machine names any"
        )
        settings.refuse(
            "dataset.eval_class_ids",
            f"ids {unknown} have no names here ({known}); remove the key (TAO's template writes [1], which evaluates one class alone), or "
            "name the classes under evaluate.classes in the written file",
        )
    keys = dict(zip(names, told_apart(list(names.values()), list(names)), strict=True))
    return {"evaluate.classes": [keys[number] for number in ids if number in keys]}


def _categories(settings: Settings) -> dict[int, str]:
    """Id -> name, from the first annotation file that is on this machine. Raises UserError where that is no JSON."""
    for source in (*_listed(settings["dataset.val_data_sources"]), *_listed(settings["dataset.train_data_sources"])):
        if (path := Path(source.get("json_file", ""))).is_file():
            with contextlib.suppress(KeyError, TypeError):
                return {int(entry["id"]): str(entry["name"]) for entry in read_json(path)["categories"]}
    return {}


def _levels(settings: Settings) -> Mapping[str, Any]:
    indices, levels = settings["model.return_interm_indices"], settings["model.num_feature_levels"]
    if len(indices) != levels:
        settings.refuse(
            "model.return_interm_indices",
            f"{indices} are {len(indices)} levels, but model.num_feature_levels is {levels}; make them agree",
        )
    strides = [4 * 2**index for index in indices if index < 4]
    if not strides or sorted(set(indices)) != indices:
        settings.refuse(
            "model.return_interm_indices", f"expected ascending indices with one of 0..3 at least, found {indices}"
        )
    return {"model.strides": strides, "model.num_feature_levels": levels}


def _sizes(settings: Settings) -> Mapping[str, Any]:
    crop = settings[f"{AUGMENTATION}.fixed_random_crop"]
    keys = ("train_random_resize", "train_random_crop", "train_crop_size", "train_scale", "fixed_padding")
    found: dict[str, Any] = {f"{AUGMENTATION}.{key}": None for key in keys}
    if crop is not None:
        unread = ("scales", "train_random_resize", "train_random_crop_min", "train_random_crop_max", "fixed_padding")
        settings.pass_over("fixed_random_crop takes its place", *(f"{AUGMENTATION}.{leaf}" for leaf in unread))
        settings.note(
            f"{AUGMENTATION}.fixed_random_crop", "factors from 0.1 to 2, as in the published large-scale jitter"
        )
        return found | {f"{AUGMENTATION}.train_crop_size": [crop, crop], f"{AUGMENTATION}.train_scale": [0.1, 2.0]}
    scales, largest = sorted(settings[f"{AUGMENTATION}.scales"]), settings[f"{AUGMENTATION}.random_resize_max_size"]
    low, high = (settings[f"{AUGMENTATION}.train_random_crop_{end}"] for end in ("min", "max"))
    if low > high:
        settings.refuse(f"{AUGMENTATION}.train_random_crop_min", f"{low} is above train_random_crop_max, {high}")
    return found | {
        f"{AUGMENTATION}.train_min_size": scales,
        f"{AUGMENTATION}.train_random_resize": settings[f"{AUGMENTATION}.train_random_resize"],
        f"{AUGMENTATION}.train_random_crop": [low, high],
        f"{AUGMENTATION}.fixed_padding": [scales[-1], largest] if settings[f"{AUGMENTATION}.fixed_padding"] else None,
    }


def _rates(settings: Settings) -> Mapping[str, Any]:
    names, factor = settings["model.linear_proj_names"], settings["train.optim.lr_linear_proj_mult"]
    multiplier = settings["train.optim.lr_backbone"] / settings["train.optim.lr"]
    return {
        "train.optim.backbone_multiplier": round(multiplier, 12),
        "train.optim.multipliers": {**dict.fromkeys(PROJECTIONS, 1.0), **dict.fromkeys(names, factor)},
    }


def _colors(settings: Settings) -> Mapping[str, Any]:
    if not settings.given("inference.color_map"):
        return {}
    from PIL import ImageColor  # every colour name of CSS, and #rrggbb

    found = {}
    for name, color in settings["inference.color_map"].items():
        try:
            found[name] = list(ImageColor.getrgb(color)[:3])
        except ValueError:
            settings.refuse(
                "inference.color_map", f"{name}: {color!r} is no colour; expected a name such as red, or #rrggbb"
            )
    return {"inference.color_map": found}


FREEZE = {
    "backbone": ("backbone",),
    "input_proj": ("input_proj",),
    "transformer.encoder": ("encoder",),
    "transformer.decoder": ("decoder",),
}
RULES = (
    _backbone,
    _sources,
    _classes,
    _evaluated,
    _levels,
    _sizes,
    shared.clip,
    _rates,
    _colors,
    shared.gpus,
    shared.seed,
    shared.freeze_rule(FREEZE, "model.train_backbone"),
)

TABLE = Table(
    "deformable_detr",
    KEYS,
    LEFT_OUT,
    IGNORED,
    NOTES,
    RULES,
    fixed=(
        Fixed("train.optim.warmup_iters", 0, "TAO has no key for it"),
        Fixed("dataset.augmentation.color_jitter", False, "TAO does not change colours for Deformable DETR"),
        Fixed("dataset.augmentation.single_class_max_area", 1.0, "TAO has no such limit for Deformable DETR"),
        Fixed(
            "model.backbone.norm",
            "frozen",
            "TAO never trains the batch norms of its ResNet",
            lambda settings: settings["model.backbone"] == "resnet_50",
        ),
    ),
    names={
        "model.pretrained_model_path": "model.pretrained_backbone_path",
        "train.optim.lr_monitor": "train.optim.monitor_name",
    },
)
