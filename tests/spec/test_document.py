import json
from pathlib import Path
from typing import Any

from tessera.spec.describe import keys_of, nearest_keys
from tessera.spec.document import json_schema, reference_markdown
from tessera.spec.parts import read_mapping
from tessera.spec.schema import Spec

ROOT = Path(__file__).parents[2]
STALE = "changed in the schema: run `tessera reference` and commit the result"


def test_committed_reference_is_the_generated_one() -> None:
    assert (ROOT / "docs/spec.md").read_text() == reference_markdown(), STALE


def test_committed_json_schema_is_the_generated_one() -> None:
    assert json.loads((ROOT / "config/spec.schema.json").read_text()) == json_schema(), STALE


def test_reference_has_every_key_once_with_its_meaning() -> None:
    rows = [line for line in reference_markdown().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == sorted(
        (key.name for key in keys_of(Spec)), key=[row.split("`")[1] for row in rows].index
    )
    assert len(rows) == len(keys_of(Spec))
    for row in rows:
        meaning = row.rstrip("| ").rpartition(" | ")[2]
        assert len(meaning) > 3, row


def test_reference_marks_inert_keys() -> None:
    rows = {line.split("`")[1]: line for line in reference_markdown().splitlines() if line.startswith("| `")}
    assert {name for name, row in rows.items() if "*inert*" in row} == {key.name for key in keys_of(Spec) if key.inert}
    assert "*inert*" in rows["dataset.test.batch_size"]
    assert "*inert*" not in rows["dataset.train.batch_size"]


def test_json_schema_knows_every_key_and_requires_none() -> None:
    schema = json_schema()

    def walk(node: dict[str, Any], prefix: str) -> list[str]:
        node = resolve(node)
        if "properties" not in node:
            return [prefix.rstrip(".")]
        assert "required" not in node and node["additionalProperties"] is False
        return [key for name, child in node["properties"].items() for key in walk(child, f"{prefix}{name}.")]

    def resolve(node: dict[str, Any]) -> dict[str, Any]:
        for choice in node.get("anyOf", [node]):
            if "$ref" in choice:
                found: dict[str, Any] = schema["$defs"][choice["$ref"].rpartition("/")[2]]
                return found
        return node

    assert walk(schema, "") == [key.name for key in keys_of(Spec)]


def test_nearest_keys() -> None:
    assert nearest_keys(Spec, "train.", "lr") == ["train.optim.lr"]
    assert nearest_keys(Spec, "train.optim.", "milestone") == ["train.optim.milestones"]
    assert nearest_keys(Spec, "", "dataste")[0] == "dataset"
    assert nearest_keys(Spec, "", "zzzzzz") == []


def test_readme_of_the_configuration_names_every_folder() -> None:
    text = (ROOT / "config/README.md").read_text()
    folders = [path.name for path in (ROOT / "config").iterdir() if path.is_dir()]
    assert folders and all(f"`{folder}/" in text for folder in folders)
    assert read_mapping(ROOT / "config/config.yaml").keys() >= {"models", "backbones", "datasets"}
