"""What a table of TAO's keys is made of: one row per key, and what becomes of it here.

Everything said about TAO in this package was read from its source and documents; nothing of TAO was run.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tessera.spec.parts import shown

UNSET = object()
"""TAO has no default: the key must be given where its section is used."""


class Fate(enum.Enum):
    """What becomes of a key; the text is the report's heading."""

    TAKEN = "taken over"
    REVIVED = "taken over although TAO ignores it: here it acts"
    SAME = "nothing to take over: the same here"
    IGNORED = "ignored, as TAO itself ignores it"
    LEFT_OUT = "left out: no counterpart, no promised result depends on it"
    OPEN = "not said in the file (??? or null)"


@dataclass(frozen=True)
class Kind:
    words: str
    """What is expected, for messages."""
    read: Callable[[Any], Any]
    """The value in its type, or ValueError. As TAO's reader does, numbers and truth values may be quoted."""


@dataclass(frozen=True)
class Row:
    """One key of TAO's schema."""

    key: str
    """Dotted."""
    kind: Kind
    default: Any
    """TAO's; None where it is nothing, UNSET where there is none."""
    fate: Fate
    to: tuple[str, ...] = ()
    """Our keys that the value goes to, alone or together with other keys."""
    convert: Callable[[Any], Any] | None = None
    """From TAO's value to ours; ValueError with advice refuses the value. None: one of the table's rules does it."""
    note: str = ""
    impose: bool = True
    """TAO's default is written out when the file does not have the key. Not so for what belongs to a machine."""


class Settings:
    """What the file says about every row of a table, and what the rules have to say about it."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._values = values
        self._defaults = defaults
        self.refused: list[tuple[str, str]] = []
        """(TAO key, what is wrong and what to do)."""
        self.notes: dict[str, list[str]] = {}
        """TAO key -> remarks for the report."""
        self.passed_over: dict[str, str] = {}
        """TAO key -> why it is not read."""

    def __getitem__(self, key: str) -> Any:
        """The file's value, else TAO's default; None where there is neither."""
        default = self._defaults[key]
        return self._values.get(key, None if default is UNSET else default)

    def given(self, *keys: str) -> bool:
        """The file has one of the keys."""
        return any(key in self._values for key in keys)

    def refuse(self, key: str, text: str) -> None:
        self.refused.append((key, text))

    def note(self, key: str, text: str) -> None:
        if self.given(key):
            self.notes.setdefault(key, []).append(text)

    def pass_over(self, key: str, reason: str) -> None:
        """Another key decides that TAO does not read this one."""
        if self.given(key):
            self.passed_over[key] = reason


Rule = Callable[[Settings], Mapping[str, Any]]
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
    family: str
    rows: tuple[Row, ...]
    rules: tuple[Rule, ...]
    fixed: tuple[Fixed, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    """Keys that TAO's documents name otherwise than its source -> the source's."""
    absent: Mapping[str, str] = field(default_factory=dict)
    """Keys that only the documents have -> advice."""

    def row(self, key: str) -> Row:
        return next(row for row in self.rows if row.key == key)


@dataclass(frozen=True)
class DataPath:
    """A path that will be written relative to the data root."""

    path: str


# Kinds


def _number(value: Any, kind: type[int] | type[float]) -> Any:
    if isinstance(value, str):
        try:
            value = float(value) if kind is float or not value.lstrip("+-").isdigit() else int(value)
        except ValueError:
            raise ValueError from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    if kind is int and isinstance(value, float):
        raise ValueError
    return kind(value)


def _limits(low: float | None, high: float | None, above: float | None) -> str:
    words = [("above", above), ("at least", low), ("at most", high)]
    return "".join(f", {word} {limit}" for word, limit in words if limit is not None)


def _ranged(kind: type[int] | type[float], low: float | None, high: float | None, above: float | None) -> Kind:
    def read(value: Any) -> Any:
        number = _number(value, kind)
        if not (low is None or number >= low) or not (high is None or number <= high):
            raise ValueError
        if not (above is None or number > above):
            raise ValueError
        return number

    return Kind(("a whole number" if kind is int else "a number") + _limits(low, high, above), read)


def whole(low: int | None = None, high: int | None = None) -> Kind:
    return _ranged(int, low, high, None)


def number(low: float | None = None, high: float | None = None, above: float | None = None) -> Kind:
    return _ranged(float, low, high, above)


def _read_truth(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError
    return value


def _read_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _read_path(value: Any) -> str:
    text = _read_text(value)
    if "://" in text:
        raise ValueError("download it and give the local path")
    if text.endswith((".tar.gz", ".tgz", ".tar", ".zip")):
        raise ValueError("unpack it and give the folder")
    return text


def _read_section(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError
    return value


TRUTH = Kind("true or false", _read_truth)
TEXT = Kind("text", _read_text)
PATH = Kind("a path", _read_path)
SECTION = Kind("a section", _read_section)
ANYTHING = Kind("anything", lambda value: value)
SIDE = whole(32)
UNIT = number(0, 1)


def choice(*values: str) -> Kind:
    def read(value: Any) -> str:
        text = _read_text(value)
        if text not in values:
            raise ValueError
        return text

    return Kind("one of " + ", ".join(values), read)


def listing(item: Kind, count: int | None = None) -> Kind:
    def read(value: Any) -> list[Any]:
        if not isinstance(value, list) or (count is not None and len(value) != count):
            raise ValueError
        return [item.read(entry) for entry in value]

    return Kind(f"a list{'' if count is None else f' of {count}'}, each {item.words}", read)


def either(*kinds: Kind) -> Kind:
    def read(value: Any) -> Any:
        for kind in kinds:
            try:
                return kind.read(value)
            except ValueError:
                continue
        raise ValueError

    return Kind(", or ".join(kind.words for kind in kinds), read)


# Rows


def taken(
    key: str,
    kind: Kind,
    default: Any,
    to: str | tuple[str, ...],
    convert: Callable[[Any], Any] = lambda value: value,
    note: str = "",
    impose: bool = True,
) -> Row:
    """One key, one value, written to each of our keys."""
    return Row(key, kind, default, Fate.TAKEN, (to,) if isinstance(to, str) else to, convert, note, impose)


def part(key: str, kind: Kind, default: Any, to: str | tuple[str, ...], note: str = "") -> Row:
    """A key that a rule takes over together with others."""
    return Row(key, kind, default, Fate.TAKEN, (to,) if isinstance(to, str) else to, None, note)


def revived(
    key: str,
    kind: Kind,
    default: Any,
    to: str | tuple[str, ...],
    note: str,
    convert: Callable[[Any], Any] = lambda value: value,
) -> Row:
    """TAO accepts the key and never reads it; we do. Its default is not imposed."""
    return Row(key, kind, default, Fate.REVIVED, (to,) if isinstance(to, str) else to, convert, note, impose=False)


def revived_part(key: str, kind: Kind, default: Any, to: str | tuple[str, ...], note: str) -> Row:
    return Row(key, kind, default, Fate.REVIVED, (to,) if isinstance(to, str) else to, None, note)


def ignored(key: str, kind: Kind, default: Any, note: str) -> Row:
    return Row(key, kind, default, Fate.IGNORED, note=note)


def left_out(key: str, kind: Kind, default: Any, note: str) -> Row:
    return Row(key, kind, default, Fate.LEFT_OUT, note=note)


def same(key: str, kind: Kind, value: Any, advice: str) -> Row:
    """TAO's default is the only value that exists here; ``advice`` for who wants another one."""

    def read(found: Any) -> Any:
        read_value = kind.read(found)
        if read_value != value:
            raise ValueError(f"here it is always {shown(value)}; {advice}")
        return read_value

    return Row(key, Kind(kind.words, read), value, Fate.SAME, note=advice)
