"""From an fp32 graph to an fp16 one: weights and most operators in half precision, inputs and outputs still float32.

The types in the graph are what every runtime obeys, TensorRT's strongly typed networks included.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from torch import Tensor

from tessera.deploy.export import TRACED
from tessera.deploy.graph import INPUT, input_shape, read_graph, write_graph
from tessera.deploy.parity import Comparison, tolerance_of
from tessera.files import UserError
from tessera.inference.trt_library import PLUGIN
from tessera.models import task_input, tasks
from tessera.provenance import Header
from tessera.spec.lineage import Lineages
from tessera.spec.schema import Spec


def to_fp16(
    onnx_path: Path, out_path: Path, spec: Spec, experiment: str, lineages: Lineages | None = None
) -> dict[str, Any]:
    """Writes ``out_path`` and returns a JSON-able report: bytes before and after, operators left in fp32, differences.

    The differences are of one generated image, a first look; the parity stage decides, on real ones.
    Raises UserError when ``onnx_path`` is not this spec's export, or its half-precision outputs are not finite.
    """
    graph, header = read_graph(onnx_path)
    lineages = lineages or Lineages(spec)
    header.require(onnx_path, "export", lineages.of("export"), spec.data_root)
    has_plugin = any(node.op_type == PLUGIN for node in graph.graph.node)
    shape = input_shape(graph, onnx_path)
    half = _convert(graph, spec.precision.fp16_keep)
    # The graph is large enough for the difference to be measured before anything is written.
    differences = None if has_plugin else _differences(graph, half, shape, spec, onnx_path)
    before, after = graph.ByteSize(), half.ByteSize()
    made = Header("precision", experiment, spec, lineages.of("precision", precision="fp16"), header.catalog, "fp16")
    write_graph(half, made, out_path)
    print(
        f"precision: {after / 2**20:.1f} MiB (fp32: {before / 2**20:.1f} MiB)",
        file=sys.stderr,
        flush=True,
    )
    return {
        "experiment": experiment,
        "precision": "fp16",
        "bytes_fp32": before,
        "bytes": after,
        "kept_in_fp32": {kind: count for kind, count in _counts(graph).items() if kind in spec.precision.fp16_keep},
        "difference_on_generated_image": differences,
        "difference_missing": f"ONNX Runtime has no {PLUGIN}; see the parity of the engine" if has_plugin else None,
        "lineage": made.lineage,
        "facts": made.facts,
    }


def _convert(graph: onnx.ModelProto, keep: list[str]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    # Half precision has 11 bits: a sampling location in a 160-pixel map would be off by a tenth of a pixel.
    blocked = [*DEFAULT_OP_BLOCK_LIST, PLUGIN, *keep]
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # It warns of every weight that half precision rounds to zero.
            warnings.simplefilter("ignore")
            half: onnx.ModelProto = convert_float_to_float16(copy, keep_io_types=True, op_block_list=blocked)
    finally:
        logging.disable(before)
    # Its casts stand after the operators that need them, and a weight that two operators share is cast twice under one name.
    unique = [onnx.NodeProto.FromString(text) for text in dict.fromkeys(n.SerializeToString() for n in half.graph.node)]
    del half.graph.node[:]
    half.graph.node.extend(unique)
    OnnxModel(half).topological_sort()
    # Some of its types are those of before; every runtime infers them anew.
    del half.graph.value_info[:]
    return half


def _differences(
    graph: onnx.ModelProto, half: onnx.ModelProto, shape: list[int | None], spec: Spec, path: Path
) -> dict[str, dict[str, Any]]:
    batch, _, height, width = shape
    size = (height or spec.export.input_height or TRACED, width or spec.export.input_width or TRACED)
    generator = torch.Generator().manual_seed(0)
    # Smooth noise: colours that change over some 16 pixels, which is closer to a photograph than white noise.
    coarse = torch.rand(batch or 1, 3, max(2, size[0] // 16), max(2, size[1] // 16), generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    comparison = Comparison()
    comparison.add(_run(graph, image, spec), _run(half, image, spec))
    broken = comparison.problems(float("inf"))
    if broken:
        raise UserError(
            f"{path}: its fp16 version does not compute: {'; '.join(broken)}. Add the operator types that overflow to "
            "precision.fp16_keep"
        )
    for line in comparison.problems(tolerance_of("fp16", spec)):
        print(
            f"precision: warning: on a generated image, {line}; the parity stage decides on real ones", file=sys.stderr
        )
    return comparison.to_json()


def _run(graph: onnx.ModelProto, images: Tensor, spec: Spec) -> dict[str, Tensor]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    inputs = {INPUT: images}
    for entry in session.get_inputs():
        if entry.name == "padding":
            inputs["padding"] = torch.zeros(len(images), *images.shape[2:], dtype=torch.bool)
        elif entry.name == "task":
            inputs["task"] = task_input(spec.model, str(tasks(spec.model)[0])).expand(len(images), -1)
    values = session.run(names, {name: value.numpy() for name, value in inputs.items()})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def _counts(graph: onnx.ModelProto) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in graph.graph.node:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return dict(sorted(found.items()))
