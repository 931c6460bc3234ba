"""Executes an exported network by ONNX Runtime: on any CPU, and on the GPU where the installed ONNX Runtime can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from tessera.files import UserError
from tessera.inference.predictor import INPUT, INPUTS, Predictor
from tessera.models import build_postprocess
from tessera.models.base import Postprocess
from tessera.provenance import Header
from tessera.spec.schema import PostprocessSpec

PROPERTY = "tessera"
"""Metadata property that holds the header as JSON."""

_TYPES: dict[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bool)": np.bool_}


class OnnxPredictor(Predictor):
    runtime = "onnx"

    def __init__(
        self, session: onnxruntime.InferenceSession, header: Header, postprocess: Postprocess, path: Path
    ) -> None:
        """Raises UserError unless the graph has the input ``images`` of shape (B, 3, H, W), and maybe ``padding`` and ``task``."""
        inputs = session.get_inputs()
        known = all(entry.name in INPUTS and entry.type in _TYPES for entry in inputs)
        if not inputs or not known or inputs[0].name != INPUT or len(inputs[0].shape) != 4:
            found = ", ".join(f"{entry.name} {entry.shape} {entry.type}" for entry in inputs)
            raise UserError(
                f"{path}: has the inputs {found}; expected `{INPUT}` of (batch, 3, height, width), float, and of the models that take "
                "them `padding` and `task`"
            )
        batch, _, height, width = (side if isinstance(side, int) else None for side in inputs[0].shape)
        fixed_size = None if height is None or width is None else (height, width)
        super().__init__(header, postprocess, [entry.name for entry in inputs], fixed_size, batch)
        self._session = session
        self._path = path
        self._types = {entry.name: _TYPES[entry.type] for entry in inputs}
        self._fixed_batch = batch
        self._names = [entry.name for entry in session.get_outputs()]

    @classmethod
    def load(cls, path: Path, postprocess: PostprocessSpec | None = None, device: str = "auto") -> OnnxPredictor:
        """Raises UserError on a file that is cut off, foreign, or needs operators that ONNX Runtime lacks."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(path, options, providers=_providers(device, path))
        except Exception as error:  # ONNX Runtime raises its own classes, without a common base, for every damage
            raise UserError(
                f"{path}: ONNX Runtime cannot load it ({_reason(error)}). Expected a graph that `tessera export` wrote with "
                "export.on_cpu=true; if it is cut off, export again"
            ) from None
        text = session.get_modelmeta().custom_metadata_map.get(PROPERTY)
        try:
            header = Header.from_json(None if text is None else json.loads(text), path)
        except (ValueError, RecursionError):
            raise UserError(f"{path}: its tessera header is not JSON; export again") from None
        built = build_postprocess(header.spec.model, header.catalog, postprocess or header.spec.postprocess)
        return cls(session, header, built, path)

    def outputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A graph of fixed batch gets the last image repeated up to it, and loses the answers to the repetitions."""
        count = len(inputs[INPUT])
        if self._fixed_batch is not None and count > self._fixed_batch:
            raise ValueError(f"the graph takes {self._fixed_batch} images, got {count}")
        missing = (self._fixed_batch or count) - count
        arrays = {}
        for name, value in inputs.items():
            array = value.cpu().numpy()
            if missing:
                array = np.concatenate([array, np.repeat(array[-1:], missing, 0)])
            arrays[name] = np.ascontiguousarray(array, self._types[name])
        try:
            values = self._session.run(self._names, arrays)
        except Exception as error:  # as in ``load``
            shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
            raise UserError(
                f"{self._path}: ONNX Runtime cannot execute it for {shapes} ({_reason(error)}); if it is not what `tessera export` wrote, "
                "export again"
            ) from None
        return {name: torch.from_numpy(value[:count]) for name, value in zip(self._names, values, strict=True)}


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _providers(device: str, path: Path) -> list[Any]:
    """The GPU before the CPU, unless the CPU was asked for. Threads stay at ONNX Runtime's default, all cores."""
    gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if device.startswith("cuda") and not gpu:
        raise UserError(
            f"{path}: device {device} asked for, but the installed ONNX Runtime has no CUDA; install onnxruntime-gpu, or use cpu"
        )
    if not gpu or device == "cpu":
        return ["CPUExecutionProvider"]
    number = device.partition(":")[2] or "0"
    # TensorFloat-32 keeps 10 bits of a product's factors: not what fp32 in a table means.
    return [("CUDAExecutionProvider", {"device_id": number, "use_tf32": "0"}), "CPUExecutionProvider"]
