"""Executes a network by PyTorch, on the GPU where there is one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tessera.inference.predictor import Predictor, choose_device
from tessera.models.artifact import load_model
from tessera.models.base import Model
from tessera.provenance import Header
from tessera.spec.schema import PostprocessSpec


class TorchPredictor(Predictor):
    runtime = "torch"

    def __init__(self, model: Model, header: Header, device: torch.device = torch.device("cpu")) -> None:
        """Moves the network to ``device`` and puts it into evaluation mode."""
        super().__init__(header, model.postprocess, model.network.input_names)
        self.network = model.network.to(device).eval()
        self.size_divisor = model.network.size_divisor
        self.device = device

    @classmethod
    def load(cls, path: Path, postprocess: PostprocessSpec | None = None, device: str = "auto") -> TorchPredictor:
        """Raises UserError on anything but a model.pth, and for a device that is not there."""
        chosen = choose_device(device, path)
        model, header = load_model(path, postprocess)
        return cls(model, header, chosen)

    @torch.inference_mode()
    def outputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        # TensorFloat-32, cuDNN's default, keeps 10 bits of a product's factors: not what fp32 in a table means.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found: dict[str, Tensor] = self.network(**{name: value.to(self.device) for name, value in inputs.items()})
        return found
