"""The reference of every key, and the JSON Schema for editors, made from the schema itself. `tessera reference` writes both."""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection
from typing import Any

from pydantic import create_model

from tessera.spec.describe import ANY_NAME, named_sections_of, range_words, section_of, type_words
from tessera.spec.lineage import RUNTIMES, STAGES, ancestry
from tessera.spec.networks import FAMILIES, ModelSpec
from tessera.spec.parts import inline_yaml
from tessera.spec.schema import Spec
from tessera.spec.section import Section, inert_keys, is_inert

HEAD = """# The keys of a spec

Made from `src/tessera/spec/schema.py` and `networks.py` by `tessera reference`; a test compares.
How parts compose a spec: [config/README.md](../config/README.md).

- *inert*: the key cannot change a result; changing it reruns nothing.
- *Read by*: the stages that read the section themselves. Everything made from their outputs reruns as well:
"""


def reference_markdown() -> str:
    lines = [HEAD]
    for verb in STAGES:
        lines.append(f"  - {verb} comes after {_ancestors(verb)}")
    lines.append("")
    top = [name for name, field in Spec.model_fields.items() if section_of(field.annotation) is None]
    lines += ["## Top level", "", *_table([(Spec, name, "", frozenset()) for name in top]), ""]
    for name in Spec.model_fields:
        section = section_of(Spec.model_fields[name].annotation)
        if name == "model":
            lines += _models()
        elif section is not None:
            lines += _section(name, name, section, frozenset())
    return "\n".join(lines).rstrip() + "\n"


def json_schema() -> dict[str, Any]:
    """For part files, which are partial specs: no key is required."""
    families: Any = functools.reduce(operator.or_, FAMILIES)
    part: type[Spec] = create_model("Part", __base__=Spec, model=(families, None))
    schema = part.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "A part of a tessera spec"
    _clean(schema)
    return schema


def _ancestors(verb: str) -> str:
    """Before a stage that works on models of every runtime the chain differs by runtime."""
    if not STAGES[verb].reads_split:
        return _chain(verb, "torch")
    runtimes = [runtime for runtime in RUNTIMES if verb != "parity" or runtime != "torch"]
    return "; ".join(f"{runtime}: {_chain(verb, runtime)}" for runtime in runtimes)


def _chain(verb: str, runtime: str) -> str:
    return ", ".join(stage for stage in ancestry(verb, runtime) if stage != verb) or "nothing"


def _models() -> list[str]:
    """What all families share, then the rest of each family."""
    shared = set(ModelSpec.model_fields) - {"name", "mode"}
    lines = _section("model", "model, in every family", ModelSpec, frozenset(), {"name", "mode"})
    for family in FAMILIES:
        lines += _section("model", f"model of {family.model_fields['name'].default}", family, frozenset(), shared)
    return lines


def _section(
    key: str,
    title: str,
    section: type[Section],
    inert_here: frozenset[str],
    skipped: Collection[str] = (),
    text: str = "",
) -> list[str]:
    lines = [f"## {title}", ""]
    text = " ".join(piece for piece in (text, _own_docstring(section)) if piece)
    if text:
        lines += [text, ""]
    lines += [f"Read by: {', '.join(_readers(key))}.", ""]
    leaves, below = [], []
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if name in skipped:
            continue
        named = named_sections_of(field.annotation)
        if named is not None:
            default = ", ".join(field.get_default(call_default_factory=True)) or "none"
            title_of_named = f"{key}.{name}.{ANY_NAME}{title.removeprefix(key)}"
            text = f"{field.description} By default there is: {default}."
            below += _section(f"{key}.{name}.{ANY_NAME}", title_of_named, named, frozenset(), text=text)
        elif inner is None:
            leaves.append((section, name, f"{key}.", inert_here))
        else:
            inner_title = f"{key}.{name}{title.removeprefix(key)}"
            below += _section(f"{key}.{name}", inner_title, inner, inert_keys(section, name))
    if leaves:
        lines += [*_table(leaves), ""]
    return lines + below


def _table(rows: list[tuple[type[Section], str, str, frozenset[str]]]) -> list[str]:
    lines = ["| key | type | default | range | meaning |", "| --- | --- | --- | --- | --- |"]
    for section, name, prefix, inert_here in rows:
        field = section.model_fields[name]
        meaning = (field.description or "").replace("\n", " ")
        if name in inert_here or is_inert(section, name):
            meaning = f"*inert*. {meaning}"
        if not prefix:
            meaning += f" Read by: {', '.join(_readers(name)) or 'every stage that opens data'}."
        cells = [
            f"`{prefix}{name}`",
            type_words(field.annotation),
            "required" if field.is_required() else f"`{inline_yaml(field.get_default(call_default_factory=True))}`",
            range_words(field.metadata),
            meaning,
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def _readers(key: str) -> list[str]:
    """Stages whose own sections hold the key; of the test split, the stages that read `evaluate.split`."""
    if key == "dataset.test" or key.startswith("dataset.test."):
        return [verb for verb, stage in STAGES.items() if stage.reads_split]
    section = key.partition(".")[0]
    return [verb for verb, stage in STAGES.items() if section in stage.sections]


def _own_docstring(section: type[Section]) -> str:
    return " ".join((section.__doc__ or "").split())


def _clean(node: Any) -> None:
    """Removes what is ours alone, and the titles that only repeat a key."""
    if isinstance(node, dict):
        if isinstance(node.get("properties"), dict):
            node.pop("required", None)
            for content in node["properties"].values():
                for key in ("title", "inert", "inert_keys"):
                    content.pop(key, None)
        for value in node.values():
            _clean(value)
    elif isinstance(node, list):
        for value in node:
            _clean(value)
