"""What the cases break works before it is broken; without this, every one of them could fail for another reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tessera import inference
from tessera.files import read_json
from tessera.provenance import seal_holds
from tests.malformed.conftest import call
from tests.malformed.project import EXPERIMENT, FOLDER

COMMANDS = (
    f"spec {EXPERIMENT}",
    "check demo --out check.json",
    "check pairs --out check.json",
    "check objects --out check.json",
    f"evaluate {EXPERIMENT}",
    f"evaluate {EXPERIMENT} --runtime onnx",
    f"parity {EXPERIMENT}",
    f"infer {EXPERIMENT} --out out inference.images=demo/images/test",
    f"precision {EXPERIMENT}",
    "compare demo",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_valid_project_works(command: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = call(command.split(), project, capsys)
    assert answer.code == 0, answer.err
    assert "error" not in answer.err


def test_a_check_without_out_writes_where_the_rule_does(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["check", "pairs"], project, capsys).code == 0
    assert read_json(project / "data/checks/pairs.json")["dataset"] == "pairs"


def test_the_written_parity_holds_the_differences(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["parity", EXPERIMENT], project, capsys).code == 0
    report = read_json(project / FOLDER / "onnx_parity.json")
    assert report["differences"].keys() == {"pred_logits", "pred_masks"}
    for difference in report["differences"].values():
        assert 0 <= difference["max_abs"] < 0.01 and difference["agreement"] > 0.9
    assert report["inputs"].keys() == {"model.pth", "model.onnx"} and report["outputs"] == {} and seal_holds(report)


@pytest.mark.parametrize("stage", ["evaluate", "infer", "parity"])
def test_stages_of_onnx_runtime_leave_the_gpu_alone(
    stage: str, project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rules take none, so another stage may be computing on it."""
    devices = []

    def load(path: Path, postprocess: Any, device: str, testing: Any) -> Any:
        devices.append(device)
        return opened(path, postprocess, device, testing)

    opened = inference.load_predictor
    monkeypatch.setattr(inference, "load_predictor", load)
    assert call([stage, EXPERIMENT, "--runtime", "onnx"], project, capsys).code == 0
    assert devices and set(devices) == {"cpu"}
