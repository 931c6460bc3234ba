"""A stage whose source changed asks for a decision: do its results change as well? So does whatever makes data.

Run as a script, this file records the present sources as decided.
"""

import ast
import hashlib
import json
from pathlib import Path

import pytest

from tessera.data import coco_index
from tessera.spec.lineage import CONVERT_VERSION, GENERATOR_VERSION, STAGES

SOURCE = Path(__file__).parents[2] / "src" / "tessera"
RECORD = Path(__file__).with_name("versions.json")

NO_STAGE = (
    "cli.py",
    "commands.py",
    "files.py",
    "gpus.py",
    "log.py",
    "pictures/figures.py",
    "pictures/panels.py",
    "pictures/style.py",
    "progress.py",
    "provenance.py",
    "structures.py",
    "__init__.py",
    "spec",
    "tables",
    "interop",
)
"""What no stage's version speaks for: it carries values and files but computes no result. Table layouts are looked at, not reused."""


MAKERS = {"demo": ("data/demo.py",), "convert": ("interop/kitti",)}
"""What nothing but the making of a dataset runs: part of no stage, because the data's digest has these versions."""

VERSIONS = {
    **{name: stage.version for name, stage in STAGES.items()},
    "demo": GENERATOR_VERSION,
    "convert": CONVERT_VERSION,
    "index": coco_index.FORMAT,
}
SOURCES = {
    **{name: stage.sources for name, stage in STAGES.items()},
    "demo": (*MAKERS["demo"], "ops/rle.py"),
    "convert": (*MAKERS["convert"], "data/label_map.py", "ops/image_size.py"),
    "index": ("data/coco_file.py", "data/coco_index.py", "data/columns.py"),
}


def modules(source: str) -> list[Path]:
    path = SOURCE / source
    return [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))


def digest(name: str) -> str:
    """Of the syntax trees of the sources; comments, layout and docstrings do not count."""
    found = hashlib.sha256()
    paths = {path for source in SOURCES[name] for path in modules(source)}
    if name in STAGES:
        paths -= {path for sources in MAKERS.values() for source in sources for path in modules(source)}
    for path in sorted(paths):
        found.update(path.relative_to(SOURCE).as_posix().encode() + b"\0")
        found.update(normalised(path.read_text(encoding="utf-8")).encode() + b"\0")
    return found.hexdigest()[:16]


def normalised(text: str) -> str:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [statement for statement in body if not _is_text(statement)]  # type: ignore[attr-defined]  # any node with a body
    return ast.dump(tree)


def _is_text(statement: ast.AST) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def present() -> dict[str, dict[str, int | str]]:
    return {name: {"version": version, "digest": digest(name)} for name, version in VERSIONS.items()}


@pytest.mark.parametrize("name", VERSIONS)
def test_changed_source_was_decided_upon(name: str) -> None:
    recorded = json.loads(RECORD.read_text())
    place = (
        "FORMAT in src/tessera/data/coco_index.py" if name == "index" else "its version in src/tessera/spec/lineage.py"
    )
    assert recorded.get(name) == present()[name], (
        f"source of {name} changed: raise {place} if what it makes changes, "
        "then run `python tests/spec/test_versions.py` to record the decision"
    )


def test_record_has_nothing_else() -> None:
    assert json.loads(RECORD.read_text()).keys() == VERSIONS.keys()


@pytest.mark.parametrize("name", VERSIONS)
def test_sources_exist(name: str) -> None:
    for source in SOURCES[name]:
        assert modules(source) and all(path.is_file() for path in modules(source)), source


def test_every_module_belongs_to_a_stage() -> None:
    covered = {path for stage in STAGES.values() for source in stage.sources for path in modules(source)}
    free = [
        path.relative_to(SOURCE).as_posix()
        for path in sorted(SOURCE.rglob("*.py"))
        if path not in covered
        and not path.relative_to(SOURCE).as_posix().startswith(NO_STAGE)
        and path.name != "__init__.py"
    ]
    assert free == [], (
        "no stage's version speaks for these modules: add them to `sources` in src/tessera/spec/lineage.py"
    )


SAME = {
    "comment": ("a = 1\n", "a = 1  # one\n"),
    "layout": ("f(1, 2)\n", "f(\n    1,\n    2,\n)\n"),
    "docstring": ('def f():\n    """Old."""\n    return 1\n', 'def f():\n    """New."""\n    return 1\n'),
    "attribute docstring": ("class A:\n    a: int = 1\n", 'class A:\n    a: int = 1\n    """One."""\n'),
}


@pytest.mark.parametrize(("one", "two"), SAME.values(), ids=SAME.keys())
def test_what_cannot_change_a_result_does_not_ask(one: str, two: str) -> None:
    assert normalised(one) == normalised(two)


def test_what_can_change_a_result_asks() -> None:
    assert normalised("a = 1\n") != normalised("a = 2\n")
    assert normalised('a = "old"\n') != normalised('a = "new"\n')


if __name__ == "__main__":
    from tessera.files import write_json

    write_json(RECORD, present())
    print(f"recorded {', '.join(VERSIONS)}")
