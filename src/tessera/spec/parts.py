"""Reads YAML 1.2 strictly: what YAML would let pass in silence is refused with its position. Writes it so that YAML 1.1 reads the same."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)
from ruamel.yaml.scanner import Scanner

from tessera.files import UserError, is_text, read_text, reading

MAX_BYTES = 1_000_000
"""Of a file: some 25,000 names of experiments, which take 3 seconds."""
MAX_DEPTH = 50
"""Sections and lists inside one another."""
MAX_REPEATED = 10_000
"""Values that aliases repeat, all together."""

NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
CORE: tuple[tuple[re.Pattern[str], Any], ...] = (
    (re.compile(r"~|null|Null|NULL|"), lambda text: None),
    (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text[0] in "tT"),
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"0o[0-7]+"), lambda text: int(text[2:], 8)),
    (re.compile(r"0x[0-9a-fA-F]+"), lambda text: int(text, 16)),
    (NUMBER, float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)"), lambda text: float(text.replace(".", ""))),
    (re.compile(r"\.(nan|NaN|NAN)"), lambda text: float("nan")),
)
"""What a plain scalar is in YAML 1.2 (its core schema, section 10.3.2); anything else is text."""


class LinedKey(str):
    """A key as the file spells it, which knows its line, from 1."""

    __slots__ = ("line",)
    line: int

    def __new__(cls, text: str, line: int) -> LinedKey:
        key = super().__new__(cls, text)
        key.line = line
        return key


def read_mapping(path: Path, twice_read: bool = False) -> dict[str, Any]:
    """The file's content, its keys being ``LinedKey``; empty for an empty file. Raises UserError with line and column for anything but a plain
    YAML mapping.

    ``twice_read``: by a tool of YAML 1.1 as well, so that scalars which mean something else there are refused.
    """
    with reading(path, "a YAML file"):
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: has {path.stat().st_size} bytes, expected a YAML file of at most {MAX_BYTES}")
        text = read_text(path)
    value = parse_yaml(text, str(path), twice_read)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a mapping such as `train: {{num_epochs: 10}}`, found {shown(value)}")
    return value


def place_of(path: Path, key: str) -> str:
    """Where in a file a key stands, if it is known."""
    line = getattr(key, "line", None)
    return str(path) if line is None else f"{path}, line {line}"


def parse_yaml(text: str, origin: str, twice_read: bool = False) -> Any:
    """One document's dictionaries, lists, text, numbers, booleans and null."""
    try:
        return _Reader(text, twice_read).read()
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        lines = text.splitlines()
        tab = mark is not None and mark.line < len(lines) and "\t" in lines[mark.line]
        hint = "; indent with spaces, not tabs" if tab else ""
        wrong = "" if isinstance(error, _RefusedError) else "not valid YAML: "
        raise UserError(f"{origin}{place}: {wrong}{error.problem or error.context}{hint}") from None
    except YAMLError as error:
        raise UserError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None


class _RefusedError(MarkedYAMLError):
    """Of what is valid and not wanted."""


class _ShallowScanner(Scanner):
    """Looks ahead over a thousand brackets; with one more than allowed it need not."""

    def fetch_flow_collection_start(self, *arguments: Any, **options: Any) -> None:
        super().fetch_flow_collection_start(*arguments, **options)
        if self.flow_level > MAX_DEPTH:
            raise _RefusedError(problem=_TOO_DEEP, problem_mark=self.reader.get_mark())


_TOO_DEEP = f"more than {MAX_DEPTH} sections or lists inside one another"


class _Reader:
    def __init__(self, text: str, twice_read: bool) -> None:
        parser = YAML(typ="safe", pure=True)
        parser.Scanner = _ShallowScanner
        self.events: Iterator[Any] = iter(parser.parse(text))
        self.twice_read = twice_read
        self.anchors: dict[str, tuple[Any, int]] = {}
        self.size = 0
        self.repeated = 0

    def read(self) -> Any:
        next(self.events)
        first = next(self.events)
        if isinstance(first, StreamEndEvent):
            return None
        if first.version not in (None, (1, 2)):
            self._refuse(first, "the document says that it is of another version than YAML 1.2; remove %YAML")
        value = self._value(next(self.events), 1)
        next(self.events)
        if isinstance(more := next(self.events), DocumentStartEvent):
            self._refuse(more, "expected a single document, but found another document")
        return value

    def _refuse(self, event: Any, problem: str) -> NoReturn:
        raise _RefusedError(problem=problem, problem_mark=event.start_mark)

    def _value(self, event: Any, depth: int) -> Any:
        if isinstance(event, AliasEvent):
            return self._alias(event)
        if depth > MAX_DEPTH:
            self._refuse(event, _TOO_DEEP)
        if (tag := event.tag) and tag != "!" and tag.rpartition(":")[2] not in ("str", "seq", "map"):
            self._refuse(event, f"found the tag {tag}; expected plain values without tags")
        before = self.size
        self.size += 1
        value: Any
        if isinstance(event, ScalarEvent):
            value = self._scalar(event)
        elif isinstance(event, SequenceStartEvent):
            value = []
            while not isinstance(item := next(self.events), SequenceEndEvent):
                value.append(self._value(item, depth + 1))
        else:
            value = self._mapping(depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = value, self.size - before
        return value

    def _alias(self, event: Any) -> Any:
        if event.anchor not in self.anchors:
            self._refuse(event, f"found the alias *{event.anchor}, but no value before it is &{event.anchor}")
        value, size = self.anchors[event.anchor]
        self.size += size
        self.repeated += size
        if self.repeated > MAX_REPEATED:
            self._refuse(event, f"aliases repeat more than {MAX_REPEATED} values")
        return value

    def _scalar(self, event: Any) -> Any:
        text: str = event.value
        if not is_text(text):
            self._refuse(event, f"{text!r} is no text in UTF-8")
        if not event.implicit[0] or event.tag is not None:
            return text
        try:
            value = next((read(text) for pattern, read in CORE if pattern.fullmatch(text)), text)
        except ValueError:
            self._refuse(event, f"found a number of {len(text)} digits")
        if self.twice_read and not isinstance(value, float):
            other = _in_yaml_1_1(text)
            if repr(other) != repr(value):
                advice = "quote it" if isinstance(value, str) else f"write {json.dumps(value)}, or quote it"
                self._refuse(
                    event,
                    f"{text} is {shown(value)} in YAML 1.2 and {shown(other)} in YAML 1.1, and readers of both read this file; {advice}",
                )
        return value

    def _mapping(self, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(self.events), MappingEndEvent):
            plain = isinstance(event, ScalarEvent) and event.implicit[0]
            if plain and event.value == "<<":
                for one in self._merged(next(self.events), depth):
                    merged = one | merged
                continue
            name = self._value(event, depth + 1)
            if not isinstance(name, str):
                self._refuse(
                    event,
                    f"expected a key of text, found {cut(getattr(event, 'value', ''))!r}, which YAML reads as {shown(name)}; quote it",
                )
            line = event.start_mark.line + 1
            if name in lines:
                self._refuse(event, f"the key {cut(name)!r} stands twice, first in line {lines[name]}; keep one")
            lines[name] = line
            own[LinedKey(name, line)] = self._value(next(self.events), depth + 1)
        return merged | own if merged else own

    def _merged(self, event: Any, depth: int) -> list[dict[str, Any]]:
        value = self._value(event, depth + 1)
        found = value if isinstance(value, list) else [value]
        if not all(isinstance(one, dict) for one in found):
            self._refuse(event, f"expected sections to merge (<<), found {shown(value)}")
        return found


def _in_yaml_1_1(text: str) -> Any:
    """Of a plain scalar, as PyYAML reads it."""
    loader: Any = yaml.SafeLoader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except (ValueError, yaml.YAMLError):
        return None


class _Dumper(yaml.CSafeDumper):
    """Quotes text that is a number in YAML 1.2 though not in 1.1 as well."""


_Dumper.add_representer(LinedKey, lambda dumper, key: dumper.represent_str(str(key)))
_Dumper.add_implicit_resolver("1.2", re.compile(rf"({NUMBER.pattern}|0o[0-7]+)\Z"), list("-+.0123456789"))


def inline_yaml(value: Any) -> str:
    """On one line."""
    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.dump(plain, Dumper=_Dumper, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def render_yaml(entries: Sequence[tuple[str, Any, str]]) -> str:
    """Sections of (dotted key, value, comment), keys of a section next to each other; an empty comment is left out."""
    lines: list[tuple[str, str]] = []
    opened: list[str] = []
    for key, value, comment in entries:
        *sections, leaf = key.split(".")
        shared = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(opened, sections, strict=False))
        )
        lines += [(f"{'  ' * depth}{sections[depth]}:", "") for depth in range(shared, len(sections))]
        opened = sections
        lines.append((f"{'  ' * len(sections)}{leaf}: {inline_yaml(value)}", comment))
    width = min(60, max(len(text) for text, _ in lines))
    return "\n".join(f"{text:<{width}}  # {comment}" if comment else text for text, comment in lines)


def shown(value: Any) -> str:
    """A found value in words, short enough for a message."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {cut(repr(value))}"
    if isinstance(value, dict):
        return f"a section with the keys {cut(', '.join(map(str, value)))}" if value else "an empty section"
    if isinstance(value, list | tuple):
        return f"the list {cut(json.dumps(value))}"
    return cut(str(value))


def cut(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
