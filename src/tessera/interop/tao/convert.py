"""From TAO's settings to this project's keys, with an account of every key."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from tessera.interop.tao.table import DataPath, Fate, Row, Settings
from tessera.spec.describe import keys_of
from tessera.spec.layers import OWNED, nested
from tessera.spec.mistakes import Value, from_validation
from tessera.spec.schema import SPECS

SECTIONS = {"dataset", "model", "train", "evaluate", "inference", "export", "gen_trt_engine"}
"""Of an experiment; a spec with none of them describes something else."""
NO_DATA = "it belongs to a dataset, and the file names none"


@dataclass(frozen=True)
class Outcome:
    """What became of one key of the file."""

    key: str
    """As the file spells it."""
    value: Any
    fate: Fate
    ours: Mapping[str, Any]
    """Our keys and values that it went into."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Converted:
    family: str
    values: dict[str, Any]
    """Our dotted key -> value; complete but for what the parts of the project say."""
    origins: dict[str, str]
    """Our dotted key -> where the value comes from."""
    outcomes: tuple[Outcome, ...]
    """In the order of the files."""
    data_root: str | None
    """Folder that the data's paths are relative to; None where there are none."""

    @property
    def is_experiment(self) -> bool:
        return "model.backbone.name" in self.values

    @property
    def names_data(self) -> bool:
        return any(key.endswith(".annotations") for key in self.values)


def convert(found: Settings) -> Converted:
    """Mistakes go to ``found``; the result is of use only without any."""
    values, origins = _one_by_one(found)
    _together(found, values, origins)
    for fixed in found.table.fixed:
        if fixed.to.partition(".")[0] in found.sections and fixed.to not in values and fixed.when(found):
            values[fixed.to], origins[fixed.to] = fixed.value, fixed.why
    data_root = _relative(values, found)
    names_data = any(key.endswith(".annotations") for key in values)
    order = {key.name: number for number, key in enumerate(keys_of(SPECS[found.table.family]))}
    kept = [key for key in values if names_data or OWNED.get(key) != "datasets"]
    values = {key: values[key] for key in sorted(kept, key=order.__getitem__)}
    if not found.mistakes:
        _require_valid(values, found)
    outcomes = tuple(_outcome(found.table.rows[key], found, values) for key in found.places)
    return Converted(found.table.family, values, {key: origins[key] for key in values}, outcomes, data_root)


def _one_by_one(found: Settings) -> tuple[dict[str, Any], dict[str, str]]:
    """Our values and their origins, of keys that go into ours alone."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for row in found.table.lines:
        wanted = row.impose and row.default is not None and row.key.partition(".")[0] in found.sections
        if row.convert is None or not (found.given(row.key) or wanted):
            continue
        try:
            value = row.convert(found[row.key])
        except ValueError as error:
            found.refuse(row.key, f"found {found[row.key]}; {error}")
            continue
        values |= dict.fromkeys(row.to, value)
        origins |= dict.fromkeys(row.to, _origin(found, row))
    return values, origins


def _together(found: Settings, values: dict[str, Any], origins: dict[str, str]) -> None:
    """Adds what the rules make."""
    for rule in found.table.rules:
        for key, value in rule(found).items():
            sources = [row for row in found.table.lines if row.convert is None and key in row.to]
            said = [row for row in sources if found.given(row.key) and row.key not in found.passed_over]
            present = any(row.key.partition(".")[0] in found.sections for row in sources)
            named = key == "model.backbone.name" and found.sections & SECTIONS
            if said or present or not sources or named:
                values[key] = value
                told = said or sorted(sources, key=lambda row: row.to[0] != key)[:1]
                origins[key] = ", ".join(_origin(found, row) for row in told) or "which data there are"


def _origin(found: Settings, row: Row) -> str:
    return f"TAO: {found.places[row.key][1]}" if row.key in found.values else f"TAO's default of {row.key}"


def _outcome(row: Row, found: Settings, values: Mapping[str, Any]) -> Outcome:
    spelled = found.places[row.key][1]
    notes = [] if spelled == row.key or spelled.startswith("data.") else [f"TAO's source calls it {row.key}"]
    if row.key not in found.values:
        return Outcome(spelled, found.open[row.key], Fate.OPEN, {}, tuple(notes))
    value, fate = found.values[row.key], row.fate
    if row.key in found.passed_over:
        return Outcome(spelled, value, Fate.LEFT_OUT, {}, (*notes, found.passed_over[row.key]))
    ours = {key: values[key] for key in row.to if key in values}
    notes += [row.note] if row.note and fate is not Fate.SAME else []
    notes += found.notes.get(row.key, [])
    if row.to and not ours:
        fate = Fate.LEFT_OUT
        notes = [NO_DATA] if all(OWNED.get(key) == "datasets" for key in row.to) else notes
    return Outcome(spelled, value, fate, ours, tuple(notes))


def _relative(values: dict[str, Any], found: Settings) -> str | None:
    """Writes data paths relative to the folder that holds all of them, and returns it."""
    paths = {path: key for key, value in values.items() for path in _data_paths(value)}
    if not paths:
        return None
    if len({posixpath.isabs(path) for path in paths}) > 1:
        first, key = next((path, key) for path, key in paths.items() if not posixpath.isabs(path))
        row = next(row for row in found.table.lines if key in row.to and row.key in found.values)
        found.refuse(
            row.key,
            f"{first!r} is relative and others are absolute; give all in the same way, so that they have one data root",
        )
        return None
    root = posixpath.commonpath([posixpath.dirname(posixpath.normpath(path)) for path in paths]) or "."
    for key, value in values.items():
        if relative := [posixpath.relpath(path, root) for path in _data_paths(value)]:
            values[key] = relative if isinstance(value, list) else relative[0]
    return root


def _data_paths(value: Any) -> list[str]:
    return [entry.path for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, DataPath)]


def _require_valid(values: Mapping[str, Any], found: Settings) -> None:
    spec = SPECS[found.table.family]
    content = nested({tuple(key.split(".")): Value(value, "") for key, value in values.items()})
    content.setdefault("model", {})["name"] = found.table.family
    try:
        spec.model_validate_json(json.dumps(content))
    except ValidationError as error:
        for mistake in from_validation(error, spec, content, {}):
            sources = [row.key for row in found.table.lines if mistake.key in row.to]
            key = next((key for key in sources if key in found.values), next(iter(sources), mistake.key))
            found.refuse(key, mistake.text if key == mistake.key else f"becomes {mistake.key} here: {mistake.text}")
