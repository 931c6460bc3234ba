"""From TAO's YAML files to the settings of one model's table; every key is known, of its type and in its range, or refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tessera.files import UserError
from tessera.interop.tao.deformable_detr import TABLE as DEFORMABLE_DETR
from tessera.interop.tao.mask2former import TABLE as MASK2FORMER
from tessera.interop.tao.oneformer import TABLE as ONEFORMER
from tessera.interop.tao.table import Fate, Row, Table
from tessera.spec.describe import nearest_names
from tessera.spec.mistakes import Mistake, refuse
from tessera.spec.parts import LinedKey, place_of, read_mapping, shown

TABLES: dict[str, Table] = {table.family: table for table in (MASK2FORMER, ONEFORMER, DEFORMABLE_DETR)}
MANDATORY = "???"
"""What hydra calls a value that has to come from the command line."""


@dataclass
class Found:
    """What the files say, by the source's name of each key."""

    table: Table
    values: dict[str, Any] = field(default_factory=dict)
    """Given values in their types."""
    open: dict[str, Any] = field(default_factory=dict)
    """Keys that stand in the file and say nothing: `???` or null."""
    places: dict[str, tuple[Path, LinedKey]] = field(default_factory=dict)
    """File, and the key as it is spelled there."""
    mistakes: list[Mistake] = field(default_factory=list)

    @property
    def sections(self) -> set[str]:
        return {key.partition(".")[0] for key in (*self.values, *self.open)}

    def mistake(self, key: str, text: str) -> None:
        path, spelled = self.places.get(key, (None, key))
        self.mistakes.append(Mistake(() if path is None else (place_of(path, spelled),), spelled, text))


def read_files(paths: Sequence[Path], model: str | None) -> Found:
    """All files as one spec. Raises UserError where a file is no YAML or the model cannot be told."""
    contents = {path: _nested(read_mapping(path, twice_read=True), path) for path in paths}
    table = TABLES[_choose(contents, model)]
    found = Found(table)
    rows = {row.key: row for row in table.rows}
    for path, content in contents.items():
        for spelled, value in _leaves(content, table, rows):
            _take(found, rows, path, spelled, value)
    return found


def _take(found: Found, rows: Mapping[str, Row], path: Path, spelled: LinedKey, value: Any) -> None:
    key = _renamed(spelled, found.table)
    row = rows.get(key)
    if row is None:
        found.mistakes.append(Mistake((place_of(path, spelled),), spelled, _unknown(key, found.table, rows)))
        return
    if value is None or value == MANDATORY:
        found.open[key] = value
        found.places.setdefault(key, (path, spelled))
        return
    try:
        read = row.kind.read(value)
    except ValueError as error:
        advice = f"; {error}" if str(error) else ""
        found.mistakes.append(
            Mistake((place_of(path, spelled),), spelled, f"expected {row.kind.words}, found {shown(value)}{advice}")
        )
        return
    if key in found.values and found.values[key] != read and row.fate in (Fate.TAKEN, Fate.REVIVED):
        other, name = found.places[key]
        text = f"{shown(value)} here, but {shown(found.values[key])} as {name} in {other}; one experiment has one value"
        found.mistakes.append(Mistake((place_of(path, spelled),), spelled, text))
        return
    found.values[key] = read
    found.places[key] = (path, spelled)


def _choose(contents: Mapping[Path, dict[str, Any]], model: str | None) -> str:
    """The given model, the one that a file names, or the one that knows most of the keys."""
    files = ", ".join(map(str, contents))
    if model is not None:
        if model not in TABLES:
            raise UserError(f"--model {model}: expected one of {', '.join(TABLES)}")
        return model
    strange = {
        name: sum(
            _strange(_renamed(spelled, table), rows)
            for content in contents.values()
            for spelled, _ in _leaves(content, table, rows)
        )
        for name, table in TABLES.items()
        for rows in [{row.key: row for row in table.rows}]
    }
    named = {str(content["model_name"]) for content in contents.values() if content.get("model_name")} & TABLES.keys()
    least = named or {name for name, count in strange.items() if count == min(strange.values())}
    if len(least) > 1:
        raise UserError(f"{files}: every key belongs to {' and '.join(sorted(least))} alike; say which with --model")
    return least.pop()


def _strange(key: str, rows: Mapping[str, Row]) -> int:
    """How many of the key's names, from the last one on, mean nothing to the model."""
    names = key.split(".")
    for known in range(len(names), 0, -1):
        prefix = ".".join(names[:known])
        if prefix in rows or any(row.startswith(f"{prefix}.") for row in rows):
            return len(names) - known
    return len(names)


def _nested(values: dict[Any, Any], path: Path) -> dict[str, Any]:
    """Overrides such as `train.num_epochs: 10` become sections."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *sections, leaf = (LinedKey(piece, name.line) for piece in name.split("."))
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UserError(f"{path}: {name}: {section} has a value of its own and keys below it; keep one")
        if isinstance(place.get(leaf), dict) and isinstance(value, dict):
            place[leaf] = {**place[leaf], **value}
        elif leaf in place:
            raise UserError(f"{path}: {name} stands twice; keep one")
        else:
            place[leaf] = value
    return nested


def _leaves(
    values: Mapping[Any, Any], table: Table, rows: Mapping[str, Row], prefix: str = ""
) -> Iterator[tuple[LinedKey, Any]]:
    """(key as spelled, value), down to the table's rows, or as far as sections go."""
    for name, value in values.items():
        spelled = LinedKey(f"{prefix}{name}", name.line)
        key = _renamed(spelled, table)
        if key in rows or not isinstance(value, dict) or not value:
            if key in rows or value not in (None, {}) or not any(row.startswith(f"{key}.") for row in rows):
                yield spelled, value
        else:
            yield from _leaves(value, table, rows, f"{spelled}.")


def _renamed(spelled: str, table: Table) -> str:
    """The source's name of a key that the documents call otherwise."""
    for old, new in table.names.items():
        if spelled == old or spelled.startswith(f"{old}."):
            spelled = new + spelled.removeprefix(old)
    return spelled


def _unknown(key: str, table: Table, rows: Mapping[str, Row]) -> str:
    if key in table.absent:
        return f"unknown key: {table.absent[key]}"
    if any(row.startswith(f"{key}.") for row in rows):
        below = sorted({row.removeprefix(f"{key}.").partition(".")[0] for row in rows if row.startswith(f"{key}.")})
        return f"expected a section with the keys {', '.join(below)}"
    prefix, dot, name = key.rpartition(".")
    near = nearest_names(list(rows), prefix + dot, name)
    siblings = [row.removeprefix(prefix + dot) for row in rows if row.startswith(prefix + dot)]
    legal = f"legal here: {', '.join(sorted({row.partition('.')[0] for row in siblings}))}"
    return "unknown key; " + (f"did you mean {' or '.join(near)}?" if near else legal)


def require_known(found: Found, paths: Sequence[Path]) -> None:
    """Raises UserError with every mistake."""
    refuse(", ".join(map(str, paths)), found.mistakes)
