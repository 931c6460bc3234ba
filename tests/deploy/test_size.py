"""The size of a graph follows from the images, and what is scaled down to fit one is said wherever its numbers stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tessera.data.catalog import load_catalog
from tessera.data.datamodule import eval_loader
from tessera.data.loader import Loader
from tessera.data.opened import OpenedData
from tessera.deploy.export import export, with_size
from tessera.deploy.parity import ParityError, compare_predictions
from tessera.files import UserError, read_json
from tessera.inference import load_predictor
from tessera.inference.predictor import Predictor
from tessera.inference.results import predict_to
from tessera.metrics.evaluate import evaluate
from tessera.models import build_model
from tessera.models.artifact import save_model
from tessera.provenance import Header
from tessera.spec.lineage import lineage
from tessera.spec.schema import Spec, read_spec
from tests.data.files import write_pairs
from tests.deploy.conftest import EXPERIMENT, MODEL

SIZES = [(64, 192), (64, 192), (64, 130)]
AUGMENTATION = {"test_min_size": 64, "test_max_size": 256, "train_crop_size": [64, 64]}


def wide(root: Path, sizes: list[tuple[int, int]] = SIZES, **keys: Any) -> Spec:
    """Train, val and test are the same images."""
    generator = np.random.default_rng(0)
    masks = [generator.choice([2, 7, 90], size).astype(np.uint8) for size in sizes]
    dataset = write_pairs(root, masks).model_dump(mode="json") | {"augmentation": AUGMENTATION}
    for split in ("train", "val", "test"):
        dataset[split]["num_workers"] = 0
    return read_spec({"data_root": str(root), "model": {**MODEL, "mode": "semantic"}, "dataset": dataset, **keys})


def trained(spec: Spec) -> Path:
    torch.manual_seed(0)
    catalog = load_catalog(spec.dataset, spec.data_root, "semantic")
    network = build_model(spec.model, catalog, load_pretrained=False).network
    path = Path(spec.data_root) / "model.pth"
    save_model(path, network.state_dict(), Header("train", EXPERIMENT, spec, lineage(spec, "train"), catalog))
    return path


def images_for(predictor: Predictor, spec: Spec) -> Loader:
    data = OpenedData(spec, ("test",), predictor.header.catalog)
    return eval_loader(spec, data, "test", fixed_size=predictor.input_size)


def measured(path: Path, spec: Spec) -> dict[str, Any]:
    """eval.json, of PyTorch or ONNX Runtime."""
    predictor = load_predictor(path, device="cpu")
    catalog = predictor.header.catalog
    evaluation = evaluate(predictor, images_for(predictor, spec), catalog, "semantic", progress=False)
    return evaluation.to_json(EXPERIMENT, {}, spec, predictor.runtime, "fp32", {}, input_size=predictor.input_size)


def compared(root: Path, spec: Spec) -> dict[str, Any]:
    """Of onnx_parity.json what is said of the final predictions."""
    reference, candidate = (load_predictor(root / name, device="cpu") for name in ("model.pth", "model.onnx"))
    return compare_predictions(reference, candidate, images_for(reference, spec), images_for(candidate, spec), spec)


def test_a_graph_holds_the_images_and_scores_what_pytorch_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = wide(tmp_path)
    model = trained(spec)
    report = export(model, tmp_path / "model.onnx", spec, EXPERIMENT)
    assert report["input_size"] == [64, 192]
    assert "warning" not in capsys.readouterr().err
    torch_eval, onnx_eval = (measured(tmp_path / name, spec) for name in ("model.pth", "model.onnx"))
    assert torch_eval["input"] == {"size": None, "scaled_down": None}
    assert onnx_eval["input"] == {"size": [64, 192], "scaled_down": None}
    assert torch_eval["remarks"] == onnx_eval["remarks"] == []
    found = compared(tmp_path, spec)
    assert found["sizes"] == {"torch": [[64, 130], [64, 192]], "onnx": [[64, 130], [64, 192]]}
    assert found["agreement"] > 0.95
    # The narrow image is padded further than alone, which the network may notice.
    assert onnx_eval["metrics"] == pytest.approx(torch_eval["metrics"], abs=0.02)


def test_what_does_not_fit_is_said_at_export_parity_and_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = wide(tmp_path, export={"input_height": 64, "input_width": 64}, parity={"images": 3})
    model = trained(spec)
    export(model, tmp_path / "model.onnx", spec, EXPERIMENT)
    told = "3 of 3 images are scaled down to fit the graph's 64x64 (height x width), to 0.328 of their test size in the worst case, 21x64 for 64x192"
    assert f"export: warning: {told}; a larger export.input_height" in capsys.readouterr().err
    document = measured(tmp_path / "model.onnx", spec)
    assert document["input"] == {"size": [64, 64], "scaled_down": {"images": 3, "factor": 21 / 64}}
    assert document["remarks"] == [told]
    report = compared(tmp_path, spec)
    assert report["sizes"] == {"torch": [[64, 130], [64, 192]], "onnx": [[21, 64], [32, 64]]}
    assert report["input"] == document["input"]
    assert report["agreement"] < 0.9
    assert (
        f"parity: warning: {told}; the final predictions agree to {report['agreement']:.1%}" in capsys.readouterr().err
    )
    predict_to(load_predictor(tmp_path / "model.onnx", device="cpu"), tmp_path / "images", tmp_path / "out")
    assert read_json(tmp_path / "out/index.json")["input"] == document["input"]
    assert f"infer: warning: {told}\n" in capsys.readouterr().err


def test_parity_can_refuse_what_scaling_makes_of_predictions(tmp_path: Path) -> None:
    spec = wide(tmp_path, export={"input_height": 64, "input_width": 64}, parity={"agreement": 0.95})
    export(trained(spec), tmp_path / "model.onnx", spec, EXPERIMENT)
    with pytest.raises(ParityError, match=r"21x64 for 64x192; .* less than parity\.agreement, 0\.95; leave out export"):
        compared(tmp_path, spec)


def test_windows_are_compared_as_they_are_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is scaled down for a graph that takes windows."""
    views = {"mode": "slide", "crop_size": [64, 64], "stride": [43, 43]}
    spec = wide(tmp_path, export={"input_height": 64, "input_width": 64}, testing=views)
    export(trained(spec), tmp_path / "model.onnx", spec, EXPERIMENT)
    capsys.readouterr()
    report = compared(tmp_path, spec)
    assert report["agreement"] > 0.99 and report["input"] == {"size": None, "scaled_down": None}
    assert "warning" not in capsys.readouterr().err


def test_the_size_is_that_of_the_test_size(tmp_path: Path) -> None:
    """1024x2048 is 640x1280 in PyTorch; each side is the largest of any image."""
    spec = wide(tmp_path, [(32, 64), (50, 40)])
    catalog = load_catalog(spec.dataset, spec.data_root, "semantic")
    found = with_size(spec, catalog)
    assert (found.input_height, found.input_width) == (96, 128)  # 64x128 and 80x64
    one = with_size(spec.model_copy(update={"export": spec.export.model_copy(update={"input_width": 64})}), catalog)
    assert (one.input_height, one.input_width) == (96, 64)


def test_a_few_large_images_are_named_where_they_make_the_graph_large(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = wide(tmp_path, [(32, 32)] * 30 + [(16, 64), (64, 16)])
    found = with_size(spec, load_catalog(spec.dataset, spec.data_root, "semantic"))
    assert (found.input_height, found.input_width) == (256, 256)
    assert "95% of all heights and widths no more than 64x64; export.input_height=64 export.input_width=64" in (
        capsys.readouterr().err
    )


def test_without_the_images_both_sides_must_be_given(tmp_path: Path) -> None:
    spec = wide(tmp_path)
    model = trained(spec)
    (tmp_path / "images/3.png").unlink()
    with pytest.raises(UserError, match=r"export\.input_height and export\.input_width are left out, .* set both"):
        export(model, tmp_path / "model.onnx", spec, EXPERIMENT)
    assert not (tmp_path / "model.onnx").exists()
