"""From model.pth to model.onnx by PyTorch's own exporter. Of the dataset, the sizes of images are read where the spec does not say the graph's.

The graph's inputs are the network's ``input_names``: ``images`` (B, 3, H, W) float32 RGB in [0, 1], normalised inside, and of the
families that read them ``padding`` and ``task``. Its outputs are the network's, by name and in order. Post-processing stays outside.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from torch import Tensor, nn

from tessera.data.datasets import open_dataset, unannotated_images
from tessera.deploy.graph import read_header, write_graph
from tessera.files import UserError
from tessera.inference.trt_library import PLUGIN
from tessera.models import task_input, tasks
from tessera.models.artifact import load_model
from tessera.models.base import Network
from tessera.models.common.attention import DeformableAttention
from tessera.ops.deformable import multi_scale_deformable_gather, multi_scale_deformable_sample
from tessera.ops.image_size import read_image_size
from tessera.ops.images import input_size, padded_size, scaled_down
from tessera.provenance import Header
from tessera.spec.lineage import Lineages
from tessera.spec.schema import ExportSpec, Spec
from tessera.structures import ClassCatalog

__all__ = ["export", "read_header", "to_onnx"]

TRACED = 256
"""Pixels of a side that stays free and that the spec does not give."""

MOST = 0.95
"""Share of the images that a graph is compared with which is much larger for the sake of the rest."""

LARGEST = 2**31 - 2**26
"""Bytes of weights that one ONNX file can hold: protobuf's limit of 2 GiB less room for the graph."""


def export(
    model_path: Path,
    onnx_path: Path,
    spec: Spec,
    experiment: str,
    own: bool = True,
    lineages: Lineages | None = None,
) -> dict[str, Any]:
    """Writes ``onnx_path`` whole or not at all, and returns a JSON-able report. ``own``: ``model_path`` is the experiment's, not another
    state of such a network, which the lineage then names. ``lineages``: the spec's, where they were taken before.

    Raises UserError when ``model_path`` was trained from another spec, is too large for one file, or cannot be traced as asked.
    """
    model, trained = load_model(model_path, spec.postprocess)
    lineages = lineages or Lineages(spec)
    origin = {} if own else trained.stand_in(model_path, "train", lineages.of("train"))
    if own:
        trained.require(model_path, "train", lineages.of("train"), spec.data_root)
    size = sum(t.numel() * t.element_size() for t in model.network.state_dict().values())
    if size > LARGEST:
        raise UserError(
            f"{model_path}: has {size / 2**30:.2f} GiB of weights; an ONNX file holds less than 2 GiB, so this backbone cannot be "
            "exported. Choose a smaller one"
        )
    started = time.monotonic()
    settings = with_size(spec, trained.catalog)
    _say(f"export: tracing {experiment} for {_describe(settings)}")
    _warn_of_scaling(spec, settings, trained.catalog)
    try:
        graph = to_onnx(model.network, settings, _task(model.network, spec))
    except torch.onnx.OnnxExporterError as error:
        advice = (
            "set export.dynamic_size=false"
            if spec.export.dynamic_size
            else "this backbone is not exportable with these settings"
        )
        raise UserError(
            f"{model_path}: PyTorch's exporter could not trace the network ({_cause(error)}); {advice}"
        ) from None
    header = Header("export", experiment, spec, lineages.of("export") | origin, trained.catalog)
    write_graph(graph, header, onnx_path)
    _say(
        f"export: {onnx_path.stat().st_size / 2**20:.1f} MiB, {len(graph.graph.node)} operators, {time.monotonic() - started:.0f} s"
    )
    return {
        "experiment": experiment,
        "bytes": onnx_path.stat().st_size,
        "operators": len(graph.graph.node),
        "opset": spec.export.opset_version,
        "input_size": None if settings.dynamic_size else [settings.input_height, settings.input_width],
        "lineage": header.lineage,
        "facts": header.facts,
    }


def with_size(spec: Spec, catalog: ClassCatalog) -> ExportSpec:
    """``spec.export`` with the height and width of the graph where it is to have fixed ones: what is left out is as large as the images of
    the val split (without one, of the train split) need. Raises UserError where they cannot be read."""
    settings = spec.export
    if settings.dynamic_size or None not in (settings.input_height, settings.input_width):
        return settings
    split = "train" if spec.dataset.val.annotations is None else "val"
    try:
        sizes = _test_sizes(spec, split, catalog)
    except UserError as error:
        raise UserError(
            f"export.input_height and export.input_width are left out, and the {split} images that they follow from cannot be read; "
            f"set both, or give the images. {error}"
        ) from None
    height, width = padded_size(sizes, 32)
    # Of each side alone: the few largest images need not be the same.
    tall, wide = (sorted(side)[int(MOST * (len(sizes) - 1))] for side in zip(*sizes, strict=True))
    usual = padded_size([(tall, wide)], 32)
    if height * width > 2 * usual[0] * usual[1]:
        _say(
            f"export: the largest of the {len(sizes)} {split} images need {height}x{width} (height x width), {MOST:.0%} of all heights and "
            f"widths no more than {usual[0]}x{usual[1]}; export.input_height={usual[0]} export.input_width={usual[1]} makes a graph that "
            "takes less time and scales the rest down"
        )
    found = {"input_height": settings.input_height or height, "input_width": settings.input_width or width}
    return settings.model_copy(update=found)


def _test_sizes(spec: Spec, split: str, catalog: ClassCatalog) -> list[tuple[int, int]]:
    """(height, width) of every image of the split as PyTorch sees it."""
    dataset = spec.dataset
    target: tuple[int, int] | None = getattr(dataset, split).target_size
    sizes: Iterable[tuple[int, int]]
    if (listed := unannotated_images(dataset, split, spec.data_root)) is not None:
        sizes = (read_image_size(path, dataset.max_pixels) for path, _, _ in listed)
    else:
        reader = open_dataset(dataset, split, catalog, spec.model.mode, spec.data_root)
        sizes = (reader.size(index) for index in range(len(reader)))
    return [input_size(*(target or size), dataset.augmentation) for size in sizes]


def _warn_of_scaling(spec: Spec, settings: ExportSpec, catalog: ClassCatalog) -> None:
    if settings.dynamic_size or settings.input_height is None or settings.input_width is None:
        return
    graph = settings.input_height, settings.input_width
    try:
        sizes = _test_sizes(spec, spec.evaluate.split, catalog)
    except UserError as error:
        _say(f"export: warning: whether the {spec.evaluate.split} images fit {graph[0]}x{graph[1]} is unknown. {error}")
        return
    augmentation = spec.dataset.augmentation
    # Their test size stays as it is when it is made again.
    found = scaled_down(((size, input_size(*size, augmentation, graph)) for size in sizes), augmentation, None)
    if found is not None:
        _say(
            f"export: warning: {found.describe(len(sizes), graph)}; a larger export.input_height and export.input_width, or neither, "
            "takes them as they are"
        )


def _task(network: Network, spec: Spec) -> Tensor | None:
    if "task" not in network.input_names:
        return None
    return task_input(spec.model, spec.export.task or str(tasks(spec.model)[0]))


def to_onnx(network: Network, settings: ExportSpec, task: Tensor | None = None) -> onnx.ModelProto:
    """``task`` (L,) float32 of a network that takes one: built into the graph with ``settings.task``, otherwise an example.

    Raises torch.onnx.OnnxExporterError when the network cannot be traced. The network is left as it was.
    """
    height, width = settings.input_height or TRACED, settings.input_width or TRACED
    if settings.dynamic_size:
        # The tracer takes a size of one feature pixel for a constant, so free sizes are traced with at least two.
        height, width = max(height, 64), max(width, 64)
    # Likewise a free batch is traced with two images.
    batch = 2 if settings.batch_size < 0 else settings.batch_size
    examples = {
        "images": torch.zeros(batch, 3, height, width),
        "padding": torch.zeros(batch, height, width, dtype=torch.bool),
    }
    rows = columns = batches = None
    if settings.batch_size < 0:
        batches = torch.export.Dim("batch")
    if settings.dynamic_size:
        rows = network.size_divisor * torch.export.Dim("rows")
        columns = network.size_divisor * torch.export.Dim("columns")
    axes: dict[str, tuple[Any, ...]] = {"images": (batches, None, rows, columns), "padding": (batches, rows, columns)}
    baked = None
    if task is not None:
        examples["task"], axes["task"] = task.expand(batch, -1).clone(), (batches, None)
        baked = task if settings.task is not None else None
    names = [name for name in network.input_names if name != "task" or baked is None]
    free = {name: {axis: size for axis, size in enumerate(axes[name]) if size is not None} for name in names}
    with _quiet(), _sampling(network, settings), torch.no_grad():
        program = torch.onnx.export(
            _Exported(network, names, baked).eval(),
            tuple(examples[name] for name in names),
            dynamo=True,
            opset_version=settings.opset_version,
            input_names=names,
            output_names=list(network.output_names),
            dynamic_shapes=(tuple(free[name] for name in names),) if any(free.values()) else None,
            verbose=False,
            optimize=False,
        )
        assert program is not None
        # More than half of the raw nodes are repeated constants, and the optimiser's time grows with them.
        CommonSubexpressionEliminationPass()(program.model)
        program.optimize()
        graph: onnx.ModelProto = program.model_proto
    _clean(graph, settings)
    return graph


class _Exported(nn.Module):
    """The network as the graph has it: the tensors of ``names`` in, a tuple of tensors out; a ``task`` (L,) that is built in."""

    task: Tensor | None

    def __init__(self, network: Network, names: Sequence[str], task: Tensor | None) -> None:
        super().__init__()
        self.network = network
        self.names = list(names)
        self.register_buffer("task", task)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        arguments = dict(zip(self.names, inputs, strict=True))
        if self.task is not None:
            arguments["task"] = self.task.expand(inputs[0].shape[0], -1)
        outputs = self.network(**arguments)
        return tuple(outputs[name] for name in self.network.output_names)


def plugin_sample(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """``ops.deformable.multi_scale_deformable_sample`` as one TensorRT plug-in node; only for tracing, it computes nothing.

    The plug-in (TensorRT, plugin/multiscaleDeformableAttnPlugin) takes, in this order, value (B, S, M, D), spatial_shapes (L, 2)
    int32, level_start_index (L,) int32, sampling_locations (B, Q, M, L, K, 2), attention_weights (B, Q, M, L, K), and returns
    (B, Q, M, D). Unchecked on hardware.
    """
    starts = [0]
    for height, width in shapes[:-1]:
        starts.append(starts[-1] + height * width)
    attended = torch.onnx.ops.symbolic(
        f"nvidia::{PLUGIN}",
        (
            value,
            torch.tensor([list(shape) for shape in shapes], dtype=torch.int32),
            torch.tensor(starts, dtype=torch.int32),
            locations,
            weights,
        ),
        {"plugin_version": "1", "plugin_namespace": ""},
        dtype=value.dtype,
        shape=(value.shape[0], locations.shape[1], value.shape[2], value.shape[3]),
        version=1,
    )
    return attended.flatten(2)


@contextlib.contextmanager
def _sampling(network: Network, settings: ExportSpec) -> Iterator[None]:
    """Gives every deformable attention of the network the sampling that ``settings`` ask for, and takes it back."""
    chosen = plugin_sample
    if settings.on_cpu:
        chosen = multi_scale_deformable_gather if settings.sampling == "gather" else multi_scale_deformable_sample
    layers = [module for module in network.modules() if isinstance(module, DeformableAttention)]
    before = [layer.sample for layer in layers]
    try:
        for layer in layers:
            layer.sample = chosen
        yield
    finally:
        for layer, sample in zip(layers, before, strict=True):
            layer.sample = sample


def _clean(graph: onnx.ModelProto, settings: ExportSpec) -> None:
    """Drops what the exporter notes about this machine (paths of source files) and gives the free sizes readable names."""
    for holder in (graph, graph.graph, *graph.graph.node, *graph.graph.input, *graph.graph.output):
        del holder.metadata_props[:]
    for value in (*graph.graph.value_info, *graph.graph.initializer):
        del value.metadata_props[:]
    names = {"images": ("batch", "", "height", "width"), "padding": ("batch", "height", "width"), "task": ("batch", "")}
    for value in graph.graph.input:
        for axis, dimension in enumerate(value.type.tensor_type.shape.dim):
            if dimension.HasField("dim_param"):
                dimension.dim_param = names[value.name][axis]
    for output in graph.graph.output:
        for axis, dimension in enumerate(output.type.tensor_type.shape.dim):
            if dimension.HasField("dim_param"):
                dimension.dim_param = "batch" if axis == 0 else f"{output.name}_{axis}"
    if settings.dynamic_size:
        # Their sizes are written in the tracer's own symbols, which the new names contradict.
        del graph.graph.value_info[:]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about its own internals on every run; what matters comes as an exception."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _cause(error: BaseException) -> str:
    """The innermost reason, first line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def _describe(settings: ExportSpec) -> str:
    size = "any size" if settings.dynamic_size else f"{settings.input_height}x{settings.input_width}"
    batch = "any batch" if settings.batch_size < 0 else f"batch {settings.batch_size}"
    return f"{size}, {batch}, opset {settings.opset_version}, {'standard operators' if settings.on_cpu else PLUGIN}"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
