"""One layer of a composition: a part file or an override, checked for everything that can be said about it alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tessera.files import UserError
from tessera.spec.describe import section_of
from tessera.spec.mistakes import OVERRIDE, Mistake, not_a_section, unknown_key
from tessera.spec.parts import parse_yaml
from tessera.spec.schema import Spec
from tessera.spec.section import Section

SOURCE_KEYS = (
    "name",
    "type",
    "generator",
    "fetch",
    "convert",
    "label_map",
    "contiguous_id",
    "num_classes",
    "ignore_id",
)
SPLIT_SOURCE_KEYS = ("images", "annotations", "panoptic")

OWNED = {
    "model.name": "models",
    "model.backbone.name": "backbones",
    **{f"dataset.{key}": "datasets" for key in SOURCE_KEYS},
    **{f"dataset.{split}.{key}": "datasets" for split in ("train", "val", "test") for key in SPLIT_SOURCE_KEYS},
}
"""Keys that only one folder's files may set."""

OWNER_REASONS = {
    "models": "an experiment's name tells its model; add a file config/models/<new name>.yaml",
    "backbones": "an experiment's name tells its backbone; add a file config/backbones/<new name>.yaml",
    "datasets": "a dataset is checked once, not once per experiment; add a file config/datasets/<new name>.yaml",
}


@dataclass(frozen=True)
class Layer:
    """One part file or the overrides, after everything that can be said about it alone."""

    values: dict[str, Any] = field(default_factory=dict)
    set_by: dict[str, str] = field(default_factory=dict)
    mistakes: tuple[Mistake, ...] = ()


def read_layer(values: dict[str, Any], origin: str, folder: str, root: type[Spec]) -> Layer:
    """``folder`` below config/ that the file lies in, `override`, or `companion`; ``root`` is the spec of the model family."""
    set_by: dict[str, str] = {}
    mistakes: list[Mistake] = []
    clean = _check_section(values, root, root, origin, folder, "", set_by, mistakes)
    return Layer(clean, set_by, tuple(mistakes))


def _check_section(
    values: dict[str, Any],
    root: type[Spec],
    section: type[Section],
    origin: str,
    folder: str,
    prefix: str,
    set_by: dict[str, str],
    mistakes: list[Mistake],
) -> dict[str, Any]:
    """What may be merged: keys that exist, sections that are sections, keys that files of ``folder`` may set."""
    clean: dict[str, Any] = {}
    for name, value in values.items():
        key = prefix + name
        if name not in section.model_fields:
            mistakes.append(unknown_key(root, section, origin, prefix, name))
            continue
        refusal = _refusal(key, folder)
        if refusal is not None:
            mistakes.append(Mistake((origin,), key, refusal))
            continue
        annotation = section.model_fields[name].annotation
        below = section_of(annotation)
        if below is None or (value is None and annotation is not below):
            clean[name] = value
            set_by[key] = origin
        elif value is None:
            continue
        elif isinstance(value, dict):
            clean[name] = _check_section(value, root, below, origin, folder, f"{key}.", set_by, mistakes)
            if not value:
                set_by[key] = origin
        else:
            mistakes.append(not_a_section(below, origin, key, value))
    return clean


def _refusal(key: str, folder: str) -> str | None:
    """Why files of this folder (or overrides) may not set the key."""
    owner = OWNED.get(key)
    if owner is not None and owner != folder:
        return f"only config/{owner}/*.yaml may set it: {OWNER_REASONS[owner]}"
    if key == "seed" and folder != OVERRIDE:
        return "the experiment's name tells its seed; list it under `seeds` in config/config.yaml"
    if key == "data_root":
        return "it belongs to the machine; set it in config/config.yaml, with --data-root or with snakemake's --config data_root="
    return None


def override_layer(text: str, root: type[Spec]) -> Layer:
    key, sign, value = text.partition("=")
    names = key.strip().split(".")
    if not sign or not all(names):
        raise UserError(f"override {text!r}: expected a.b=c, such as train.optim.lr=2.0e-4")
    nested: Any = parse_yaml(value, f"override {text!r}")
    for name in reversed(names):
        nested = {name: nested}
    return read_layer(nested, OVERRIDE, OVERRIDE, root)
