"""What the cases break works before it is broken; without this, every one of them could fail for another reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.malformed.conftest import call
from tests.malformed.project import EXPERIMENT

COMMANDS = (
    f"spec {EXPERIMENT}",
    "check demo --out check.json",
    "check pairs --out check.json",
    "check objects --out check.json",
    f"evaluate {EXPERIMENT}",
    f"evaluate {EXPERIMENT} --runtime onnx",
    f"parity {EXPERIMENT}",
    f"infer {EXPERIMENT} inference.images=demo/images/test",
    f"precision {EXPERIMENT}",
    "compare demo",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_valid_project_works(command: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = call(command.split(), project, capsys)
    assert answer.code == 0, answer.err
    assert "error" not in answer.err
