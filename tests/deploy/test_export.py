"""The exported graph: what it promises to every runtime, and that it computes what PyTorch computes."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tessera.deploy.export import export, plugin_sample, read_header, to_onnx
from tessera.deploy.graph import input_shape, read_graph
from tessera.files import UserError
from tessera.inference import load_predictor
from tessera.inference.trt_library import PLUGIN
from tessera.models.artifact import load_model
from tessera.models.base import Network
from tessera.models.common.attention import DeformableAttention
from tessera.ops.deformable import multi_scale_deformable_sample
from tessera.spec.lineage import lineage
from tessera.spec.schema import ExportSpec, Spec
from tests.deploy.conftest import EXPERIMENT, make_spec


class TwoLevels(Network):
    """The smallest network with deformable attention: quick to trace."""

    output_names = ("features", "sum")

    def __init__(self) -> None:
        super().__init__((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        self.fine = nn.Conv2d(3, 8, 16, 16)
        self.coarse = nn.Conv2d(3, 8, 32, 32)
        self.attention = DeformableAttention(8, heads=2, levels=2, points=3)

    def forward(self, images: Tensor, padding: Tensor | None = None) -> dict[str, Tensor]:
        x = self.normalise(images)
        maps = [self.fine(x), self.coarse(x)]
        shapes = [(m.shape[2], m.shape[3]) for m in maps]
        memory = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
        reference = torch.full((memory.shape[1], 2), 0.5)
        features = self.attention(memory, memory, reference, shapes)
        return {"features": features, "sum": features.sum(1)}


@pytest.fixture(scope="module")
def two_levels() -> TwoLevels:
    torch.manual_seed(0)
    network = TwoLevels().eval()
    for parameter in network.attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return network


def run(graph: onnx.ModelProto, images: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()})]


def settings(**keys: object) -> ExportSpec:
    return ExportSpec.model_validate({"input_height": 64, "input_width": 96, **keys})


def assert_same(network: Network, graph: onnx.ModelProto, images: Tensor, tolerance: float = 1e-4) -> None:
    with torch.no_grad():
        expected = network(images)
    for name, found in zip(network.output_names, run(graph, images), strict=True):
        assert found.shape == expected[name].shape
        assert (found - expected[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_mask2former_gives_pytorchs_outputs_at_any_batch(model_path: Path, onnx_path: Path, batch: int) -> None:
    network = load_model(model_path)[0].network
    images = torch.rand(batch, 3, 64, 96, generator=torch.Generator().manual_seed(batch))
    assert_same(network, onnx.load(onnx_path), images)


def test_file_is_self_describing_and_standard(spec: Spec, onnx_path: Path) -> None:
    graph, header = read_graph(onnx_path)
    onnx.checker.check_model(graph, full_check=True)
    assert (header.stage, header.experiment, header.precision) == ("export", EXPERIMENT, "fp32")
    assert header.spec == spec
    assert header.lineage == lineage(spec, "export")
    assert [value.name for value in graph.graph.input] == ["images"]
    assert [value.name for value in graph.graph.output] == ["pred_logits", "pred_masks"]
    assert input_shape(graph, onnx_path) == [None, 3, 64, 96]
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {node.domain for node in graph.graph.node} == {""}
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", spec.export.opset_version)]


def test_file_holds_every_weight_once_and_no_path(model_path: Path, onnx_path: Path) -> None:
    network = load_model(model_path)[0].network
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    content = onnx_path.read_bytes()
    assert weights < len(content) < weights + 600_000
    assert str(Path(torch.__file__).parent).encode() not in content
    assert b"site-packages" not in content
    assert b".py" not in content


def test_header_is_read_without_the_runtime(onnx_path: Path) -> None:
    assert read_header(onnx_path).experiment == EXPERIMENT


CASES = [
    pytest.param({"batch_size": 2, "opset_version": 20}, [(2, 64, 96)], id="fixed batch, opset 20"),
    pytest.param({"batch_size": 1, "sampling": "gather"}, [(1, 64, 96)], id="batch of one, gather"),
    pytest.param(
        {"dynamic_size": True, "input_height": 32, "input_width": 32},
        [(1, 64, 96), (2, 128, 64), (3, 32, 32)],
        id="free size and batch, traced from the smallest",
    ),
]


@pytest.mark.parametrize(("keys", "shapes"), CASES)
def test_settings(two_levels: TwoLevels, keys: dict[str, object], shapes: list[tuple[int, int, int]]) -> None:
    graph = to_onnx(two_levels, settings(**keys))
    onnx.checker.check_model(graph, full_check=True)
    assert graph.opset_import[0].version == keys.get("opset_version", 18)
    kinds = {node.op_type for node in graph.graph.node}
    assert ("GridSample" in kinds) == (keys.get("sampling") != "gather")
    for batch, height, width in shapes:
        assert_same(two_levels, graph, torch.rand(batch, 3, height, width))


def test_plugin_export_has_the_plugin_in_place_of_sampling(two_levels: TwoLevels) -> None:
    graph = to_onnx(two_levels, settings(on_cpu=False))
    nodes = [node for node in graph.graph.node if node.op_type == PLUGIN]
    assert len(nodes) == 1
    assert nodes[0].domain == "nvidia"
    assert {a.name: a.s for a in nodes[0].attribute} == {"plugin_version": b"1", "plugin_namespace": b""}
    assert not [node for node in graph.graph.node if node.op_type in ("GridSample", "GatherElements")]
    constants = {value.name: onnx.numpy_helper.to_array(value) for value in graph.graph.initializer}
    sizes, starts = (constants[name] for name in nodes[0].input[1:3])
    assert sizes.dtype == starts.dtype == "int32"
    assert sizes.tolist() == [[4, 6], [2, 3]]
    assert starts.tolist() == [0, 24]
    shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.graph.value_info}
    assert [len(shapes[nodes[0].input[index]]) for index in (0, 3, 4)] == [4, 6, 5]
    # The network itself is as before.
    assert two_levels.attention.sample is multi_scale_deformable_sample


def test_plugin_sample_is_only_for_tracing() -> None:
    """It returns zeros of the right shape, so nobody may evaluate with it."""
    found = plugin_sample(torch.rand(2, 6, 2, 4), [(2, 3)], torch.rand(2, 5, 2, 1, 3, 2), torch.rand(2, 5, 2, 1, 3))
    assert found.shape == (2, 5, 8)
    assert not found.any()


def test_another_spec_is_refused_and_writes_nothing(model_path: Path, tmp_path: Path) -> None:
    other = make_spec(seed=7)
    with pytest.raises(UserError, match=r"another spec(.|\n)*seed: 0 -> 7"):
        export(model_path, tmp_path / "model.onnx", other, EXPERIMENT)
    assert list(tmp_path.iterdir()) == []


def test_too_large_a_model_is_refused_before_tracing(
    monkeypatch: pytest.MonkeyPatch, spec: Spec, model_path: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("tessera.deploy.export.LARGEST", 1000)
    with pytest.raises(UserError, match="GiB of weights"):
        export(model_path, tmp_path / "model.onnx", spec, EXPERIMENT)
    assert list(tmp_path.iterdir()) == []


def test_untraceable_network_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, spec: Spec, model_path: Path, tmp_path: Path
) -> None:
    class Stubborn(TwoLevels):
        def forward(self, images: Tensor, padding: Tensor | None = None) -> dict[str, Tensor]:
            if images.sum() > 0:
                images = images * 2
            return super().forward(images)

    model, header = load_model(model_path)
    stubborn = type(model)(Stubborn().eval(), model.criterion, model.postprocess)
    monkeypatch.setattr("tessera.deploy.export.load_model", lambda path, postprocess: (stubborn, header))
    with pytest.raises(UserError, match="could not trace") as caught:
        export(model_path, tmp_path / "model.onnx", spec, EXPERIMENT)
    assert str(model_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def _damaged(kind: str, content: bytes) -> bytes:
    if kind == "not onnx":
        return b"this is no graph at all"
    if kind == "empty":
        return b""
    if kind == "cut off":
        return content[: len(content) // 2]
    if kind == "last byte missing":
        return content[:-1]
    graph = onnx.load_from_string(content)
    del graph.metadata_props[:]
    if kind == "header is no JSON":
        onnx.helper.set_model_props(graph, {"tessera": "{"})
    if kind == "header of something else":
        onnx.helper.set_model_props(graph, {"tessera": json.dumps({"format": 1})})
    return graph.SerializeToString()


@pytest.mark.parametrize(
    "kind",
    ["not onnx", "empty", "cut off", "last byte missing", "foreign", "header is no JSON", "header of something else"],
)
def test_damaged_and_foreign_files_are_refused(onnx_path: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(_damaged(kind, onnx_path.read_bytes()))
    with pytest.raises(UserError, match=str(path)):
        read_graph(path)
    with pytest.raises(UserError, match=str(path)):
        load_predictor(path, device="cpu")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_graph(tmp_path / "model.onnx")
