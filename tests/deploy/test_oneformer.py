"""OneFormer's graph: with the task as an input it does all three, with a task built in that one alone; never with the text encoder."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from tessera.deploy.export import export
from tessera.deploy.graph import read_graph
from tessera.deploy.precision import to_fp16
from tessera.inference import load_predictor
from tessera.inference.predictor import Predictor
from tessera.inference.torch_runtime import TorchPredictor
from tessera.models import build_model
from tessera.models.artifact import save_model
from tessera.models.oneformer.text import VOCABULARY
from tessera.provenance import Header
from tessera.spec.lineage import lineage
from tessera.spec.schema import Spec
from tessera.structures import Batch, ImageMeta
from tests.deploy.conftest import CATALOG, EXPERIMENT, MODEL, make_spec

SIZE = (64, 96)
TASKS = ("panoptic", "instance", "semantic")
ONEFORMER = MODEL | {
    "name": "oneformer",
    "class_decoder": {"nheads": 2, "layers": 1, "dim_feedforward": 32},
    "text": {"width": 64, "layers": 1, "num_context": 2},
}


def spec_of(**export_keys: object) -> Spec:
    return make_spec(
        model=ONEFORMER,
        export={"input_height": SIZE[0], "input_width": SIZE[1], **export_keys},
        postprocess={"object_mask_threshold": 0.1, "overlap_threshold": 0.1},
    )


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    spec = spec_of()
    model = build_model(spec.model, CATALOG)
    for parameter in model.network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("oneformer") / "model.pth"
    save_model(path, model.network.state_dict(), Header("train", EXPERIMENT, spec, lineage(spec, "train"), CATALOG))
    return path


@pytest.fixture(scope="module")
def reference(model_path: Path) -> Predictor:
    return TorchPredictor.load(model_path, spec_of().postprocess, "cpu")


@pytest.fixture(scope="module")
def free(model_path: Path) -> Path:
    """Any task and batch."""
    path = model_path.with_name("model.onnx")
    export(model_path, path, spec_of(), EXPERIMENT)
    return path


def batch(count: int, size: tuple[int, int] = SIZE) -> Batch:
    torch.manual_seed(1)
    images, padding = torch.rand(count, 3, *size), torch.zeros(count, *size, dtype=torch.bool)
    metas = [ImageMeta(index, f"{index}.png", size, size) for index in range(count)]
    return Batch(images, padding, metas, None, None)


def assert_same(candidate: Predictor, reference: Predictor, task: str, given: Batch) -> None:
    found = candidate.ask(given.images, given.padding, task)
    expected = reference.ask(given.images, given.padding, task)
    assert list(found) == list(expected) == ["pred_logits", "pred_masks"]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)


def test_the_task_is_an_input(free: Path, reference: Predictor) -> None:
    predictor = load_predictor(free, device="cpu")
    assert predictor.input_names == ("images", "task")
    assert predictor.tasks == reference.tasks == TASKS and predictor.mode == "panoptic"
    for task in TASKS:
        for given in (batch(1), batch(3)):
            assert_same(predictor, reference, task, given)


@pytest.mark.slow
def test_sizes_can_stay_free(model_path: Path, reference: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export(model_path, path, spec_of(dynamic_size=True), EXPERIMENT)
    assert_same(load_predictor(path, device="cpu"), reference, "semantic", batch(2, (96, 160)))


def test_every_part_comes_from_its_own_task(free: Path, reference: Predictor) -> None:
    given = batch(2)
    for predictor in (reference, load_predictor(free, device="cpu")):
        for place, found in enumerate(predictor(given)):
            for task in TASKS:
                outputs = predictor.ask(given.images, given.padding, task)
                alone = predictor.postprocess(outputs, given.metas, SIZE, task)[place]
                if task == "semantic":
                    assert alone.semantic is not None and found.semantic is not None
                    assert torch.equal(found.semantic, alone.semantic)
                elif task == "instance":
                    assert alone.instances is not None and found.instances is not None
                    assert torch.equal(found.instances.scores, alone.instances.scores)
                else:
                    assert alone.panoptic is not None and found.panoptic is not None
                    assert torch.equal(found.panoptic.ids, alone.panoptic.ids)


def test_a_task_can_be_built_in(model_path: Path, reference: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export(model_path, path, spec_of(task="instance"), EXPERIMENT)
    predictor = load_predictor(path, device="cpu")
    assert predictor.input_names == ("images",)
    assert predictor.tasks == ("instance",) and predictor.mode == "instance"
    for count in (1, 2):
        assert_same(predictor, reference, "instance", batch(count))
    (found,) = predictor(batch(1))
    assert found.instances is not None and found.semantic is None and found.panoptic is None


def test_the_text_encoder_stays_behind(free: Path, model_path: Path) -> None:
    graph, _ = read_graph(free)
    assert not any(VOCABULARY in tensor.dims for tensor in graph.graph.initializer)
    text = 4 * sum(v.numel() for k, v in torch.load(model_path, weights_only=True)["state"].items() if "text." in k)
    assert free.stat().st_size < model_path.stat().st_size - text + 2**20


def test_half_precision_keeps_the_task(free: Path, tmp_path: Path) -> None:
    """Token ids do not fit into fp16's 11 bits; the report compares with the fp32 graph."""
    report = to_fp16(free, tmp_path / "model.fp16.onnx", spec_of(), EXPERIMENT)
    for name, difference in report["difference_on_generated_image"].items():
        assert difference["share_of_std"] < 0.05, name
    graph = onnx.load(tmp_path / "model.fp16.onnx")
    assert {value.name: value.type.tensor_type.elem_type for value in graph.graph.input} == {
        "images": onnx.TensorProto.FLOAT,
        "task": onnx.TensorProto.FLOAT,
    }
