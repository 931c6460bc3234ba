"""What a table of TAO's keys is made of: a line for every key, and what becomes of it here.

Everything said about TAO in this package was read from its source and documents; nothing of TAO was run.
"""

from __future__ import annotations

import enum
import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from pydantic import AfterValidator, TypeAdapter, ValidationError

from tessera.spec.describe import locate, type_words
from tessera.spec.mistakes import Mistake
from tessera.spec.parts import LinedKey, inline_yaml, place_of, shown
from tessera.spec.schema import SPECS


class Fate(enum.Enum):
    """What becomes of a key; the text is the report's heading."""

    TAKEN = "taken over"
    REVIVED = "taken over although TAO ignores it: here it acts"
    SAME = "nothing to take over: the same here"
    IGNORED = "ignored, as TAO itself ignores it"
    LEFT_OUT = "left out: no counterpart, no promised result depends on it"
    OPEN = "not said in the file (??? or null)"


Converter = Callable[[Any], Any]


@dataclass(frozen=True)
class Row:
    """One key of TAO's schema."""

    key: str
    """Dotted."""
    default: Any
    """TAO's; None where it is nothing."""
    fate: Fate
    to: tuple[str, ...] = ()
    """Our keys that the value goes to, alone or together with other keys."""
    convert: Converter | None = None
    """From TAO's value to ours; ValueError with advice refuses the value. None: one of the table's rules does it."""
    kind: Any = None
    """Its type, where neither our key nor the default has it."""
    note: str = ""
    impose: bool = True
    """TAO's default is written out when the file does not have the key. Not so for what belongs to a machine."""


Rule = Callable[["Settings"], Mapping[str, Any]]
"""Makes our values, by dotted key, from several keys together, and refuses those that contradict each other. Which key took part in
which value is said by the rows."""


@dataclass(frozen=True)
class Fixed:
    """What TAO's code does without a key, where we have one."""

    to: str
    value: Any
    why: str
    when: Callable[[Settings], bool] = lambda settings: True


@dataclass(frozen=True)
class Table:
    """Wherever keys are listed, ``a.{b,c}`` stands for ``a.b`` and ``a.c``, and spaces separate them."""

    family: str
    read_keys: InitVar[tuple[Row, ...]]
    left_out: Mapping[str, str]
    """Why nothing promised depends on keys -> the keys."""
    ignored: Mapping[str, str]
    """Why TAO itself does nothing with keys -> the keys."""
    notes: Mapping[str, str]
    """What the report says of keys that are taken over -> the keys."""
    rules: tuple[Rule, ...]
    fixed: tuple[Fixed, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    """Keys that TAO's documents name otherwise than its source -> the source's."""
    absent: Mapping[str, str] = field(default_factory=dict)
    """Keys that only the documents have -> advice."""
    rows: dict[str, Row] = field(init=False, default_factory=dict)
    """By key."""

    def __post_init__(self, read_keys: tuple[Row, ...]) -> None:
        unread = ((Fate.LEFT_OUT, self.left_out), (Fate.IGNORED, self.ignored))
        listed = [Row(keys, None, fate, note=note) for fate, reasons in unread for note, keys in reasons.items()]
        notes = {key: note for note, keys in self.notes.items() for key in expand(keys)}
        for row in (*read_keys, *listed):
            for key, to in zip(expand(row.key), _targets(row), strict=True):
                assert key not in self.rows, key
                self.rows[key] = replace(row, key=key, to=to, note=notes.pop(key, row.note))
        assert not notes, notes

    @property
    def lines(self) -> list[Row]:
        """Of the keys that go into ours."""
        return [row for row in self.rows.values() if row.to]

    def read(self, row: Row, value: Any) -> Any:
        """``value`` in the type of the key. Raises ValueError saying what is expected."""
        if row.fate is Fate.SAME:
            if row.default not in (value, _unquoted(value)):
                raise ValueError(f"found {shown(value)}, but here it is always {shown(row.default)}; {row.note}")
            return row.default
        return value if row.kind is None and not row.to else _read(self._kind(row), value)

    def _kind(self, row: Row) -> Any:
        if row.kind is None and (row.default is None or row.convert is as_it_is):
            found = locate(SPECS[self.family], row.to[0].split(".")).field
            assert found is not None, row.to
            return Annotated[found.annotation, *found.metadata] if found.metadata else found.annotation
        return row.kind or _type_of(row.default)


@dataclass
class Settings:
    """What the files say about every row of a table, by the source's name of each key, and what is to be said about that."""

    table: Table
    values: dict[str, Any] = field(default_factory=dict)
    """Given values in their types."""
    open: dict[str, Any] = field(default_factory=dict)
    """Keys that stand in the file and say nothing: `???` or null."""
    places: dict[str, tuple[Path, LinedKey]] = field(default_factory=dict)
    """File, and the key as it is spelled there."""
    mistakes: list[Mistake] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)
    """Remarks for the report."""
    passed_over: dict[str, str] = field(default_factory=dict)
    """Key -> why TAO does not read it, which another key decides."""

    @property
    def sections(self) -> set[str]:
        return {key.partition(".")[0] for key in (*self.values, *self.open)}

    def __getitem__(self, key: str) -> Any:
        """The file's value, else TAO's default; None where there is neither."""
        return self.values.get(key, self.table.rows[key].default)

    def given(self, *keys: str) -> bool:
        """The file has one of the keys."""
        return any(key in self.values for key in keys)

    def refuse(self, key: str, text: str, place: tuple[Path, LinedKey] | None = None) -> None:
        """``place``: where the key stands, unless that is known. ``text``: what is wrong and what to do."""
        place = place or self.places.get(key)
        self.mistakes.append(Mistake((place_of(*place),) if place else (), place[1] if place else key, text))

    def note(self, key: str, text: str) -> None:
        if self.given(key):
            self.notes.setdefault(key, []).append(text)

    def pass_over(self, reason: str, *keys: str) -> None:
        self.passed_over |= {key: reason for key in keys if self.given(key)}


def expand(text: str) -> list[str]:
    """``a.{b,c} d`` to ``a.b``, ``a.c`` and ``d``."""
    pieces = [[piece.split(",") for piece in re.split(r"\{(.*?)\}", word)] for word in text.split()]
    return ["".join(choice) for word in pieces for choice in itertools.product(*word)]


def _targets(row: Row) -> list[tuple[str, ...]]:
    """Our keys of each of the row's: the one of the same place in the list where both lists have several, else all."""
    keys = expand(row.key)
    if row.fate not in (Fate.TAKEN, Fate.REVIVED):
        return [()] * len(keys)
    targets = [key for text in row.to for key in expand(text)]
    return [(key,) for key in targets or keys] if len(targets) in (0, len(keys)) else [tuple(targets)] * len(keys)


def _type_of(default: Any) -> Any:
    return list[_type_of(default[0])] if isinstance(default, list) else type(default)  # type: ignore[misc]  # made for pydantic


def _read(kind: Any, value: Any) -> Any:
    adapter = TypeAdapter(kind)
    advice = ""
    for candidate in (value, _unquoted(value)):
        try:
            return adapter.dump_python(adapter.validate_json(json.dumps(candidate), strict=True), mode="json")
        except ValidationError as error:
            said = [detail["msg"] for detail in error.errors() if detail["type"] == "value_error"]
            advice = f"; {said[0].removeprefix('Value error, ')}" if said else ""
    found = inline_yaml(value) if isinstance(value, dict) else shown(value)
    raise ValueError(f"expected {type_words(kind)}, found {found}{advice}")


def _unquoted(value: Any) -> Any:
    """As TAO's reader takes them, numbers and truth values may be quoted."""
    if isinstance(value, list):
        return [_unquoted(item) for item in value]
    try:
        return json.loads(value.lower()) if isinstance(value, str) else value
    except ValueError:
        return value


# Types


@dataclass(frozen=True)
class DataPath:
    """A path that will be written relative to the data root."""

    path: str


def _local(text: str) -> str:
    if "://" in text:
        raise ValueError("download it and give the local path")
    if text.endswith((".tar.gz", ".tgz", ".tar", ".zip")):
        raise ValueError("unpack it and give the folder")
    return text


LocalPath = Annotated[str, AfterValidator(_local)]
Side = Annotated[int, Ge(32)]


# Rows


def as_it_is(value: Any) -> Any:
    return value


def taken(
    key: str, default: Any, to: str = "", convert: Converter = as_it_is, *, kind: Any = None, impose: bool = True
) -> Row:
    """One key, one value; ``to``: our keys, unless they are called the same."""
    return Row(key, default, Fate.TAKEN, tuple(to.split()), convert, kind, impose=impose)


def machine(key: str, default: Any, to: str = "") -> Row:
    """The same for what belongs to a machine or to taste: TAO's default is not imposed."""
    return taken(key, default, to, impose=False)


def part(key: str, default: Any, to: str = "", *, kind: Any = None) -> Row:
    """A key that a rule takes over together with others."""
    return Row(key, default, Fate.TAKEN, tuple(to.split()), None, kind)


def revived(
    key: str, default: Any, to: str, note: str, convert: Converter | None = as_it_is, *, kind: Any = None
) -> Row:
    """TAO accepts the key and never reads it; we do. Its default is not imposed."""
    return Row(key, default, Fate.REVIVED, tuple(to.split()), convert, kind, note, impose=False)


def same(key: str, value: Any, advice: str) -> Row:
    """TAO's default is the only value that exists here; ``advice`` for who wants another one."""
    return Row(key, value, Fate.SAME, note=advice)
