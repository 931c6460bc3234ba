"""No key is dead: each one changes some stage's lineage or is marked inert, and each one is read by code outside spec/."""

import ast
import json
import typing
from pathlib import Path
from typing import Any

import pytest

from tessera.spec.compose import Table
from tessera.spec.describe import ANY_NAME, Key, keys_of
from tessera.spec.lineage import STAGES, lineage_text
from tessera.spec.schema import SPECS, Spec
from tests.spec.test_lineage import STEPS

SOURCE = Path(__file__).parents[2] / "src" / "tessera"

FETCHED = "dataset.fetch."
ARCHIVE: dict[str, Any] = {"address": "s3://bucket/images.tar", "sha256": "0" * 64}

BASE: dict[str, Any] = {
    "dataset": {"generator": {}, "num_classes": 3},
    "engine": {"opt_batch_size": 2, "max_batch_size": 4},
    "train": {"num_gpus": 2},
}
"""A spec in which every key can change alone; its batches leave room."""

MODELS: dict[str, dict[str, Any]] = {
    "mask2former": {"mode": "semantic"},
    "oneformer": {"mode": "semantic"},
    "deformable_detr": {"with_box_refine": False},
    "encoder_decoder": {"losses": {"ce": {}, "second": {}}, "auxiliary": {"aux": {}}, "ohem": {}},
}
"""The same for `model`, by family: all annotation types serve its mode, and every section is there."""


VALUES: dict[str, Any] = {
    "model.backbone.name": "swin_small",
    "model.backbone.norm": "frozen",
    "model.mode": "instance",
    "model.class_decoder.nheads": 4,
    "model.text.width": 320,
    "model.strides": [16, 32],
    "model.hidden_dim": 288,
    "model.nheads": 4,
    "model.class_weights": [1.0, 2.0, 3.0],
    "model.backbone.swin.embed_dim": 48,
    "model.backbone.swin.depths": [1, 1, 1, 1],
    "model.backbone.swin.num_heads": [1, 2, 4, 8],
    "model.backbone.swin.window_size": 5,
    "model.pixel_mean": [0.5, 0.5, 0.5],
    "model.pixel_std": [0.5, 0.5, 0.5],
    "model.pixel_decoder.hidden_dim": 288,
    "model.pixel_decoder.nheads": 4,
    "model.decoder.nheads": 4,
    "dataset.fetch.<name>.sha256": "1" * 64,
    "dataset.augmentation.train_min_size": [64, 96],
    "dataset.augmentation.train_scale": [0.5, 2.0],
    "dataset.augmentation.train_crop_size": [64, 96],
    "dataset.augmentation.fixed_padding": [64, 96],
    "dataset.augmentation.train_random_crop": [64, 96],
    "dataset.augmentation.train_random_resize": [64, 96],
    "model.decoder.atrous_rates": [6, 12, 18],
    "train.optim.multipliers": {"backbone": 0.5},
    "evaluate.classes": ["circle"],
    "evaluate.max_detections": [1, 10, 300],
    "evaluate.size_borders": [16.0, 64.0],
    "inference.color_map": {"circle": [1, 2, 3]},
    "inference.outline_width": 5,
    "dataset.convert.input_source": ["b"],
    "dataset.convert.val_source": ["c"],
    "dataset.convert.test_source": ["d"],
    "dataset.convert.image_dir_name": "image_2",
    "dataset.convert.label_dir_name": "label_2",
    "dataset.convert.mapping_path": "classes.json",
    "dataset.convert.val_split": 10.0,
    "dataset.convert.num_partitions": 5,
    "dataset.convert.num_shards": 3,
    "dataset.convert.seed": 1,
    "dataset.value_range": [0.0, 4095.0],
    "dataset.train.target_size": [64, 96],
    "dataset.val.target_size": [64, 96],
    "dataset.test.target_size": [64, 96],
    "train.gpu_ids": [0, 1, 2],
    "train.iters_per_epoch": 7,
    "train.keep_checkpoints": 3,
    "train.optim.milestones": [5, 6],
    "train.optim.min_lr": 5.0e-5,
    "testing.crop_size": [64, 96],
    "testing.stride": [64, 96],
    "testing.scales": [0.5, 1.0],
    "export.batch_size": 2,
    "export.input_height": 320,
    "export.input_width": 320,
}
"""Changed values of the keys that ``change`` cannot guess."""


AUGMENTATION = "dataset.augmentation"
CONTEXT: dict[str, dict[str, Any]] = {
    f"{AUGMENTATION}.fixed_padding": {"train_crop_size": None},
    f"{AUGMENTATION}.train_random_crop": {"train_random_resize": [64], "train_random_crop": [48, 64]},
    f"{AUGMENTATION}.train_random_resize": {"train_random_resize": [96], "train_random_crop": [64, 96]},
}
"""Other augmentation keys that a key needs to be legal."""


def base(family: str, name: str = "") -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps({**BASE, "model": {"name": family, **MODELS[family]}}))
    if family == "deformable_detr":
        values["dataset"]["type"] = "coco"
    if name.startswith(FETCHED):
        values["dataset"] |= {"generator": None, "fetch": {"images": dict(ARCHIVE)}}
    if name.startswith("dataset.convert."):
        values["dataset"] |= {"type": "coco", "label_map": "map.json", "convert": {"input_source": ["a"]}}
        values["model"]["mode"] = "instance"
    if name in CONTEXT:
        values["dataset"]["augmentation"] = dict(CONTEXT[name])
    return values


def read(values: dict[str, Any]) -> Spec:
    return SPECS[values["model"]["name"]].model_validate_json(json.dumps(values))


def change(family: str, key: Key) -> Any:
    """Another legal value; None where there is none."""
    if key.name in VALUES and (family, key.name) not in SINGLE:
        return VALUES[key.name]
    values, annotation = read(base(family, key.name)).model_dump(), key.field.annotation
    value = value_at(values, pieces(family, key))
    if typing.get_origin(annotation) is typing.Literal:
        return next((other for other in typing.get_args(annotation) if other != value), None)
    literals = [one for one in typing.get_args(annotation) if typing.get_origin(one) is typing.Literal]
    if literals and value is None:
        return typing.get_args(literals[0])[-1]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 if value else 0.25
    if isinstance(value, list):
        return [*value, "changed"]
    return "changed"


def pieces(family: str, key: Key) -> list[str]:
    """The dotted key, with the names that the base spec gives to named sections."""
    names = key.name.split(".")
    if ANY_NAME in names:
        place = names.index(ANY_NAME)
        names[place] = next(iter(value_at(base(family, key.name), names[:place])))
    return names


def value_at(values: Any, names: list[str]) -> Any:
    for piece in names:
        values = values[piece]
    return values


def changed_spec(family: str, key: Key) -> Spec:
    values = base(family, key.name)
    *sections, leaf = pieces(family, key)
    section = values
    for name in sections:
        section = section.setdefault(name, {})
    section[leaf] = change(family, key)
    return read(values)


SINGLE = {("deformable_detr", "model.mode"), ("encoder_decoder", "model.mode")} | {
    (family, "model.name") for family in SPECS
}
"""Keys that have one legal value."""

KEYS = {
    (family, key.name): key
    for family, section in SPECS.items()
    for key in keys_of(section)
    if family == "mask2former" or key.name.startswith("model.")
}
"""What is outside `model` is the same for every family and looked at once."""


@pytest.mark.parametrize(("family", "name"), sorted(KEYS.keys() - SINGLE))
def test_key_changes_a_lineage_or_is_inert(family: str, name: str) -> None:
    key = KEYS[family, name]
    if name == "export.task":
        family, key = "oneformer", next(key for key in keys_of(SPECS["oneformer"]) if key.name == name)
    old, new = read(base(family, name)), changed_spec(family, key)
    place = pieces(family, key)
    assert value_at(old.model_dump(), place) != value_at(new.model_dump(), place)
    changed = [step for step in STEPS if lineage_text(old, *step) != lineage_text(new, *step)]
    assert not changed if key.inert else changed


def test_single_valued_keys_are_the_known_ones() -> None:
    assert {place for place, key in KEYS.items() if change(place[0], key) is None} == SINGLE


def test_every_section_is_read_by_a_stage() -> None:
    read = {section for stage in STAGES.values() for section in stage.sections}
    assert read == set(Spec.model_fields) - {"data_root"}


READERS = {
    "seed": ("training", "data"),
    "data_root": ("data",),
    "model": ("models", "data"),
    "dataset": ("data", "interop/kitti", "interop/storage", "spec/sources", "ops"),
    "train": ("training", "data", "models"),
    "postprocess": ("models",),
    "evaluate": ("commands", "inference", "metrics"),
    "testing": ("inference",),
    "inference": ("inference",),
    "export": ("deploy",),
    "precision": ("deploy",),
    "engine": ("deploy",),
    "parity": ("deploy", "cli"),
}
"""Section -> packages and modules that work with it."""


def test_every_key_of_a_table_is_read() -> None:
    """By planning, which knows what a table waits for, or where tables are made."""
    read = attributes_in("tables") | attributes_in("spec/planning")
    assert Table.model_fields.keys() <= read


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
    for (_, name), key in KEYS.items():
        module = WHOLE_SECTIONS.get(key.section.__name__)
        if module is None:
            read = key.leaf in found[name.partition(".")[0]]
        else:
            text = (SOURCE / module).read_text(encoding="utf-8")
            read = "model_dump" in text and key.leaf in text
        if not read:
            unread.append(name)
    assert unread == [], "nothing reads these keys: read them, or remove them from the schema"
