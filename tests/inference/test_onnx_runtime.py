import numpy as np
import onnx
import pytest
import torch

from tessera.files import UserError
from tessera.inference import load_predictor
from tessera.inference.onnx_runtime import OnnxPredictor
from tessera.inference.torch_runtime import TorchPredictor
from tessera.ops.images import make_batch
from tessera.spec.schema import PostprocessSpec
from tests.inference.tiny import assert_same, make_graph, make_model, make_picture


def save_graph(folder, graph):
    path = folder / "model.onnx"
    onnx.save(graph, str(path))
    return path


PICTURES = [make_picture(height, width, seed) for seed, (height, width) in enumerate([(64, 80)] * 3 + [(100, 50)] * 2)]


@pytest.mark.parametrize("mode", ["panoptic", "instance", "semantic"])
def test_predicts_as_pytorch_does(tmp_path, mode):
    predictor = load_predictor(save_graph(tmp_path, make_graph(mode)), device="cpu")
    assert (predictor.runtime, predictor.precision, predictor.input_size, predictor.max_batch) == (
        "onnx",
        "fp32",
        None,
        None,
    )
    reference = TorchPredictor(*make_model(mode))
    for batch_size in (1, 2, 3):
        found = predictor.predict(PICTURES, batch_size)
        for one, wanted in zip(found, reference.predict(PICTURES), strict=True):
            assert_same(one, wanted, exact=False)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_fixed_batch_is_filled_up_and_cut(tmp_path, batch):
    predictor = load_predictor(save_graph(tmp_path, make_graph(batch=batch)), device="cpu")
    assert predictor.max_batch == batch
    free = load_predictor(save_graph(tmp_path, make_graph()), device="cpu")
    images = torch.rand(3, 3, 64, 64)
    for count in range(1, min(batch, 3) + 1):
        found, wanted = predictor.outputs({"images": images[:count]}), free.outputs({"images": images[:count]})
        for name, value in wanted.items():
            assert found[name].shape == value.shape
            assert torch.allclose(found[name], value, atol=1e-5)
    for one, wanted in zip(predictor.predict(PICTURES, 3), free.predict(PICTURES), strict=True):
        assert_same(one, wanted, exact=False)
    with pytest.raises(ValueError, match="takes"):
        predictor.outputs({"images": torch.rand(batch + 1, 3, 64, 64)})


def test_a_fixed_size_is_honoured(tmp_path):
    predictor = load_predictor(save_graph(tmp_path, make_graph(size=(64, 96))), device="cpu")
    assert predictor.input_size == (64, 96)
    found = predictor.predict(PICTURES, 2)
    assert [p.semantic.shape for p in found] == [picture.shape[:2] for picture in PICTURES]
    assert [p.meta.resized_size for p in found] == [(64, 80)] * 3 + [(64, 32)] * 2
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    batch = make_batch([image], [1], ["x"], predictor.header.spec.dataset.augmentation, (0.5, 0.5, 0.5))
    with pytest.raises(UserError, match=r"takes images of \(64, 96\)"):
        predictor(batch)


def test_half_precision_inputs_are_converted(tmp_path):
    graph = make_graph()
    graph.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    cast = onnx.helper.make_node("Cast", ["images"], ["wide"], to=onnx.TensorProto.FLOAT)
    graph.graph.node[0].input[0] = "wide"
    graph.graph.node.insert(0, cast)
    predictor = load_predictor(save_graph(tmp_path, graph), device="cpu")
    reference = TorchPredictor(*make_model())
    images = torch.rand(2, 3, 64, 64)
    found, wanted = predictor.outputs({"images": images}), reference.outputs({"images": images})
    assert torch.allclose(found["pred_masks"], wanted["pred_masks"], atol=0.05)


def test_thresholds_of_the_caller_replace_the_headers(tmp_path):
    path = save_graph(tmp_path, make_graph())
    strict = load_predictor(path, PostprocessSpec(object_mask_threshold=1.0), device="cpu")
    assert load_predictor(path, device="cpu").predict(PICTURES[0]).panoptic.segments
    assert strict.predict(PICTURES[0]).panoptic.segments == []


def without_header(graph):
    del graph.metadata_props[:]


def with_broken_header(graph):
    graph.metadata_props[0].value = graph.metadata_props[0].value[:-5]


def with_foreign_header(graph):
    graph.metadata_props[0].value = '{"format": 99}'


def with_other_input(graph):
    graph.graph.input[0].name = graph.graph.node[0].input[0] = "inputs"


def with_unknown_operator(graph):
    graph.graph.node[0].op_type = "MultiscaleDeformableAttnPlugin_TRT"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_header, "carries no tessera header"),
        (with_broken_header, "header is not JSON"),
        (with_foreign_header, "header format 99"),
        (with_other_input, "has the inputs inputs"),
        (with_unknown_operator, r"cannot load it .*export\.on_cpu=true"),
    ],
)
def test_foreign_graphs_are_refused(tmp_path, change, message):
    graph = make_graph()
    change(graph)
    with pytest.raises(UserError, match=message) as caught:
        load_predictor(save_graph(tmp_path, graph), device="cpu")
    assert str(tmp_path / "model.onnx") in str(caught.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_graphs_that_are_cut_off_are_refused(tmp_path, share):
    path = save_graph(tmp_path, make_graph())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"model\.onnx"):
        load_predictor(path, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_device_that_is_not_there_is_refused(tmp_path, device):
    with pytest.raises(UserError, match=f"device {device}"):
        OnnxPredictor.load(save_graph(tmp_path, make_graph()), device=device)


def test_outputs_keep_the_order_and_names_of_the_graph(tmp_path):
    predictor = load_predictor(save_graph(tmp_path, make_graph()), device="cpu")
    found = predictor.outputs({"images": torch.zeros(1, 3, 32, 32)})
    assert list(found) == ["pred_logits", "pred_masks"]


def without_masks(graph):
    del graph.graph.output[1]


def with_one_class_more(graph):
    (bias,) = [value for value in graph.graph.initializer if value.name == "class_bias"]
    (weight,) = [value for value in graph.graph.initializer if value.name == "class_weight"]
    (shape,) = [value for value in graph.graph.initializer if value.name == "shape"]
    wide = onnx.numpy_helper.to_array(weight)
    queries, classes = onnx.numpy_helper.to_array(shape)[1:]
    more = [np.zeros((*value.shape[:-1], queries), np.float32) for value in (wide, onnx.numpy_helper.to_array(bias))]
    for tensor, extra in zip((weight, bias), more, strict=True):
        tensor.CopyFrom(
            onnx.numpy_helper.from_array(np.concatenate([onnx.numpy_helper.to_array(tensor), extra], -1), tensor.name)
        )
    shape.CopyFrom(onnx.numpy_helper.from_array(np.array([-1, queries, classes + 1]), "shape"))
    graph.graph.output[0].type.tensor_type.shape.dim[2].dim_value = classes + 1


def with_flat_masks(graph):
    graph.graph.node.append(onnx.helper.make_node("Flatten", ["wide_masks"], ["pred_masks"]))
    graph.graph.node[3].output[0] = "wide_masks"
    del graph.graph.output[1].type.tensor_type.shape.dim[2:]


def that_cannot_run(graph):
    graph.graph.node.append(onnx.helper.make_node("Reshape", ["flat", "five"], ["pred_logits"]))
    del graph.graph.node[7]
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, 5, 7]), "five"))
    graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5
    graph.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 7


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            without_masks,
            r"not the mask2former of its header: pred_masks is not among its outputs pred_logits, expected \(1, any, any, any\)",
        ),
        (with_one_class_more, r"pred_logits is of shape \(1, 6, 5\), expected \(1, any, 4\)"),
        (with_flat_masks, r"pred_masks is of shape \(1, \d+\), expected \(1, any, any, any\)"),
        (
            that_cannot_run,
            r"model\.onnx: ONNX Runtime cannot execute it for images \(1, 3, \d+, \d+\) \(.*\); if it is not",
        ),
    ],
)
def test_a_graph_of_another_network_under_our_header_is_refused(tmp_path, change, said):
    graph = make_graph()
    change(graph)
    predictor = load_predictor(save_graph(tmp_path, graph), device="cpu")
    with pytest.raises(UserError, match=said):
        predictor.predict(PICTURES[0])
