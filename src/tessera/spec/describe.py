"""A key of the schema in words: for the reference, for error messages and for suggestions."""

from __future__ import annotations

import difflib
import functools
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo

from tessera.spec.section import Section, inert_keys, is_inert

ANY_NAME = "<name>"
"""Stands in dotted keys for what the user calls a section."""


@dataclass(frozen=True)
class Key:
    name: str
    """Dotted, from the section that was asked for its keys."""
    section: type[Section]
    """Where the key is declared."""
    field: FieldInfo
    inert: bool

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


@functools.cache
def keys_of(section: type[Section]) -> tuple[Key, ...]:
    """Every leaf key below a section, in the order of declaration; sections that may be left out are entered too."""
    return tuple(_keys(section, "", frozenset()))


def _keys(section: type[Section], prefix: str, inert_here: frozenset[str]) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        below, named = section_of(field.annotation), named_sections_of(field.annotation)
        if named is not None:
            yield from _keys(named, f"{prefix}{name}.{ANY_NAME}.", frozenset())
        elif below is None:
            yield Key(prefix + name, section, field, name in inert_here or is_inert(section, name))
        else:
            yield from _keys(below, f"{prefix}{name}.", inert_keys(section, name))


def section_of(annotation: Any) -> type[Section] | None:
    """The section behind an annotation ``Section`` or ``Section | None``; None for any other annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(annotation) if member is not type(None)]
        return section_of(members[0]) if len(members) == 1 else None
    return None


def named_sections_of(annotation: Any) -> type[Section] | None:
    """The section behind an annotation ``dict[str, Section]``."""
    return section_of(typing.get_args(annotation)[1]) if typing.get_origin(annotation) is dict else None


@dataclass(frozen=True)
class Place:
    """What a key is in the schema; neither a field nor a section where it is unknown."""

    key: tuple[str, ...]
    """As far as it was followed: to the unknown name, or to a field that has names of the user's own below it."""
    field: FieldInfo | None = None
    """None for the root, and for a section that the user names."""
    section: type[Section] | None = None
    """Of the section itself, or of those that the user names below the field."""
    is_named: bool = False
    """The field holds sections that the user names."""

    @property
    def is_known(self) -> bool:
        return self.field is not None or self.section is not None

    @property
    def is_entry(self) -> bool:
        """A section that the user named."""
        return self.section is not None and self.field is None and self.key != ()

    @property
    def is_optional(self) -> bool:
        """A section that may be null."""
        return self.field is not None and not self.is_named and self.field.annotation is not self.section

    @property
    def has_free_names(self) -> bool:
        """What stands below it the user names."""
        return self.field is not None and typing.get_origin(self.field.annotation) is dict


def locate(root: type[Section], key: Sequence[str]) -> Place:
    place = Place((), None, root)
    for count, name in enumerate(key, 1):
        section = place.section
        if section is None:
            break
        if place.is_named:
            place = Place(tuple(key[:count]), None, section)
        elif name not in section.model_fields:
            return Place(tuple(key[:count]))
        else:
            field = section.model_fields[name]
            named = named_sections_of(field.annotation)
            place = Place(tuple(key[:count]), field, named or section_of(field.annotation), named is not None)
    return place


def expected(field: FieldInfo) -> str:
    """Type and range in one phrase: ``a number, at least 0, below 1``."""
    limits = range_words(field.metadata)
    return type_words(field.annotation) + (f", {limits}" if limits else "")


def type_words(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        limits = range_words(arguments[1:])
        return type_words(arguments[0]) + (f", {limits}" if limits else "")
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments)) if len(arguments) > 1 else str(arguments[0])
    if origin in (typing.Union, types.UnionType):
        members = [member for member in arguments if member is not type(None)]
        return " or ".join(map(type_words, members)) + (" or null" if len(members) < len(arguments) else "")
    if origin is list:
        return f"a list (each {type_words(arguments[0])})"
    if origin is tuple:
        items = list(dict.fromkeys(map(type_words, arguments)))
        each = f"each {items[0]}" if len(items) == 1 else "; ".join(map(type_words, arguments))
        return f"a list of {len(arguments)} ({each})"
    if origin is dict:
        return f"a section of names (each {type_words(arguments[1])})"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "a section with the keys " + ", ".join(annotation.model_fields)
    names: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names[annotation]


def range_words(metadata: Sequence[Any]) -> str:
    words = []
    counts = [item.min_length for item in metadata if isinstance(item, MinLen)]
    if counts and MaxLen(counts[0]) in metadata:
        return f"exactly {counts[0]} of them"
    for item in metadata:
        if isinstance(item, FieldInfo):
            words.append(range_words(item.metadata))
        elif isinstance(item, Ge):
            words.append(f"at least {item.ge}")
        elif isinstance(item, Gt):
            words.append(f"above {item.gt}")
        elif isinstance(item, Le):
            words.append(f"at most {item.le}")
        elif isinstance(item, Lt):
            words.append(f"below {item.lt}")
        elif isinstance(item, MinLen):
            words.append(f"at least {item.min_length} of them")
        elif isinstance(item, MaxLen):
            words.append(f"at most {item.max_length} of them")
    return ", ".join(word for word in words if word)


def closest(name: str, names: Sequence[str], count: int = 3) -> list[str]:
    return difflib.get_close_matches(name, names, n=count, cutoff=0.6)


def nearest_keys(root: type[Section], prefix: str, name: str) -> list[str]:
    """Legal dotted keys that an unknown ``prefix + name`` may have meant."""
    return nearest_names(_every_key(root), prefix, name)


def nearest_names(every: Sequence[str], prefix: str, name: str) -> list[str]:
    """Of dotted names, those that ``prefix + name`` may have meant: the same name elsewhere, else a sibling of alike spelling, else an
    alike name elsewhere."""
    siblings = {key.removeprefix(prefix): key for key in every if key.startswith(prefix)}
    siblings = {leaf: key for leaf, key in siblings.items() if leaf and "." not in leaf}
    elsewhere: dict[str, list[str]] = {}
    for key in every:
        elsewhere.setdefault(key.rpartition(".")[2], []).append(key)
    exact = sorted(elsewhere.get(name, []), key=lambda key: (not key.startswith(prefix), key.count("."), key))
    if exact:
        return exact[:3]
    near = [siblings[leaf] for leaf in closest(name, list(siblings))]
    if near:
        return near
    return [key for leaf in closest(name, list(elsewhere)) for key in elsewhere[leaf][:1]]


@functools.cache
def _every_key(root: type[Section]) -> tuple[str, ...]:
    """Leaves and sections."""
    found: dict[str, None] = {}
    for key in keys_of(root):
        pieces = key.name.split(".")
        for count in range(1, len(pieces) + 1):
            found[".".join(pieces[:count])] = None
    return tuple(found)
