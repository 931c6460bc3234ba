"""Keys that the models have in common, and rules that more than one of them uses."""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, MaxLen, MinLen

from tessera.data.label_map import read_label_map
from tessera.files import UserError
from tessera.interop.tao.table import DataPath, Fate, LocalPath, Row, Rule, Settings, Side, machine, part, same, taken
from tessera.spec.networks import SWIN_SIZES

Channels = Annotated[list[float], MinLen(3), MaxLen(3)]
Precision = Literal["FP32", "FP16", "fp32", "fp16"]
NotNegative = Annotated[float, Ge(0)]

NOT_RUN = "(read from its source, not run)"
OTHER_WEIGHTS = (
    "a file of this project, or one that `tessera import` made from a published checkpoint; TAO's own checkpoints put `no object` first and "
    "are not read"
)
ITERS_PER_EPOCH = f"TAO measures the learning-rate curve by it {NOT_RUN}; here the curve is as long as the training"
MONITOR = f"no scheduler that TAO has reads it {NOT_RUN}"
QUANTIZE = "the precision of a graph is asked for by file name, not by a key"
TENSORRT_PRECISION = "no key: ask for a file by its precision, as in `tessera engine --precision fp16`"
DRY_RUN = "for a trial run give train.num_epochs=1 train.iters_per_epoch=1 and --out FOLDER to `tessera train`"
PUBLISHED_SWIN = "timm's and the published Swin have no other"
THREE_MAPS = ["res3", "res4", "res5"]

LEFT_OUT = {
    "every experiment has its own folder, results/<experiment>": "{,train.,evaluate.,inference.,export.,gen_trt_engine.}results_dir",
    "model files are not encrypted here": "encryption_key",
    "the experiment's name tells its model": "model_name",
    "nothing is sent anywhere; curves are written for TensorBoard": (
        "wandb.{enable,project,entity,group,name,run_id,tags,reinit,sync_tensorboard,save_code}"
    ),
    "it changes speed only": "train.cudnn.benchmark",
    "a run on the CPU always repeats itself bit for bit": "train.cudnn.deterministic",
    "a training continues by itself from its newest checkpoint; the state of a TAO training cannot be continued here": (
        "train.resume_training_checkpoint_path"
    ),
    "set train.verbose in the written file": "train.verbose",
    "this stage runs in one process; the numbers would be the same": "{evaluate,inference}.{num_gpus,gpu_ids,num_nodes}",
    "every stage finds the model of its experiment by itself": "{evaluate,inference}.{checkpoint,trt_engine} export.checkpoint",
    "the batch of dataset.val and dataset.test counts; it changes speed only": "{evaluate,inference}.batch_size",
    "the loaders pin memory where there is a GPU": "dataset.pin_memory",
    "the graph is traced on the CPU": "export.gpu_id",
    "it is results/<experiment>/model.onnx": "{export,gen_trt_engine}.onnx_file",
    "it changes what is printed only": "export.verbose",
    "choose it with CUDA_VISIBLE_DEVICES": "gen_trt_engine.gpu_id",
    "it is results/<experiment>/model.engine": "gen_trt_engine.trt_engine",
    "export.batch_size says whether the graph's batch is free": "gen_trt_engine.batch_size",
    QUANTIZE: "quantize.{backend,mode,algorithm,layers,skip_names,model_path,results_dir,backend_kwargs,device}",
}


def to_multiple_of_32(value: int) -> int:
    if value % 32:
        raise ValueError(f"expected a multiple of 32; take {max(32, round(value / 32) * 32)}")
    return value


def opset(value: int) -> int:
    """The exporter writes 18 at least; operators of older sets exist in newer ones, so raising it changes no result."""
    return max(value, 18)


def free_batch(value: int) -> int:
    if value == 0:
        raise ValueError("expected -1 (free) or at least 1")
    return value


def pixels_0_255(value: list[float]) -> list[float]:
    """To images in [0, 1]."""
    return [round(channel / 255, 6) for channel in value]


def pixels_0_1(value: list[float]) -> list[float]:
    if max(value) > 1:
        raise ValueError("expected the scale of images in [0, 1]; divide by 255")
    return value


def scheduler(name: str) -> str:
    return "WarmupPoly" if name == "Warmuppoly" else name


def one_less(value: int) -> int:
    """TAO's and detectron2's `dec_layers` counts the prediction on the raw queries."""
    if value < 2:
        raise ValueError(
            "expected at least 2: TAO counts the prediction on the raw queries, so 1 leaves no decoder layer"
        )
    return value - 1


def common(epochs: int, seed: int, gpus: int, width: int, height: int) -> tuple[Row, ...]:
    """Keys of all three models; the arguments are the model's own defaults."""
    engine = "gen_trt_engine.tensorrt"
    return (
        part("train.num_gpus", gpus),
        part("train.gpu_ids", [0]),
        machine("train.{num_nodes,checkpoint_interval}", 1),
        part("train.seed", seed, "seed"),
        taken("train.num_epochs", epochs),
        machine("train.checkpoint_interval_unit", "epoch"),
        taken("train.validation_interval", 1),
        part("train.freeze", [], kind=list[str]),
        same("train.is_dry_run", False, DRY_RUN),
        machine("train.distributed_strategy", "ddp"),
        machine("train.optim.momentum", 0.9),
        machine("export.on_cpu", False),
        same("export.input_channel", 3, "images are RGB"),
        taken("export.input_width", width, "", to_multiple_of_32, kind=Side),
        taken("export.input_height", height, "", to_multiple_of_32, kind=Side),
        taken("export.opset_version", 17, "", opset),
        taken("export.batch_size", -1, "", free_batch),
        same("export.format", "onnx", "no other format is written"),
        taken("gen_trt_engine.timing_cache", None, "engine.timing_cache", kind=LocalPath),
        machine("gen_trt_engine.verbose", False, "engine.verbose"),
        taken(f"{engine}.workspace_size", 1024, "engine.workspace_size"),
        taken(f"{engine}.{{min,opt,max}}_batch_size", 1, "engine.{min,opt,max}_batch_size"),
        same(f"{engine}.layers_precision", [], "which operators stay in fp32 is said by precision.fp16_keep"),
    )


NOTES = {
    "listed under `seeds` in config/config.yaml": "train.seed",
    "false: a graph that only TensorRT runs, where TAO's documents have true as the default and its source false": "export.on_cpu",
    "18 at least": "export.opset_version",
}


def masked(
    head: str, test: str, queries: int, classes: int, lr: float, contiguous: bool, window: int
) -> tuple[Row, ...]:
    """Keys of Mask2Former and OneFormer; ``head`` and ``test`` begin the names of their sections."""
    swin, encoder = "model.backbone.swin", "model.sem_seg_head"
    return (
        part("dataset.contiguous_id", contiguous, "dataset.{contiguous_id,num_classes}"),
        part("dataset.label_map", "", kind=LocalPath),
        taken(f"{encoder}.transformer_enc_layers", 6, "model.pixel_decoder.layers"),
        part(f"{encoder}.{{convs_dim,mask_dim}} {head}.hidden_dim", 256, "model.pixel_decoder.hidden_dim"),
        part(f"{encoder}.num_classes", classes, "dataset.num_classes"),
        same(f"{encoder}.common_stride", 4, "masks are predicted at a quarter of the image"),
        same(f"{encoder}.deformable_transformer_encoder_in_features", THREE_MAPS, "it reads the strides 8, 16 and 32"),
        same(f"{encoder}.norm", "GN", "no other norm is built"),
        taken(f"{head}.num_object_queries", queries, "model.decoder.num_object_queries"),
        taken(f"{head}.dec_layers", 10, "model.decoder.layers", one_less),
        taken(f"{head}.pre_norm", False, "model.decoder.pre_norm"),
        taken(f"{head}.deep_supervision", True, "model.loss.deep_supervision"),
        taken(f"{head}.class_weight", 2.0, "model.loss.class_weight"),
        taken(f"{head}.{{mask,dice}}_weight", 5.0, "model.loss.{mask,dice}_weight"),
        taken(f"{head}.no_object_weight", 0.1, "model.loss.no_object_weight"),
        taken(f"{test}.object_mask_threshold", 0.4, "postprocess.object_mask_threshold"),
        taken(f"{test}.overlap_threshold", 0.5, "postprocess.overlap_threshold"),
        taken(f"{test}.test_topk_per_image", 100, "postprocess.test_topk_per_image"),
        taken("train.optim.type", "AdamW", kind=Literal["AdamW", "SGD"]),
        taken("train.optim.lr", lr),
        taken("train.optim.backbone_multiplier", 0.1),
        taken("train.optim.weight_decay", 0.05),
        part(f"{swin}.window_size", window, f"model.backbone.name {swin}.window_size"),
        part(f"{swin}.drop_path_rate", 0.3, "model.backbone.drop_path_rate"),
        same(f"{swin}.patch_size", 4, PUBLISHED_SWIN),
        same(f"{swin}.mlp_ratio", 4.0, PUBLISHED_SWIN),
        same(f"{swin}.{{qkv_bias,patch_norm}}", True, PUBLISHED_SWIN),
        same(f"{swin}.qk_scale", None, PUBLISHED_SWIN),
        same(f"{swin}.{{drop_rate,attn_drop_rate}}", 0.0, "the published recipes use drop_path_rate alone"),
        same(f"{swin}.ape", False, "positions are relative, so that any image size works"),
        same(f"{swin}.out_indices", [0, 1, 2, 3], "all four maps are used"),
        same(f"{swin}.out_features", ["res2", *THREE_MAPS], "all four maps are used"),
        Row("gen_trt_engine.tensorrt.data_type", None, Fate.LEFT_OUT, kind=Precision, note=TENSORRT_PRECISION),
    )


MASKED_LEFT_OUT = {
    **LEFT_OUT,
    QUANTIZE: f"{LEFT_OUT[QUANTIZE]} dataset.quant_calibration_dataset.images_dir",
    "only absolute positions (ape) would need it": "model.backbone.swin.pretrain_img_size",
    "train.activation_checkpoint covers the whole network": "model.backbone.swin.use_checkpoint",
    "the export stage needs no switch in the model": "model.export",
    ITERS_PER_EPOCH: "train.iters_per_epoch",
}


# Rules


def gpus(settings: Settings) -> Mapping[str, Any]:
    if not settings.given("train.num_gpus", "train.gpu_ids"):
        return {}
    counted, named = settings.given("train.num_gpus"), settings.given("train.gpu_ids")
    count = settings["train.num_gpus"] if counted else 1
    ids = settings["train.gpu_ids"] if named else [0]
    if counted and named and count != len(ids):
        for key in ("train.num_gpus", "train.gpu_ids"):
            settings.note(
                key, f"num_gpus {count} and gpu_ids {ids} disagree; the larger counts, as TAO's document says"
            )
    return {"train.num_gpus": max(count, len(ids))} | ({"train.gpu_ids": ids} if named else {})


def seed(settings: Settings) -> Mapping[str, Any]:
    if not settings.given("train.seed"):
        return {}
    if settings["train.seed"] < 0:
        settings.note("train.seed", "TAO then seeds nothing; here a run always has a seed, and 0 is taken")
    return {"seed": max(0, settings["train.seed"])}


RULES = (gpus, seed)


def clip(settings: Settings) -> dict[str, Any]:
    """0 means no clipping in TAO's documents."""
    if settings["train.clip_grad_norm"] == 0:
        return {"train.clip_grad_type": "none"}
    return {"train.clip_grad_type": "full", "train.clip_grad_norm": settings["train.clip_grad_norm"]}


def classes(settings: Settings) -> dict[str, Any]:
    """Where the label map is on this machine, the number of classes is compared with it."""
    key = "model.sem_seg_head.num_classes"
    contiguous, count = settings["dataset.contiguous_id"], settings[key]
    ids = list(named_ids(settings["dataset.label_map"]))
    if not contiguous:
        if ids and max(ids) > count:
            settings.refuse(
                key,
                f"{count}, but with contiguous_id false the label map's own ids are the classes, and the largest is {max(ids)}; "
                f"set {key} to at least {max(ids)}, or dataset.contiguous_id to true",
            )
        settings.note(
            key,
            "ids stay as they are, so the largest must not exceed it (COCO: 90, panoptic 200); `tessera check` compares",
        )
    elif not settings.given(key):
        return {"dataset.contiguous_id": True}
    elif ids and count < len(ids):
        settings.refuse(key, f"{count}, but the label map has {len(ids)} classes; set {key} to {len(ids)}")
    elif ids and count > len(ids):
        settings.note(
            key, f"{count} in the file; the label map has {len(ids)}, and TAO fills up with classes that do not exist"
        )
        count = len(ids)
    elif not ids:
        settings.note(
            key,
            "compared with the label map by `tessera check`; leave it out of the written file if TAO's number had room to spare",
        )
    return {"dataset.contiguous_id": contiguous, "dataset.num_classes": count}


def named_ids(path: str | None) -> dict[int, str]:
    """Of a label map. Empty where it is elsewhere, or not well-formed, which `tessera check` tells in detail."""
    if path and Path(path).is_file():
        with contextlib.suppress(UserError):
            return {entry.id: entry.name for entry in read_label_map(Path(path)).categories}
    return {}


def width(head: str) -> Rule:
    """TAO's model could have a different width in each of its parts; here they are one."""

    def make(settings: Settings) -> Mapping[str, Any]:
        keys = ("model.sem_seg_head.convs_dim", "model.sem_seg_head.mask_dim", f"{head}.hidden_dim")
        if len({settings[key] for key in keys}) > 1:
            told = ", ".join(f"{key} {settings[key]}" for key in keys)
            settings.refuse(
                keys[0], f"expected one width for all parts of the model, found {told}; give the same number to each"
            )
        return {"model.pixel_decoder.hidden_dim": settings[keys[0]]}

    return make


def freeze_rule(names: Mapping[str, tuple[str, ...]], trained: str | None = None) -> Rule:
    """``names``: TAO's module -> ours. TAO warns of unknown names only; here they are refused. ``trained``: key that is false where the
    backbone is frozen."""

    def make(settings: Settings) -> Mapping[str, Any]:
        frozen = ["backbone"] if trained and not settings[trained] else []
        for name in settings["train.freeze"]:
            if name not in names:
                settings.refuse(
                    "train.freeze",
                    f"no module of TAO's model is known here as {name!r}; known are {', '.join(names)}; for others remove it, and set "
                    "train.freeze in the written file to module names of this project",
                )
            frozen += names.get(name, ())
        given = settings.given("train.freeze", *([trained] if trained else []))
        return {"train.freeze": list(dict.fromkeys(frozen))} if given else {}

    return make


def swin_keys(settings: Settings, name: str) -> dict[str, Any]:
    """The window is written where it is not that of the name."""
    window, rate = settings["model.backbone.swin.window_size"], settings["model.backbone.swin.drop_path_rate"]
    found = {"model.backbone.name": name, "model.backbone.drop_path_rate": rate}
    if window == SWIN_SIZES[name].window_size:
        settings.note("model.backbone.swin.window_size", f"that of {name}")
        return found
    return {**found, "model.backbone.swin.window_size": window}


def height_width(value: list[int]) -> list[int] | None:
    """From [width, height]."""
    if len(value) not in (0, 2):
        raise ValueError("expected [width, height]")
    return value[::-1] or None


def evaluated(found: Mapping[str, Any]) -> dict[str, str]:
    """The split that is evaluated: test where it has annotations, else val."""
    annotated = [split for split in ("test", "val") if f"dataset.{split}.annotations" in found]
    return {"evaluate.split": annotated[0]} if annotated else {}


def join(folder: str | None, path: str | None) -> str | None:
    return posixpath.join(folder or "", path or "").removesuffix("/") or None


def data_paths(paths: str | Sequence[str] | None) -> DataPath | list[DataPath] | None:
    """A list of one is a path alone, and an empty one is none."""
    listed = [DataPath(path) for path in ([paths] if isinstance(paths, str) else paths or ()) if path]
    return listed if len(listed) > 1 else next(iter(listed), None)
