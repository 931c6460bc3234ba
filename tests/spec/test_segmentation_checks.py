"""Keys of the encoder-decoder family, of testing and of the poly schedule that are legal alone and not together."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from tessera.spec.schema import Spec, read_spec


def read(**sections: Any) -> Spec:
    model = {"name": "encoder_decoder", **sections.pop("model", {})}
    return read_spec(json.loads(json.dumps({"model": model, "dataset": {"type": "mask_pairs"}, **sections})))


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "fpn on dilated maps": (
        {"model": {"decoder": {"type": "fpn"}, "output_stride": 8}},
        r"model\.output_stride: fpn doubles the size .* expected 32, found 8",
    ),
    "linknet on dilated maps": (
        {"model": {"decoder": {"type": "linknet"}, "output_stride": 16}},
        r"model\.output_stride: linknet .* found 16",
    ),
    "groups of fpn": (
        {"model": {"decoder": {"type": "fpn", "channels": 100}}},
        r"model\.decoder\.channels: .* multiple of 64 .* found 100; take 128",
    ),
    "no loss": ({"model": {"losses": {}}}, r"model\.losses: no loss has a weight above 0"),
    "losses without weight": ({"model": {"losses": {"a": {"weight": 0.0}}}}, r"model\.losses: no loss has a weight"),
    "name of a loss": ({"model": {"losses": {"a.b": {}}}}, r"model\.losses: 'a\.b' is no name"),
    "name of a head": ({"model": {"auxiliary": {"": {}}}}, r"model\.auxiliary: '' is no name"),
    "mining without cross-entropy": (
        {"model": {"ohem": {}, "losses": {"dice": {"type": "dice"}}}},
        r"model\.ohem: .* has none",
    ),
    "weights that nothing reads": (
        {"model": {"class_weights": [1.0], "losses": {"dice": {"type": "dice"}}}},
        r"model\.class_weights: .* has neither",
    ),
    "no weight": ({"model": {"class_weights": [0.0, 0.0]}}, r"model\.class_weights: are all 0"),
    "window of no multiple": (
        {"testing": {"mode": "slide", "crop_size": [100, 128], "stride": [64, 64]}},
        r"testing\.crop_size: expected a height that is a multiple of 32, found 100; take 96",
    ),
    "gaps between windows": (
        {"testing": {"mode": "slide", "crop_size": [128, 128], "stride": [64, 200]}},
        r"testing\.stride: steps of 200 leave gaps .* width is 128",
    ),
    "floor above the rate": (
        {"train": {"optim": {"lr": 0.001, "min_lr": 0.01}}},
        r"train\.optim\.min_lr: expected at most train\.optim\.lr, 0\.001, found 0\.01",
    ),
}


@pytest.mark.parametrize(("sections", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_disagreeing_keys(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        read(**sections)


def test_what_agrees_is_read() -> None:
    losses = {"ce": {}, "dice": {"type": "dice", "weight": 3.0}}
    spec = read(
        model={"losses": losses, "ohem": {"thresh": None, "min_kept": 5}, "class_weights": [1.0, 2.0]},
        testing={"mode": "slide", "crop_size": [128, 96], "stride": [128, 48], "scales": [0.5, 1.0], "flip": True},
    )
    assert spec.testing.crop_size == (128, 96)


@pytest.mark.parametrize("mode", ["panoptic", "instance"])
@pytest.mark.parametrize(
    ("key", "value"), [("flip", True), ("scales", [0.5, 1.0]), ("mode", "slide"), ("crop_size", [64, 64])]
)
def test_only_semantic_predictions_are_averaged(mode: str, key: str, value: Any) -> None:
    values = {"model": {"name": "mask2former", "mode": mode}, "testing": {key: value}}
    with pytest.raises(
        ValidationError, match=rf"testing\.{key}: averages semantic predictions, but model\.mode is {mode}"
    ):
        read_spec(values)
    assert read_spec(values | {"model": {"name": "mask2former", "mode": "semantic"}})
