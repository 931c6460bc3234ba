"""TAO's OneFormer spec, key by key."""

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
    either,
    ignored,
    left_out,
    listing,
    number,
    part,
    revived,
    revived_part,
    same,
    taken,
    whole,
)
from tessera.spec.networks import SWIN_SIZES

SPLITS = ("train", "val", "test")
TASKS = ("semantic", "instance", "panoptic")
PATHS = either(PATH, listing(PATH))

NOT_ATTACHED = "TAO looks for it in the wrong section, so that neither schedule nor clipping is ever applied (read from its source, not run)"
NEVER_READ = "TAO never reads it (read from its source, not run)"
OTHER_BACKBONE = "only the backbone of that name reads it, and it does not exist here"
ALL_TASKS = "one evaluation asks the network for all three tasks"

PRECISIONS = {
    "32": "fp32",
    "32-true": "fp32",
    "fp32": "fp32",
    "16": "fp16",
    "16-mixed": "fp16",
    "fp16": "fp16",
    "bf16": "bf16",
    "bf16-mixed": "bf16",
}


def _split(name: str) -> tuple[Row, ...]:
    key = f"dataset.{name}"
    return (
        part(f"{key}.images", PATHS, "", f"{key}.images"),
        part(f"{key}.annotations", PATHS, "", f"{key}.annotations"),
        part(f"{key}.panoptic", PATHS, "", f"{key}.panoptic"),
        left_out(f"{key}.names", listing(TEXT), [], "several sources are told apart by their files"),
        taken(f"{key}.batch_size", whole(1), 1, f"{key}.batch_size"),
        taken(f"{key}.num_workers", whole(0), 1, f"{key}.num_workers", impose=False),
    )


def _swin_size(key: str, kind: Kind, default: Any) -> Row:
    leaf = key.rpartition(".")[2]
    return part(
        key,
        kind,
        default,
        ("model.backbone.name", f"model.backbone.swin.{leaf}"),
        "published sizes are told by the name",
    )


DATASET = (
    *(row for name in SPLITS for row in _split(name)),
    ignored("dataset.workers", whole(0), 8, NEVER_READ + "; num_workers of each split counts"),
    left_out("dataset.pin_memory", TRUTH, True, "the loaders pin memory where there is a GPU"),
    taken(
        "dataset.pixel_mean",
        listing(number(0, 255), 3),
        [123.675, 116.28, 103.53],
        "model.pixel_mean",
        shared.pixels_0_255,
        "images are 0..255 there and 0..1 here",
    ),
    taken(
        "dataset.pixel_std",
        listing(number(0, 255), 3),
        [58.395, 57.12, 57.375],
        "model.pixel_std",
        shared.pixels_0_255,
        "images are 0..255 there and 0..1 here",
    ),
    part("dataset.contiguous_id", TRUTH, True, ("dataset.contiguous_id", "dataset.num_classes")),
    part("dataset.label_map", PATH, "", "dataset.label_map"),
    *(
        taken(
            f"dataset.task_prob_train.{task}",
            UNIT,
            default,
            f"model.task_probability.{task}",
            note="TAO's default shows the panoptic task to one image in a hundred; the published third is kept unless the file has the key",
            impose=False,
        )
        for task, default in zip(TASKS, (0.33, 0.66, 0.01), strict=True)
    ),
    *(
        left_out(f"dataset.task_prob_val.{task}", UNIT, default, ALL_TASKS + ", instead of drawing one per image")
        for task, default in zip(TASKS, (0.33, 0.66, 0.01), strict=True)
    ),
    taken("dataset.task_seq_len", whole(8), 77, "model.task_length"),
    part("dataset.max_seq_len", whole(8), 77, "model.text.context_length"),
    part(
        "dataset.image_size",
        SIDE,
        1024,
        ("dataset.val.target_size", "dataset.test.target_size"),
        "TAO stretches validation images to this square",
    ),
    part("dataset.min_scale", number(above=0), 0.1, "dataset.augmentation.train_scale"),
    part("dataset.max_scale", number(above=0), 2.0, "dataset.augmentation.train_scale"),
    ignored("dataset.cutmix_prob", UNIT, 0.0, "TAO looks for it in the wrong section (read from its source, not run)"),
    left_out("dataset.quant_calibration_dataset.images_dir", PATH, "", shared.QUANTIZE),
    ignored(
        "dataset.augmentation.train_min_size", listing(SIDE), [800], NEVER_READ + "; min_scale and max_scale count"
    ),
    ignored("dataset.augmentation.train_max_size", SIDE, 1333, NEVER_READ + "; min_scale and max_scale count"),
    taken(
        "dataset.augmentation.train_crop_size", listing(SIDE, 2), [1024, 1024], "dataset.augmentation.train_crop_size"
    ),
    taken("dataset.augmentation.test_min_size", SIDE, 800, "dataset.augmentation.test_min_size"),
    taken("dataset.augmentation.test_max_size", SIDE, 1333, "dataset.augmentation.test_max_size"),
)


def _radio(key: str, kind: Kind, default: Any) -> Row:
    return left_out(f"model.backbone.radio.{key}", kind, default, OTHER_BACKBONE)


def _dinat(key: str, kind: Kind, default: Any) -> Row:
    return left_out(f"model.backbone.dinat.{key}", kind, default, OTHER_BACKBONE)


MODEL = (
    same(
        "model.backbone.name",
        choice("D2SwinTransformer", "D2RADIO", "D2DiNAT"),
        "D2SwinTransformer",
        "RADIO and DiNAT do not exist here; take a Swin, or any pyramid of timm's by a file in config/backbones",
    ),
    same("model.backbone.freeze_at", whole(0), 0, "name the stages under train.freeze, such as backbone"),
    *shared.swin_rows("model.backbone.swin", _swin_size, SWIN_SIZES["swin_large"]._replace(window_size=12)),
    _radio("resolution", listing(whole(1), 2), [1024, 1024]),
    _radio("backbone", TEXT, "vit_base_patch16_224"),
    _radio("summary_idxs", listing(whole(0)), [0, 1, 2]),
    _radio("window_size", whole(1), None),
    _radio("num_teacher", whole(1), 4),
    _radio("cpe_max_size", whole(1), 2048),
    _radio("register_multiple", whole(1), 8),
    _radio("out_features", listing(TEXT), ["res2", "res3", "res4", "res5"]),
    _radio("use_checkpoint", TRUTH, False),
    _dinat("embed_dim", whole(1), 192),
    _dinat("mlp_ratio", number(0), 2.0),
    _dinat("depths", listing(whole(1), 4), [3, 4, 18, 5]),
    _dinat("num_heads", listing(whole(1), 4), [6, 12, 24, 48]),
    _dinat("kernel_size", whole(1), 7),
    _dinat("drop_path_rate", UNIT, 0.3),
    _dinat("dilations", listing(listing(whole(1))), None),
    same("model.sem_seg_head.name", TEXT, "OneFormerHead", "there is one head"),
    same(
        "model.sem_seg_head.ignore_value",
        whole(0),
        255,
        "ignored pixels are always 255; dataset.ignore_id names one more value",
    ),
    same(
        "model.sem_seg_head.loss_weight", number(0), 1.0, "give the factor to class_weight, mask_weight and dice_weight"
    ),
    *(
        same(
            f"model.sem_seg_head.{key}",
            listing(TEXT),
            ["res3", "res4", "res5"],
            "the pixel decoder reads the strides 8, 16 and 32",
        )
        for key in ("in_features", "deformable_transformer_encoder_in_features")
    ),
    same("model.sem_seg_head.common_stride", whole(1), 4, "masks are predicted at a quarter of the image"),
    taken("model.sem_seg_head.transformer_enc_layers", whole(1), 6, "model.pixel_decoder.layers"),
    part("model.sem_seg_head.convs_dim", whole(1), 256, "model.pixel_decoder.hidden_dim"),
    part("model.sem_seg_head.mask_dim", whole(1), 256, "model.pixel_decoder.hidden_dim", "one width for all"),
    same("model.sem_seg_head.pixel_decoder_name", TEXT, "MSDeformAttnPixelDecoder", "there is one pixel decoder"),
    same("model.sem_seg_head.norm", TEXT, "GN", "no other norm is built"),
    part("model.sem_seg_head.num_classes", whole(1), 133, "dataset.num_classes"),
    taken("model.one_former.num_object_queries", whole(2), 150, "model.decoder.num_object_queries"),
    part("model.one_former.hidden_dim", whole(1), 256, "model.pixel_decoder.hidden_dim", "one width for all"),
    taken(
        "model.one_former.nheads",
        whole(1),
        8,
        ("model.decoder.nheads", "model.class_decoder.nheads", "model.pixel_decoder.nheads"),
    ),
    taken(
        "model.one_former.dim_feedforward",
        whole(1),
        2048,
        ("model.decoder.dim_feedforward", "model.class_decoder.dim_feedforward"),
    ),
    same("model.one_former.enc_layers", whole(0), 0, "the class transformer has decoder layers only"),
    taken("model.one_former.dec_layers", whole(1), 10, "model.decoder.layers", shared.one_less),
    taken("model.one_former.class_dec_layers", whole(1), 2, "model.class_decoder.layers"),
    taken(
        "model.one_former.dropout",
        number(0, 1),
        0.1,
        ("model.class_decoder.dropout", "model.pixel_decoder.dropout"),
        note="the masked decoder has none, as published",
    ),
    taken("model.one_former.pre_norm", TRUTH, False, "model.decoder.pre_norm"),
    same("model.one_former.enforce_input_proj", TRUTH, False, "the maps have the decoder's width already"),
    taken("model.one_former.use_task_norm", TRUTH, True, "model.use_task_norm"),
    same("model.one_former.size_divisibility", whole(), 32, "images are padded to multiples of 32"),
    same("model.one_former.num_feature_levels", whole(1), 3, "the strides 8, 16 and 32"),
    taken("model.one_former.deep_supervision", TRUTH, True, "model.loss.deep_supervision"),
    taken("model.one_former.class_weight", number(0), 2.0, "model.loss.class_weight"),
    taken("model.one_former.mask_weight", number(0), 5.0, "model.loss.mask_weight"),
    taken("model.one_former.dice_weight", number(0), 5.0, "model.loss.dice_weight"),
    taken("model.one_former.no_object_weight", number(0), 0.1, "model.loss.no_object_weight"),
    taken("model.one_former.contrastive_weight", number(0), 0.5, "model.loss.contrastive_weight"),
    taken("model.one_former.contrastive_temperature", number(above=0), 0.07, "model.loss.contrastive_temperature"),
    taken("model.one_former.train_num_points", whole(1), 12544, "model.loss.train_num_points"),
    taken("model.one_former.oversample_ratio", number(1), 3.0, "model.loss.oversample_ratio"),
    taken("model.one_former.importance_sample_ratio", UNIT, 0.75, "model.loss.importance_sample_ratio"),
    same(
        "model.one_former.transformer_decoder_name",
        TEXT,
        "ContrastiveMultiScaleMaskedTransformerDecoder",
        "there is one decoder",
    ),
    same("model.one_former.transformer_in_feature", TEXT, "multi_scale_pixel_decoder", "there is one decoder"),
    part("model.text_encoder.context_length", whole(8), 77, "model.text.context_length"),
    same("model.text_encoder.vocab_size", whole(1), 49408, "it is the size of the tokenizer's vocabulary"),
    taken("model.text_encoder.width", whole(1), 256, "model.text.width"),
    taken("model.text_encoder.num_layers", whole(1), 6, "model.text.layers"),
    taken("model.text_encoder.n_ctx", whole(0), 16, "model.text.num_context"),
    taken("model.text_encoder.proj_num_layers", whole(1), 2, "model.text.projection_layers"),
    taken("model.test.object_mask_threshold", UNIT, 0.4, "postprocess.object_mask_threshold"),
    taken("model.test.overlap_threshold", UNIT, 0.5, "postprocess.overlap_threshold"),
    taken("model.test.test_topk_per_image", whole(1), 100, "postprocess.test_topk_per_image"),
    *(
        left_out(f"model.test.{key}", TRUTH, key == "semantic_on", ALL_TASKS)
        for key in ("semantic_on", "instance_on", "panoptic_on", "detection_on")
    ),
    left_out("model.export", TRUTH, False, "the export stage needs no switch in the model"),
)

TRAIN = (
    *shared.train(epochs=50, seed=123, gpus=8),
    part("train.freeze", listing(TEXT), [], "train.freeze"),
    taken("train.pretrained_model", PATH, None, "train.pretrained_model_path", note=shared.OTHER_WEIGHTS),
    taken("train.pretrained_backbone", PATH, None, "model.backbone.pretrained"),
    revived_part(
        "train.clip_grad_norm", number(0), 0.1, ("train.clip_grad_norm", "train.clip_grad_type"), NOT_ATTACHED
    ),
    revived_part("train.clip_grad_norm_type", number(above=0), 2.0, "train.clip_grad_norm_type", NOT_ATTACHED),
    revived_part("train.clip_grad_type", choice("full"), "full", "train.clip_grad_type", NOT_ATTACHED),
    revived_part("train.clip_gradients.enabled", TRUTH, True, "train.clip_grad_type", NOT_ATTACHED),
    revived_part(
        "train.clip_gradients.clip_type",
        choice("full_model", "value"),
        "full_model",
        "train.clip_grad_type",
        NOT_ATTACHED,
    ),
    revived_part("train.clip_gradients.clip_value", number(above=0), 1.0, "train.clip_grad_norm", NOT_ATTACHED),
    revived_part("train.clip_gradients.norm_type", number(above=0), 2.0, "train.clip_grad_norm_type", NOT_ATTACHED),
    shared.DRY_RUN,
    part(
        "train.precision",
        either(whole(), choice(*PRECISIONS)),
        "fp32",
        "train.precision",
        "TAO hands it to Lightning as it is, which refuses the documented fp16 and fp32 (read from its source, not run)",
    ),
    shared.DISTRIBUTED,
    left_out("train.verbose", TRUTH, False, "set train.verbose in the written file"),
    left_out("train.iters_per_epoch", whole(1), None, shared.ITERS_PER_EPOCH),
    ignored("train.accumulate_grad_batches", whole(1), 1, NEVER_READ),
    left_out(
        "train.val_check_interval", number(above=0), 1.0, "train.validation_interval and its unit say when to validate"
    ),
    taken("train.optim.type", choice("AdamW", "SGD"), "AdamW", "train.optim.type"),
    taken("train.optim.lr", number(above=0), 1e-5, "train.optim.lr"),
    taken("train.optim.backbone_multiplier", number(0), 0.1, "train.optim.backbone_multiplier"),
    taken("train.optim.momentum", number(0, 1), 0.9, "train.optim.momentum", impose=False),
    taken("train.optim.weight_decay", number(0), 0.05, "train.optim.weight_decay"),
    revived(
        "train.optim.lr_scheduler",
        choice("MultiStep", "Warmuppoly"),
        "Warmuppoly",
        "train.optim.lr_scheduler",
        NOT_ATTACHED,
        shared.from_mapping(shared.SCHEDULERS),
    ),
    revived("train.optim.warmup_iters", whole(0), 1000, "train.optim.warmup_iters", NOT_ATTACHED),
    revived("train.optim.warmup_factor", number(0, 1), 0.001, "train.optim.warmup_factor", NOT_ATTACHED),
    ignored("train.optim.max_iter", whole(1), 368750, NOT_ATTACHED + "; here the curve is as long as the training"),
    ignored("train.optim.steps", listing(whole(1)), [327778, 355092], NOT_ATTACHED + "; milestones here are epochs"),
    revived(
        "train.optim.milestones",
        listing(whole(1)),
        [88, 96],
        "train.optim.milestones",
        NOT_ATTACHED,
    ),
    revived("train.optim.gamma", number(0, 1), 0.1, "train.optim.gamma", NOT_ATTACHED),
)

TASK_ROWS = (
    *shared.task("evaluate"),
    left_out("evaluate.iou_per_class", TRUTH, True, "every metric is always written per class, too"),
    left_out("evaluate.task", choice(*TASKS), "semantic", ALL_TASKS),
    *shared.task("inference"),
    left_out("inference.mode", choice(*TASKS), "semantic", "pictures and results of all tasks are written"),
    left_out(
        "inference.image_size",
        listing(SIDE, 2),
        [1024, 1024],
        "test_min_size and test_max_size count, as in the evaluation",
    ),
    part("inference.images_dir", PATH, "", "inference.images"),
)

DATA_TYPE = left_out("gen_trt_engine.tensorrt.data_type", choice("fp16", "fp32"), "fp16", shared.TENSORRT_PRECISION)


def _backbone(settings: Settings) -> Mapping[str, Any]:
    """A published size by its name, any other as the sizes of the nearest."""
    keys = ("embed_dim", "depths", "num_heads")
    sizes = tuple(settings[f"model.backbone.swin.{key}"] for key in keys)
    published = {name: (size.embed_dim, size.depths, size.num_heads) for name, size in SWIN_SIZES.items()}
    name = next((name for name, known in published.items() if known == sizes), None)
    if name is not None:
        return shared.swin_keys(settings, name)
    nearest = min(published, key=lambda name: (abs(published[name][0] - sizes[0]), published[name][1] != sizes[1]))
    own = {f"model.backbone.swin.{key}": size for key, size in zip(keys, sizes, strict=True)}
    return shared.swin_keys(settings, nearest) | own


def _sources(settings: Settings) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for name in SPLITS:
        for leaf in ("images", "annotations", "panoptic"):
            key = f"dataset.{name}.{leaf}"
            if settings.given(key):
                found[key] = shared.data_paths(settings[key])
        if f"dataset.{name}.annotations" not in found and f"dataset.{name}.images" in found:
            settings.refuse(f"dataset.{name}.annotations", "not given, and without it the images have no masks")
        if f"dataset.{name}.annotations" in found and f"dataset.{name}.panoptic" not in found:
            settings.refuse(
                f"dataset.{name}.panoptic",
                "not given; OneFormer learns from panoptic annotations, a JSON and a folder of PNG files",
            )
    annotated = "dataset.test.annotations" in found
    if annotated or "dataset.val.annotations" in found:
        found["evaluate.split"] = "test" if annotated else "val"
    if found:
        found["dataset.type"] = "coco_panoptic"
    if settings.given("dataset.label_map"):
        found["dataset.label_map"] = shared.data_path(settings["dataset.label_map"])
    if settings.given("inference.images_dir"):
        found["inference.images"] = shared.data_path(settings["inference.images_dir"])
    return found


def _classes(settings: Settings) -> Mapping[str, Any]:
    return shared.classes(settings, "model.sem_seg_head.num_classes")


def _width(settings: Settings) -> Mapping[str, Any]:
    return shared.width(
        settings, "model.sem_seg_head.convs_dim", "model.sem_seg_head.mask_dim", "model.one_former.hidden_dim"
    )


def _text(settings: Settings) -> Mapping[str, Any]:
    length, read = settings["model.text_encoder.context_length"], settings["dataset.max_seq_len"]
    if length != read:
        settings.refuse(
            "dataset.max_seq_len",
            f"{read}, but model.text_encoder.context_length is {length}; the texts have one length, give the same number to both",
        )
    return {"model.text.context_length": length}


def _sizes(settings: Settings) -> Mapping[str, Any]:
    low, high = settings["dataset.min_scale"], settings["dataset.max_scale"]
    side = settings["dataset.image_size"]
    if low > high:
        settings.refuse("dataset.min_scale", f"{low} is above dataset.max_scale, {high}")
    return {
        "dataset.augmentation.train_scale": [low, high],
        "dataset.val.target_size": [side, side],
        "dataset.test.target_size": [side, side],
    }


def _clip(settings: Settings) -> Mapping[str, Any]:
    """Only what the file says: TAO clips nothing."""
    prefix = "train.clip_gradients"
    if settings.given(*(f"{prefix}.{key}" for key in ("enabled", "clip_type", "clip_value", "norm_type"))):
        for key in ("train.clip_grad_norm", "train.clip_grad_norm_type", "train.clip_grad_type"):
            settings.pass_over(key, "clip_gradients says it more exactly")
        if not settings[f"{prefix}.enabled"]:
            return {"train.clip_grad_type": "none"}
        return {
            "train.clip_grad_type": {"full_model": "full", "value": "value"}[settings[f"{prefix}.clip_type"]],
            "train.clip_grad_norm": settings[f"{prefix}.clip_value"],
            "train.clip_grad_norm_type": settings[f"{prefix}.norm_type"],
        }
    if settings.given("train.clip_grad_norm", "train.clip_grad_norm_type", "train.clip_grad_type"):
        return {**shared.clip(settings), "train.clip_grad_norm_type": settings["train.clip_grad_norm_type"]}
    return {}


def _precision(settings: Settings) -> Mapping[str, Any]:
    value = str(settings["train.precision"])
    if value not in PRECISIONS:
        settings.refuse("train.precision", f"expected one of {', '.join(PRECISIONS)}, found {value}")
        return {}
    return {"train.precision": PRECISIONS[value]}


FREEZE = {
    "backbone": ("backbone",),
    "sem_seg_head": ("pixel_decoder", "decoder", "class_decoder", "query_embed"),
    "sem_seg_head.pixel_decoder": ("pixel_decoder",),
    "sem_seg_head.predictor": ("decoder", "class_decoder", "query_embed"),
    "task_mlp": ("task_mlp",),
    "text_encoder": ("text",),
}

TABLE = Table(
    "oneformer",
    (
        *shared.ROOT,
        *DATASET,
        *MODEL,
        *TRAIN,
        *TASK_ROWS,
        *shared.export(640, 640),
        taken(
            "export.task",
            choice(*TASKS),
            "semantic",
            "export.task",
            note="the graph then does this task alone; without export.task in the written file the task is an input of the graph",
            impose=False,
        ),
        *shared.engine(DATA_TYPE),
        *shared.QUANTIZE_ROWS,
    ),
    (
        _backbone,
        _sources,
        _classes,
        _width,
        _text,
        _sizes,
        _clip,
        _precision,
        shared.gpus,
        shared.seed,
        shared.freeze_rule(FREEZE),
    ),
    fixed=(
        Fixed("model.mode", "panoptic", "one training serves all three tasks"),
        Fixed("dataset.augmentation.flip", 0.5, "TAO has no key for it"),
        Fixed("dataset.augmentation.color_jitter", True, "TAO has no key for it"),
        Fixed("dataset.augmentation.single_class_max_area", 1.0, "TAO has no such limit for OneFormer"),
    ),
    names={
        "train.pretrained_model_path": "train.pretrained_model",
        "model.backbone.pretrained_weights": "train.pretrained_backbone",
        "model.object_mask_threshold": "model.test.object_mask_threshold",
        "model.overlap_threshold": "model.test.overlap_threshold",
        "model.test_topk_per_image": "model.test.test_topk_per_image",
        "model.mode": "inference.mode",
    },
    absent={
        "model.backbone.type": "it is in TAO's document only; its source reads model.backbone.name",
        "train.activation_checkpoint": "it is in TAO's document only; set train.activation_checkpoint in the written file",
        "train.optim.monitor_name": "it is in TAO's document only",
        "dataset.dataset_type": "it is in TAO's document only, as advice taken from Deformable DETR",
        "dataset.augmentation.fixed_padding": "it is in TAO's document only, as advice taken from Deformable DETR",
    },
)
