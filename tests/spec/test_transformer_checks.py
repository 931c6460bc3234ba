"""Keys of the transformers that are legal alone and not together."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tessera.spec.schema import read_spec


def values(name: str, model: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {
        "model": {"name": name, **model},
        "dataset": {"type": "coco_panoptic", **others.pop("dataset", {})},
        **others,
    }


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "heads that nobody trains": (
        values("deformable_detr", {"loss": {"aux_loss": False}}),
        r"model\.loss\.aux_loss: .* model\.with_box_refine",
    ),
    "a pixel of a crop": (
        values("deformable_detr", {"hidden_dim": 32}, dataset={"augmentation": {"train_crop_size": [64, 48]}}),
        r"model\.hidden_dim: 32 .* stride 64, .* dataset\.augmentation\.train_crop_size 64; take 64",
    ),
    "a pixel of a small image": (
        values(
            "deformable_detr",
            {"hidden_dim": 32},
            dataset={"augmentation": {"train_crop_size": None, "train_min_size": [96, 64]}},
        ),
        r"model\.hidden_dim: .* dataset\.augmentation\.train_min_size 64",
    ),
    "a pixel of a test image": (
        values("oneformer", {"pixel_decoder": {"hidden_dim": 32}}, dataset={"augmentation": {"test_min_size": 32}}),
        r"model\.pixel_decoder\.hidden_dim: .* stride 32, .* dataset\.augmentation\.test_min_size 32",
    ),
    "a pixel of a graph": (
        values("mask2former", {"pixel_decoder": {"hidden_dim": 32}}, export={"input_height": 32, "input_width": 32}),
        r"model\.pixel_decoder\.hidden_dim: .* export\.input_height and input_width 32",
    ),
}


@pytest.mark.parametrize(("content", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_disagreeing_keys(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        read_spec(content)


@pytest.mark.parametrize(
    "content",
    [
        values("deformable_detr", {"loss": {"aux_loss": False}, "with_box_refine": False}),
        values("deformable_detr", {"loss": {"aux_loss": False}, "dec_layers": 1}),
        values("deformable_detr", {"hidden_dim": 64}, dataset={"augmentation": {"train_crop_size": [64, 48]}}),
        values("deformable_detr", {"hidden_dim": 32}, dataset={"augmentation": {"train_crop_size": [64, 96]}}),
        values(
            "deformable_detr",
            {"hidden_dim": 32, "num_feature_levels": 3, "dilation": True},
            dataset={"augmentation": {"train_crop_size": [32, 32]}},
        ),
    ],
)
def test_what_agrees_is_read(content: dict[str, Any]) -> None:
    assert read_spec(content).model.name == "deformable_detr"
