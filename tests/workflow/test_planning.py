from __future__ import annotations

import pytest

from tessera.spec.planning import engine_notice, evaluation_file


@pytest.mark.parametrize(
    ("rules", "missing", "said"),
    [
        (["train", "evaluate_trt"], "a GPU", True),
        (["engine"], "a GPU", True),
        (["engine"], None, False),
        (["train", "evaluate_onnx"], "a GPU", False),
        ([], "a GPU", False),
    ],
)
def test_engine_notice(rules: list[str], missing: str | None, said: bool) -> None:
    notice = engine_notice(rules, lambda: missing)
    assert (notice is not None) == said
    if notice is not None:
        assert "a GPU" in notice
        assert "onnx_eval.json" in notice


def test_availability_is_only_asked_when_it_matters() -> None:
    def never() -> str:
        raise AssertionError("asked")

    assert engine_notice(["train"], never) is None


@pytest.mark.parametrize(
    ("runtime", "precision", "name"),
    [
        ("torch", "fp32", "eval.json"),
        ("onnx", "fp32", "onnx_eval.json"),
        ("trt", "fp16", "trt_eval.fp16.json"),
    ],
)
def test_evaluation_file(runtime: str, precision: str, name: str) -> None:
    assert evaluation_file(runtime, precision) == name
