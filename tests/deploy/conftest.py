"""A tiny Mask2Former as the train stage leaves it, and its export; made once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tessera.deploy.export import export
from tessera.models import build_model
from tessera.models.artifact import save_model
from tessera.provenance import Header
from tessera.spec.lineage import lineage
from tessera.spec.schema import Spec, read_spec
from tessera.structures import Category, ClassCatalog

EXPERIMENT = "tiny"
CATALOG = ClassCatalog(tuple(Category(i + 1, f"class{i}", (50 * i, 0, 0), isthing=i < 2) for i in range(4)))
MODEL = {
    "name": "mask2former",
    "backbone": {
        "swin": {"embed_dim": 8, "depths": [2, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 3},
        "drop_path_rate": 0.0,
    },
    "pixel_decoder": {"hidden_dim": 64, "nheads": 2, "layers": 1, "dim_feedforward": 32},
    "decoder": {"num_object_queries": 6, "nheads": 2, "layers": 1, "dim_feedforward": 32},
}


def make_spec(**sections: object) -> Spec:
    value = {
        "model": MODEL,
        "dataset": {"generator": {}},
        "export": {"input_height": 64, "input_width": 96},
        **sections,
    }
    return read_spec(value)


@pytest.fixture(scope="session")
def spec() -> Spec:
    return make_spec()


@pytest.fixture(scope="session")
def model_path(spec: Spec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = build_model(spec.model, CATALOG)
    path = tmp_path_factory.mktemp("tiny") / "model.pth"
    save_model(path, model.network.state_dict(), Header("train", EXPERIMENT, spec, lineage(spec, "train"), CATALOG))
    return path


@pytest.fixture(scope="session")
def onnx_path(spec: Spec, model_path: Path) -> Path:
    path = model_path.with_name("model.onnx")
    export(model_path, path, spec, EXPERIMENT)
    return path
