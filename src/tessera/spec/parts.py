"""Reads the YAML files below config/ strictly: what YAML would let pass in silence is refused with its position."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tessera.files import UserError

PLAIN_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")


class StrictLoader(yaml.CSafeLoader):
    """YAML 1.1 restricted to what JSON can hold; keys are text and unique. Dates stay text."""

    yaml_constructors = {
        tag: constructor
        for tag, constructor in yaml.CSafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in PLAIN_TAGS
    }
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, Any] = {}
        for key, _ in node.value:
            if key.tag.endswith(":merge"):
                continue
            if not key.tag.endswith(":str"):
                text = getattr(key, "value", "")
                raise yaml.constructor.ConstructorError(
                    problem=f"expected a key of text, found {text!r}, which YAML reads as {key.tag.rpartition(':')[2]}; quote it",
                    problem_mark=key.start_mark,
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} stands twice, first in line {seen[key.value].line + 1}; keep one",
                    problem_mark=key.start_mark,
                )
            seen[key.value] = key.start_mark
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def read_mapping(path: Path) -> dict[str, Any]:
    """The file's content, empty for an empty file. Raises UserError with line and column for anything but a plain YAML mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); expected a YAML file") from None
    value = parse_yaml(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a mapping such as `train: {{num_epochs: 10}}`, found {shown(value)}")
    return value


def parse_yaml(text: str, origin: str) -> Any:
    try:
        value = yaml.load(text, Loader=StrictLoader)
        json.dumps(value)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        hint = "; indent with spaces, not tabs" if _tab_at(text, mark) else ""
        raise UserError(f"{origin}{place}: not valid YAML: {error.problem or error.context}{hint}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, RecursionError) as error:
        reason = "it refers to itself or is nested too deeply" if not _is_number_error(error) else str(error)
        raise UserError(f"{origin}: not usable YAML: {reason}") from None
    return value


def line_of(path: Path, key: str) -> int | None:
    """Line, from 1, where the dotted ``key`` stands in the file, or the nearest section above it; None where neither does."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=StrictLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return None
    line = None
    for name in key.split("."):
        if not isinstance(node, yaml.MappingNode):
            break
        for found, value in node.value:
            if found.value == name:
                line, node = found.start_mark.line + 1, value
                break
        else:
            break
    return line


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
        return f"the text {_cut(repr(value))}"
    if isinstance(value, dict):
        return f"a section with the keys {_cut(', '.join(map(str, value)))}" if value else "an empty section"
    if isinstance(value, list | tuple):
        return f"the list {_cut(json.dumps(value))}"
    return str(value)


def _cut(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _tab_at(text: str, mark: Any) -> bool:
    lines = text.splitlines()
    return mark is not None and mark.line < len(lines) and "\t" in lines[mark.line]


def _is_number_error(error: BaseException) -> bool:
    return isinstance(error, ValueError) and "Circular" not in str(error)


def inline_yaml(value: Any) -> str:
    """On one line."""
    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.dump(plain, Dumper=yaml.CSafeDumper, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()
