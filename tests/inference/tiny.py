"""A network of two small products, as PyTorch module and as ONNX graph: the same outputs, in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import Tensor, nn

from tessera.models import build_postprocess
from tessera.models.base import Model, Network
from tessera.provenance import Header
from tessera.spec.networks import Mode
from tessera.spec.schema import Spec, read_spec
from tessera.structures import Category, ClassCatalog

QUERIES = 6
CATALOG = ClassCatalog(
    (
        Category(3, "car", (220, 40, 60), True),
        Category(7, "road", (120, 120, 140), False),
        Category(300, "person", (30, 160, 90), True),
    )
)


class TinyNetwork(Network):
    output_names = ("pred_logits", "pred_masks")

    def __init__(self, spec: Spec, classes: int) -> None:
        super().__init__(spec.model.pixel_mean, spec.model.pixel_std)
        generator = torch.Generator().manual_seed(0)
        self.mask_weight = nn.Parameter(torch.randn(QUERIES, 3, 1, 1, generator=generator) * 2)
        self.class_weight = nn.Parameter(torch.randn(3, QUERIES * (classes + 1), generator=generator))
        self.class_bias = nn.Parameter(torch.randn(QUERIES * (classes + 1), generator=generator) * 3)

    def forward(self, images: Tensor, padding: Tensor | None = None) -> dict[str, Tensor]:
        small = F.avg_pool2d(self.normalise(images), 4)
        logits = small.mean((2, 3)) @ self.class_weight + self.class_bias
        return {"pred_logits": logits.unflatten(1, (QUERIES, -1)), "pred_masks": F.conv2d(small, self.mask_weight)}


def make_spec(mode: Mode = "panoptic", **sections: dict) -> Spec:
    """Small sizes, and thresholds that an untrained network passes."""
    value = {
        "model": {"name": "mask2former", "mode": mode},
        "dataset": {"augmentation": {"test_min_size": 64, "test_max_size": 96}},
        "postprocess": {"object_mask_threshold": 0.1, "overlap_threshold": 0.1},
        **sections,
    }
    return read_spec(value)


def make_catalog(mode: Mode) -> ClassCatalog:
    return CATALOG.things() if mode == "instance" else CATALOG


def make_model(mode: Mode = "panoptic", **sections: dict) -> tuple[Model, Header]:
    spec, catalog = make_spec(mode, **sections), make_catalog(mode)
    postprocess = build_postprocess(spec.model, catalog, spec.postprocess)
    network = TinyNetwork(spec, len(catalog))
    return Model(network, lambda outputs, targets: {}, postprocess), Header("train", "tiny", spec, {}, catalog)


def make_graph(
    mode: Mode = "panoptic", batch: int | str = "batch", size: tuple[int, int] | None = None, **sections: dict
) -> onnx.ModelProto:
    """``TinyNetwork`` of ``make_model`` with the header in its metadata; ``size`` None leaves it free."""
    model, header = make_model(mode, **sections)
    network = model.network
    height, width = size or ("height", "width")
    classes = len(header.catalog) + 1
    constants = {
        "mean": network.pixel_mean,
        "std": network.pixel_std,
        "mask_weight": network.mask_weight,
        "class_weight": network.class_weight,
        "class_bias": network.class_bias,
        "shape": torch.tensor([-1, QUERIES, classes]),
        "axes": torch.tensor([2, 3]),
    }
    nodes = [
        helper.make_node("Sub", ["images", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["normal"]),
        helper.make_node("AveragePool", ["normal"], ["small"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Conv", ["small", "mask_weight"], ["pred_masks"]),
        helper.make_node("ReduceMean", ["small", "axes"], ["pooled"], keepdims=0),
        helper.make_node("MatMul", ["pooled", "class_weight"], ["product"]),
        helper.make_node("Add", ["product", "class_bias"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["pred_logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, height, width])],
        [
            helper.make_tensor_value_info("pred_logits", TensorProto.FLOAT, [batch, QUERIES, classes]),
            helper.make_tensor_value_info("pred_masks", TensorProto.FLOAT, [batch, QUERIES, None, None]),
        ],
        [numpy_helper.from_array(value.detach().numpy(), name) for name, value in constants.items()],
    )
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(built, {"tessera": json.dumps(header.to_json())})
    return built


def make_picture(height: int, width: int, seed: int) -> np.ndarray:
    """(H, W, 3) uint8: patches of colour, smooth enough to survive resizing."""
    generator = np.random.default_rng(seed)
    patches = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC))


def save_picture(path: Path, height: int, width: int, seed: int, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(make_picture(height, width, seed)).save(path, **options)
    return path


def assert_same(found, wanted, exact=True) -> None:
    """Two ``Predictions`` of one image; not exact: up to the rounding of another order of sums."""
    assert found.meta.original_size == wanted.meta.original_size
    assert (found.semantic is None) == (wanted.semantic is None)
    share = 1.0 if exact else 0.999
    if wanted.semantic is not None:
        assert (found.semantic == wanted.semantic).float().mean() >= share
    if wanted.panoptic is not None:
        assert (found.panoptic.ids == wanted.panoptic.ids).float().mean() >= share
        assert [(s.id, s.label) for s in found.panoptic.segments] == [(s.id, s.label) for s in wanted.panoptic.segments]
    if wanted.instances is not None:
        assert torch.equal(found.instances.labels, wanted.instances.labels)
        assert torch.allclose(found.instances.scores, wanted.instances.scores, rtol=0, atol=0 if exact else 1e-4)
        assert (found.instances.masks == wanted.instances.masks).float().mean() >= share
