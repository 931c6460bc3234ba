"""TAO's OneFormer spec, key by key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from tessera.interop.tao import shared
from tessera.interop.tao.shared import NOT_RUN, Channels, NotNegative, data_paths
from tessera.interop.tao.table import Fixed, LocalPath, Settings, Table, machine, part, revived, same, taken
from tessera.spec.networks import SWIN_SIZES

SPLIT = "dataset.{train,val,test}"
SWIN = "model.backbone.swin"
HEAD = "model.one_former"
SPLITS = ("train", "val", "test")
SOURCES = ("images", "annotations", "panoptic")
SIZES = ("embed_dim", "depths", "num_heads")
LARGE = SWIN_SIZES["swin_large"]._asdict()

MISPLACED = f"TAO looks for it in the wrong section, so that neither schedule nor clipping is ever applied {NOT_RUN}"
NEVER_READ = f"TAO never reads it {NOT_RUN}"
ALL_TASKS = "one evaluation asks the network for all three tasks"
NO_OTHER_BACKBONE = (
    "RADIO and DiNAT do not exist here; take a Swin, or any pyramid of timm's by a file in config/backbones"
)
_NAMES: dict[str, tuple[int | str, ...]] = {
    "fp32": (32, "32-true", "fp32"),
    "fp16": (16, "16-mixed", "fp16"),
    "bf16": ("bf16", "bf16-mixed"),
}
PRECISIONS = {name: ours for ours, names in _NAMES.items() for name in names}

Scheduler = Literal["MultiStep", "Warmuppoly"]
ClipType = Literal["full_model", "value"]

KEYS = (
    part(f"{SPLIT}.{{images,annotations,panoptic}}", "", kind=LocalPath | list[LocalPath]),
    taken(f"{SPLIT}.batch_size", 1),
    machine(f"{SPLIT}.num_workers", 1),
    taken("dataset.pixel_mean", [123.675, 116.28, 103.53], "model.pixel_mean", shared.pixels_0_255, kind=Channels),
    taken("dataset.pixel_std", [58.395, 57.12, 57.375], "model.pixel_std", shared.pixels_0_255, kind=Channels),
    machine("dataset.task_prob_train.semantic", 0.33, "model.task_probability.semantic"),
    machine("dataset.task_prob_train.instance", 0.66, "model.task_probability.instance"),
    machine("dataset.task_prob_train.panoptic", 0.01, "model.task_probability.panoptic"),
    taken("dataset.task_seq_len", 77, "model.task_length"),
    part("dataset.max_seq_len", 77, "model.text.context_length"),
    part("dataset.image_size", 1024, "dataset.{val,test}.target_size"),
    part("dataset.min_scale", 0.1, "dataset.augmentation.train_scale"),
    part("dataset.max_scale", 2.0, "dataset.augmentation.train_scale"),
    taken("dataset.augmentation.train_crop_size", [1024, 1024]),
    taken("dataset.augmentation.test_min_size", 800),
    taken("dataset.augmentation.test_max_size", 1333),
    same("model.backbone.name", "D2SwinTransformer", NO_OTHER_BACKBONE),
    same("model.backbone.freeze_at", 0, "name the stages under train.freeze, such as backbone"),
    *(part(f"{SWIN}.{key}", LARGE[key], f"model.backbone.name {SWIN}.{key}") for key in SIZES),
    same("model.sem_seg_head.name", "OneFormerHead", "there is one head"),
    same("model.sem_seg_head.ignore_value", 255, "it is always 255; dataset.ignore_id names one more value"),
    same("model.sem_seg_head.loss_weight", 1.0, "give the factor to class_weight, mask_weight and dice_weight"),
    same("model.sem_seg_head.in_features", shared.THREE_MAPS, "the pixel decoder reads the strides 8, 16 and 32"),
    same("model.sem_seg_head.pixel_decoder_name", "MSDeformAttnPixelDecoder", "there is one pixel decoder"),
    taken(f"{HEAD}.nheads", 8, "model.{decoder,class_decoder,pixel_decoder}.nheads"),
    taken(f"{HEAD}.dim_feedforward", 2048, "model.{decoder,class_decoder}.dim_feedforward"),
    same(f"{HEAD}.enc_layers", 0, "the class transformer has decoder layers only"),
    taken(f"{HEAD}.class_dec_layers", 2, "model.class_decoder.layers"),
    taken(f"{HEAD}.dropout", 0.1, "model.{class_decoder,pixel_decoder}.dropout"),
    same(f"{HEAD}.enforce_input_proj", False, "the maps have the decoder's width already"),
    taken(f"{HEAD}.use_task_norm", True, "model.use_task_norm"),
    same(f"{HEAD}.size_divisibility", 32, "images are padded to multiples of 32"),
    same(f"{HEAD}.num_feature_levels", 3, "the strides 8, 16 and 32"),
    taken(f"{HEAD}.contrastive_weight", 0.5, "model.loss.contrastive_weight"),
    taken(f"{HEAD}.contrastive_temperature", 0.07, "model.loss.contrastive_temperature"),
    taken(f"{HEAD}.train_num_points", 12544, "model.loss.train_num_points"),
    taken(f"{HEAD}.oversample_ratio", 3.0, "model.loss.oversample_ratio"),
    taken(f"{HEAD}.importance_sample_ratio", 0.75, "model.loss.importance_sample_ratio"),
    same(f"{HEAD}.transformer_decoder_name", "ContrastiveMultiScaleMaskedTransformerDecoder", "there is one decoder"),
    same(f"{HEAD}.transformer_in_feature", "multi_scale_pixel_decoder", "there is one decoder"),
    part("model.text_encoder.context_length", 77, "model.text.context_length"),
    same("model.text_encoder.vocab_size", 49408, "it is the size of the tokenizer's vocabulary"),
    taken("model.text_encoder.width", 256, "model.text.width"),
    taken("model.text_encoder.num_layers", 6, "model.text.layers"),
    taken("model.text_encoder.n_ctx", 16, "model.text.num_context"),
    taken("model.text_encoder.proj_num_layers", 2, "model.text.projection_layers"),
    taken("train.pretrained_model", None, "train.pretrained_model_path", kind=LocalPath),
    taken("train.pretrained_backbone", None, "model.backbone.pretrained", kind=LocalPath),
    revived("train.clip_grad_norm", 0.1, "train.clip_grad_{norm,type}", MISPLACED, None, kind=NotNegative),
    revived("train.clip_grad_norm_type", 2.0, "", MISPLACED, None),
    revived("train.clip_grad_type", "full", "", MISPLACED, None, kind=Literal["full"]),
    revived("train.clip_gradients.enabled", True, "train.clip_grad_type", MISPLACED, None),
    revived("train.clip_gradients.clip_type", "full_model", "train.clip_grad_type", MISPLACED, None, kind=ClipType),
    revived("train.clip_gradients.clip_value", 1.0, "train.clip_grad_norm", MISPLACED, None),
    revived("train.clip_gradients.norm_type", 2.0, "train.clip_grad_norm_type", MISPLACED, None),
    taken("train.precision", "fp32", "", PRECISIONS.__getitem__, kind=Literal[tuple(PRECISIONS)]),
    revived("train.optim.lr_scheduler", "Warmuppoly", "", MISPLACED, shared.scheduler, kind=Scheduler),
    revived("train.optim.warmup_iters", 1000, "", MISPLACED),
    revived("train.optim.warmup_factor", 0.001, "", MISPLACED),
    revived("train.optim.milestones", [88, 96], "", MISPLACED),
    revived("train.optim.gamma", 0.1, "", MISPLACED),
    part("inference.images_dir", "", "inference.images", kind=LocalPath),
    machine("export.task", "semantic"),
    *shared.masked(HEAD, "model.test", queries=150, classes=133, lr=1e-5, contiguous=True, window=12),
    *shared.common(epochs=50, seed=123, gpus=8, width=640, height=640),
)

NOTES = {
    **shared.NOTES,
    "one width for all": f"model.sem_seg_head.mask_dim {HEAD}.hidden_dim",
    "images are 0..255 there and 0..1 here": "dataset.{pixel_mean,pixel_std}",
    "TAO's default shows the panoptic task to one image in a hundred; the published third is kept unless the file has the key": (
        "dataset.task_prob_train.{semantic,instance,panoptic}"
    ),
    "TAO stretches validation images to this square": "dataset.image_size",
    "published sizes are told by the name": "model.backbone.swin.{embed_dim,depths,num_heads}",
    "the masked decoder has none, as published": f"{HEAD}.dropout",
    shared.OTHER_WEIGHTS: "train.pretrained_model",
    f"TAO hands it to Lightning as it is, which refuses the documented fp16 and fp32 {NOT_RUN}": "train.precision",
    "the graph then does this task alone; without export.task in the written file the task is an input of the graph": "export.task",
}

LEFT_OUT = {
    **shared.MASKED_LEFT_OUT,
    "several sources are told apart by their files": "dataset.{train,val,test}.names",
    f"{ALL_TASKS}, instead of drawing one per image": "dataset.task_prob_val.{semantic,instance,panoptic}",
    "only the backbone of that name reads it, and it does not exist here": (
        "model.backbone.radio.{resolution,backbone,summary_idxs,window_size,num_teacher,cpe_max_size,register_multiple} "
        "model.backbone.radio.{out_features,use_checkpoint} "
        "model.backbone.dinat.{embed_dim,mlp_ratio,depths,num_heads,kernel_size,drop_path_rate,dilations}"
    ),
    ALL_TASKS: "model.test.{semantic_on,instance_on,panoptic_on,detection_on} evaluate.task",
    "train.validation_interval and its unit say when to validate": "train.val_check_interval",
    "every metric is always written per class, too": "evaluate.iou_per_class",
    "pictures and results of all tasks are written": "inference.mode",
    "test_min_size and test_max_size count, as in the evaluation": "inference.image_size",
}
IGNORED = {
    f"{NEVER_READ}; num_workers of each split counts": "dataset.workers",
    f"TAO looks for it in the wrong section {NOT_RUN}": "dataset.cutmix_prob",
    f"{NEVER_READ}; min_scale and max_scale count": "dataset.augmentation.{train_min_size,train_max_size}",
    NEVER_READ: "train.accumulate_grad_batches",
    f"{MISPLACED}; here the curve is as long as the training": "train.optim.max_iter",
    f"{MISPLACED}; milestones here are epochs": "train.optim.steps",
}


def _backbone(settings: Settings) -> Mapping[str, Any]:
    """A published size by its name, any other as the sizes of the nearest."""
    sizes = {key: settings[f"model.backbone.swin.{key}"] for key in SIZES}
    published = {name: {key: getattr(size, key) for key in SIZES} for name, size in SWIN_SIZES.items()}
    for name, known in published.items():
        if known == sizes:
            return shared.swin_keys(settings, name)
    nearest = min(
        published,
        key=lambda name: (
            abs(published[name]["embed_dim"] - sizes["embed_dim"]),
            published[name]["depths"] != sizes["depths"],
        ),
    )
    own = {f"model.backbone.swin.{key}": size for key, size in sizes.items()}
    return shared.swin_keys(settings, nearest) | own


def _sources(settings: Settings) -> Mapping[str, Any]:
    keys = [f"dataset.{name}.{leaf}" for name in SPLITS for leaf in SOURCES]
    found: dict[str, Any] = {key: data_paths(settings[key]) for key in keys if settings.given(key)}
    for name in SPLITS:
        images, annotations, panoptic = (f"dataset.{name}.{leaf}" for leaf in SOURCES)
        if annotations not in found and images in found:
            settings.refuse(annotations, "not given, and without it the images have no masks")
        if annotations in found and panoptic not in found:
            settings.refuse(
                panoptic, "not given; OneFormer learns from panoptic annotations, a JSON and a folder of PNG files"
            )
    if found:
        found |= {"dataset.type": "coco_panoptic", **shared.evaluated(found)}
    for key, ours in (("dataset.label_map", "dataset.label_map"), ("inference.images_dir", "inference.images")):
        if settings.given(key):
            found[ours] = data_paths(settings[key])
    return found


def _text(settings: Settings) -> Mapping[str, Any]:
    length, read = settings["model.text_encoder.context_length"], settings["dataset.max_seq_len"]
    if length != read:
        settings.refuse(
            "dataset.max_seq_len",
            f"{read}, but model.text_encoder.context_length is {length}; the texts have one length, give the same number to both",
        )
    return {"model.text.context_length": length}


def _sizes(settings: Settings) -> Mapping[str, Any]:
    square = [settings["dataset.image_size"]] * 2
    return {
        "dataset.augmentation.train_scale": [settings["dataset.min_scale"], settings["dataset.max_scale"]],
        "dataset.val.target_size": square,
        "dataset.test.target_size": square,
    }


def _clip(settings: Settings) -> Mapping[str, Any]:
    """Only what the file says: TAO clips nothing."""
    prefix, plain = "train.clip_gradients", [f"train.clip_grad_{key}" for key in ("norm", "norm_type", "type")]
    if settings.given(*(f"{prefix}.{key}" for key in ("enabled", "clip_type", "clip_value", "norm_type"))):
        settings.pass_over("clip_gradients says it more exactly", *plain)
        if not settings[f"{prefix}.enabled"]:
            return {"train.clip_grad_type": "none"}
        return {
            "train.clip_grad_type": settings[f"{prefix}.clip_type"].removesuffix("_model"),
            "train.clip_grad_norm": settings[f"{prefix}.clip_value"],
            "train.clip_grad_norm_type": settings[f"{prefix}.norm_type"],
        }
    if settings.given(*plain):
        return {**shared.clip(settings), "train.clip_grad_norm_type": settings["train.clip_grad_norm_type"]}
    return {}


FREEZE = {
    "backbone": ("backbone",),
    "sem_seg_head": ("pixel_decoder", "decoder", "class_decoder", "query_embed"),
    "sem_seg_head.pixel_decoder": ("pixel_decoder",),
    "sem_seg_head.predictor": ("decoder", "class_decoder", "query_embed"),
    "task_mlp": ("task_mlp",),
    "text_encoder": ("text",),
}
OF_ANOTHER_MODEL = "it is in TAO's document only, as advice taken from Deformable DETR"
RULES = (
    _backbone,
    _sources,
    shared.classes,
    shared.width(HEAD),
    _text,
    _sizes,
    _clip,
    shared.gpus,
    shared.seed,
    shared.freeze_rule(FREEZE),
)

TABLE = Table(
    "oneformer",
    KEYS,
    LEFT_OUT,
    IGNORED,
    NOTES,
    RULES,
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
        "dataset.dataset_type": OF_ANOTHER_MODEL,
        "dataset.augmentation.fixed_padding": OF_ANOTHER_MODEL,
    },
)
