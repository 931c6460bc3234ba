"""TensorRT from graph to numbers; runs only where there are a GPU and TensorRT."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from tessera.data.datamodule import eval_loader
from tessera.data.demo import CATALOG, write_demo
from tessera.data.opened import OpenedData
from tessera.deploy.engine import availability, build_engine, sidecar
from tessera.deploy.export import export
from tessera.deploy.parity import check_parity
from tessera.deploy.precision import to_fp16
from tessera.files import UserError, read_json, write_json
from tessera.inference import load_predictor
from tessera.metrics.evaluate import evaluate
from tessera.models import build_model
from tessera.models.artifact import save_model
from tessera.provenance import Header
from tessera.spec.lineage import lineage
from tessera.spec.schema import Spec
from tests.deploy.conftest import EXPERIMENT, make_spec
from tests.deploy.test_parity import loader

MISSING = availability()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=f"TensorRT needs {MISSING}")]

SIZE = {"input_height": 128, "input_width": 128}


def gpu_spec(root: Path, **sections: object) -> Spec:
    return make_spec(
        data_root=str(root), engine={"opt_batch_size": 2, "max_batch_size": 3}, **{"export": SIZE, **sections}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


def make_engine(folder: Path, name: str, precision: str = "fp32", **sections: object) -> tuple[Path, Spec]:
    """model.pth, model.onnx and the engine of a tiny model below ``folder / name``."""
    root = folder / name
    spec = gpu_spec(root, **sections)
    torch.manual_seed(0)
    model = build_model(spec.model, CATALOG)
    save_model(
        root / "model.pth",
        model.network.state_dict(),
        Header("train", EXPERIMENT, spec, lineage(spec, "train"), CATALOG),
    )
    graph = root / "model.onnx"
    export(root / "model.pth", graph, spec, EXPERIMENT)
    if precision == "fp16":
        to_fp16(graph, root / "model.fp16.onnx", spec, EXPERIMENT)
        graph = root / "model.fp16.onnx"
    engine = graph.with_suffix(".engine")
    build_engine(graph, engine, spec, EXPERIMENT)
    return engine, spec


@pytest.mark.parametrize(
    ("name", "precision", "export_keys"),
    [
        ("grid_sample", "fp32", {}),
        ("gather", "fp32", {"sampling": "gather"}),
        ("plugin", "fp32", {"on_cpu": False}),
        ("half", "fp16", {}),
    ],
)
def test_engine_computes_what_pytorch_computes(
    folder: Path, name: str, precision: str, export_keys: dict[str, object]
) -> None:
    engine, spec = make_engine(folder, name, precision, export={**SIZE, **export_keys})
    candidate = load_predictor(engine)
    assert (candidate.runtime, candidate.precision, candidate.input_size) == ("trt", precision, (128, 128))
    assert candidate.max_batch == 3
    reference = load_predictor(engine.with_name("model.pth"))
    report = check_parity(reference, candidate, loader([(3, 128, 128)]), spec)
    assert report["batch_sizes"] == [1, 3]
    images = torch.rand(2, 3, 128, 128)
    alone = candidate.outputs({"images": images[:1]})["pred_masks"].cpu()
    together = candidate.outputs({"images": images})["pred_masks"].cpu()
    assert together.shape[0] == 2
    assert torch.allclose(alone[0], together[0], atol=1e-2)
    facts = read_json(sidecar(engine))["facts"]
    assert facts["tensorrt"]
    assert facts["gpu"] == torch.cuda.get_device_name()
    with pytest.raises(ValueError, match="takes 3 images"):
        candidate.outputs({"images": torch.rand(4, 3, 128, 128)})


def demo_dataset() -> dict[str, object]:
    splits = {
        name: {
            "images": f"images/{name}",
            "annotations": f"panoptic_{name}.json",
            "panoptic": f"panoptic/{name}",
            "num_workers": 0,
        }
        for name in ("train", "val", "test")
    }
    sizes = {"test_min_size": 128, "test_max_size": 128}
    return {
        "generator": {"train_images": 1, "val_images": 1, "test_images": 5},
        "label_map": "label_map.json",
        "augmentation": sizes,
        **splits,
    }


def measure(path: Path, spec: Spec) -> dict[str, float]:
    predictor = load_predictor(path, spec.postprocess)
    catalog = predictor.header.catalog
    batches = eval_loader(
        spec, OpenedData(spec, ("test",), catalog), "test", fixed_size=(128, 128), max_batch=predictor.max_batch
    )
    evaluation = evaluate(predictor, batches, catalog, spec.model.mode, progress=False)
    assert evaluation.images == 5
    return evaluation.metrics


def test_evaluation_agrees_with_pytorch(folder: Path) -> None:
    generator = gpu_spec(folder, dataset=demo_dataset()).dataset.generator
    assert generator is not None
    write_demo(folder / "evaluated", generator, progress=False)
    engine, spec = make_engine(folder, "evaluated", dataset=demo_dataset())
    expected, found = (measure(path, spec) for path in (engine.with_name("model.pth"), engine))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=0.01, nan_ok=True), name


def test_timing_cache_is_kept_and_reused(folder: Path) -> None:
    cache = folder / "timing.cache"
    keys = {"timing_cache": str(cache), "max_batch_size": 1}
    started = time.monotonic()
    make_engine(folder, "first", engine=keys)
    first = time.monotonic() - started
    size = cache.stat().st_size
    assert size > 0
    started = time.monotonic()
    make_engine(folder, "second", engine=keys)
    assert time.monotonic() - started < first


def test_engine_of_another_version_or_damaged_is_refused(folder: Path) -> None:
    engine, _ = make_engine(folder, "damaged", engine={"max_batch_size": 1})
    header = read_json(sidecar(engine))
    write_json(sidecar(engine), {**header, "facts": {**header["facts"], "tensorrt": "10.0.0"}})
    with pytest.raises(UserError, match=r"built by TensorRT 10\.0\.0"):
        load_predictor(engine)
    write_json(sidecar(engine), header)
    engine.write_bytes(engine.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load this engine"):
        load_predictor(engine)
    sidecar(engine).unlink()
    with pytest.raises(UserError, match="no such file"):
        load_predictor(engine)
