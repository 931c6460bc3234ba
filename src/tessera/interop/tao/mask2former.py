"""TAO's Mask2Former spec, key by key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from tessera.interop.tao import shared
from tessera.interop.tao.shared import NOT_RUN, Channels, NotNegative, data_paths
from tessera.interop.tao.table import Fixed, LocalPath, Settings, Side, Table, machine, part, revived, taken

TYPES = {"ade": "mask_pairs", "coco": "coco", "coco_panoptic": "coco_panoptic"}
SPLITS = ("train", "val", "test")
SOURCES = {"panoptic_json": "coco_panoptic", "instance_json": "coco", "annot_file": "ade"}
"""A split's key that holds annotations -> the type that they can only have."""
SPLIT = "dataset.{train,val,test}"
HEAD = "model.mask_former"
SWIN = ("tiny", "small", "base", "large", "huge")
EFFICIENTVIT = ("b0", "b1", "b2", "b3", "l0", "l1", "l2", "l3")
DEAD = f"TAO's loss always uses whole masks {NOT_RUN}; here the loss is made from sampled points, as published"


KEYS = (
    part("dataset.{type,train.type,val.type,test.type}", "ade", "dataset.type", kind=Literal[tuple(TYPES)]),
    part("dataset.{train,val}.img_dir", "", "dataset.{train,val}.images", kind=LocalPath),
    part("dataset.test.img_dir", "", "dataset.test.images inference.images", kind=LocalPath),
    part(f"{SPLIT}.root_dir", "", f"{SPLIT}.images", kind=LocalPath),
    *(part(f"{SPLIT}.{source}", "", f"{SPLIT}.annotations", kind=LocalPath) for source in reversed(SOURCES)),
    part(f"{SPLIT}.panoptic_dir", "", f"{SPLIT}.panoptic", kind=LocalPath),
    taken(f"{SPLIT}.batch_size", 1),
    machine(f"{SPLIT}.num_workers", 1),
    taken(f"{SPLIT}.target_size", [], "", shared.height_width, kind=list[Side]),
    taken("dataset.pixel_mean", [0.485, 0.456, 0.406], "model.pixel_mean", shared.pixels_0_1, kind=Channels),
    taken("dataset.pixel_std", [0.229, 0.224, 0.225], "model.pixel_std", shared.pixels_0_1, kind=Channels),
    part("dataset.augmentation.train_min_size", [640], kind=list[Side]),
    taken("dataset.augmentation.train_max_size", 2560),
    taken("dataset.augmentation.train_crop_size", [640, 640]),
    taken("dataset.augmentation.{test_min_size,test_max_size}", 640),
    part("model.mode", "panoptic", kind=Literal["panoptic", "instance", "semantic"]),
    part("model.backbone.type", "swin", "model.backbone.name", kind=Literal["swin", "efficientvit"]),
    taken("model.backbone.pretrained_weights", None, "model.backbone.pretrained", kind=LocalPath),
    part("model.backbone.swin.type", "tiny", "model.backbone.name", kind=Literal[SWIN]),
    part("model.backbone.efficientvit.name", "l0", "model.backbone.name", kind=Literal[EFFICIENTVIT]),
    taken(f"{HEAD}.nheads", 8, "model.{decoder,pixel_decoder}.nheads"),
    taken(f"{HEAD}.dim_feedforward", 2048, "model.decoder.dim_feedforward"),
    taken(f"{HEAD}.dropout", 0.0, "model.{decoder,pixel_decoder}.dropout"),
    revived(f"{HEAD}.train_num_points", 12544, "model.loss.train_num_points", DEAD),
    revived(f"{HEAD}.oversample_ratio", 3.0, "model.loss.oversample_ratio", DEAD),
    revived(f"{HEAD}.importance_sample_ratio", 0.75, "model.loss.importance_sample_ratio", DEAD),
    taken("train.pretrained_model_path", None, kind=LocalPath),
    part("train.clip_grad_norm", 0.1, kind=NotNegative),
    taken("train.clip_grad_norm_type", 2.0),
    part("train.clip_grad_type", "full", kind=Literal["full"]),
    taken("train.precision", "fp32", kind=Literal["fp32", "fp16"]),
    machine("train.activation_checkpoint", False),
    taken("train.optim.lr_scheduler", "MultiStep", "", shared.scheduler, kind=Literal["MultiStep", "Warmuppoly"]),
    taken("train.optim.milestones", [88, 96]),
    taken("train.optim.gamma", 0.1),
    *shared.masked(HEAD, "model", queries=100, classes=200, lr=2e-4, contiguous=False, window=7),
    *shared.common(epochs=10, seed=1234, gpus=1, width=960, height=544),
)

NOTES = {
    **shared.NOTES,
    "one width for all": f"model.sem_seg_head.mask_dim {HEAD}.hidden_dim",
    "the older form: of all splits": "dataset.type",
    "a test folder without annotations: inference.images": "dataset.test.img_dir",
    "[width, height] there, [height, width] here": f"{SPLIT}.target_size",
    shared.OTHER_WEIGHTS: "train.pretrained_model_path",
    "0 is no clipping: clip_grad_type none": "train.clip_grad_norm",
}

LEFT_OUT = {
    **shared.MASKED_LEFT_OUT,
    "the dataset's name is that of its file": "dataset.{train,val,test}.name",
    "deformable attention is always computed in fp32 here": "model.precise_msda",
    "several processes always share the images": "train.use_distributed_sampler",
}
IGNORED = {
    "TAO overwrites it with the size that swin.type names": "model.backbone.swin.{embed_dim,depths,num_heads}",
    "TAO reads efficientvit.name only": "model.backbone.efficientvit.{out_indices,out_features,pretrain_img_size,use_checkpoint}",
    shared.MONITOR: "train.optim.monitor_name",
}


def _backbone(settings: Settings) -> Mapping[str, Any]:
    swin = "model.backbone.swin"
    if settings["model.backbone.type"] == "efficientvit":
        unread = (f"{swin}.{key}" for key in ("type", "window_size", "drop_path_rate"))
        settings.pass_over("read with backbone.type swin only", *unread)
        return {"model.backbone.name": f"efficientvit_{settings['model.backbone.efficientvit.name']}"}
    if settings[f"{swin}.type"] == "huge":
        settings.note(f"{swin}.type", "huge is in TAO's document, not in its schema")
    settings.pass_over("read with backbone.type efficientvit only", "model.backbone.efficientvit.name")
    return shared.swin_keys(settings, f"swin_{settings[f'{swin}.type']}")


def _sources(settings: Settings) -> Mapping[str, Any]:
    """Where the data lie. A split's type may be left out where its keys tell it."""
    kinds = {name: _kind(settings, name) for name in SPLITS}
    said = {kind for kind in kinds.values() if kind}
    types = {kind for name, kind in kinds.items() if kind and _has_sources(settings, name)} or said
    if len(types) > 1:
        told = ", ".join(f"dataset.{name}: {kind}" for name, kind in kinds.items() if kind)
        settings.refuse("dataset.val.type", f"the splits have different types ({told}); a dataset has one here")
    found: dict[str, Any] = {"dataset.type": TYPES[next(iter(types))]} if len(types) == 1 else {}
    for name in SPLITS:
        found |= _split_sources(settings, name, kinds[name])
    found |= shared.evaluated(found)
    if settings.given("dataset.label_map"):
        found["dataset.label_map"] = data_paths(settings["dataset.label_map"])
    if "dataset.type" in found or settings.given("model.mode"):
        found["model.mode"] = settings["model.mode"]
    return found


def _has_sources(settings: Settings, name: str) -> bool:
    return settings.given(*(f"dataset.{name}.{leaf}" for leaf in (*SOURCES, "panoptic_dir")))


def _kind(settings: Settings, name: str) -> str | None:
    """TAO's type of a split: what it says, else what its keys can only mean; None where it says nothing."""
    key = f"dataset.{name}"
    for said in (f"{key}.type", "dataset.type"):
        if settings.given(said):
            return str(settings[said])
    if settings.given(f"{key}.instance_json") and settings["model.mode"] == "instance":
        return "coco"
    for leaf, kind in SOURCES.items():
        if settings.given(f"{key}.{leaf}"):
            settings.note(f"{key}.{leaf}", f"{key}.type is left out (TAO: ade); taken as {kind} by this key")
            return kind
    return None


def _split_sources(settings: Settings, name: str, kind: str | None) -> dict[str, Any]:
    key = f"dataset.{name}"
    root, folder = settings[f"{key}.root_dir"], settings[f"{key}.img_dir"]
    images = data_paths(shared.join(root, folder))
    leaf = next((leaf for leaf, own in SOURCES.items() if own == kind), None)
    if leaf is None or (name == "test" and not _has_sources(settings, name)):
        return {"inference.images": images} if images is not None and name == "test" else {}
    if kind != "ade" and not settings.given(f"{key}.{leaf}") and settings.given(f"{key}.annot_file"):
        settings.note(f"{key}.annot_file", f"taken as {leaf}, as TAO's document allows")
        leaf = "annot_file"
    read = {leaf, "panoptic_dir"} if kind == "coco_panoptic" else {leaf}
    unread = {*SOURCES, "panoptic_dir"} - read
    settings.pass_over(f"not read with type {kind}", *(f"{key}.{other}" for other in unread))
    found = {
        f"{key}.images": data_paths(root or folder) if kind == "ade" else images,
        f"{key}.annotations": data_paths(settings[f"{key}.{leaf}"]),
        f"{key}.panoptic": data_paths(settings[f"{key}.panoptic_dir"]) if "panoptic_dir" in read else None,
    }
    if found[f"{key}.annotations"] is None and name in ("train", "val") and images is not None:
        settings.refuse(f"{key}.{leaf}", f"not given, and type {kind} reads its annotations there")
    return {key: value for key, value in found.items() if value is not None}


def _train_sizes(settings: Settings) -> Mapping[str, Any]:
    """TAO widens a single size s to the sizes from s/2 to 2s in steps of 64."""
    key = "dataset.augmentation.train_min_size"
    sizes, largest = settings[key], settings["dataset.augmentation.train_max_size"]
    if len(sizes) == 1:
        sizes = range(min(max(32, sizes[0] // 2), largest), min(2 * sizes[0], largest) + 64, 64)
        settings.note(key, f"TAO silently widens a single size s to s/2, s/2 + 64, ... 2s {NOT_RUN}")
    return {key: sorted({min(size, largest) for size in sizes})}


FREEZE = {
    "backbone": ("backbone",),
    "sem_seg_head": ("pixel_decoder", "decoder", "query_feat", "query_embed"),
    "sem_seg_head.pixel_decoder": ("pixel_decoder",),
    "sem_seg_head.predictor": ("decoder", "query_feat", "query_embed"),
}
RULES = (
    _backbone,
    _sources,
    shared.classes,
    shared.width(HEAD),
    _train_sizes,
    shared.clip,
    shared.gpus,
    shared.seed,
    shared.freeze_rule(FREEZE),
)

TABLE = Table(
    "mask2former",
    KEYS,
    LEFT_OUT,
    IGNORED,
    NOTES,
    RULES,
    fixed=(
        Fixed("dataset.augmentation.train_scale", None, "TAO draws from train_min_size"),
        Fixed("train.optim.warmup_iters", 0, "TAO has no key for it"),
        Fixed("dataset.augmentation.single_class_max_area", 0.6, "TAO draws a crop again while one class covers more"),
        Fixed("dataset.augmentation.flip", 0.5, "TAO has no key for it"),
        Fixed("dataset.augmentation.color_jitter", True, "TAO has no key for it"),
    ),
    names={"data": "dataset"},
    absent={"dataset.workers": "it is in TAO's document only; its source reads num_workers of each split"},
)
