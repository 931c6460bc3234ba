"""From TAO's YAML files to the settings of one model's table; every key is known, of its type and in its range, or refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tessera.files import UserError
from tessera.interop.tao.deformable_detr import TABLE as DEFORMABLE_DETR
from tessera.interop.tao.mask2former import TABLE as MASK2FORMER
from tessera.interop.tao.oneformer import TABLE as ONEFORMER
from tessera.interop.tao.table import Fate, Settings, Table
from tessera.spec.describe import nearest_names
from tessera.spec.parts import LinedKey, read_mapping, shown

TABLES: dict[str, Table] = {table.family: table for table in (MASK2FORMER, ONEFORMER, DEFORMABLE_DETR)}
MANDATORY = "???"
"""What hydra calls a value that has to come from the command line."""


def read_files(paths: Sequence[Path], model: str | None) -> Settings:
    """All files as one spec. Raises UserError where a file is no YAML or the model cannot be told."""
    contents = {path: read_mapping(path, twice_read=True) for path in paths}
    found = Settings(TABLES[_choose(contents, model)])
    for path, content in contents.items():
        for spelled, value in _leaves(content, found.table):
            _take(found, (path, spelled), value)
    return found


def _take(found: Settings, place: tuple[Path, LinedKey], value: Any) -> None:
    key = _renamed(place[1], found.table)
    row = found.table.rows.get(key)
    if row is None:
        found.refuse(key, _unknown(key, found.table), place)
        return
    if value is None or value == MANDATORY:
        found.open[key] = value
        found.places.setdefault(key, place)
        return
    try:
        read = found.table.read(row, value)
    except ValueError as error:
        found.refuse(key, str(error), place)
        return
    if row.fate in (Fate.TAKEN, Fate.REVIVED) and found.values.get(key, read) != read:
        other, name = found.places[key]
        text = f"{shown(value)} here, but {shown(found.values[key])} as {name} in {other}; one experiment has one value"
        found.refuse(key, text, place)
        return
    found.values[key] = read
    found.places[key] = place


def _choose(contents: Mapping[Path, dict[str, Any]], model: str | None) -> str:
    """The given model, the one that a file names, or the one that knows most of the keys."""
    if model is not None:
        if model not in TABLES:
            raise UserError(f"--model {model}: expected one of {', '.join(TABLES)}")
        return model
    strange = {
        name: sum(_strange(spelled, table) for content in contents.values() for spelled, _ in _leaves(content, table))
        for name, table in TABLES.items()
    }
    named = {str(content.get("model_name")) for content in contents.values()} & TABLES.keys()
    least = named or {name for name, count in strange.items() if count == min(strange.values())}
    if len(least) > 1:
        files = ", ".join(map(str, contents))
        raise UserError(f"{files}: every key belongs to {' and '.join(sorted(least))} alike; say which with --model")
    return least.pop()


def _strange(spelled: str, table: Table) -> int:
    """How many of the key's names, from the last one on, mean nothing to the model."""
    names = _renamed(spelled, table).split(".")
    known = (
        count
        for count in range(len(names), 0, -1)
        if _below(table, prefix := ".".join(names[:count])) or prefix in table.rows
    )
    return len(names) - next(known, 0)


def _below(table: Table, section: str) -> list[str]:
    """What the keys of a section are called in it."""
    return [key.removeprefix(f"{section}.") for key in table.rows if key.startswith(f"{section}.")]


def _leaves(values: Mapping[Any, Any], table: Table, prefix: str = "") -> Iterator[tuple[LinedKey, Any]]:
    """(key as spelled, value), down to the table's rows, or as far as sections go; names such as ``train.num_epochs`` are overrides."""
    for name, value in values.items():
        spelled = LinedKey(f"{prefix}{name}", name.line)
        key = _renamed(spelled, table)
        if key not in table.rows and isinstance(value, dict) and value:
            yield from _leaves(value, table, f"{spelled}.")
        elif key in table.rows or value not in (None, {}) or not _below(table, key):
            yield spelled, value


def _renamed(spelled: str, table: Table) -> str:
    """The source's name of a key that the documents call otherwise."""
    for old, new in table.names.items():
        if f"{spelled}.".startswith(f"{old}."):
            spelled = new + spelled.removeprefix(old)
    return spelled


def _unknown(key: str, table: Table) -> str:
    if key in table.absent:
        return f"unknown key: {table.absent[key]}"
    if below := _below(table, key):
        return f"expected a section with the keys {', '.join(sorted({name.partition('.')[0] for name in below}))}"
    prefix, dot, name = key.rpartition(".")
    if near := nearest_names(list(table.rows), prefix + dot, name):
        return f"unknown key; did you mean {' or '.join(near)}?"
    siblings = _below(table, prefix) if dot else list(table.rows)
    return f"unknown key; legal here: {', '.join(sorted({name.partition('.')[0] for name in siblings}))}"
