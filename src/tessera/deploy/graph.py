"""ONNX files that carry a header: reading, writing, checking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from tessera.files import UserError, atomic_path, canonical_json, require_file
from tessera.inference.onnx_runtime import PROPERTY
from tessera.inference.predictor import INPUT
from tessera.provenance import Header

__all__ = ["INPUT", "PROPERTY", "input_shape", "input_shapes", "read_graph", "read_header", "write_graph"]


def read_graph(path: Path) -> tuple[onnx.ModelProto, Header]:
    """Raises UserError when the file is missing, no ONNX, cut off, or not written by a stage of ours."""
    require_file(path, "an ONNX file that `tessera export` wrote")
    try:
        # External data is refused rather than followed: it could name any file of this machine.
        graph = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError):
        raise UserError(f"{path}: not an ONNX file, or cut off; make it again with `tessera export`") from None
    text = {entry.key: entry.value for entry in graph.metadata_props}.get(PROPERTY)
    try:
        value = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: its tessera header is no JSON; make it again with `tessera export`") from None
    header = Header.from_json(value, path)
    try:
        onnx.checker.check_model(graph)
    except onnx.checker.ValidationError as error:
        raise UserError(f"{path}: not a valid ONNX graph ({error}); make it again with `tessera export`") from None
    return graph, header


def read_header(path: Path) -> Header:
    """The header of an ONNX file; raises UserError like ``read_graph``."""
    return read_graph(path)[1]


def write_graph(graph: onnx.ModelProto, header: Header, path: Path) -> None:
    """Embeds the header, checks the graph and writes one self-contained file, whole or not at all."""
    del graph.metadata_props[:]
    onnx.helper.set_model_props(graph, {PROPERTY: canonical_json(header.to_json())})
    onnx.checker.check_model(graph)
    with atomic_path(path) as temporary:
        onnx.save_model(graph, str(temporary))


def input_shapes(graph: onnx.ModelProto) -> dict[str, list[int | None]]:
    """Of every input by name; None where the size is free."""
    found = {}
    for value in graph.graph.input:
        dimensions: Any = value.type.tensor_type.shape.dim
        found[value.name] = [int(d.dim_value) if d.HasField("dim_value") else None for d in dimensions]
    return found


def input_shape(graph: onnx.ModelProto, path: Path) -> list[int | None]:
    """(batch, 3, height, width) of the input ``images``; None where the size is free."""
    shapes = input_shapes(graph)
    if INPUT not in shapes:
        raise UserError(f"{path}: has the inputs {', '.join(shapes)}; expected one named {INPUT}")
    return shapes[INPUT]
