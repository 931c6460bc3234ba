"""TAO's Mask2Former spec, key by key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tessera.interop.tao import shared
from tessera.interop.tao.table import (
    PATH,
    SIDE,
    TEXT,
    TRUTH,
    UNIT,
    Fixed,
    Kind,
    Row,
    Settings,
    Table,
    choice,
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
from tessera.spec.checks import MODES
from tessera.spec.networks import SWIN_SIZES

TYPES = {"ade": "mask_pairs", "coco": "coco", "coco_panoptic": "coco_panoptic"}
SPLITS = ("train", "val", "test")
SOURCES = ("annot_file", "instance_json", "panoptic_json", "panoptic_dir")
EFFICIENTVIT = ("b0", "b1", "b2", "b3", "l0", "l1", "l2", "l3")

OVERWRITTEN = "TAO overwrites it with the size that swin.type names"
DEAD = "TAO's loss always uses whole masks (read from its source, not run); here the loss is made from sampled points, as published"


def _split(name: str) -> tuple[Row, ...]:
    key, ours = f"dataset.{name}", f"dataset.{name}"
    return (
        part(f"{key}.type", choice(*TYPES), "ade", "dataset.type"),
        left_out(f"{key}.name", TEXT, "", "the dataset's name is that of its file"),
        part(
            f"{key}.img_dir",
            PATH,
            "",
            (f"{ours}.images", "inference.images") if name == "test" else f"{ours}.images",
            "a test folder without annotations: inference.images" if name == "test" else "",
        ),
        part(f"{key}.root_dir", PATH, "", f"{ours}.images"),
        part(f"{key}.annot_file", PATH, "", f"{ours}.annotations"),
        part(f"{key}.instance_json", PATH, "", f"{ours}.annotations"),
        part(f"{key}.panoptic_json", PATH, "", f"{ours}.annotations"),
        part(f"{key}.panoptic_dir", PATH, "", f"{ours}.panoptic"),
        taken(f"{key}.batch_size", whole(1), 1, f"{ours}.batch_size"),
        taken(f"{key}.num_workers", whole(0), 1, f"{ours}.num_workers", impose=False),
        taken(
            f"{key}.target_size",
            listing(SIDE),
            [],
            f"{ours}.target_size",
            _target_size,
            "[width, height] there, [height, width] here",
        ),
    )


def _target_size(value: list[int]) -> list[int] | None:
    if len(value) not in (0, 2):
        raise ValueError("expected [width, height]")
    return shared.height_width(value)


def _swin_size(key: str, kind: Kind, default: Any) -> Row:
    return ignored(key, kind, default, OVERWRITTEN)


def _efficientvit(key: str, kind: Kind, default: Any) -> Row:
    return ignored(f"model.backbone.efficientvit.{key}", kind, default, "TAO reads efficientvit.name only")


DATASET = (
    part("dataset.type", choice(*TYPES), None, "dataset.type", "the older form: of all splits"),
    *(row for name in SPLITS for row in _split(name)),
    left_out("dataset.pin_memory", TRUTH, True, "the loaders pin memory where there is a GPU"),
    taken("dataset.pixel_mean", listing(number(), 3), [0.485, 0.456, 0.406], "model.pixel_mean", shared.pixels_0_1),
    taken(
        "dataset.pixel_std", listing(number(above=0), 3), [0.229, 0.224, 0.225], "model.pixel_std", shared.pixels_0_1
    ),
    part("dataset.contiguous_id", TRUTH, False, ("dataset.contiguous_id", "dataset.num_classes")),
    part("dataset.label_map", PATH, "", "dataset.label_map"),
    left_out("dataset.quant_calibration_dataset.images_dir", PATH, "", shared.QUANTIZE),
    part("dataset.augmentation.train_min_size", listing(SIDE), [640], "dataset.augmentation.train_min_size"),
    taken("dataset.augmentation.train_max_size", SIDE, 2560, "dataset.augmentation.train_max_size"),
    taken("dataset.augmentation.train_crop_size", listing(SIDE, 2), [640, 640], "dataset.augmentation.train_crop_size"),
    taken("dataset.augmentation.test_min_size", SIDE, 640, "dataset.augmentation.test_min_size"),
    taken("dataset.augmentation.test_max_size", SIDE, 640, "dataset.augmentation.test_max_size"),
)

MODEL = (
    part("model.mode", choice("panoptic", "instance", "semantic"), "panoptic", "model.mode"),
    left_out("model.export", TRUTH, False, "the export stage needs no switch in the model"),
    taken("model.object_mask_threshold", UNIT, 0.4, "postprocess.object_mask_threshold"),
    taken("model.overlap_threshold", UNIT, 0.5, "postprocess.overlap_threshold"),
    taken("model.test_topk_per_image", whole(1), 100, "postprocess.test_topk_per_image"),
    left_out("model.precise_msda", TRUTH, False, "deformable attention is always computed in fp32 here"),
    part("model.backbone.type", choice("swin", "efficientvit"), "swin", "model.backbone.name"),
    taken("model.backbone.pretrained_weights", PATH, None, "model.backbone.pretrained"),
    part(
        "model.backbone.swin.type",
        choice("tiny", "small", "base", "large", "huge"),
        "tiny",
        "model.backbone.name",
    ),
    *shared.swin_rows("model.backbone.swin", _swin_size, SWIN_SIZES["swin_tiny"]),
    part("model.backbone.efficientvit.name", choice(*EFFICIENTVIT), "l0", "model.backbone.name"),
    _efficientvit("out_indices", listing(whole(0)), [1, 2, 3]),
    _efficientvit("out_features", listing(TEXT), ["res2", "res3", "res4", "res5"]),
    _efficientvit("pretrain_img_size", whole(1), 384),
    _efficientvit("use_checkpoint", TRUTH, False),
    same("model.sem_seg_head.common_stride", whole(1), 4, "masks are predicted at a quarter of the image"),
    taken("model.sem_seg_head.transformer_enc_layers", whole(1), 6, "model.pixel_decoder.layers"),
    part("model.sem_seg_head.convs_dim", whole(1), 256, "model.pixel_decoder.hidden_dim"),
    part("model.sem_seg_head.mask_dim", whole(1), 256, "model.pixel_decoder.hidden_dim", "one width for all"),
    same(
        "model.sem_seg_head.deformable_transformer_encoder_in_features",
        listing(TEXT),
        ["res3", "res4", "res5"],
        "the pixel decoder reads the strides 8, 16 and 32",
    ),
    part("model.sem_seg_head.num_classes", whole(1), 200, "dataset.num_classes"),
    same("model.sem_seg_head.norm", TEXT, "GN", "no other norm is built"),
    taken("model.mask_former.num_object_queries", whole(1), 100, "model.decoder.num_object_queries"),
    part("model.mask_former.hidden_dim", whole(64, 1024), 256, "model.pixel_decoder.hidden_dim", "one width for all"),
    taken("model.mask_former.nheads", whole(1), 8, ("model.decoder.nheads", "model.pixel_decoder.nheads")),
    taken("model.mask_former.dim_feedforward", whole(1), 2048, "model.decoder.dim_feedforward"),
    taken("model.mask_former.dec_layers", whole(1, 50), 10, "model.decoder.layers", shared.one_less),
    taken("model.mask_former.pre_norm", TRUTH, False, "model.decoder.pre_norm"),
    taken("model.mask_former.dropout", number(0, 1), 0.0, ("model.decoder.dropout", "model.pixel_decoder.dropout")),
    taken("model.mask_former.deep_supervision", TRUTH, True, "model.loss.deep_supervision"),
    taken("model.mask_former.class_weight", number(0), 2.0, "model.loss.class_weight"),
    taken("model.mask_former.dice_weight", number(0), 5.0, "model.loss.dice_weight"),
    taken("model.mask_former.mask_weight", number(0), 5.0, "model.loss.mask_weight"),
    taken("model.mask_former.no_object_weight", number(0), 0.1, "model.loss.no_object_weight"),
    revived("model.mask_former.train_num_points", whole(1), 12544, "model.loss.train_num_points", DEAD),
    revived("model.mask_former.oversample_ratio", number(1), 3.0, "model.loss.oversample_ratio", DEAD),
    revived("model.mask_former.importance_sample_ratio", UNIT, 0.75, "model.loss.importance_sample_ratio", DEAD),
)

TRAIN = (
    *shared.train(epochs=10, seed=1234, gpus=1),
    part("train.freeze", listing(TEXT), [], "train.freeze"),
    taken("train.pretrained_model_path", PATH, None, "train.pretrained_model_path", note=shared.OTHER_WEIGHTS),
    part("train.clip_grad_norm", number(0), 0.1, "train.clip_grad_norm", "0 is no clipping: clip_grad_type none"),
    taken("train.clip_grad_norm_type", number(above=0), 2.0, "train.clip_grad_norm_type"),
    part("train.clip_grad_type", choice("full"), "full", "train.clip_grad_type"),
    shared.DRY_RUN,
    taken("train.precision", choice("fp32", "fp16"), "fp32", "train.precision"),
    shared.DISTRIBUTED,
    taken("train.activation_checkpoint", TRUTH, False, "train.activation_checkpoint", impose=False),
    left_out("train.use_distributed_sampler", TRUTH, False, "several processes always share the images"),
    left_out("train.iters_per_epoch", whole(1), None, shared.ITERS_PER_EPOCH),
    left_out("train.verbose", TRUTH, False, "in TAO's document only; set train.verbose in the written file"),
    taken("train.optim.type", choice("AdamW", "SGD"), "AdamW", "train.optim.type"),
    taken("train.optim.lr", number(above=0), 2e-4, "train.optim.lr"),
    taken("train.optim.backbone_multiplier", number(0), 0.1, "train.optim.backbone_multiplier"),
    taken("train.optim.momentum", number(0, 1), 0.9, "train.optim.momentum", impose=False),
    taken("train.optim.weight_decay", number(0), 0.05, "train.optim.weight_decay"),
    taken(
        "train.optim.lr_scheduler",
        choice("MultiStep", "Warmuppoly"),
        "MultiStep",
        "train.optim.lr_scheduler",
        shared.from_mapping(shared.SCHEDULERS),
    ),
    taken("train.optim.milestones", listing(whole(1)), [88, 96], "train.optim.milestones"),
    taken("train.optim.gamma", number(0, 1), 0.1, "train.optim.gamma"),
    ignored("train.optim.monitor_name", choice("val_loss", "train_loss"), "train_loss", shared.MONITOR),
)

DATA_TYPE = left_out("gen_trt_engine.tensorrt.data_type", choice("FP32", "FP16"), "FP32", shared.TENSORRT_PRECISION)


def _backbone(settings: Settings) -> Mapping[str, Any]:
    if settings["model.backbone.type"] == "efficientvit":
        for key in ("type", "window_size", "drop_path_rate"):
            settings.pass_over(f"model.backbone.swin.{key}", "read with backbone.type swin only")
        return {"model.backbone.name": f"efficientvit_{settings['model.backbone.efficientvit.name']}"}
    if settings["model.backbone.swin.type"] == "huge":
        settings.note("model.backbone.swin.type", "huge is in TAO's document, not in its schema")
    settings.pass_over("model.backbone.efficientvit.name", "read with backbone.type efficientvit only")
    return shared.swin_keys(settings, f"swin_{settings['model.backbone.swin.type']}")


def _sources(settings: Settings) -> Mapping[str, Any]:
    """Where the data lie. A split's type may be left out where its keys tell it."""
    kinds = {name: _kind(settings, name) for name in SPLITS}
    found: dict[str, Any] = {}
    types = {kind for name, kind in kinds.items() if kind and settings.given(*_keys(name, *SOURCES))}
    if len(types) > 1:
        told = ", ".join(f"dataset.{name}: {kind}" for name, kind in kinds.items() if kind)
        settings.refuse("dataset.val.type", f"the splits have different types ({told}); a dataset has one here")
    if not types:
        types = {kind for kind in kinds.values() if kind}
    if len(types) == 1:
        found["dataset.type"] = TYPES[types.pop()]
    for name in SPLITS:
        found |= _split_sources(settings, name, kinds[name])
    annotated = "dataset.test.annotations" in found
    if annotated or "dataset.val.annotations" in found:
        found["evaluate.split"] = "test" if annotated else "val"
    if settings.given("dataset.label_map"):
        found["dataset.label_map"] = shared.data_path(settings["dataset.label_map"])
    if "dataset.type" in found:
        _require_mode(settings, found["dataset.type"])
        found["model.mode"] = settings["model.mode"]
    elif settings.given("model.mode"):
        found["model.mode"] = settings["model.mode"]
    return found


def _keys(name: str, *leaves: str) -> tuple[str, ...]:
    return tuple(f"dataset.{name}.{leaf}" for leaf in leaves)


def _kind(settings: Settings, name: str) -> str | None:
    """TAO's type of a split: what it says, else what its keys can only mean; None where it says nothing."""
    key = f"dataset.{name}.type"
    if settings.given(key):
        return str(settings[key])
    if settings.given("dataset.type"):
        return str(settings["dataset.type"])
    if settings.given(f"dataset.{name}.instance_json") and settings["model.mode"] == "instance":
        return "coco"
    for leaf, kind in (("panoptic_json", "coco_panoptic"), ("instance_json", "coco"), ("annot_file", "ade")):
        if settings.given(f"dataset.{name}.{leaf}"):
            settings.note(
                f"dataset.{name}.{leaf}", f"dataset.{name}.type is left out (TAO: ade); taken as {kind} by this key"
            )
            return kind
    return None


def _split_sources(settings: Settings, name: str, kind: str | None) -> dict[str, Any]:
    root, folder = settings[f"dataset.{name}.root_dir"], settings[f"dataset.{name}.img_dir"]
    images = shared.data_path(shared.join(root, folder))
    leaf = {"ade": "annot_file", "coco": "instance_json", "coco_panoptic": "panoptic_json"}.get(kind or "")
    if leaf is None or (name == "test" and not settings.given(*_keys(name, *SOURCES))):
        return {"inference.images": images} if images is not None and name == "test" else {}
    if kind != "ade" and not settings.given(f"dataset.{name}.{leaf}") and settings.given(f"dataset.{name}.annot_file"):
        settings.note(f"dataset.{name}.annot_file", f"taken as {leaf}, as TAO's document allows")
        leaf = "annot_file"
    for other in SOURCES:
        if other != leaf and not (other == "panoptic_dir" and kind == "coco_panoptic"):
            settings.pass_over(f"dataset.{name}.{other}", f"not read with type {kind}")
    found = {
        f"dataset.{name}.images": shared.data_path(root or folder) if kind == "ade" else images,
        f"dataset.{name}.annotations": shared.data_path(settings[f"dataset.{name}.{leaf}"]),
        f"dataset.{name}.panoptic": shared.data_path(settings[f"dataset.{name}.panoptic_dir"]),
    }
    if kind != "coco_panoptic":
        del found[f"dataset.{name}.panoptic"]
    if found[f"dataset.{name}.annotations"] is None and name in ("train", "val") and images is not None:
        settings.refuse(f"dataset.{name}.{leaf}", f"not given, and type {kind} reads its annotations there")
    return {key: value for key, value in found.items() if value is not None}


def _require_mode(settings: Settings, kind: str) -> None:
    mode, allowed = settings["model.mode"], [mode for mode in MODES[kind] if mode != "detection"]
    if mode not in allowed:
        name = next(name for name, ours in TYPES.items() if ours == kind)
        fitting = " or ".join(name for name, ours in TYPES.items() if mode in MODES[ours])
        settings.refuse(
            "model.mode",
            f"{mode}, but the annotations are of type {name}, which serve {' or '.join(allowed)}; set model.mode: {allowed[0]}, or "
            f"give annotations of type {fitting}",
        )


def _classes(settings: Settings) -> Mapping[str, Any]:
    return shared.classes(settings, "model.sem_seg_head.num_classes")


def _width(settings: Settings) -> Mapping[str, Any]:
    return shared.width(
        settings, "model.sem_seg_head.convs_dim", "model.sem_seg_head.mask_dim", "model.mask_former.hidden_dim"
    )


def _train_sizes(settings: Settings) -> Mapping[str, Any]:
    """TAO widens a single size s to the sizes from s/2 to 2s in steps of 64."""
    key = "dataset.augmentation.train_min_size"
    sizes, largest = settings[key], settings["dataset.augmentation.train_max_size"]
    if len(sizes) == 1:
        sizes = list(range(max(32, sizes[0] // 2), 2 * sizes[0] + 64, 64))
        settings.note(
            key, "TAO silently widens a single size s to s/2, s/2 + 64, ... 2s (read from its source, not run)"
        )
    return {key: sorted({min(size, largest) for size in sizes})}


FREEZE = {
    "backbone": ("backbone",),
    "sem_seg_head": ("pixel_decoder", "decoder", "query_feat", "query_embed"),
    "sem_seg_head.pixel_decoder": ("pixel_decoder",),
    "sem_seg_head.predictor": ("decoder", "query_feat", "query_embed"),
}

TABLE = Table(
    "mask2former",
    (
        *shared.ROOT,
        *DATASET,
        *MODEL,
        *TRAIN,
        *shared.task("evaluate"),
        *shared.task("inference"),
        *shared.export(960, 544),
        *shared.engine(DATA_TYPE),
        *shared.QUANTIZE_ROWS,
    ),
    (
        _backbone,
        _sources,
        _classes,
        _width,
        _train_sizes,
        shared.clip,
        shared.gpus,
        shared.seed,
        shared.freeze_rule(FREEZE),
    ),
    fixed=(
        Fixed("dataset.augmentation.train_scale", None, "TAO draws from train_min_size"),
        Fixed("train.optim.warmup_iters", 0, "TAO has no key for it"),
        Fixed("dataset.augmentation.single_class_max_area", 0.6, "TAO draws a crop again while one class covers more"),
        Fixed("dataset.augmentation.flip", 0.5, "TAO has no key for it"),
        Fixed("dataset.augmentation.color_jitter", True, "TAO has no key for it"),
    ),
    names={"data": "dataset"},
    absent={
        "dataset.workers": "it is in TAO's document only; its source reads num_workers of each split",
    },
)
