"""What stands at a key and who set it, and the lines that tell about a mistake there: file, line, key, what was found, what was expected."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from tessera.files import UserError
from tessera.spec.describe import ANY_NAME, Place, expected, locate, nearest_keys
from tessera.spec.parts import shown
from tessera.spec.section import Section

OVERRIDE = "override"
COMPANION = "companion"
LARGEST = 1_000_000
"""Of numbers whose key has no upper limit of its own: beyond it they overflow somewhere."""

Key = tuple[str, ...]


class Value(NamedTuple):
    value: Any
    """A scalar, a list, or an empty section."""
    origin: str
    """The file, `override`, or who else set it."""
    line: int | None = None

    @property
    def place(self) -> str:
        return self.origin if self.line is None else f"{self.origin}, line {self.line}"


Values = dict[Key, Value]


@dataclass(frozen=True)
class Mistake:
    places: tuple[str, ...]
    """Where the value was set: files with lines, or `override`."""
    key: str
    """Dotted, empty for the file as a whole."""
    text: str

    def line(self) -> str:
        return ": ".join(piece for piece in (", ".join(self.places), self.key, self.text) if piece)


def dotted(key: Key) -> str:
    return ".".join(key)


def refuse(subject: str, mistakes: Sequence[Mistake]) -> None:
    """Raises UserError with one line per mistake; returns when there are none."""
    if not mistakes:
        return
    lines = list(dict.fromkeys(mistake.line() for mistake in mistakes))
    if len(lines) == 1:
        raise UserError(lines[0] if lines[0].startswith(subject) else f"{subject}: {lines[0]}")
    raise UserError(f"{subject}: {len(lines)} mistakes\n  " + "\n  ".join(lines))


def unknown_key(root: type[Section], key: Key, value: Value | None = None) -> Mistake:
    """``key`` ends with the first name that is unknown."""
    *above, name = key
    section = locate(root, above).section
    prefix = "".join(f"{piece}." for piece in above)
    places = (locate(root, above[:count]) for count in range(1, len(above) + 1))
    general = "".join(f"{ANY_NAME if place.is_entry else place.key[-1]}." for place in places)
    near = [found.replace(general, prefix) for found in nearest_keys(root, general, name)]
    legal = "" if section is None else f"legal here: {', '.join(section.model_fields)}"
    advice = f"did you mean {' or '.join(near)}?" if near else legal
    return Mistake(() if value is None else (value.place,), dotted(key), f"unknown key; {advice}")


def not_a_section(place: Place, key: Key, value: Value) -> Mistake:
    return Mistake((value.place,), dotted(key), _expected_section(place, value.value))


def too_large(field: FieldInfo, key: Key, value: Value) -> Mistake | None:
    numbers = [one for one in _items(value.value) if isinstance(one, int | float) and LARGEST < abs(one) < math.inf]
    if not numbers or "at most" in expected(field) or "below" in expected(field):
        return None
    return Mistake(
        (value.place,), dotted(key), f"expected {expected(field)}, at most {LARGEST}, found {shown(numbers[0])}"
    )


def from_validation(error: ValidationError, root: type[Section], content: Any, values: Values) -> list[Mistake]:
    """One mistake per key that pydantic refused in ``content``, which is made of ``values``."""
    found: dict[tuple[Key, str], Mistake] = {}

    def add(key: Key, text: str) -> None:
        found.setdefault((key, text), Mistake(places_of(key, values), dotted(key), text))

    for detail in error.errors(include_url=False):
        location = [str(piece) for piece in detail["loc"]]
        if detail["type"] == "disagreement":
            for key, text in detail["ctx"]["mistakes"]:
                add((*location, *key.split(".")), text)
            continue
        place = locate(root, location)
        value = _value_at(content, place.key)
        if detail["type"] == "extra_forbidden":
            add(place.key, unknown_key(root, place.key).text)
        elif detail["type"] == "value_error":
            add(place.key, detail["msg"].removeprefix("Value error, "))
        elif place.section is not None:
            add(place.key, _expected_section(place, value))
        elif place.field is not None:
            key = place.key
            if place.has_free_names and len(location) > len(key):
                key = (*key, location[len(key)])
                value = _value_at(content, key)
            add(key, f"expected {expected(place.field)}, found {shown(value)}{_advice(place.field, value)}")
    return list(found.values())


def _expected_section(place: Place, value: Any) -> str:
    if place.section is None or (place.is_named and place.field is not None):
        return f"expected {expected(place.field)}, found {shown(value)}" if place.field else ""
    return f"expected a section with the keys {', '.join(place.section.model_fields)}, found {shown(value)}"


def _value_at(values: Any, key: Key) -> Any:
    for name in key:
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def places_of(key: Key, values: Mapping[Key, Value]) -> tuple[str, ...]:
    """Where the key was set; for a section, or a key left to its default, everyone who set something in that section."""
    for prefix in (f"{dotted(key)}.", f"{dotted(key[:-1])}."):
        if below := [value for path, value in values.items() if f"{dotted(path)}.".startswith(prefix)]:
            return tuple({value.origin: value.place for value in reversed(below)}.values())[::-1]
    return ()


def _advice(field: FieldInfo, value: Any) -> str:
    words = expected(field)
    for item in _items(value):
        if isinstance(item, str) and "number" in words and re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", item):
            return "; remove the quotes"
        if isinstance(item, str) and "true or false" in words and item.lower() in ("yes", "no", "on", "off"):
            return f"; write {str(item.lower() in ('yes', 'on')).lower()}"
    if isinstance(value, bool | int | float) and "text" in words:
        return "; quote it"
    if isinstance(value, float) and value.is_integer() and "whole number" in words:
        return f"; write {int(value)}"
    if isinstance(value, int | float | str) and words.startswith("a list"):
        return f"; write [{value}]"
    return ""
