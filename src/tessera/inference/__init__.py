"""Predictions from any runtime in three lines::

    from tessera.inference import load_predictor
    model = load_predictor("results/mask2former_swin/model.pth")
    predictions = model.predict("street.jpg")

and the pictures and files that the infer stage writes, below a folder of one's own::

    from tessera.inference.results import predict_to
    predict_to(model, "photos", "out")

Importing this package alone imports no torch: the workflow asks its ``trt_library`` while it plans.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tessera.files import UserError, require_file

if TYPE_CHECKING:
    from tessera.inference.predictor import Predictor
    from tessera.spec.schema import PostprocessSpec, ViewsSpec

__all__ = ["load_predictor"]


def load_predictor(
    path: str | Path,
    postprocess: PostprocessSpec | None = None,
    device: str = "auto",
    testing: ViewsSpec | None = None,
) -> Predictor:
    """Opens ``model.pth`` (PyTorch), ``*.onnx`` (ONNX Runtime) or ``*.engine`` (TensorRT).

    ``postprocess`` replaces the thresholds that the model was made with, ``testing`` the views that semantic predictions are averaged
    over. ``device``: ``auto`` takes the GPU where there is one; otherwise ``cpu``, ``cuda`` or ``cuda:1``. Raises UserError on a file
    that no stage wrote, and on views that it cannot take.
    """
    path = Path(path)
    require_file(path, "a model.pth, an .onnx file or an .engine file")
    from tessera.inference.testing import with_views

    predictor = _open(path, postprocess, device)
    return with_views(predictor, predictor.header.spec.testing if testing is None else testing)


def _open(path: Path, postprocess: PostprocessSpec | None, device: str) -> Predictor:
    if path.suffix == ".pth":
        from tessera.inference.torch_runtime import TorchPredictor

        return TorchPredictor.load(path, postprocess, device)
    if path.suffix == ".onnx":
        from tessera.inference.onnx_runtime import OnnxPredictor

        return OnnxPredictor.load(path, postprocess, device)
    if path.suffix == ".engine":
        from tessera.inference.trt_runtime import TrtPredictor

        return TrtPredictor.load(path, postprocess, device)
    raise UserError(f"{path}: expected a name that ends in .pth, .onnx or .engine, which says what executes it")
