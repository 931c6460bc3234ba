import json
from pathlib import Path
from typing import Any

import pytest

from tessera.spec.describe import ANY_NAME, keys_of, nearest_keys
from tessera.spec.document import json_schema, reference_markdown
from tessera.spec.parts import read_mapping
from tessera.spec.schema import SPECS

ROOT = Path(__file__).parents[2]
STALE = "changed in the schema: run `tessera reference` and commit the result"


def test_committed_reference_is_the_generated_one() -> None:
    assert (ROOT / "docs/spec.md").read_text() == reference_markdown(), STALE


def test_committed_json_schema_is_the_generated_one() -> None:
    assert json.loads((ROOT / "config/spec.schema.json").read_text()) == json_schema(), STALE


EVERY = [key for section in SPECS.values() for key in keys_of(section)]


def sections() -> dict[str, list[str]]:
    """Rows of the reference by the title they stand under."""
    found: dict[str, list[str]] = {}
    title = ""
    for line in reference_markdown().splitlines():
        title = line.removeprefix("## ") if line.startswith("## ") else title
        if line.startswith("| `"):
            found.setdefault(title, []).append(line)
    return found


@pytest.mark.parametrize("family", SPECS)
def test_reference_has_every_key_of_a_family_once_with_its_meaning(family: str) -> None:
    rows = [
        row
        for title, rows in sections().items()
        for row in rows
        if not title.startswith("model") or title.endswith((f" of {family}", "in every family"))
    ]
    names = [row.split("`")[1] for row in rows]
    assert sorted(names) == sorted(key.name for key in keys_of(SPECS[family]))
    for row in rows:
        meaning = row.rstrip("| ").rpartition(" | ")[2]
        assert len(meaning) > 3, row


def test_reference_marks_inert_keys() -> None:
    rows = {row.split("`")[1]: row for rows in sections().values() for row in rows}
    assert {name for name, row in rows.items() if "*inert*" in row} == {key.name for key in EVERY if key.inert}
    assert "*inert*" in rows["dataset.test.batch_size"]
    assert "*inert*" not in rows["dataset.train.batch_size"]


def test_json_schema_knows_every_key_and_requires_none() -> None:
    schema = json_schema()

    def walk(node: dict[str, Any], prefix: str) -> list[str]:
        choices = resolve(node)
        if not any("properties" in choice for choice in choices):
            return [prefix.rstrip(".")]
        found = []
        for choice in choices:
            if "properties" in choice:
                assert "required" not in choice and choice["additionalProperties"] is False
                found += [
                    key for name, child in choice["properties"].items() for key in walk(child, f"{prefix}{name}.")
                ]
        return found

    def resolve(node: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            schema["$defs"][choice["$ref"].rpartition("/")[2]] if "$ref" in choice else choice
            for choice in node.get("anyOf", [node])
        ]

    whole = {key.name.partition(f".{ANY_NAME}")[0] for key in EVERY}
    assert set(walk(schema, "")) == whole


def test_nearest_keys() -> None:
    assert nearest_keys(SPECS["mask2former"], "train.", "lr") == ["train.optim.lr"]
    assert nearest_keys(SPECS["mask2former"], "train.optim.", "milestone") == ["train.optim.milestones"]
    assert nearest_keys(SPECS["mask2former"], "", "dataste")[0] == "dataset"
    assert nearest_keys(SPECS["mask2former"], "", "zzzzzz") == []


def test_readme_of_the_configuration_names_every_folder() -> None:
    text = (ROOT / "config/README.md").read_text()
    folders = [path.name for path in (ROOT / "config").iterdir() if path.is_dir()]
    assert folders and all(f"`{folder}/" in text for folder in folders)
    assert read_mapping(ROOT / "config/config.yaml").keys() >= {"models", "backbones", "datasets"}
