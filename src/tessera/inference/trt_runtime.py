"""Executes a TensorRT engine on PyTorch's CUDA tensors. Needs an NVIDIA GPU and the TensorRT version that built the engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tessera.files import UserError, read_json
from tessera.inference import trt_library
from tessera.inference.predictor import INPUT, INPUTS, Predictor, choose_device
from tessera.models import build_postprocess
from tessera.models.base import Postprocess
from tessera.provenance import Header
from tessera.spec.schema import PostprocessSpec

if TYPE_CHECKING:
    import tensorrt as trt


class TrtPredictor(Predictor):
    runtime = "trt"

    def __init__(
        self, engine: trt.ICudaEngine, header: Header, postprocess: Postprocess, path: Path, device: torch.device
    ) -> None:
        """Raises UserError unless the engine's tensors are inputs of ``INPUTS``, ``images`` among them, and float32 outputs."""
        library = trt_library.load()
        self._engine = engine
        self._context = engine.create_execution_context()
        if self._context is None:
            raise UserError(f"{path}: TensorRT could not set the engine up; is there enough free GPU memory?")
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        inputs, self._names = _tensor_names(library, engine, path)
        smallest, _, largest = engine.get_tensor_profile_shape(INPUT, 0)
        self._min_batch = int(smallest[0])
        super().__init__(header, postprocess, inputs, (int(largest[2]), int(largest[3])), int(largest[0]))

    @classmethod
    def load(cls, path: Path, postprocess: PostprocessSpec | None = None, device: str = "auto") -> TrtPredictor:
        """Raises UserError without a GPU or TensorRT, and on an engine of another version or another kind of GPU."""
        trt_library.require(
            f"{path}: running a TensorRT engine",
            f"{path.with_name('model.onnx')} runs here with ONNX Runtime.",
        )
        header = Header.from_json(read_json(path.with_name(path.name + ".json")), path)
        chosen = choose_device(device, path)
        if chosen.type != "cuda":
            raise UserError(f"{path}: a TensorRT engine runs on a GPU only; use device auto or cuda")
        trt = trt_library.load()
        made_with = header.facts.get("tensorrt")
        if made_with != trt.__version__:
            raise UserError(
                f"{path}: was built by TensorRT {made_with}, {trt.__version__} is installed, and engines do not move between "
                "versions; build it again with `tessera engine`"
            )
        logger = trt_library.make_logger(trt)
        trt.init_libnvinfer_plugins(logger, "")
        torch.cuda.set_device(chosen)
        runtime = trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            messages = "\n".join(f"  {message}" for message in logger.errors)
            raise UserError(
                f"{path}: TensorRT cannot load this engine; it is damaged, or was built on another kind of GPU than "
                f"{torch.cuda.get_device_name(chosen)} ({header.facts.get('gpu')}); build it again with `tessera engine`\n{messages}"
            )
        built = build_postprocess(header.spec.model, header.catalog, postprocess or header.spec.postprocess)
        return cls(engine, header, built, path, chosen)

    def outputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """float32 on the GPU. A batch below the engine's smallest is filled up with its last image, whose answers are dropped."""
        count = len(inputs[INPUT])
        assert self.max_batch is not None
        if count > self.max_batch:
            raise ValueError(f"the engine takes {self.max_batch} images, got {count}")
        bound = {}
        for name, value in inputs.items():
            value = value.to(self._device)
            if count < self._min_batch:
                value = torch.cat([value, value[-1:].repeat(self._min_batch - count, *[1] * (value.dim() - 1))])
            bound[name] = value.contiguous()
            self._bind(name, bound[name])
        found = self._allocate()
        # The engine's stream starts after the input has been copied, and ours goes on after the engine.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise RuntimeError("TensorRT could not start the engine; its messages are above")
        self._stream.synchronize()
        return {name: value[:count] for name, value in found.items()}

    def _bind(self, name: str, value: Tensor) -> None:
        if not self._context.set_input_shape(name, tuple(value.shape)):
            raise UserError(
                f"{self.header.experiment}: the engine refuses {name} of shape {tuple(value.shape)}; it takes {self._min_batch} "
                f"to {self.max_batch} images of {self.input_size} (height, width)"
            )
        if not self._context.set_tensor_address(name, value.data_ptr()):
            raise RuntimeError(f"TensorRT refuses the address of {name}")

    def _allocate(self) -> dict[str, Tensor]:
        """Outputs by name, already known to the engine; their sizes follow from the input's."""
        found = {}
        for name in self._names:
            shape = tuple(self._context.get_tensor_shape(name))
            # What the engine does not write must not look like an answer.
            found[name] = torch.full(shape, float("nan"), dtype=torch.float32, device=self._device)
            if not self._context.set_tensor_address(name, found[name].data_ptr()):
                raise RuntimeError(f"TensorRT refuses the address of {name}")
        return found


def _tensor_names(trt: Any, engine: trt.ICudaEngine, path: Path) -> tuple[list[str], list[str]]:
    """Inputs, in the order of ``INPUTS``, and outputs."""
    inputs, outputs, problems = set(), [], []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_output = engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT
        if is_output:
            outputs.append(name)
        else:
            inputs.add(name)
        wanted = trt.DataType.BOOL if name == "padding" else trt.DataType.FLOAT
        if (not is_output and name not in INPUTS) or engine.get_tensor_dtype(name) != wanted:
            problems.append(f"{name} ({engine.get_tensor_dtype(name)})")
    if problems or not outputs or INPUT not in inputs:
        raise UserError(
            f"{path}: unexpected tensors: {', '.join(problems) or 'inputs or outputs are missing'}; expected the input {INPUT} and float32 "
            "outputs, as `tessera engine` builds them"
        )
    return [name for name in INPUTS if name in inputs], outputs
