"""Checkpoints, ONNX files, engines and evaluation files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
import yaml
from onnx import TensorProto, helper

from tessera.provenance import sealed
from tests.malformed.project import (
    EVALUATION,
    EXPERIMENT,
    FOLDER,
    GRAPH,
    GRID,
    MODEL,
    Break,
    Case,
    bare_pickle,
    cut,
    edit,
    fifo,
    flip,
    folder,
    header,
    put,
    recipe,
    remove,
    text,
    weights,
    zipped_pickle,
)

EVALUATE = f"evaluate {EXPERIMENT}"
ON_ONNX = f"evaluate {EXPERIMENT} --runtime onnx"
EXPORT = f"export {EXPERIMENT}"
INFER = f"infer {EXPERIMENT}"
PARITY = f"parity {EXPERIMENT}"
PRECISION = f"precision {EXPERIMENT}"
TRAIN = f"train {EXPERIMENT} --out out"
COMPARE = "compare demo"

OTHER_SPEC = recipe({"train": {"num_epochs": 3}})


def in_header(key: str, value: Any) -> Break:
    return weights(lambda content: put(key, value)(content["header"]))


def in_graph_header(key: str, value: Any) -> Break:
    def change(written: str) -> str:
        whole = json.loads(written)
        put(key, value)(whole)
        return json.dumps(whole)

    return header(change)


def first_tensor(value: Any) -> Break:
    def change(content: dict[str, Any]) -> None:
        content["state"][next(iter(content["state"]))] = value

    return weights(change)


def graph(change: Any) -> Break:
    def apply(project: Path) -> None:
        model = onnx.load(project / GRAPH)
        change(model)
        onnx.save(model, project / GRAPH)

    return apply


def with_external_data(model: onnx.ModelProto) -> None:
    """Weights said to lie in a file outside."""
    tensor = max(model.graph.initializer, key=lambda initializer: len(initializer.raw_data))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../../../../etc/passwd"), ("offset", "0"), ("length", "64")):
        tensor.external_data.add(key=key, value=value)


def with_another_input(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.input[:] = ["pixels" if name == "images" else name for name in node.input]
    model.graph.input[0].name = "pixels"


def foreign(project: Path) -> None:
    """A sound graph of somebody else."""
    value = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 64, 64])
    result = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 3, 64, 64])
    made = helper.make_graph([helper.make_node("Relu", ["images"], ["out"])], "foreign", [value], [result])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), project / GRAPH)


def resealed(change: Callable[[Any], Any]) -> Break:
    """As of an evaluation that was written so."""

    def apply(document: Any) -> Any:
        inputs, outputs, _ = (document.pop(key) for key in ("inputs", "outputs", "seal"))
        return sealed(change(document), inputs, outputs)

    return edit(EVALUATION, apply)


def in_evaluation(key: str, value: Any) -> Break:
    return resealed(lambda document: put(key, value)(document) or document)


def table(**keys: Any) -> Break:
    return text(
        "config/config.yaml", yaml.safe_dump({**GRID, "tables": {"demo": {"experiments": [EXPERIMENT], **keys}}})
    )


CHECKPOINTS = [
    Case("model-fifo", EVALUATE, MODEL, ("a FIFO, expected a regular file",), (fifo(MODEL),)),
    Case("graph-fifo", ON_ONNX, GRAPH, ("a FIFO, expected a regular file",), (fifo(GRAPH),)),
    Case("graph-fifo-for-precision", PRECISION, GRAPH, ("a FIFO, expected a regular file",), (fifo(GRAPH),)),
    Case("evaluation-fifo", COMPARE, EVALUATION, ("a FIFO, expected a regular file",), (fifo(EVALUATION),)),
    Case("model-missing", EVALUATE, MODEL, ("no such file", "make it with `snakemake"), (remove(MODEL),)),
    Case("model-missing-for-export", EXPORT, MODEL, ("no such file",), (remove(MODEL),)),
    Case("model-cut-off", EVALUATE, MODEL, ("damaged", "nothing in it was executed"), (cut(MODEL),)),
    Case("model-of-no-bytes", EXPORT, MODEL, ("damaged",), (text(MODEL, ""),)),
    Case("model-with-flipped-bits", EVALUATE, MODEL, ("damaged", "checksum"), (flip(MODEL),)),
    Case("model-of-text", INFER, MODEL, ("damaged",), (text(MODEL, "weights"),)),
    Case("model-is-a-folder", EXPORT, MODEL, ("is a folder",), (folder(MODEL),)),
    Case("model-pickle-with-code", EVALUATE, MODEL, ("nothing in it was executed",), (bare_pickle(MODEL),)),
    Case("model-zip-with-code", EXPORT, MODEL, ("nothing in it was executed",), (zipped_pickle(MODEL),)),
    Case(
        "model-plain-state-dict",
        EVALUATE,
        MODEL,
        ("holds no `header` and `state`", "train.pretrained_model_path"),
        (weights(lambda content: content["state"]),),
    ),
    Case("model-list", EXPORT, MODEL, ("holds no `header` and `state`",), (weights(lambda content: [1, 2]),)),
    Case(
        "model-header-of-newer-format",
        EVALUATE,
        MODEL,
        ("header format 99, this version reads 1", "make the file again"),
        (in_header("format", 99),),
    ),
    Case("model-header-of-text", EVALUATE, MODEL, ("no tessera header",), (weights(lambda c: {**c, "header": "v1"}),)),
    Case(
        "model-header-without-catalog",
        EVALUATE,
        MODEL,
        ("header is damaged", "catalog"),
        (weights(lambda content: content["header"].pop("catalog") and None),),
    ),
    Case(
        "model-header-with-unknown-key",
        EVALUATE,
        MODEL,
        ("header is damaged", "spec.model.depth"),
        (in_header("spec.model.depth", 3),),
    ),
    Case(
        "model-header-with-damaged-class",
        EVALUATE,
        MODEL,
        ("header is damaged",),
        (in_header("catalog.0", {"id": "one"}),),
    ),
    Case(
        "model-header-without-lineage",
        EVALUATE,
        MODEL,
        ("header is damaged", "lineage"),
        (in_header("lineage", None),),
    ),
    Case(
        "model-of-another-spec",
        EVALUATE,
        MODEL,
        ("another spec", "train.num_epochs: 2 -> 3", "make it again"),
        (OTHER_SPEC,),
        lines=2,
    ),
    Case(
        "model-of-another-spec-for-export",
        EXPORT,
        MODEL,
        ("another spec", "train.num_epochs: 2 -> 3"),
        (OTHER_SPEC,),
        lines=2,
    ),
    Case(
        "model-of-another-stage", EVALUATE, MODEL, ("by the stage export", "by train"), (in_header("stage", "export"),)
    ),
    Case(
        "model-tensor-of-another-shape",
        EVALUATE,
        MODEL,
        ("tensors are not those of the mask2former", "train again", "size mismatch"),
        (first_tensor(torch.zeros(2, 2)),),
    ),
    Case(
        "model-without-a-tensor",
        EXPORT,
        MODEL,
        ("tensors are not those of the mask2former", "train again"),
        (weights(lambda content: {**content, "state": dict(list(content["state"].items())[1:])}),),
    ),
    Case("model-entry-of-text", EVALUATE, MODEL, ("is a str, expected a tensor",), (first_tensor("weights"),)),
    Case(
        "model-without-tensors", EVALUATE, MODEL, ("holds no named tensors",), (weights(lambda c: {**c, "state": {}}),)
    ),
    Case(
        "pretrained-missing",
        f"{TRAIN} train.pretrained_model_path=old.pth",
        "old.pth",
        ("no such file",),
    ),
    Case(
        "pretrained-pickle-with-code",
        f"{TRAIN} train.pretrained_model_path=old.pth",
        "old.pth",
        ("nothing in it was executed",),
        (bare_pickle("old.pth"),),
    ),
    Case(
        "pretrained-without-anything-that-fits",
        f"{TRAIN} train.pretrained_model_path=old.pth",
        "old.pth",
        ("none of its 1 tensors", "train.pretrained_model_path"),
        (weights(lambda content: {"w": torch.zeros(3)}, "old.pth"),),
    ),
    Case(
        "backbone-weights-cut-off",
        f"{TRAIN} model.backbone.pretrained=swin.safetensors",
        "swin.safetensors",
        ("not a readable safetensors file",),
        (text("swin.safetensors", b"\x40\0\0\0\0\0\0\0{"),),
    ),
    Case(
        "backbone-weights-missing",
        f"{TRAIN} model.backbone.pretrained=swin.pth",
        "swin.pth",
        ("no such file",),
    ),
    Case(
        "backbone-weights-pickle-with-code",
        f"{TRAIN} model.backbone.pretrained=swin.pth",
        "swin.pth",
        ("nothing in it was executed",),
        (zipped_pickle("swin.pth"),),
    ),
    Case(
        "resume-missing",
        f"{TRAIN} train.resume_training_checkpoint_path=old.pth",
        "train.resume_training_checkpoint_path: old.pth",
        ("no such file",),
    ),
    Case(
        "resume-pickle-with-code",
        f"{TRAIN} train.resume_training_checkpoint_path=old.pth",
        "old.pth",
        ("nothing in it was executed",),
        (bare_pickle("old.pth"),),
    ),
    Case(
        "resume-from-a-finished-model",
        f"{TRAIN} train.resume_training_checkpoint_path={MODEL}",
        MODEL,
        ("is no training checkpoint", "train.pretrained_model_path"),
    ),
]

GRAPHS = [
    Case("graph-missing", ON_ONNX, GRAPH, ("no such file", "make it with `snakemake"), (remove(GRAPH),)),
    Case("graph-missing-for-precision", PRECISION, GRAPH, ("no such file",), (remove(GRAPH),)),
    Case("graph-cut-off", ON_ONNX, GRAPH, ("cannot load it", "export again"), (cut(GRAPH),)),
    Case("graph-cut-off-for-precision", PRECISION, GRAPH, ("not an ONNX file, or cut off",), (cut(GRAPH),)),
    Case("graph-of-text", PARITY, GRAPH, ("cannot load it",), (text(GRAPH, "a graph\n"),)),
    Case("graph-of-no-bytes", PRECISION, GRAPH, ("tessera",), (text(GRAPH, ""),)),
    Case("graph-foreign", ON_ONNX, GRAPH, ("carries no tessera header",), (foreign,)),
    Case("graph-foreign-for-precision", PRECISION, GRAPH, ("carries no tessera header",), (foreign,)),
    Case("graph-header-not-json", ON_ONNX, GRAPH, ("header is not JSON",), (header(lambda written: written[:-9]),)),
    Case(
        "graph-header-nested-without-end",
        ON_ONNX,
        GRAPH,
        ("header is not JSON",),
        (header(lambda written: "[" * 200_000),),
    ),
    Case(
        "graph-header-damaged",
        PRECISION,
        GRAPH,
        ("header is damaged",),
        (in_graph_header("spec.train.num_epochs", "many"),),
    ),
    Case("graph-header-newer", PARITY, GRAPH, ("header format 2",), (in_graph_header("format", 2),)),
    Case(
        "graph-of-another-spec",
        ON_ONNX,
        GRAPH,
        ("another spec", "export.opset_version: 18 -> 20"),
        (recipe({"export": {"opset_version": 20}}),),
        lines=2,
    ),
    Case(
        "graph-of-another-spec-for-precision",
        PRECISION,
        GRAPH,
        ("another spec", "export.opset_version: 18 -> 20"),
        (recipe({"export": {"opset_version": 20}}),),
        lines=2,
    ),
    Case(
        "graph-of-another-stage",
        ON_ONNX,
        GRAPH,
        ("by the stage precision", "expected one by export"),
        (in_graph_header("stage", "precision"),),
    ),
    Case("graph-with-weights-elsewhere", ON_ONNX, GRAPH, ("cannot load it",), (graph(with_external_data),)),
    Case("graph-with-weights-elsewhere-for-precision", PRECISION, GRAPH, ("ONNX",), (graph(with_external_data),)),
    Case("graph-with-another-input", ON_ONNX, GRAPH, ("pixels", "expected `images` of"), (graph(with_another_input),)),
    Case("half-graph-missing", f"{ON_ONNX} --precision fp16", f"{FOLDER}/model.fp16.onnx", ("no such file",)),
    Case("half-precision-of-pytorch", f"{EVALUATE} --precision fp16", "--precision fp16", ("--runtime onnx or trt",)),
    Case("engine-without-tensorrt", f"engine {EXPERIMENT}", f"{FOLDER}/model.engine", ("needs", "onnx_eval.json")),
    Case("engine-missing", f"{EVALUATE} --runtime trt", f"{FOLDER}/model.engine", ("no such file",)),
    Case(
        "engine-of-text",
        f"{EVALUATE} --runtime trt",
        f"{FOLDER}/model.engine",
        ("needs",),
        (text(f"{FOLDER}/model.engine", "an engine"),),
    ),
]

EVALUATIONS = [
    Case("evaluation-missing", COMPARE, EVALUATION, ("no such file",), (remove(EVALUATION),)),
    Case("evaluation-cut-off", COMPARE, EVALUATION, ("not valid JSON", "cut off"), (cut(EVALUATION),)),
    Case("evaluation-list", COMPARE, EVALUATION, ("carries no seal",), (text(EVALUATION, "[1, 2]"),)),
    Case(
        "evaluation-without-seal",
        COMPARE,
        EVALUATION,
        ("carries no seal", "make it again"),
        (edit(EVALUATION, lambda document: {key: document[key] for key in document if key != "seal"}),),
    ),
    Case(
        "evaluation-without-metrics",
        COMPARE,
        EVALUATION,
        ("is no evaluation file", "metrics", "make it again"),
        (resealed(lambda document: {key: document[key] for key in document if key != "metrics"}),),
    ),
    Case(
        "evaluation-edited-by-hand",
        COMPARE,
        EVALUATION,
        ("was edited after it was written", f"`snakemake --cores 2 --force {EVALUATION}`"),
        (edit(EVALUATION, put("metrics.PQ", 0.99)),),
    ),
    Case(
        "evaluation-metric-of-text",
        COMPARE,
        EVALUATION,
        ("is no evaluation file", "metrics.PQ"),
        (in_evaluation("metrics.PQ", "high"),),
    ),
    Case(
        "evaluation-metric-above-1",
        COMPARE,
        EVALUATION,
        ("metrics.PQ", "less than or equal to 1, found 41.5"),
        (in_evaluation("metrics.PQ", 41.5),),
    ),
    Case(
        "evaluation-metric-not-a-number",
        COMPARE,
        EVALUATION,
        ("was edited after it was written",),
        (edit(EVALUATION, put("metrics.PQ", float("nan"))),),
    ),
    Case(
        "evaluation-of-another-runtime",
        COMPARE,
        EVALUATION,
        ("says it is of", "onnx", "copied by hand"),
        (in_evaluation("runtime", "onnx"),),
    ),
    Case(
        "evaluation-of-another-spec",
        COMPARE,
        EVALUATION,
        ("another spec", "train.num_epochs: 2 -> 3", "make it again"),
        (OTHER_SPEC,),
        lines=2,
    ),
    Case("evaluation-asked-twice", "compare twice", "tables.twice.experiments", ("stands twice", "keep one")),
    Case("evaluation-of-unknown-table", "compare dmeo", "no table 'dmeo'", ("did you mean demo",)),
    Case(
        "evaluation-of-unknown-metric",
        COMPARE,
        "tables.demo.metrics",
        ("no evaluation has PQQ", "mode is panoptic"),
        (table(metrics=["PQQ"]),),
    ),
    Case(
        "evaluation-of-a-runtime-that-never-ran",
        COMPARE,
        f"{FOLDER}/onnx_eval.json",
        ("no such file",),
        (table(runtimes=["torch", "onnx"]),),
    ),
    Case(
        "why-of-a-missing-file",
        f"why {EXPERIMENT} train",
        f"{FOLDER}/train.json",
        ("no such file",),
        (remove(f"{FOLDER}/train.json"),),
    ),
    Case(
        "why-of-a-file-without-lineage",
        f"why {EXPERIMENT} evaluate",
        EVALUATION,
        ("lineage",),
        (edit(EVALUATION, lambda value: value.pop("lineage") and None),),
    ),
    Case("why-of-a-list", f"why {EXPERIMENT} evaluate", EVALUATION, ("lineage",), (text(EVALUATION, "[]"),)),
]

CASES = [*CHECKPOINTS, *GRAPHS, *EVALUATIONS]
