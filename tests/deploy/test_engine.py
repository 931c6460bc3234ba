"""What the engine stage and the TensorRT runtime decide before TensorRT is needed; the rest is in tests/gpu."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import onnx
import pytest
import torch

from tessera.deploy import engine
from tessera.deploy.engine import build_engine, sidecar
from tessera.files import UserError
from tessera.inference import load_predictor, trt_library
from tests.deploy.conftest import EXPERIMENT, make_spec


@pytest.mark.parametrize(
    ("package", "gpus", "expected"),
    [
        (True, 1, None),
        (False, 1, "the Python package tensorrt"),
        (True, 0, "an NVIDIA GPU"),
        (False, 0, "the Python package tensorrt.* and an NVIDIA GPU"),
    ],
)
def test_availability_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, package: bool, gpus: int, expected: str | None
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if package else None)
    monkeypatch.setattr(trt_library, "gpu_count", lambda: gpus)
    found = engine.availability()
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(expected, found)


def test_gpu_count_is_what_the_driver_says() -> None:
    assert trt_library.gpu_count() == torch.cuda.device_count()


def test_stage_fails_in_seconds_where_something_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trt_library, "gpu_count", lambda: 0)
    started = time.monotonic()
    with pytest.raises(UserError, match="NVIDIA GPU") as caught:
        build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", make_spec(), EXPERIMENT)
    assert time.monotonic() - started < 5
    assert str(tmp_path / "model.engine") in str(caught.value)
    assert str(tmp_path / "onnx_eval.json") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_runtime_fails_in_the_same_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trt_library, "gpu_count", lambda: 0)
    path = tmp_path / "model.engine"
    path.write_bytes(b"an engine")
    with pytest.raises(UserError, match=r"NVIDIA GPU.*ONNX Runtime"):
        load_predictor(path)


def test_a_package_that_cannot_be_loaded_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(UserError, match=r"cannot be loaded \(libnvinfer"):
        trt_library.load()


@pytest.mark.parametrize("version", ["8.6.1", "9.0", "12.0.1"])
def test_other_major_versions_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str) -> None:
    (tmp_path / "tensorrt.py").write_text(f"__version__ = '{version}'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(UserError, match=version):
        trt_library.load()
    monkeypatch.delitem(sys.modules, "tensorrt")


@pytest.mark.parametrize(
    ("shape", "batches", "expected"),
    [
        ([None, 3, 64, 96], (1, 2, 4), ((1, 3, 64, 96), (2, 3, 64, 96), (4, 3, 64, 96))),
        ([2, 3, 64, 96], (2, 2, 2), ((2, 3, 64, 96),) * 3),
        ([2, 3, 64, 96], (1, 1, 1), "fixed batch 2"),
        ([None, 3, None, None], (1, 1, 1), "export.dynamic_size=false"),
    ],
)
def test_profile_follows_the_graph_and_the_spec(
    shape: list[int | None], batches: tuple[int, int, int], expected: object
) -> None:
    keys = dict(zip(("min_batch_size", "opt_batch_size", "max_batch_size"), batches, strict=True))
    spec = make_spec(engine=keys)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            engine._profile(shape, spec, Path("model.onnx"))
    else:
        assert engine._profile(shape, spec, Path("model.onnx")) == expected


class Registry:
    def __init__(self, versions: set[str]) -> None:
        self.versions = versions

    def get_creator(self, kind: str, version: str, plugin_namespace: str = "") -> object | None:
        return object() if kind == trt_library.PLUGIN and version in self.versions else None


@pytest.mark.parametrize(("versions", "expected"), [({"1"}, b"1"), ({"1", "2"}, b"2"), ({"2"}, b"2")])
def test_newest_plugin_version_is_chosen(versions: set[str], expected: bytes) -> None:
    node = onnx.helper.make_node(
        trt_library.PLUGIN, ["x"], ["y"], domain="nvidia", plugin_version="1", plugin_namespace=""
    )
    graph = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))
    library = type("Library", (), {"get_plugin_registry": staticmethod(lambda: Registry(versions))})
    engine._choose_plugin_version(library, graph)
    assert {a.name: a.s for a in graph.graph.node[0].attribute}["plugin_version"] == expected


def test_sidecar_lies_beside_the_engine() -> None:
    assert sidecar(Path("results/a/model.fp16.engine")) == Path("results/a/model.fp16.engine.json")
