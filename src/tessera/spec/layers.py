"""A layer of a composition is flat: key -> value, file and line. Composing is updating one with the next; an empty section clears.

A key is a tuple of names, because names that users give may have dots (``multipliers: {backbone.layer4: 0.1}``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tessera.files import UserError
from tessera.spec.describe import locate
from tessera.spec.mistakes import (
    OVERRIDE,
    Key,
    Mistake,
    Value,
    Values,
    dotted,
    not_a_section,
    too_large,
    unknown_key,
)
from tessera.spec.parts import cut, parse_yaml
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
    "value_range",
    "max_pixels",
)
SPLIT_SOURCE_KEYS = ("images", "annotations", "panoptic", "names")

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

TESTING = "testing"
"""Folder of the ways of testing a model that is trained."""

TESTED = ("testing", "postprocess", "evaluate", "dataset.test")
"""Sections that its files may set: no training reads them, so that another way of testing trains nothing again."""

REMOVED: Any = object()
"""Value of a section that the user named and then set to null."""


@dataclass(frozen=True)
class Layer:
    """One part file or override, after everything that can be said about it alone."""

    values: Values = field(default_factory=dict)
    mistakes: tuple[Mistake, ...] = ()
    folder: str = ""
    """Below config/ that the file lies in, `override`, or `companion`: whose keys it may set."""


def flat(content: Mapping[str, Any], origin: str, prefix: Key = ()) -> Iterator[tuple[Key, Value]]:
    """Empty sections are values; the names of those above a value are its key."""
    for name, value in content.items():
        key = (*prefix, str(name))
        if isinstance(value, dict) and value:
            yield from flat(value, origin, key)
        else:
            yield key, Value(value, origin, getattr(name, "line", None))


def make_layer(content: Iterable[tuple[Key, Value]], folder: str, root: type[Section]) -> Layer:
    """What may be composed: keys that exist, sections that are sections, keys that files of ``folder`` may set."""
    values: Values = {}
    mistakes: list[Mistake] = []
    for key, value in content:
        place = locate(root, key)
        if place.has_free_names and len(key) > len(place.key):
            key = (*place.key, ".".join(key[len(place.key) :]))
        if not place.is_known:
            mistakes.append(unknown_key(root, place.key, value))
        elif (refusal := _refusal(key, folder)) is not None:
            mistakes.append(Mistake((value.place,), dotted(key), refusal))
        elif place.section is not None and value.value is None:
            if place.is_entry:
                values[key] = value._replace(value=REMOVED)
            elif place.is_optional:
                values[key] = value
            elif folder == OVERRIDE:
                mistakes.append(not_a_section(place, key, value))
            # In a file: a section whose keys are all commented out, which says nothing.
        elif place.section is not None and value.value != {}:
            mistakes.append(not_a_section(place, key, value))
        elif place.field is not None and (mistake := too_large(place.field, key, value)):
            mistakes.append(mistake)
        else:
            values[key] = value
    return Layer(values, tuple(mistakes), folder)


def override_layer(text: str, root: type[Section]) -> Layer:
    """Of ``a.b=c``. A mapping whose names are the user's (`model.losses`) is replaced, a section is updated, as by a file."""
    name, sign, written = text.partition("=")
    key = tuple(name.strip().split("."))
    if not sign or not all(key):
        raise UserError(f"override {cut(text)!r}: expected a.b=c, such as train.optim.lr=2.0e-4")
    content = parse_yaml(written, f"override {cut(text)!r}")
    for piece in reversed(key):
        content = {piece: content}
    values = [(path, value._replace(line=None)) for path, value in flat(content, OVERRIDE)]
    if len(values[0][0]) > len(key) and locate(root, key).has_free_names:
        values.insert(0, (key, Value({}, OVERRIDE)))
    return make_layer(values, OVERRIDE, root)


def compose(layers: Iterable[Layer]) -> tuple[Values, list[Mistake]]:
    """Later layers win. A value takes the place of everything above and below its key."""
    found: Values = {}
    mistakes: list[Mistake] = []
    for layer in layers:
        mistakes += layer.mistakes
        for key, value in layer.values.items():
            if value.value in ({}, None) or value.value is REMOVED:
                below = [other for other in found if len(other) > len(key) and other[: len(key)] == key]
                foreign = [other for other in below if _refusal(other, layer.folder) is not None]
                if foreign:
                    text = f"would clear {dotted(foreign[0])}, which other files set; clear what is meant alone"
                    mistakes.append(Mistake((value.place,), dotted(key), text))
                for other in below:
                    del found[other]
            for count in range(1, len(key)):
                found.pop(key[:count], None)
            if value.value is not REMOVED:
                found[key] = value
            elif not any(other[: len(key) - 1] == key[:-1] for other in found):
                found[key[:-1]] = value._replace(value={})
    return found, mistakes


def nested(values: Values) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        place = result
        for name in key[:-1]:
            place = place.setdefault(name, {})
        place[key[-1]] = value.value
    return result


def _refusal(key: Key, folder: str) -> str | None:
    """Why files of this folder (or overrides) may not set the key."""
    if folder == TESTING:
        fits = any(dotted(key) == section or dotted(key).startswith(f"{section}.") for section in TESTED)
        return (
            None
            if fits
            else f"a way of testing sets {', '.join(TESTED)} alone; what training reads belongs in a variant"
        )
    for count in range(1, len(key) + 1):
        owner = OWNED.get(".".join(key[:count]))
        if owner is not None and owner != folder:
            return f"only config/{owner}/*.yaml may set it: {OWNER_REASONS[owner]}"
    if key == ("seed",) and folder != OVERRIDE:
        return "the experiment's name tells its seed; list it under `seeds` in config/config.yaml"
    if key == ("data_root",):
        return "it belongs to the machine; set it in config/config.yaml, with --data-root or with snakemake's --config data_root="
    return None
