"""Data that change while a stage reads them: it ends with the file's name, and writes nothing of what would not be true."""

from pathlib import Path
from typing import Any

import pytest

from tessera.data.opened import OpenedData
from tests.malformed.conftest import call
from tests.malformed.project import EXPERIMENT, content


@pytest.mark.parametrize("command", ["evaluate", "evaluate --runtime onnx", "infer", "parity"])
@pytest.mark.parametrize("name", ["panoptic_test.json", "label_map.json"])
def test_nothing_is_written_of_data_that_changed(
    command: str, name: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = project / "data/demo" / name
    original = OpenedData.__init__

    def open_then_change(self: OpenedData, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        path.write_bytes(path.read_bytes() + b" ")

    monkeypatch.setattr(OpenedData, "__init__", open_then_change)
    verb, *options = command.split()
    (project / "logs").mkdir(exist_ok=True)
    before = content(project)
    answer = call([verb, EXPERIMENT, *options], project, capsys)
    assert answer.code == 1
    assert f"demo/{name}: changed during this run" in answer.err.splitlines()[-1]
    after = content(project)
    assert {place for place in before.keys() | after.keys() if before.get(place) != after.get(place)} <= {
        f"data/demo/{name}"
    }


@pytest.mark.parametrize("command", ["evaluate", "infer", "parity"])
def test_data_that_change_before_a_stage_opens_them(
    command: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo's lineage is of its generator; what was generated is in the manifest."""
    path = project / "data/demo/panoptic_test.json"
    path.write_bytes(path.read_bytes() + b" ")
    before = content(project)
    answer = call([command, EXPERIMENT], project, capsys)
    assert answer.code == 1
    assert "panoptic_test.json: differs from what demo wrote; remove data/demo and generate again" in answer.err
    assert content(project) == before
