"""From an ONNX graph to a TensorRT engine, for TensorRT 10 and 11.

The network is strongly typed: every tensor has the precision that the graph says, and the builder decides nothing about it.
TensorRT's Python interface is checked against the real bindings by tests/deploy/test_tensorrt_api.py.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessera.files import UserError, atomic_path, digest_file, write_bytes, write_json
from tessera.inference import trt_library
from tessera.inference.trt_library import PLUGIN, availability
from tessera.provenance import Header, digests, sealed
from tessera.spec.lineage import Lineages
from tessera.spec.schema import EngineSpec, Spec

if TYPE_CHECKING:
    import onnx
    import tensorrt as trt

__all__ = ["availability", "build_engine", "sidecar"]


def sidecar(engine_path: Path) -> Path:
    """``model.engine.json`` beside ``model.engine``: the header, sealed, with TensorRT's version and the GPU's name among its facts."""
    return engine_path.with_name(engine_path.name + ".json")


def build_engine(
    onnx_path: Path, engine_path: Path, spec: Spec, experiment: str, lineages: Lineages | None = None
) -> None:
    """Writes the engine and its sidecar; an engine runs only on the kind of GPU and the TensorRT version that built it.

    Raises UserError, within seconds where TensorRT or a GPU is missing, and with every message of TensorRT where it refuses.
    """
    trt_library.require(
        f"{engine_path}: building a TensorRT engine",
        f"It can make {engine_path.parent / 'onnx_eval.json'}, the same evaluation with ONNX Runtime.",
    )
    from tessera.deploy.graph import input_shape, input_shapes, read_graph

    graph, header = read_graph(onnx_path)
    inputs = digests(onnx_path.parent, [onnx_path])
    stage = "export" if header.precision == "fp32" else "precision"
    lineages = lineages or Lineages(spec)
    header.require(onnx_path, stage, lineages.of(stage, precision=header.precision), spec.data_root)
    smallest, tuned, largest = _profile(input_shape(graph, onnx_path), spec, onnx_path)

    trt = trt_library.load()
    logger = trt_library.make_logger(trt, spec.engine.verbose)
    trt.init_libnvinfer_plugins(logger, "")
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, logger, graph, onnx_path)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.engine.workspace_size << 20)
    # fp32 means fp32: the shorter mantissa of TF32, on by default, costs three digits against PyTorch.
    config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    for name, shape in input_shapes(graph).items():
        # Every input has the batch in front; what is behind it is fixed.
        profile.set_shape(name, *((shapes[0], *shape[1:]) for shapes in (smallest, tuned, largest)))
    if config.add_optimization_profile(profile) < 0:
        raise UserError(f"{onnx_path}: TensorRT refuses the shapes {smallest} to {largest}\n{_messages(logger)}")
    monitor = _monitor(trt, engine_path)
    config.progress_monitor = monitor
    _load_timing_cache(config, spec.engine)
    started = time.monotonic()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(f"{onnx_path}: TensorRT {trt.__version__} could not build an engine\n{_messages(logger)}")
    _save_timing_cache(config, spec.engine)

    made = Header(
        "engine",
        experiment,
        spec,
        lineages.of("engine", precision=header.precision),
        header.catalog,
        header.precision,
    )
    made = replace(made, facts={**made.facts, "tensorrt": trt.__version__, "gpu": _gpu_name()})
    with atomic_path(engine_path) as temporary:
        temporary.write_bytes(memoryview(plan))
        # First the sidecar: an engine is never found beside the header of an older one.
        engine_path.unlink(missing_ok=True)
        outputs = {engine_path.name: digest_file(temporary)}
        write_json(sidecar(engine_path), sealed(made.to_json(), inputs, outputs))
    print(
        f"engine: wrote {engine_path}, {plan.nbytes / 2**20:.1f} MiB, {time.monotonic() - started:.0f} s",
        file=sys.stderr,
        flush=True,
    )


def _profile(
    shape: list[int | None], spec: Spec, path: Path
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Smallest, tuned-for and largest input shape."""
    batch, channels, height, width = shape
    if height is None or width is None:
        raise UserError(
            f"{path}: height and width are free, and an engine is built for one size; set export.dynamic_size=false and "
            "export.input_height, export.input_width"
        )
    wanted = (spec.engine.min_batch_size, spec.engine.opt_batch_size, spec.engine.max_batch_size)
    if batch is not None and wanted != (batch, batch, batch):
        raise UserError(
            f"{path}: has the fixed batch {batch}, the spec asks for engine.min/opt/max_batch_size {wanted}; set all three to "
            f"{batch}, or export.batch_size=-1"
        )
    smallest, tuned, largest = ((size, channels or 3, height, width) for size in wanted)
    return smallest, tuned, largest


def _parse(trt: Any, network: trt.INetworkDefinition, logger: trt.ILogger, graph: onnx.ModelProto, path: Path) -> None:
    _choose_plugin_version(trt, graph)
    parser = trt.OnnxParser(network, logger)
    if parser.parse(graph.SerializeToString()):
        return
    lines = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        lines.append(f"  operator {error.node_operator()} ({error.node_name()}): {error.desc()}")
    raise UserError(
        "\n".join([f"{path}: TensorRT {trt.__version__} cannot read the graph", *lines, _messages(logger)]).rstrip()
    )


def _choose_plugin_version(trt: Any, graph: onnx.ModelProto) -> None:
    """Version 2 of the plug-in exists since TensorRT 10.11 and outlives version 1."""
    nodes = [node for node in graph.graph.node if node.op_type == PLUGIN]
    if not nodes:
        return
    registry = trt.get_plugin_registry()
    version = "2" if registry.get_creator(PLUGIN, "2", "") is not None else "1"
    for node in nodes:
        for attribute in node.attribute:
            if attribute.name == "plugin_version":
                attribute.s = version.encode()


def _load_timing_cache(config: trt.IBuilderConfig, settings: EngineSpec) -> None:
    if settings.timing_cache is None:
        return
    path = Path(settings.timing_cache)
    known = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):
        print(f"engine: {path} was made by another TensorRT or GPU and starts afresh", file=sys.stderr, flush=True)
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _save_timing_cache(config: trt.IBuilderConfig, settings: EngineSpec) -> None:
    if settings.timing_cache is None:
        return
    cache = config.get_timing_cache()
    write_bytes(Path(settings.timing_cache), bytes(cache.serialize()))


def _monitor(trt: Any, engine_path: Path) -> Any:
    """Prints a line for every tenth of the builder's outermost phase."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the base class exists only once TensorRT is loaded
        def __init__(self) -> None:
            super().__init__()
            self.outermost: str | None = None
            self.steps = 1
            self.shown = -1

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.outermost, self.steps, self.shown = phase_name, max(1, num_steps), -1

        def step_complete(self, phase_name: str, step: int) -> bool:
            tenth = 10 * (step + 1) // self.steps
            if phase_name == self.outermost and tenth > self.shown:
                self.shown = tenth
                print(f"engine: {engine_path.name}: {phase_name}: {10 * tenth} %", file=sys.stderr, flush=True)
            return True

        def phase_finish(self, phase_name: str) -> None:
            if phase_name == self.outermost:
                self.outermost = None

    return Monitor()


def _messages(logger: Any) -> str:
    return "\n".join(f"  {message}" for message in logger.errors)


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()
