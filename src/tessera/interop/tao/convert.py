"""From TAO's settings to this project's keys, with an account of every key."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from tessera.interop.tao.read import Found
from tessera.interop.tao.table import UNSET, DataPath, Fate, Row, Settings
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
    data_root: str | None
    """Folder that the data's paths are relative to; None where there are none."""

    @property
    def is_experiment(self) -> bool:
        return "model.backbone.name" in self.values

    @property
    def names_data(self) -> bool:
        return any(key.endswith(".annotations") for key in self.values)


def convert(found: Found) -> Converted:
    """Mistakes go to ``found``; the result is of use only without any."""
    table, sections = found.table, found.sections
    settings = Settings(found.values, {row.key: row.default for row in table.rows})
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for row in table.rows:
        if row.convert is None:
            continue
        given = settings.given(row.key)
        wanted = row.impose and row.default is not None and row.default is not UNSET
        if not given and not (wanted and row.key.partition(".")[0] in sections):
            continue
        try:
            value = row.convert(settings[row.key])
        except ValueError as error:
            settings.refuse(row.key, f"found {settings[row.key]}; {error}")
            continue
        for key in row.to:
            values[key], origins[key] = value, _origin(found, row, given)
    for rule in table.rules:
        for key, value in rule(settings).items():
            sources = [row for row in table.rows if row.convert is None and key in row.to]
            said = [row for row in sources if settings.given(row.key) and row.key not in settings.passed_over]
            present = any(row.key.partition(".")[0] in sections for row in sources)
            named = key == "model.backbone.name" and sections & SECTIONS
            if said or present or not sources or named:
                values[key] = value
                names = [
                    _origin(found, row, bool(said))
                    for row in said or sorted(sources, key=lambda row: row.to[0] != key)[:1]
                ]
                origins[key] = ", ".join(names) or "which data there are"
    for fixed in table.fixed:
        if fixed.to.partition(".")[0] in sections and fixed.to not in values and fixed.when(settings):
            values[fixed.to], origins[fixed.to] = fixed.value, fixed.why
    for key, text in settings.refused:
        found.mistake(key, text)
    data_root = _relative(values, found)
    if not any(key.endswith(".annotations") for key in values):
        values = {key: value for key, value in values.items() if OWNED.get(key) != "datasets"}
    values = _ordered(values, table.family)
    if not found.mistakes:
        _require_valid(values, table.family, found)
    outcomes = tuple(_outcome(row, found, settings, values) for row in table.rows if row.key in found.places)
    return Converted(table.family, values, {key: origins[key] for key in values}, outcomes, data_root)


def _origin(found: Found, row: Row, given: bool) -> str:
    if given:
        return f"TAO: {found.places[row.key][1]}"
    return f"TAO's default of {row.key}"


def _outcome(row: Row, found: Found, settings: Settings, values: Mapping[str, Any]) -> Outcome:
    spelled = found.places[row.key][1]
    notes = [] if spelled == row.key or spelled.startswith("data.") else [f"TAO's source calls it {row.key}"]
    if row.key in found.open and row.key not in found.values:
        return Outcome(spelled, found.open[row.key], Fate.OPEN, {}, tuple(notes))
    value = found.values[row.key]
    if row.key in settings.passed_over:
        return Outcome(spelled, value, Fate.LEFT_OUT, {}, (*notes, settings.passed_over[row.key]))
    ours = {key: values[key] for key in row.to if key in values}
    notes += [row.note] if row.note and row.fate is not Fate.SAME else []
    notes += settings.notes.get(row.key, [])
    fate = row.fate
    if fate in (Fate.TAKEN, Fate.REVIVED) and not ours:
        fate = Fate.LEFT_OUT
        if row.to and all(OWNED.get(key) == "datasets" for key in row.to):
            notes = [NO_DATA]
    return Outcome(spelled, value, fate, ours, tuple(notes))


def _relative(values: dict[str, Any], found: Found) -> str | None:
    """Writes data paths relative to the folder that holds all of them, and returns it."""
    paths = [path for value in values.values() for path in _data_paths(value)]
    if not paths:
        return None
    if len({posixpath.isabs(path) for path in paths}) > 1:
        first = next(path for path in paths if not posixpath.isabs(path))
        key = next(key for key, value in values.items() if first in _data_paths(value))
        row = next(row for row in found.table.rows if key in row.to and row.key in found.values)
        found.mistake(
            row.key,
            f"{first!r} is relative and others are absolute; give all in the same way, so that they have one data root",
        )
        return None
    root = posixpath.commonpath([posixpath.dirname(posixpath.normpath(path)) for path in paths]) or "."
    for key, value in values.items():
        if isinstance(value, DataPath):
            values[key] = posixpath.relpath(value.path, root)
        elif isinstance(value, list) and _data_paths(value):
            values[key] = [posixpath.relpath(path.path, root) for path in value]
    return root


def _data_paths(value: Any) -> list[str]:
    entries = value if isinstance(value, list) else [value]
    return [entry.path for entry in entries if isinstance(entry, DataPath)]


def _ordered(values: Mapping[str, Any], family: str) -> dict[str, Any]:
    """In the order of the schema."""
    order = {key.name: number for number, key in enumerate(keys_of(SPECS[family]))}
    return dict(sorted(values.items(), key=lambda item: order[item[0]]))


def _require_valid(values: Mapping[str, Any], family: str, found: Found) -> None:
    content = nested({tuple(key.split(".")): Value(value, "") for key, value in values.items()})
    content.setdefault("model", {})["name"] = family
    try:
        SPECS[family].model_validate_json(json.dumps(content))
    except ValidationError as error:
        for mistake in from_validation(error, SPECS[family], content, {}):
            sources = [row for row in found.table.rows if mistake.key in row.to]
            sources = [row for row in sources if row.key in found.values] or sources
            if sources:
                found.mistake(sources[0].key, f"becomes {mistake.key} here: {mistake.text}")
            else:
                found.mistake(mistake.key, mistake.text)
