"""Mistakes in part files, and the lines that tell about them: file, key, what was found, what was expected, the nearest legal key."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from tessera.files import UserError
from tessera.spec.describe import expected, named_sections_of, nearest_keys, section_of
from tessera.spec.parts import line_of, shown
from tessera.spec.section import Section

OVERRIDE = "override"


@dataclass(frozen=True)
class Mistake:
    origins: tuple[str, ...]
    """The files that set the value, or `override`."""
    key: str
    """Dotted, empty for the file as a whole."""
    text: str

    def line(self) -> str:
        places = ", ".join(_place(origin, self.key) for origin in self.origins)
        return ": ".join(piece for piece in (places, self.key, self.text) if piece)


def refuse(subject: str, mistakes: Sequence[Mistake]) -> None:
    """Raises UserError with one line per mistake; returns when there are none."""
    if not mistakes:
        return
    lines = list(dict.fromkeys(mistake.line() for mistake in mistakes))
    if len(lines) == 1:
        raise UserError(lines[0] if lines[0].startswith(subject) else f"{subject}: {lines[0]}")
    raise UserError(f"{subject}: {len(lines)} mistakes\n  " + "\n  ".join(lines))


def unknown_key(root: type[Section], section: type[Section], origin: str, prefix: str, name: str) -> Mistake:
    near = nearest_keys(root, prefix, name)
    advice = f"did you mean {' or '.join(near)}?" if near else f"legal here: {', '.join(section.model_fields)}"
    return Mistake((origin,), prefix + name, f"unknown key; {advice}")


def not_a_section(section: type[Section], origin: str, key: str, value: Any) -> Mistake:
    return Mistake(
        (origin,), key, f"expected a section with the keys {', '.join(section.model_fields)}, found {shown(value)}"
    )


def from_validation(
    error: ValidationError, root: type[Section], values: dict[str, Any], set_by: Mapping[str, str]
) -> list[Mistake]:
    """One mistake per key that pydantic refused in ``values``; ``set_by`` tells who set each dotted key."""
    found: dict[tuple[str, str], Mistake] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] == "disagreement":
            prefix = "".join(f"{piece}." for piece in detail["loc"])
            for key, text in detail["ctx"]["mistakes"]:
                found.setdefault((prefix + key, text), Mistake(_origins(prefix + key, set_by), prefix + key, text))
            continue
        key, place = _place_at(root, detail["loc"])
        value = _value_at(values, key)
        if detail["type"] == "extra_forbidden":
            prefix, dot, name = key.rpartition(".")
            text = unknown_key(root, root, "", prefix + dot, name).text
        elif isinstance(place, FieldInfo):
            text = f"expected {expected(place)}, found {shown(value)}{_advice(place, value)}"
        elif detail["type"] == "model_type":
            text = not_a_section(place, "", key, value).text
        else:
            text = detail["msg"].removeprefix("Value error, ")
        found.setdefault((key, text), Mistake(_origins(key, set_by), key, text))
    return list(found.values())


def _place_at(root: type[Section], location: tuple[int | str, ...]) -> tuple[str, FieldInfo | type[Section]]:
    """Dotted key of an error's location, which goes on into list items and union members, and the field or section that it names."""
    section: type[Section] | None = root
    place: FieldInfo | type[Section] = root
    key: list[str] = []
    for piece in location:
        if not isinstance(piece, str):
            break
        if section is None:
            section = named_sections_of(place.annotation) if isinstance(place, FieldInfo) else None
            if section is None:
                break
            place = section
        else:
            if piece in section.model_fields:
                field = section.model_fields[piece]
                below = section_of(field.annotation)
                place, section = below or field, below
            else:
                key.append(piece)
                break
        key.append(piece)
    return ".".join(key), place


def _value_at(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _origins(key: str, set_by: Mapping[str, str]) -> tuple[str, ...]:
    """Who set the key; for a section, or a key left to its default, everyone who set something in that section."""
    if key in set_by:
        return (set_by[key],)
    prefix = f"{key}." if any(name.startswith(f"{key}.") for name in set_by) else f"{key.rpartition('.')[0]}."
    return tuple(dict.fromkeys(origin for name, origin in set_by.items() if name.startswith(prefix)))


def _advice(field: FieldInfo, value: Any) -> str:
    words = expected(field)
    values = value if isinstance(value, list) else [value]
    for item in values:
        if isinstance(item, str) and "number" in words:
            match = re.fullmatch(r"([-+]?\d+)[eE]([-+]?\d+)", item)
            if match:
                return f"; YAML reads a number with an exponent only with a dot: write {match[1]}.0e{match[2]}"
            if re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", item):
                return "; remove the quotes"
    if isinstance(value, bool) and "text" in words:
        return "; YAML reads yes, no, on and off as true and false: quote it"
    if isinstance(value, int | float) and "text" in words:
        return "; quote it"
    if isinstance(value, float) and value.is_integer() and "whole number" in words:
        return f"; write {int(value)}"
    if isinstance(value, int | float | str) and words.startswith("a list"):
        return f"; write [{value}]"
    return ""


def _place(origin: str, key: str) -> str:
    if origin == OVERRIDE or not key:
        return origin
    line = line_of(Path(origin), key)
    return origin if line is None else f"{origin}, line {line}"
