"""The tables hold every key of TAO's schemas once, and whatever is taken over arrives under a key of ours that exists."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tessera.interop.tao import TABLES
from tessera.interop.tao.deformable_detr import GCVIT
from tessera.interop.tao.table import Fate, Row, expand
from tessera.models.backbone import GCVIT_SIZES
from tessera.spec.describe import keys_of
from tessera.spec.schema import SPECS
from tests.interop.tao.project import read

KEYS = yaml.safe_load((Path(__file__).parent / "samples/keys.yaml").read_text())
SECTIONS = {"mask2former": "mask_former", "oneformer": "one_former"}
ROWS = [(family, row) for family, table in TABLES.items() for row in table.rows.values()]

COCO = {"image_dir": "/data/images", "json_file": "/data/a.json"}


@pytest.mark.parametrize("family", TABLES)
def test_every_key_of_the_schema_has_one_row(family: str) -> None:
    assert TABLES[family].rows.keys() == {key for text in KEYS["shared"] + KEYS[family] for key in expand(text)}


def test_rows_are_complete() -> None:
    ours = {family: {key.name for key in keys_of(SPECS[family])} for family in TABLES}
    for family, row in ROWS:
        assert set(row.to) <= ours[family], row
        assert bool(row.to) == (row.fate in (Fate.TAKEN, Fate.REVIVED)), row
        assert row.note or row.fate is Fate.TAKEN, f"{row} does not say why"
        if row.default not in (None, "", [], {}):
            assert TABLES[family].read(row, row.default) == row.default, row


# One value, one key

CANDIDATES: tuple[Any, ...] = (
    *("epoch", "step", "fp16", "fsdp", "SGD", "StepLR", "MultiStep", "Warmuppoly", "instance", "/data/file"),
    *(True, False, 12, 3, 0.25, 352, 960, 4096),
    *([96, 128], [0.5, 0.25, 0.125], [3], [11, 22]),
)
SAMPLES = {
    "test_max_size": 2048,
    "random_resize_max_size": 1000,
    "nheads": 4,
    "dim_feedforward": 512,
    "num_object_queries": 200,
    "hidden_dim": 128,
    "text_encoder.width": 128,
    "proj_num_layers": 3,
    "opset_version": 20,
    "focal_alpha": 0.5,
}
"""By the end of the key, where the first candidate would not go with TAO's other defaults or is beyond our range."""
ALONE = [(family, row) for family, row in ROWS if row.convert]


@pytest.mark.parametrize(("family", "row"), ALONE, ids=[f"{family}-{row.key}" for family, row in ALONE])
def test_value_arrives(family: str, row: Row, tmp_path: Path) -> None:
    """Some value other than TAO's default is accepted, arrives as converted, and with the other values makes a valid spec."""
    assert row.convert is not None
    value = next((value for end, value in SAMPLES.items() if row.key.endswith(end)), None)
    value = next(other for other in CANDIDATES if readable(family, row, other)) if value is None else value
    assert readable(family, row, value)
    others = (
        {"gen_trt_engine.tensorrt.max_batch_size": 4096} if "batch_size" in row.key and "tensorrt" in row.key else {}
    )
    others |= {"gen_trt_engine.tensorrt.opt_batch_size": 4096} if row.key.endswith("tensorrt.min_batch_size") else {}
    others |= {"model.with_box_refine": False} if row.key == "model.aux_loss" else {}
    converted = read(tmp_path, family, {**others, row.key: value}).converted
    for key in row.to:
        assert converted.values[key] == row.convert(TABLES[family].read(row, value))
        assert converted.origins[key] == f"TAO: {row.key}"


def readable(family: str, row: Row, value: Any) -> bool:
    assert row.convert is not None
    try:
        read = TABLES[family].read(row, value)
        return bool(read != row.default) and row.convert(read) != row.convert(row.default) if row.default else True
    except (ValueError, TypeError):
        return False


# Several keys together

TOGETHER: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "mask2former": [
        (
            {
                "dataset.train.type": "ade",
                "dataset.train.root_dir": "/data",
                "dataset.train.img_dir": "images",
                "dataset.train.annot_file": "/data/train.jsonl",
                "dataset.label_map": "/data/labels.json",
                "model.mode": "semantic",
            },
            {
                "dataset.type": "mask_pairs",
                "dataset.train.images": "data",
                "dataset.train.annotations": "data/train.jsonl",
                "dataset.label_map": "data/labels.json",
                "model.mode": "semantic",
            },
        ),
        (
            {
                "dataset.type": "coco",
                **{f"dataset.{split}.img_dir": f"/data/{split}" for split in ("train", "val", "test")},
                **{f"dataset.{split}.instance_json": f"/data/{split}.json" for split in ("train", "val", "test")},
                "model.mode": "instance",
            },
            {
                "dataset.type": "coco",
                "dataset.val.images": "val",
                "dataset.test.annotations": "test.json",
                "evaluate.split": "test",
                "model.mode": "instance",
            },
        ),
        (
            {"dataset.val.type": "coco", "dataset.val.annot_file": "/data/val.json", "model.mode": "instance"},
            {"dataset.type": "coco", "dataset.val.annotations": "val.json", "evaluate.split": "val"},
        ),
        (
            {
                **{f"dataset.{split}.type": "coco_panoptic" for split in ("train", "val", "test")},
                **{f"dataset.{split}.root_dir": "/data" for split in ("train", "val", "test")},
                **{f"dataset.{split}.img_dir": split for split in ("train", "val", "test")},
                **{f"dataset.{split}.panoptic_json": f"/data/{split}.json" for split in ("train", "val", "test")},
                **{f"dataset.{split}.panoptic_dir": f"/data/png/{split}" for split in ("train", "val", "test")},
                "dataset.contiguous_id": True,
                "model.sem_seg_head.num_classes": 133,
            },
            {
                "dataset.train.images": "train",
                "dataset.val.annotations": "val.json",
                "dataset.test.panoptic": "png/test",
                "dataset.contiguous_id": True,
                "dataset.num_classes": 133,
                "model.mode": "panoptic",
            },
        ),
        (
            {"dataset.test.type": "ade", "dataset.test.annot_file": "/data/test.jsonl", "model.mode": "semantic"},
            {"dataset.type": "mask_pairs", "dataset.test.annotations": "test.jsonl", "evaluate.split": "test"},
        ),
        ({"dataset.test.root_dir": "/data", "dataset.test.img_dir": "photos"}, {"inference.images": "photos"}),
        (
            {"dataset.augmentation.train_min_size": [640], "dataset.augmentation.train_max_size": 1000},
            {"dataset.augmentation.train_min_size": [320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960, 1000]},
        ),
        ({"dataset.augmentation.train_min_size": [512, 480]}, {"dataset.augmentation.train_min_size": [480, 512]}),
        (
            {"model.backbone.type": "efficientvit", "model.backbone.efficientvit.name": "l2"},
            {"model.backbone.name": "efficientvit_l2"},
        ),
        (
            {
                "model.backbone.swin.type": "base",
                "model.backbone.swin.window_size": 12,
                "model.backbone.swin.drop_path_rate": 0.5,
            },
            {
                "model.backbone.name": "swin_base",
                "model.backbone.swin.window_size": 12,
                "model.backbone.drop_path_rate": 0.5,
            },
        ),
        ({"model.backbone.swin.type": "huge"}, {"model.backbone.name": "swin_huge"}),
        (
            {
                "model.sem_seg_head.convs_dim": 128,
                "model.sem_seg_head.mask_dim": 128,
                "model.mask_former.hidden_dim": 128,
            },
            {"model.pixel_decoder.hidden_dim": 128},
        ),
        ({"train.clip_grad_norm": 0.0}, {"train.clip_grad_type": "none"}),
        (
            {"train.clip_grad_norm": 0.5, "train.clip_grad_type": "full"},
            {"train.clip_grad_norm": 0.5, "train.clip_grad_type": "full"},
        ),
        (
            {"train.freeze": ["backbone", "sem_seg_head.pixel_decoder"]},
            {"train.freeze": ["backbone", "pixel_decoder"]},
        ),
        ({"train.num_gpus": 1, "train.gpu_ids": [0, 1]}, {"train.num_gpus": 2, "train.gpu_ids": [0, 1]}),
        ({"train.num_gpus": 4}, {"train.num_gpus": 4}),
        ({"train.seed": 7}, {"seed": 7}),
        ({"train.seed": -1}, {"seed": 0}),
    ],
    "oneformer": [
        (
            {
                **{
                    f"dataset.{split}.{leaf}": f"/data/{split}/{leaf}"
                    for split in ("train", "val", "test")
                    for leaf in ("images", "annotations", "panoptic")
                },
                "dataset.label_map": "/data/labels.json",
                "dataset.contiguous_id": False,
                "model.sem_seg_head.num_classes": 200,
            },
            {
                "dataset.type": "coco_panoptic",
                "dataset.val.images": "val/images",
                "dataset.test.panoptic": "test/panoptic",
                "dataset.label_map": "labels.json",
                "dataset.contiguous_id": False,
                "dataset.num_classes": 200,
                "evaluate.split": "test",
            },
        ),
        (
            {
                "dataset.train.images": ["/data/a", "/data/b"],
                "dataset.train.annotations": ["/data/a.json", "/data/b.json"],
                "dataset.train.panoptic": ["/data/a_png", "/data/b_png"],
            },
            {"dataset.train.images": ["a", "b"], "dataset.train.annotations": ["a.json", "b.json"]},
        ),
        ({"inference.images_dir": "/data/photos"}, {"inference.images": "photos"}),
        (
            {"dataset.image_size": 512, "dataset.min_scale": 0.5, "dataset.max_scale": 1.5},
            {
                "dataset.val.target_size": [512, 512],
                "dataset.test.target_size": [512, 512],
                "dataset.augmentation.train_scale": [0.5, 1.5],
            },
        ),
        (
            {
                "model.backbone.swin.embed_dim": 96,
                "model.backbone.swin.depths": [2, 2, 6, 2],
                "model.backbone.swin.num_heads": [3, 6, 12, 24],
                "model.backbone.swin.window_size": 7,
            },
            {"model.backbone.name": "swin_tiny"},
        ),
        (
            {
                "model.backbone.swin.embed_dim": 48,
                "model.backbone.swin.depths": [1, 1, 2, 1],
                "model.backbone.swin.num_heads": [2, 4, 8, 16],
                "model.backbone.swin.drop_path_rate": 0.0,
            },
            {
                "model.backbone.name": "swin_tiny",
                "model.backbone.swin.embed_dim": 48,
                "model.backbone.swin.depths": [1, 1, 2, 1],
                "model.backbone.swin.num_heads": [2, 4, 8, 16],
                "model.backbone.drop_path_rate": 0.0,
            },
        ),
        (
            {
                "model.sem_seg_head.convs_dim": 128,
                "model.sem_seg_head.mask_dim": 128,
                "model.one_former.hidden_dim": 128,
                "dataset.max_seq_len": 64,
                "model.text_encoder.context_length": 64,
            },
            {"model.pixel_decoder.hidden_dim": 128, "model.text.context_length": 64},
        ),
        ({"train.precision": 16}, {"train.precision": "fp16"}),
        ({"train.precision": "bf16-mixed"}, {"train.precision": "bf16"}),
        ({"train.precision": "fp32"}, {"train.precision": "fp32"}),
        (
            {
                "train.clip_gradients.enabled": True,
                "train.clip_gradients.clip_type": "value",
                "train.clip_gradients.clip_value": 0.5,
                "train.clip_gradients.norm_type": 1.0,
            },
            {"train.clip_grad_type": "value", "train.clip_grad_norm": 0.5, "train.clip_grad_norm_type": 1.0},
        ),
        ({"train.clip_gradients.enabled": False}, {"train.clip_grad_type": "none"}),
        (
            {"train.clip_grad_norm": 0.2, "train.clip_grad_norm_type": 3.0, "train.clip_grad_type": "full"},
            {"train.clip_grad_type": "full", "train.clip_grad_norm": 0.2, "train.clip_grad_norm_type": 3.0},
        ),
        (
            {
                "train.freeze": ["text_encoder", "sem_seg_head.predictor"],
                "train.num_gpus": 2,
                "train.gpu_ids": [3],
                "train.seed": 5,
            },
            {
                "train.freeze": ["text", "decoder", "class_decoder", "query_embed"],
                "train.num_gpus": 2,
                "train.gpu_ids": [3],
                "seed": 5,
            },
        ),
    ],
    "deformable_detr": [
        (
            {
                "dataset.train_data_sources": [COCO, {"image_dir": "/data/more", "json_file": "/data/shards/*"}],
                "dataset.val_data_sources": [COCO],
                "dataset.num_classes": 21,
            },
            {
                "dataset.type": "coco",
                "dataset.train.images": ["images", "more"],
                "dataset.train.annotations": ["a.json", "shards/*"],
                "dataset.val.annotations": "a.json",
                "dataset.num_classes": 20,
                "dataset.contiguous_id": False,
                "evaluate.split": "val",
            },
        ),
        (
            {
                "dataset.test_data_sources": COCO,
                "dataset.infer_data_sources": {"image_dir": ["/data/p"], "classmap": "/data/c.txt"},
            },
            {
                "dataset.test.images": "images",
                "inference.images": "p",
                "dataset.label_map": "c.txt",
                "evaluate.split": "test",
            },
        ),
        (
            {
                "dataset.augmentation.scales": [608, 480],
                "dataset.augmentation.train_random_resize": [300],
                "dataset.augmentation.train_random_crop_min": 200,
                "dataset.augmentation.train_random_crop_max": 300,
                "dataset.augmentation.fixed_padding": "TRUE",
            },
            {
                "dataset.augmentation.train_min_size": [480, 608],
                "dataset.augmentation.train_random_resize": [300],
                "dataset.augmentation.train_random_crop": [200, 300],
                "dataset.augmentation.fixed_padding": [608, 1333],
                "dataset.augmentation.train_crop_size": None,
            },
        ),
        (
            {"dataset.augmentation.fixed_random_crop": 1024},
            {"dataset.augmentation.train_crop_size": [1024, 1024], "dataset.augmentation.train_scale": [0.1, 2.0]},
        ),
        *(({"model.backbone": name}, {"model.backbone.name": name}) for name in GCVIT),
        ({"model.train_backbone": False, "train.freeze": ["input_proj"]}, {"train.freeze": ["backbone", "input_proj"]}),
        (
            {"model.return_interm_indices": [0, 1, 2, 3, 4], "model.num_feature_levels": 5},
            {"model.strides": [4, 8, 16, 32], "model.num_feature_levels": 5},
        ),
        (
            {"model.return_interm_indices": [1, 2], "model.num_feature_levels": 2},
            {"model.strides": [8, 16], "model.num_feature_levels": 2},
        ),
        (
            {
                "train.optim.lr": 1e-3,
                "train.optim.lr_backbone": 5e-4,
                "train.optim.lr_linear_proj_mult": 0.2,
                "model.linear_proj_names": ["reference_points"],
            },
            {
                "train.optim.backbone_multiplier": 0.5,
                "train.optim.multipliers": {"reference_points": 0.2, "sampling_offsets": 1.0},
            },
        ),
        ({"train.clip_grad_norm": 0.3}, {"train.clip_grad_norm": 0.3, "train.clip_grad_type": "full"}),
        ({"inference.color_map": {"person": "#0a0B0c"}}, {"inference.color_map": {"person": [10, 11, 12]}}),
        ({"train.num_gpus": 1, "train.gpu_ids": [1, 2], "train.seed": 3}, {"train.num_gpus": 2, "seed": 3}),
    ],
}
CASES = [(family, *case) for family, cases in TOGETHER.items() for case in cases]


@pytest.mark.parametrize(
    ("family", "values", "expected"), CASES, ids=[f"{family}-{next(iter(given))}" for family, given, _ in CASES]
)
def test_values_arrive_together(family: str, values: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    converted = read(tmp_path, family, values).converted
    assert {key: converted.values.get(key) for key in expected} == expected


def test_every_key_of_a_rule_is_in_a_case() -> None:
    told = {(family, key) for family, values, _ in CASES for key in values}
    resolved_elsewhere = {("deformable_detr", "dataset.eval_class_ids")}  # needs files: test_refusals
    assert {(family, row.key) for family, row in ROWS if row.to and row.convert is None} <= told | resolved_elsewhere


def test_a_key_that_is_fixed_accepts_its_value_alone() -> None:
    fixed = [(family, row) for family, row in ROWS if row.fate is Fate.SAME]
    assert len(fixed) > 50
    for family, row in fixed:
        assert TABLES[family].read(row, row.default) == row.default
        for other in ("another", 17, [17], {"a": 1}):
            with pytest.raises(ValueError, match="here it is always"):
                TABLES[family].read(row, other)


def test_names_are_those_of_the_networks() -> None:
    assert set(GCVIT) == set(GCVIT_SIZES)


def test_document_names_what_tao_ignores() -> None:
    text = (Path(__file__).parents[3] / "docs/tao.md").read_text().partition("## What TAO accepts and ignores")[2]
    for _, row in ROWS:
        if row.fate in (Fate.REVIVED, Fate.IGNORED):
            assert f"`{row.key}`" in text, row.key
