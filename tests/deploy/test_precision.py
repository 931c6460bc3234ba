from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from tessera.deploy.graph import input_shape, read_graph
from tessera.deploy.parity import check_parity
from tessera.deploy.precision import to_fp16
from tessera.files import UserError
from tessera.inference import load_predictor
from tessera.spec.lineage import lineage
from tessera.spec.schema import Spec
from tests.deploy.conftest import EXPERIMENT, make_spec
from tests.deploy.test_parity import loader

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


@pytest.fixture(scope="module")
def made(spec: Spec, onnx_path: Path) -> tuple[Path, dict[str, object]]:
    path = onnx_path.with_name("model.fp16.onnx")
    return path, to_fp16(onnx_path, path, spec, EXPERIMENT)


def test_weights_are_half_and_the_interface_is_float(made: tuple[Path, dict[str, object]], spec: Spec) -> None:
    path, report = made
    graph, header = read_graph(path)
    assert (header.stage, header.precision, header.experiment) == ("precision", "fp16", EXPERIMENT)
    assert header.lineage == lineage(spec, "precision", precision="fp16") == report["lineage"]
    assert {v.type.tensor_type.elem_type for v in (*graph.graph.input, *graph.graph.output)} == {FLOAT}
    assert input_shape(graph, path) == [None, 3, 64, 96]
    sizes = {FLOAT: 0, HALF: 0}
    for weight in graph.graph.initializer:
        if weight.data_type in sizes:
            sizes[weight.data_type] += len(weight.raw_data)
    assert sizes[HALF] > 10 * sizes[FLOAT]
    assert report["bytes"] < 0.75 * report["bytes_fp32"]  # type: ignore[operator]  # a number
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_kept_operators_compute_in_fp32(made: tuple[Path, dict[str, object]], spec: Spec) -> None:
    graph = onnx.shape_inference.infer_shapes(onnx.load(made[0]))
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.graph.value_info, *graph.graph.output)}
    kept = [node for node in graph.graph.node if node.op_type in spec.precision.fp16_keep]
    halved = [node for node in graph.graph.node if node.op_type == "MatMul"]
    assert kept and {types[node.output[0]] for node in kept} == {FLOAT}
    assert halved and {types[node.output[0]] for node in halved} == {HALF}


def test_runs_in_onnx_runtime_within_the_tolerance(
    made: tuple[Path, dict[str, object]], spec: Spec, model_path: Path
) -> None:
    path, _ = made
    report = check_parity(
        load_predictor(model_path, device="cpu"), load_predictor(path, device="cpu"), loader([(3, 64, 96)]), spec
    )
    assert (report["precision"], report["batch_sizes"]) == ("fp16", [1, 3])
    assert all(output["share_of_std"] > 1e-6 for output in report["differences"].values())


def test_another_spec_is_refused_and_writes_nothing(onnx_path: Path, tmp_path: Path) -> None:
    other = make_spec(export={"input_height": 64, "input_width": 96, "opset_version": 19})
    with pytest.raises(UserError, match=r"export.opset_version: 18 -> 19"):
        to_fp16(onnx_path, tmp_path / "model.fp16.onnx", other, EXPERIMENT)
    assert list(tmp_path.iterdir()) == []


def test_overflow_is_refused_and_writes_nothing(spec: Spec, onnx_path: Path, tmp_path: Path) -> None:
    """A weight beyond half precision's range makes the outputs infinite or constant, never silently wrong."""
    graph, _ = read_graph(onnx_path)
    for weight in graph.graph.initializer:
        if weight.name.endswith("class_embed.bias"):
            weight.raw_data = (onnx.numpy_helper.to_array(weight) + 1e30).astype("float32").tobytes()
    huge = tmp_path / "model.onnx"
    onnx.save(graph, huge)
    out = tmp_path / "out" / "model.fp16.onnx"
    with pytest.raises(UserError, match="pred_logits"):
        to_fp16(huge, out, spec, EXPERIMENT)
    assert not out.exists()
