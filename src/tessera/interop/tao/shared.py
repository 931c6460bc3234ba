"""Keys that the three models have in common, and rules that more than one of them uses."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tessera.files import UserError, read_json
from tessera.interop.tao.table import (
    PATH,
    SECTION,
    SIDE,
    TEXT,
    TRUTH,
    UNSET,
    DataPath,
    Kind,
    Row,
    Rule,
    Settings,
    choice,
    left_out,
    listing,
    number,
    part,
    same,
    taken,
    whole,
)
from tessera.spec.networks import SWIN_SIZES, SwinSize

OWN_FOLDER = "every experiment has its own folder, results/<experiment>"
OWN_MODEL = "every stage finds the model of its experiment by itself"
ONE_PROCESS = "this stage runs in one process; the numbers would be the same"
OTHER_WEIGHTS = (
    "a file of this project, or one that `tessera import` made from a published checkpoint; TAO's own checkpoints put `no object` first and "
    "are not read"
)
ITERS_PER_EPOCH = "TAO measures the learning-rate curve by it (read from its source, not run); here the curve is as long as the training"
MONITOR = "no scheduler that TAO has reads it (read from its source, not run)"
SCHEDULERS = {"MultiStep": "MultiStep", "Warmuppoly": "WarmupPoly", "StepLR": "StepLR"}
QUANTIZE = "the precision of a graph is asked for by file name, not by a key"
TENSORRT_PRECISION = "no key: ask for a file by its precision, as in `tessera engine --precision fp16`"


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


ROOT = (
    left_out("results_dir", PATH, "", OWN_FOLDER),
    left_out("encryption_key", TEXT, None, "model files are not encrypted here"),
    left_out("model_name", TEXT, None, "the experiment's name tells its model"),
    *(
        left_out(f"wandb.{key}", kind, default, "nothing is sent anywhere; curves are written for TensorBoard")
        for key, kind, default in (
            ("enable", TRUTH, True),
            ("project", TEXT, "TAO Toolkit"),
            ("entity", TEXT, ""),
            ("group", TEXT, ""),
            ("name", TEXT, ""),
            ("run_id", TEXT, ""),
            ("tags", listing(TEXT), []),
            ("reinit", TRUTH, False),
            ("sync_tensorboard", TRUTH, False),
            ("save_code", TRUTH, False),
        )
    ),
)


def train(epochs: int, seed: int, gpus: int) -> tuple[Row, ...]:
    """``epochs``, ``seed``, ``gpus``: the model's own defaults."""
    return (
        part("train.num_gpus", whole(1), gpus, "train.num_gpus"),
        part("train.gpu_ids", listing(whole(0)), [0], "train.gpu_ids"),
        taken("train.num_nodes", whole(1), 1, "train.num_nodes", impose=False),
        part("train.seed", whole(-1), seed, "seed", "listed under `seeds` in config/config.yaml"),
        left_out("train.cudnn.benchmark", TRUTH, False, "it changes speed only"),
        left_out("train.cudnn.deterministic", TRUTH, True, "a run on the CPU always repeats itself bit for bit"),
        taken("train.num_epochs", whole(1), epochs, "train.num_epochs"),
        taken("train.checkpoint_interval", whole(1), 1, "train.checkpoint_interval", impose=False),
        taken(
            "train.checkpoint_interval_unit",
            choice("epoch", "step"),
            "epoch",
            "train.checkpoint_interval_unit",
            impose=False,
        ),
        taken("train.validation_interval", whole(1), 1, "train.validation_interval"),
        left_out(
            "train.resume_training_checkpoint_path",
            PATH,
            None,
            "a training continues by itself from its newest checkpoint; the state of a TAO training cannot be continued here",
        ),
        left_out("train.results_dir", PATH, None, OWN_FOLDER),
    )


DRY_RUN = same(
    "train.is_dry_run",
    TRUTH,
    False,
    "for a trial run give train.num_epochs=1 train.iters_per_epoch=1 and --out FOLDER to `tessera train`",
)
DISTRIBUTED = taken(
    "train.distributed_strategy",
    choice("ddp", "fsdp"),
    "ddp",
    "train.distributed_strategy",
    impose=False,
)


def task(name: str) -> tuple[Row, ...]:
    """`evaluate` or `inference`."""
    return (
        left_out(f"{name}.num_gpus", whole(1), 1, ONE_PROCESS),
        left_out(f"{name}.gpu_ids", listing(whole(0)), [0], ONE_PROCESS),
        left_out(f"{name}.num_nodes", whole(1), 1, ONE_PROCESS),
        left_out(f"{name}.checkpoint", PATH, UNSET, OWN_MODEL),
        left_out(f"{name}.trt_engine", PATH, None, OWN_MODEL),
        left_out(f"{name}.results_dir", PATH, None, OWN_FOLDER),
        left_out(
            f"{name}.batch_size",
            whole(-1),
            -1,
            "the batch of dataset.val and dataset.test counts; it changes speed only",
        ),
    )


def export(width: int, height: int) -> tuple[Row, ...]:
    return (
        left_out("export.results_dir", PATH, None, OWN_FOLDER),
        left_out("export.gpu_id", whole(0), 0, "the graph is traced on the CPU"),
        left_out("export.checkpoint", PATH, UNSET, OWN_MODEL),
        left_out("export.onnx_file", PATH, UNSET, "it is results/<experiment>/model.onnx"),
        taken(
            "export.on_cpu",
            TRUTH,
            False,
            "export.on_cpu",
            note="false: a graph that only TensorRT runs, where TAO's documents have true as the default and its source false",
            impose=False,
        ),
        same("export.input_channel", whole(1), 3, "images are RGB"),
        taken("export.input_width", SIDE, width, "export.input_width", to_multiple_of_32),
        taken("export.input_height", SIDE, height, "export.input_height", to_multiple_of_32),
        taken("export.opset_version", whole(1), 17, "export.opset_version", opset, "18 at least"),
        taken("export.batch_size", whole(-1), -1, "export.batch_size", free_batch),
        left_out("export.verbose", TRUTH, False, "it changes what is printed only"),
        same("export.format", choice("onnx", "xdl"), "onnx", "no other format is written"),
    )


def engine(data_type: Row) -> tuple[Row, ...]:
    return (
        left_out("gen_trt_engine.results_dir", PATH, None, OWN_FOLDER),
        left_out("gen_trt_engine.gpu_id", whole(0), 0, "choose it with CUDA_VISIBLE_DEVICES"),
        left_out("gen_trt_engine.onnx_file", PATH, UNSET, "it is results/<experiment>/model.onnx"),
        left_out("gen_trt_engine.trt_engine", PATH, None, "it is results/<experiment>/model.engine"),
        taken("gen_trt_engine.timing_cache", PATH, None, "engine.timing_cache"),
        left_out(
            "gen_trt_engine.batch_size", whole(-1), -1, "export.batch_size says whether the graph's batch is free"
        ),
        taken("gen_trt_engine.verbose", TRUTH, False, "engine.verbose", impose=False),
        taken("gen_trt_engine.tensorrt.workspace_size", whole(1), 1024, "engine.workspace_size"),
        *(
            taken(f"gen_trt_engine.tensorrt.{size}_batch_size", whole(1), 1, f"engine.{size}_batch_size")
            for size in ("min", "opt", "max")
        ),
        same(
            "gen_trt_engine.tensorrt.layers_precision",
            listing(TEXT),
            [],
            "which operators stay in fp32 is said by precision.fp16_keep",
        ),
        data_type,
    )


QUANTIZE_ROWS = tuple(
    left_out(f"quantize.{key}", kind, default, QUANTIZE)
    for key, kind, default in (
        ("backend", choice("torchao", "modelopt.pytorch", "modelopt.onnx"), "torchao"),
        ("mode", choice("weight_only_ptq", "static_ptq"), "weight_only_ptq"),
        (
            "algorithm",
            choice("minmax", "max", "entropy", "awq_clip", "awq_lite", "awq_full", "rtn_dq"),
            "minmax",
        ),
        ("layers", listing(SECTION), []),
        ("skip_names", listing(TEXT), []),
        ("model_path", PATH, ""),
        ("results_dir", PATH, ""),
        ("backend_kwargs", SECTION, {}),
        ("device", TEXT, "cuda"),
    )
)


# Rules


def gpus(settings: Settings) -> Mapping[str, Any]:
    if not settings.given("train.num_gpus", "train.gpu_ids"):
        return {}
    count = settings["train.num_gpus"] if settings.given("train.num_gpus") else 1
    ids = settings["train.gpu_ids"] if settings.given("train.gpu_ids") else [0]
    if settings.given("train.num_gpus") and settings.given("train.gpu_ids") and count != len(ids):
        for key in ("train.num_gpus", "train.gpu_ids"):
            settings.note(
                key, f"num_gpus {count} and gpu_ids {ids} disagree; the larger counts, as TAO's document says"
            )
    found: dict[str, Any] = {"train.num_gpus": max(count, len(ids))}
    if settings.given("train.gpu_ids"):
        found["train.gpu_ids"] = ids
    return found


def seed(settings: Settings) -> Mapping[str, Any]:
    if not settings.given("train.seed"):
        return {}
    if settings["train.seed"] < 0:
        settings.note("train.seed", "TAO then seeds nothing; here a run always has a seed, and 0 is taken")
        return {"seed": 0}
    return {"seed": settings["train.seed"]}


def clip(settings: Settings) -> dict[str, Any]:
    """Of the rows `train.clip_grad_*`; 0 means no clipping in TAO's documents."""
    if settings["train.clip_grad_norm"] == 0:
        return {"train.clip_grad_type": "none"}
    return {"train.clip_grad_type": "full", "train.clip_grad_norm": settings["train.clip_grad_norm"]}


def classes(settings: Settings, key: str) -> dict[str, Any]:
    """``key`` holds the number of classes. Where the label map is on this machine, the number is compared with it."""
    contiguous, count = settings["dataset.contiguous_id"], settings[key]
    ids = _label_ids(settings["dataset.label_map"])
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
        return {"dataset.contiguous_id": False, "dataset.num_classes": count}
    if not settings.given(key):
        return {"dataset.contiguous_id": True}
    if ids and count < len(ids):
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
    return {"dataset.contiguous_id": True, "dataset.num_classes": count}


def _label_ids(path: str | None) -> list[int]:
    """Empty where the label map is elsewhere, or not well-formed, which `tessera check` tells in detail."""
    if not path or not Path(path).is_file():
        return []
    try:
        content = read_json(Path(path))
    except UserError:
        return []
    entries = content if isinstance(content, list) else []
    return [entry["id"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), int)]


def width(settings: Settings, *keys: str) -> dict[str, Any]:
    """TAO's model could have a different width in each of its parts; here they are one."""
    values = {key: settings[key] for key in keys}
    if len(set(values.values())) > 1:
        told = ", ".join(f"{key} {value}" for key, value in values.items())
        settings.refuse(
            keys[0], f"expected one width for all parts of the model, found {told}; give the same number to each"
        )
    return {"model.pixel_decoder.hidden_dim": values[keys[0]]}


def freeze_rule(names: Mapping[str, tuple[str, ...]], trained: str | None = None) -> Rule:
    """``names``: TAO's module -> ours. TAO warns of unknown names only; here they are refused. ``trained``: key that is false where the
    backbone is frozen."""

    def make(settings: Settings) -> Mapping[str, Any]:
        frozen = ["backbone"] if trained and not settings[trained] else []
        for name in settings["train.freeze"]:
            if name in names:
                frozen += names[name]
            else:
                settings.refuse(
                    "train.freeze",
                    f"no module of TAO's model is known here as {name!r}; known are {', '.join(names)}; for others remove it, and set "
                    "train.freeze in the written file to module names of this project",
                )
        given = settings.given("train.freeze", *([trained] if trained else []))
        return {"train.freeze": list(dict.fromkeys(frozen))} if given else {}

    return make


def swin_keys(settings: Settings, name: str) -> dict[str, Any]:
    """The window is written where it is not that of the name."""
    window = settings["model.backbone.swin.window_size"]
    found = {
        "model.backbone.name": name,
        "model.backbone.drop_path_rate": settings["model.backbone.swin.drop_path_rate"],
    }
    if window == SWIN_SIZES[name].window_size:
        settings.note("model.backbone.swin.window_size", f"that of {name}")
        return found
    return {**found, "model.backbone.swin.window_size": window}


def swin_rows(prefix: str, size: Callable[[str, Kind, Any], Row], sizes: SwinSize) -> tuple[Row, ...]:
    """``size`` makes the rows of embed_dim, depths and num_heads; ``sizes``: their defaults and the window's."""
    dim, depths, heads, window = sizes
    fixed = "timm's and the published Swin have no other"
    return (
        size(f"{prefix}.embed_dim", whole(1), dim),
        size(f"{prefix}.depths", listing(whole(1), 4), depths),
        size(f"{prefix}.num_heads", listing(whole(1), 4), heads),
        part(f"{prefix}.window_size", whole(1), window, ("model.backbone.name", "model.backbone.swin.window_size")),
        part(f"{prefix}.drop_path_rate", number(0, 1), 0.3, "model.backbone.drop_path_rate"),
        same(f"{prefix}.patch_size", whole(1), 4, fixed),
        same(f"{prefix}.mlp_ratio", number(0), 4.0, fixed),
        same(f"{prefix}.qkv_bias", TRUTH, True, fixed),
        same(f"{prefix}.qk_scale", number(), None, fixed),
        same(f"{prefix}.drop_rate", number(0, 1), 0.0, "the published recipes use drop_path_rate alone"),
        same(f"{prefix}.attn_drop_rate", number(0, 1), 0.0, "the published recipes use drop_path_rate alone"),
        same(f"{prefix}.ape", TRUTH, False, "positions are relative, so that any image size works"),
        same(f"{prefix}.patch_norm", TRUTH, True, fixed),
        same(f"{prefix}.out_indices", listing(whole(0)), [0, 1, 2, 3], "all four maps are used"),
        same(f"{prefix}.out_features", listing(TEXT), ["res2", "res3", "res4", "res5"], "all four maps are used"),
        left_out(f"{prefix}.pretrain_img_size", whole(1), 384, "only absolute positions (ape) would need it"),
        left_out(f"{prefix}.use_checkpoint", TRUTH, False, "train.activation_checkpoint covers the whole network"),
    )


def pixels_0_255(value: list[float]) -> list[float]:
    """To images in [0, 1]."""
    return [round(channel / 255, 6) for channel in value]


def pixels_0_1(value: list[float]) -> list[float]:
    if max(value) > 1:
        raise ValueError("expected the scale of images in [0, 1]; divide by 255")
    return value


def from_mapping(names: Mapping[str, str]) -> Callable[[Any], Any]:
    return lambda value: names[value]


def one_less(value: int) -> int:
    """TAO's and detectron2's `dec_layers` counts the prediction on the raw queries."""
    if value < 2:
        raise ValueError(
            "expected at least 2: TAO counts the prediction on the raw queries, so 1 leaves no decoder layer"
        )
    return value - 1


def height_width(value: list[int]) -> list[int] | None:
    """From [width, height]."""
    return [value[1], value[0]] if value else None


def join(folder: str | None, path: str | None) -> str | None:
    if not path:
        return folder or None
    return posixpath.join(folder, path) if folder else path


def data_path(path: str | None) -> DataPath | None:
    return DataPath(path) if path else None


def data_paths(paths: str | list[str]) -> DataPath | list[DataPath]:
    """A list of one is a path alone."""
    if isinstance(paths, str):
        return DataPath(paths)
    return DataPath(paths[0]) if len(paths) == 1 else [DataPath(path) for path in paths]
