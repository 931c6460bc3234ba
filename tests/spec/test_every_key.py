"""No key is dead: each one changes some stage's lineage or is marked inert, and each one is read by code outside spec/."""

import ast
import json
import typing
from pathlib import Path
from typing import Any

import pytest

from tessera.spec.describe import Key, keys_of
from tessera.spec.lineage import STAGES, lineage_text
from tessera.spec.schema import Spec
from tests.spec.test_lineage import STEPS

SOURCE = Path(__file__).parents[2] / "src" / "tessera"

BASE: dict[str, Any] = {
    "model": {"mode": "semantic"},
    "dataset": {"generator": {}, "num_classes": 3},
    "engine": {"opt_batch_size": 2, "max_batch_size": 4},
}
"""A spec in which every key can change alone: all annotation types serve its mode, and its batches leave room."""

VALUES: dict[str, Any] = {
    "model.backbone.name": "swin_small",
    "model.backbone.swin.embed_dim": 48,
    "model.backbone.swin.depths": [1, 1, 1, 1],
    "model.backbone.swin.num_heads": [1, 2, 4, 8],
    "model.backbone.swin.window_size": 5,
    "model.pixel_mean": [0.5, 0.5, 0.5],
    "model.pixel_std": [0.5, 0.5, 0.5],
    "model.pixel_decoder.hidden_dim": 288,
    "model.pixel_decoder.nheads": 4,
    "model.decoder.nheads": 4,
    "dataset.augmentation.train_min_size": [64, 96],
    "dataset.augmentation.train_scale": [0.5, 2.0],
    "dataset.augmentation.train_crop_size": [64, 96],
    "dataset.train.target_size": [64, 96],
    "dataset.val.target_size": [64, 96],
    "dataset.test.target_size": [64, 96],
    "train.gpu_ids": [1],
    "train.iters_per_epoch": 7,
    "train.keep_checkpoints": 3,
    "train.optim.milestones": [5, 6],
    "export.batch_size": 2,
    "export.input_height": 320,
    "export.input_width": 320,
}
"""Changed values of the keys that ``change`` cannot guess."""


def change(key: Key) -> Any:
    """Another legal value."""
    if key.name in VALUES:
        return VALUES[key.name]
    value, annotation = (
        value_at(Spec.model_validate_json(json.dumps(BASE)).model_dump(), key.name),
        key.field.annotation,
    )
    if typing.get_origin(annotation) is typing.Literal:
        return next((other for other in typing.get_args(annotation) if other != value), None)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 if value else 0.25
    if isinstance(value, list):
        return [*value, "changed"]
    return "changed"


def value_at(values: Any, name: str) -> Any:
    for piece in name.split("."):
        values = values[piece]
    return values


def changed_spec(key: Key) -> Spec:
    values = json.loads(json.dumps(BASE))
    *sections, leaf = key.name.split(".")
    section = values
    for name in sections:
        section = section.setdefault(name, {})
    section[leaf] = change(key)
    return Spec.model_validate_json(json.dumps(values))


KEYS = {key.name: key for key in keys_of(Spec)}
SINGLE = {name for name, key in KEYS.items() if change(key) is None}
"""Keys that have one legal value yet."""


@pytest.mark.parametrize("name", sorted(KEYS.keys() - SINGLE))
def test_key_changes_a_lineage_or_is_inert(name: str) -> None:
    key = KEYS[name]
    old, new = Spec.model_validate_json(json.dumps(BASE)), changed_spec(key)
    assert value_at(old.model_dump(), name) != value_at(new.model_dump(), name)
    changed = [step for step in STEPS if lineage_text(old, *step) != lineage_text(new, *step)]
    assert not changed if key.inert else changed


def test_single_valued_keys_are_the_known_ones() -> None:
    assert sorted(SINGLE) == ["model.name"]


def test_every_section_is_read_by_a_stage() -> None:
    read = {section for stage in STAGES.values() for section in stage.sections}
    assert read == set(Spec.model_fields) - {"data_root"}


READERS = {
    "seed": ("training", "data"),
    "data_root": ("data",),
    "model": ("models",),
    "dataset": ("data", "ops"),
    "train": ("training", "data", "models"),
    "postprocess": ("models",),
    "evaluate": ("cli", "inference"),
    "inference": ("inference",),
    "export": ("deploy",),
    "precision": ("deploy",),
    "engine": ("deploy",),
    "parity": ("deploy", "cli"),
}
"""Section -> packages and modules that work with it."""

WHOLE_SECTIONS = {"SwinSpec": "models/backbone.py"}
"""Sections that a module unpacks with ``model_dump`` into keyword arguments of the same names."""


def attributes_in(package: str) -> set[str]:
    """Names that stand behind a dot in the package's source."""
    folder = SOURCE / package
    paths = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_every_key_is_read_where_its_section_belongs() -> None:
    """By its name as an attribute; of an unpacked section, by its name in the module that unpacks it."""
    assert READERS.keys() == Spec.model_fields.keys()
    found = {section: set().union(*map(attributes_in, packages)) for section, packages in READERS.items()}
    unread = []
    for name, key in KEYS.items():
        module = WHOLE_SECTIONS.get(key.section.__name__)
        if module is None:
            read = key.leaf in found[name.partition(".")[0]]
        else:
            text = (SOURCE / module).read_text(encoding="utf-8")
            read = "model_dump" in text and key.leaf in text
        if not read:
            unread.append(name)
    assert unread == [], "nothing reads these keys: read them, or remove them from the schema"
