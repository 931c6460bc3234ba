"""TAO's Deformable DETR spec, key by key; the spec of its `convert` action too, which is a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tessera.files import read_json
from tessera.interop.tao import shared
from tessera.interop.tao.table import (
    PATH,
    SECTION,
    SIDE,
    TEXT,
    TRUTH,
    UNIT,
    Fixed,
    Settings,
    Table,
    choice,
    either,
    ignored,
    left_out,
    listing,
    number,
    part,
    revived,
    same,
    taken,
    whole,
)
from tessera.structures import told_apart

GCVIT = tuple(f"gc_vit_{size}" for size in ("xxtiny", "xtiny", "tiny", "small", "base", "large", "large_384"))
PROJECTIONS = ["reference_points", "sampling_offsets"]
CONVERT = (
    "it describes the conversion of KITTI labels to COCO files; here the keys of `dataset.convert` do (docs/convert.md)"
)
SIZES_OF_TEST = "test_random_resize and random_resize_max_size count"
CALIBRATION = "no INT8 engine is built here"

CONVERT_ROWS = tuple(
    left_out(key, kind, default, CONVERT)
    for key, kind, default in (
        ("input_source", PATH, ""),
        ("data_root", PATH, None),
        ("image_dir_name", TEXT, None),
        ("label_dir_name", TEXT, None),
        ("val_split", number(0, 100), 0),
        ("num_shards", whole(0), 20),
        ("num_partitions", whole(1), 1),
        ("partition_mode", choice("None", "random"), None),
        ("image_extension", TEXT, ".jpg"),
        ("mapping_path", PATH, None),
    )
)

SPLITS = {"train_data_sources": "train", "val_data_sources": "val", "test_data_sources": "test"}


def _source_keys(split: str) -> tuple[str, ...]:
    return (f"dataset.{split}.images", f"dataset.{split}.annotations")


DATASET = (
    part("dataset.train_data_sources", either(listing(SECTION), SECTION), [], _source_keys("train")),
    part("dataset.val_data_sources", either(listing(SECTION), SECTION), [], _source_keys("val")),
    part("dataset.test_data_sources", either(SECTION, listing(SECTION)), {}, _source_keys("test")),
    part(
        "dataset.infer_data_sources",
        SECTION,
        {},
        ("inference.images", "dataset.label_map"),
        "its classmap names the classes everywhere",
    ),
    left_out("dataset.quant_calibration_data_sources", SECTION, {}, shared.QUANTIZE),
    taken(
        "dataset.batch_size",
        whole(1),
        4,
        ("dataset.train.batch_size", "dataset.val.batch_size", "dataset.test.batch_size"),
    ),
    taken(
        "dataset.workers",
        whole(0),
        8,
        ("dataset.train.num_workers", "dataset.val.num_workers", "dataset.test.num_workers"),
        impose=False,
    ),
    left_out("dataset.pin_memory", TRUTH, True, "the loaders pin memory where there is a GPU"),
    left_out(
        "dataset.dataset_type",
        choice("serialized", "default"),
        "serialized",
        "all loaders always share one copy of the annotations",
    ),
    part(
        "dataset.num_classes",
        whole(2),
        91,
        ("dataset.num_classes", "dataset.contiguous_id"),
        "the largest id plus 1 there",
    ),
    part("dataset.eval_class_ids", listing(whole(1)), None, "evaluate.classes", "ids there, names here"),
    left_out(
        "dataset.train_sampler",
        choice("default_sampler", "non_uniform_sampler", "uniform_sampler"),
        "default_sampler",
        "every process takes its share of every batch, on one node as on several",
    ),
    part(
        "dataset.augmentation.scales", listing(SIDE), list(range(480, 801, 32)), "dataset.augmentation.train_min_size"
    ),
    taken(
        "dataset.augmentation.input_mean",
        listing(number(), 3),
        [0.485, 0.456, 0.406],
        "model.pixel_mean",
        shared.pixels_0_1,
    ),
    taken(
        "dataset.augmentation.input_std",
        listing(number(above=0), 3),
        [0.229, 0.224, 0.225],
        "model.pixel_std",
        shared.pixels_0_1,
    ),
    part(
        "dataset.augmentation.train_random_resize",
        listing(SIDE),
        [400, 500, 600],
        "dataset.augmentation.train_random_resize",
    ),
    taken("dataset.augmentation.horizontal_flip_prob", UNIT, 0.5, "dataset.augmentation.flip"),
    part("dataset.augmentation.train_random_crop_min", SIDE, 384, "dataset.augmentation.train_random_crop"),
    part("dataset.augmentation.train_random_crop_max", whole(32, 1333), 600, "dataset.augmentation.train_random_crop"),
    taken(
        "dataset.augmentation.random_resize_max_size",
        SIDE,
        1333,
        ("dataset.augmentation.train_max_size", "dataset.augmentation.test_max_size"),
    ),
    taken("dataset.augmentation.test_random_resize", SIDE, 800, "dataset.augmentation.test_min_size"),
    part("dataset.augmentation.fixed_padding", TRUTH, True, "dataset.augmentation.fixed_padding"),
    part(
        "dataset.augmentation.fixed_random_crop",
        SIDE,
        None,
        ("dataset.augmentation.train_crop_size", "dataset.augmentation.train_scale"),
    ),
)

MODEL = (
    part("model.backbone", choice("resnet_50", *GCVIT), "resnet_50", "model.backbone.name"),
    taken("model.pretrained_backbone_path", PATH, None, "model.backbone.pretrained"),
    ignored("model.dld_model_dir_path", PATH, None, "TAO never reads it (read from its source, not run)"),
    part("model.train_backbone", TRUTH, True, "train.freeze", "false: the backbone is frozen"),
    taken("model.dilation", TRUTH, False, "model.dilation"),
    taken("model.num_queries", whole(100, 900), 300, "model.num_queries"),
    part("model.num_feature_levels", whole(1, 5), 4, "model.num_feature_levels"),
    part(
        "model.return_interm_indices",
        listing(whole(0, 4)),
        [1, 2, 3, 4],
        "model.strides",
        "0..3 are the backbone's maps of the strides 4..32; 4 is made by a convolution of stride 2",
    ),
    taken("model.with_box_refine", TRUTH, True, "model.with_box_refine"),
    revived(
        "model.num_select",
        whole(1),
        300,
        "postprocess.num_select",
        "TAO's code always keeps 100 (read from its source, not run)",
    ),
    taken("model.aux_loss", TRUTH, True, "model.loss.aux_loss"),
    taken("model.hidden_dim", whole(1), 256, "model.hidden_dim"),
    taken("model.nheads", whole(1), 8, "model.nheads"),
    taken("model.enc_layers", whole(1), 6, "model.enc_layers"),
    taken("model.dec_layers", whole(1), 6, "model.dec_layers"),
    taken("model.dim_feedforward", whole(1), 1024, "model.dim_feedforward"),
    taken("model.enc_n_points", whole(1), 4, "model.enc_n_points"),
    taken("model.dec_n_points", whole(1), 4, "model.dec_n_points"),
    taken("model.dropout_ratio", number(0, 1), 0.3, "model.dropout"),
    taken("model.cls_loss_coef", number(0), 2.0, "model.loss.class_weight"),
    taken("model.bbox_loss_coef", number(0), 5.0, "model.loss.box_weight"),
    taken("model.giou_loss_coef", number(0), 2.0, "model.loss.giou_weight"),
    taken("model.focal_alpha", UNIT, 0.25, "model.loss.focal_alpha"),
    same("model.loss_types", listing(TEXT), ["labels", "boxes"], "give a loss the weight 0 to leave it out"),
    ignored(
        "model.clip_max_norm",
        number(0),
        0.1,
        "TAO never reads it; train.clip_grad_norm counts (read from its source, not run)",
    ),
    same("model.backbone_names", listing(TEXT), ["backbone.0"], "name other modules under train.optim.multipliers"),
    part("model.linear_proj_names", listing(TEXT), PROJECTIONS, "train.optim.multipliers"),
)

TRAIN = (
    *shared.train(epochs=10, seed=1234, gpus=1),
    part("train.freeze", listing(TEXT), [], "train.freeze"),
    taken("train.pretrained_model_path", PATH, None, "train.pretrained_model_path", note=shared.OTHER_WEIGHTS),
    part("train.clip_grad_norm", number(0), 0.1, ("train.clip_grad_norm", "train.clip_grad_type"), "0 is no clipping"),
    shared.DRY_RUN,
    taken("train.precision", choice("fp32", "fp16"), "fp32", "train.precision"),
    shared.DISTRIBUTED,
    taken("train.activation_checkpoint", TRUTH, True, "train.activation_checkpoint", impose=False),
    left_out("train.verbose", TRUTH, False, "set train.verbose in the written file"),
    left_out("train.input_width", SIDE, None, "the keys of dataset.augmentation count"),
    left_out("train.input_height", SIDE, None, "the keys of dataset.augmentation count"),
    taken("train.optim.optimizer", choice("AdamW", "SGD"), "AdamW", "train.optim.type"),
    taken("train.optim.lr", number(above=0), 2e-4, "train.optim.lr"),
    part(
        "train.optim.lr_backbone",
        number(0),
        2e-5,
        "train.optim.backbone_multiplier",
        "a rate there, a factor on lr here",
    ),
    part("train.optim.lr_linear_proj_mult", number(0), 0.1, "train.optim.multipliers"),
    taken("train.optim.momentum", number(0, 1), 0.9, "train.optim.momentum", impose=False),
    taken("train.optim.weight_decay", number(0), 1e-4, "train.optim.weight_decay"),
    taken(
        "train.optim.lr_scheduler",
        choice("MultiStep", "StepLR"),
        "MultiStep",
        "train.optim.lr_scheduler",
        shared.from_mapping(shared.SCHEDULERS),
    ),
    taken("train.optim.lr_steps", listing(whole(1)), [40], "train.optim.milestones"),
    taken("train.optim.lr_step_size", whole(1), 40, "train.optim.step_size", impose=False),
    taken("train.optim.lr_decay", number(0, 1), 0.1, "train.optim.gamma"),
    ignored("train.optim.monitor_name", choice("val_loss", "train_loss"), "val_loss", shared.MONITOR),
)

TASKS = (
    *shared.task("evaluate"),
    taken("evaluate.conf_threshold", UNIT, 0.0, "postprocess.conf_threshold"),
    ignored(
        "evaluate.input_width",
        SIDE,
        None,
        f"TAO's evaluation ignores it (read from its source, not run); {SIZES_OF_TEST}",
    ),
    ignored(
        "evaluate.input_height",
        SIDE,
        None,
        f"TAO's evaluation ignores it (read from its source, not run); {SIZES_OF_TEST}",
    ),
    *shared.task("inference"),
    taken(
        "inference.conf_threshold",
        UNIT,
        0.5,
        "inference.score_threshold",
        note="what is drawn and written as KITTI labels",
    ),
    part(
        "inference.color_map", SECTION, None, "inference.color_map", "names of colours there, [red, green, blue] here"
    ),
    taken("inference.outline_width", whole(1), 3, "inference.outline_width"),
    left_out("inference.is_internal", TRUTH, False, "a switch of TAO's own tests"),
    left_out("inference.input_width", SIDE, None, SIZES_OF_TEST),
    left_out("inference.input_height", SIDE, None, SIZES_OF_TEST),
)

ENGINE = (
    *shared.engine(
        left_out(
            "gen_trt_engine.tensorrt.data_type",
            choice("FP32", "FP16", "INT8"),
            "FP32",
            f"{shared.TENSORRT_PRECISION}; {CALIBRATION}",
        )
    ),
    *(
        left_out(f"gen_trt_engine.tensorrt.calibration.{key}", kind, default, CALIBRATION)
        for key, kind, default in (
            ("cal_image_dir", listing(PATH), []),
            ("cal_cache_file", PATH, ""),
            ("cal_batch_size", whole(1), 1),
            ("cal_batches", whole(1), 1),
        )
    ),
)


def _backbone(settings: Settings) -> Mapping[str, Any]:
    name = settings["model.backbone"]
    return {"model.backbone.name": "resnet50" if name == "resnet_50" else name}


def _sources(settings: Settings) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for leaf, split in SPLITS.items():
        key = f"dataset.{leaf}"
        if not settings.given(key):
            continue
        sources = settings[key] if isinstance(settings[key], list) else [settings[key]]
        for source in sources:
            _check_source(settings, key, source)
        paths = {
            ours: [source.get(theirs) for source in sources]
            for ours, theirs in (("images", "image_dir"), ("annotations", "json_file"))
        }
        if sources and all(isinstance(path, str) for values in paths.values() for path in values):
            found |= {f"dataset.{split}.{ours}": shared.data_paths(values) for ours, values in paths.items()}
    annotated = "dataset.test.annotations" in found
    if annotated or "dataset.val.annotations" in found:
        found["evaluate.split"] = "test" if annotated else "val"
    if found:
        found["dataset.type"] = "coco"
    infer = settings["dataset.infer_data_sources"]
    for name in infer:
        if name not in ("image_dir", "classmap"):
            settings.refuse("dataset.infer_data_sources", f"unknown key {name!r}; legal are image_dir and classmap")
    folders = infer.get("image_dir") or []
    folders = folders if isinstance(folders, list) else [folders]
    folders = [folder for folder in folders if _is_path(settings, "dataset.infer_data_sources", "image_dir", folder)]
    if folders:
        found["inference.images"] = shared.data_path(folders[0])
    if len(folders) > 1:
        settings.note(
            "dataset.infer_data_sources",
            f"one folder per call here; for the others say `tessera infer <experiment> inference.images=... --out FOLDER`: {', '.join(folders[1:])}",
        )
    if infer.get("classmap") and _is_path(settings, "dataset.infer_data_sources", "classmap", infer["classmap"]):
        found["dataset.label_map"] = shared.data_path(infer["classmap"])
    return found


def _check_source(settings: Settings, key: str, source: Mapping[str, Any]) -> None:
    for name in ("image_dir", "json_file"):
        if name not in source or source[name] is None:
            settings.refuse(key, f"a source without {name}; expected image_dir and json_file")
        else:
            _is_path(settings, key, name, source[name])
    for name in source:
        if name not in ("image_dir", "json_file"):
            settings.refuse(key, f"unknown key {name!r}; legal are image_dir and json_file")


def _is_path(settings: Settings, key: str, name: str, value: Any) -> bool:
    """Refuses the value where it is none."""
    try:
        PATH.read(value)
    except ValueError as error:
        settings.refuse(key, f"{name}: found {value!r}; {str(error) or f'expected {PATH.words}'}")
        return False
    return True


def _classes(settings: Settings) -> Mapping[str, Any]:
    """TAO has a logit for every id from 0 to the largest; here for 1 to the largest."""
    count = settings["dataset.num_classes"] - 1
    names = _class_map(settings)
    if names and len(names) > count:
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


def _class_map(settings: Settings) -> list[str]:
    """Empty where the file is not on this machine, or is no text, which `tessera check` tells in detail."""
    path = settings["dataset.infer_data_sources"].get("classmap")
    if not isinstance(path, str) or not Path(path).is_file():
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return []
    return [line.strip() for line in lines if line.strip()]


def _evaluated(settings: Settings) -> Mapping[str, Any]:
    if not settings.given("dataset.eval_class_ids"):
        return {}
    ids, names = (
        settings["dataset.eval_class_ids"],
        dict(enumerate(_class_map(settings), start=1)) or _categories(settings),
    )
    unknown = [number for number in ids if number not in names]
    if unknown:
        known = (
            "no class map and no annotation file of the spec on this machine names any"
            if not names
            else "the annotations have no such ids"
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
    for key in ("dataset.val_data_sources", "dataset.train_data_sources"):
        sources = settings[key] if isinstance(settings[key], list) else [settings[key]]
        for source in sources:
            path = Path(str(source.get("json_file")))
            if path.is_file():
                content = read_json(path)
                listed = content.get("categories") if isinstance(content, dict) else None
                entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
                return {
                    entry["id"]: str(entry["name"])
                    for entry in entries
                    if isinstance(entry.get("id"), int) and "name" in entry
                }
    return {}


def _levels(settings: Settings) -> Mapping[str, Any]:
    indices, levels = settings["model.return_interm_indices"], settings["model.num_feature_levels"]
    if len(indices) != levels:
        settings.refuse(
            "model.return_interm_indices",
            f"{indices} are {len(indices)} levels, but model.num_feature_levels is {levels}; make them agree",
        )
    strides = [4 * 2**index for index in sorted(indices) if index < 4]
    if not strides or sorted(set(indices)) != indices:
        settings.refuse(
            "model.return_interm_indices", f"expected ascending indices with one of 0..3 at least, found {indices}"
        )
    return {"model.strides": strides, "model.num_feature_levels": levels}


def _sizes(settings: Settings) -> Mapping[str, Any]:
    prefix = "dataset.augmentation"
    crop = settings[f"{prefix}.fixed_random_crop"]
    if crop is not None:
        for leaf in (
            "scales",
            "train_random_resize",
            "train_random_crop_min",
            "train_random_crop_max",
            "fixed_padding",
        ):
            settings.pass_over(f"{prefix}.{leaf}", "fixed_random_crop takes its place")
        settings.note(f"{prefix}.fixed_random_crop", "factors from 0.1 to 2, as in the published large-scale jitter")
        return {
            f"{prefix}.train_crop_size": [crop, crop],
            f"{prefix}.train_scale": [0.1, 2.0],
            f"{prefix}.train_random_resize": None,
            f"{prefix}.train_random_crop": None,
            f"{prefix}.fixed_padding": None,
        }
    scales, largest = sorted(settings[f"{prefix}.scales"]), settings[f"{prefix}.random_resize_max_size"]
    low, high = settings[f"{prefix}.train_random_crop_min"], settings[f"{prefix}.train_random_crop_max"]
    if low > high:
        settings.refuse(f"{prefix}.train_random_crop_min", f"{low} is above train_random_crop_max, {high}")
    return {
        f"{prefix}.train_min_size": scales,
        f"{prefix}.train_random_resize": settings[f"{prefix}.train_random_resize"],
        f"{prefix}.train_random_crop": [low, high],
        f"{prefix}.train_crop_size": None,
        f"{prefix}.train_scale": None,
        f"{prefix}.fixed_padding": [scales[-1], largest] if settings[f"{prefix}.fixed_padding"] else None,
    }


def _rates(settings: Settings) -> Mapping[str, Any]:
    rate = settings["train.optim.lr"]
    names, factor = settings["model.linear_proj_names"], settings["train.optim.lr_linear_proj_mult"]
    return {
        "train.optim.backbone_multiplier": round(settings["train.optim.lr_backbone"] / rate, 12),
        "train.optim.multipliers": {**dict.fromkeys(PROJECTIONS, 1.0), **dict.fromkeys(names, factor)},
    }


def _colors(settings: Settings) -> Mapping[str, Any]:
    if not settings.given("inference.color_map"):
        return {}
    from PIL import ImageColor  # every colour name of CSS, and #rrggbb

    found = {}
    for name, color in settings["inference.color_map"].items():
        try:
            found[name] = list(ImageColor.getrgb(str(color))[:3])
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

TABLE = Table(
    "deformable_detr",
    (
        *shared.ROOT,
        *CONVERT_ROWS,
        *DATASET,
        *MODEL,
        *TRAIN,
        *TASKS,
        *shared.export(640, 640),
        left_out("export.serialize_nvdsinfer", TRUTH, False, "no DeepStream configuration is written"),
        *ENGINE,
        *shared.QUANTIZE_ROWS,
    ),
    (
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
    ),
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
