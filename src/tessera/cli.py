"""One sub-command per stage. Every stage is imported when it is called, so that `tessera compare` needs no torch."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tessera import gpus
from tessera.files import UserError, read_json, refusal, write_json, write_text
from tessera.log import start_log
from tessera.provenance import digests, sealed
from tessera.spec.lineage import RUNTIMES, STAGES, lineage, lineage_digest
from tessera.spec.planning import RUN_STAGES, record_file, statistics_file

if TYPE_CHECKING:
    from tessera.inference.predictor import Predictor
    from tessera.spec.compose import Resolved
    from tessera.spec.schema import ViewsSpec

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Reproducible segmentation and detection experiments. Each sub-command is one stage; `snakemake` runs them in order.",
)

Experiment = Annotated[
    str, typer.Argument(help="Name of an experiment: <model>_<backbone>[-<dataset>][-<variant>][-seed<n>].")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Keys of the spec as a.b=c, applied last.", show_default=False)
]
DataRoot = Annotated[
    str | None, typer.Option(help="Folder that datasets' paths are relative to.", show_default="config/config.yaml's")
]
Expect = Annotated[
    str | None, typer.Option(help="Lineage digest planned by the workflow; another one is refused.", show_default=False)
]
Log = Annotated[Path | None, typer.Option(help="File that receives everything printed, too.", show_default=False)]
Runtime = Annotated[str, typer.Option(help="What executes the network: torch, onnx or trt.")]
Precision = Annotated[str, typer.Option(help="fp32 or fp16; of the ONNX graph or the engine.")]

RESULTS = Path("results")


@app.command()
def demo(
    dataset: Annotated[str, typer.Argument(help="Name of a dataset with a generator.")] = "demo",
    data_root: DataRoot = None,
    log: Log = None,
) -> None:
    """Generate a demo dataset in every supported format."""
    from tessera.data.demo import write_demo
    from tessera.spec.compose import load_grid

    _start_log(log)
    grid = load_grid(data_root=data_root)
    spec = grid.dataset(dataset)
    if spec.generator is None:
        raise UserError(f"config/datasets/{dataset}.yaml: has no `generator`; only generated datasets can be made")
    write_demo(Path(grid.data_root) / dataset, spec.generator)


@app.command()
def fetch(
    dataset: Annotated[str, typer.Argument(help="Name of a dataset with archives.")],
    data_root: DataRoot = None,
    log: Log = None,
) -> None:
    """Fetch and unpack a dataset's archives into data/<dataset>/."""
    from tessera.data.fetch import fetch_dataset
    from tessera.spec.compose import load_grid

    _start_log(log)
    grid = load_grid(data_root=data_root)
    spec = grid.dataset(dataset)
    if not spec.fetch:
        raise UserError(f"config/datasets/{dataset}.yaml: has no `fetch`, so nothing is to be fetched")
    fetch_dataset(spec, grid.data_root)


@app.command()
def convert(
    dataset: Annotated[str, typer.Argument(help="Name of a dataset of KITTI folders.")],
    processes: Annotated[int, typer.Option(min=1, help="Of them reading at once; the result is the same.")] = 1,
    data_root: DataRoot = None,
    log: Log = None,
) -> None:
    """Make COCO shards of KITTI folders, with a report of every label that is left out."""
    from tessera.data.kitti import convert_dataset, describe
    from tessera.spec.compose import load_grid

    _start_log(log)
    grid = load_grid(data_root=data_root)
    print(describe(convert_dataset(grid.dataset(dataset), grid.data_root, processes)), flush=True)


@app.command("export-kitti")
def export_kitti(
    dataset: Annotated[str, typer.Argument(help="Name of a dataset of type coco.")],
    out: Annotated[Path, typer.Option(help="Folder to make; a label file an image, in <out>/<split>/.")],
    data_root: DataRoot = None,
    log: Log = None,
) -> None:
    """Write the boxes of a COCO dataset as KITTI label files: the way back from `convert`."""
    from tessera.data.kitti_export import export_kitti
    from tessera.spec.compose import load_grid

    _start_log(log)
    grid = load_grid(data_root=data_root)
    counts = export_kitti(grid.dataset(dataset), grid.data_root, out)
    print(
        "\n".join(f"{split}: {images} images, {boxes} boxes" for split, (images, boxes) in counts.items()), flush=True
    )


@app.command()
def check(
    dataset: str,
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="data/checks/<dataset>.json")] = None,
    data_root: DataRoot = None,
    log: Log = None,
) -> None:
    """Open every file of a dataset and list all problems at once."""
    from tessera.data.check import check_dataset
    from tessera.spec.compose import load_grid

    _start_log(log)
    grid = load_grid(data_root=data_root)
    report = check_dataset(grid.dataset(dataset), grid.data_root)
    write_json(out or Path(f"data/checks/{dataset}.json"), report)


@app.command()
def train(
    experiment: Experiment,
    overrides: Overrides = None,
    checkpoints: Annotated[Path, typer.Option(help="Root of the resume state.")] = Path("checkpoints"),
    data_root: DataRoot = None,
    expect: Expect = None,
    log: Log = None,
) -> None:
    """Train; continues by itself from the newest valid checkpoint of the same training."""
    from tessera.training.train import train

    resolved = _open(experiment, overrides, data_root, expect, log, "train")
    train(resolved.spec, experiment, _folder(experiment), checkpoints)


@app.command()
def export(
    experiment: Experiment,
    overrides: Overrides = None,
    data_root: DataRoot = None,
    expect: Expect = None,
    log: Log = None,
) -> None:
    """Write model.onnx."""
    from tessera.deploy.export import export

    resolved = _open(experiment, overrides, data_root, expect, log, "export")
    folder, source, made = _folder(experiment), _model(experiment), _model(experiment, "onnx")
    inputs = _model_digests(experiment, folder, ("torch", "fp32"))
    report = export(source, made, resolved.spec, experiment)
    write_json(folder / record_file("export"), sealed(report, inputs, digests(folder, [made])))


@app.command()
def precision(
    experiment: Experiment,
    overrides: Overrides = None,
    precision: Precision = "fp16",
    data_root: DataRoot = None,
    expect: Expect = None,
    log: Log = None,
) -> None:
    """Write model.fp16.onnx from model.onnx, and a report of size and difference."""
    from tessera.deploy.precision import to_fp16

    _require_precision(precision, ("fp16",))
    resolved = _open(experiment, overrides, data_root, expect, log, "precision", precision=precision)
    folder = _folder(experiment)
    source, made = folder / "model.onnx", folder / f"model.{precision}.onnx"
    inputs = _model_digests(experiment, folder, ("onnx", "fp32"))
    report = to_fp16(source, made, resolved.spec, experiment)
    write_json(folder / record_file("precision", precision=precision), sealed(report, inputs, digests(folder, [made])))


@app.command()
def engine(
    experiment: Experiment,
    overrides: Overrides = None,
    precision: Precision = "fp32",
    data_root: DataRoot = None,
    expect: Expect = None,
    log: Log = None,
) -> None:
    """Build a TensorRT engine from the ONNX graph of that precision. Needs an NVIDIA GPU."""
    from tessera.deploy.engine import build_engine

    _require_precision(precision)
    resolved = _open(experiment, overrides, data_root, expect, log, "engine", precision=precision)
    graph = _model(experiment, "onnx", precision)
    build_engine(graph, graph.with_suffix(".engine"), resolved.spec, experiment)


@app.command()
def parity(
    experiment: Experiment,
    overrides: Overrides = None,
    runtime: Runtime = "onnx",
    precision: Precision = "fp32",
    data_root: DataRoot = None,
    expect: Expect = None,
    log: Log = None,
) -> None:
    """Compare a runtime's outputs with PyTorch's on real images; fails outside the tolerance."""
    from tessera.data.datamodule import eval_loader
    from tessera.deploy.parity import check_parity
    from tessera.spec.schema import ViewsSpec

    resolved = _open(experiment, overrides, data_root, expect, log, "parity", runtime, precision)
    spec = resolved.spec
    inputs = _model_digests(experiment, _folder(experiment), ("torch", "fp32"), (runtime, precision))
    reference = _predictor(resolved, "torch", "fp32", _device(runtime), ViewsSpec())
    candidate = _predictor(resolved, runtime, precision, _device(runtime), ViewsSpec())
    loader = eval_loader(
        spec,
        reference.header.catalog,
        spec.evaluate.split,
        fixed_size=candidate.input_size,
        limit=spec.parity.images,
        max_batch=candidate.max_batch,
    )
    report = check_parity(reference, candidate, loader, spec)
    write_json(_folder(experiment) / record_file("parity", runtime, precision), sealed(report, inputs))


@app.command()
def evaluate(
    experiment: Experiment,
    overrides: Overrides = None,
    runtime: Runtime = "torch",
    precision: Precision = "fp32",
    data_root: DataRoot = None,
    expect: Expect = None,
    log: Log = None,
) -> None:
    """Measure a runtime on every image of the evaluated split."""
    from tessera.data.datamodule import eval_loader
    from tessera.evaluation.evaluate import evaluate
    from tessera.evaluation.statistics import Limits

    resolved = _open(experiment, overrides, data_root, expect, log, "evaluate", runtime, precision)
    spec = resolved.spec
    folder = _folder(experiment)
    inputs = _model_digests(experiment, folder, (runtime, precision))
    predictor = _predictor(resolved, runtime, precision, _device(runtime))
    catalog = predictor.header.catalog
    loader = eval_loader(
        spec, catalog, spec.evaluate.split, fixed_size=predictor.input_size, max_batch=predictor.max_batch
    )
    limits = Limits.of(spec.evaluate)
    evaluation = evaluate(predictor, loader, catalog, predictor.mode, classes=spec.evaluate.classes, limits=limits)
    out = folder / record_file("evaluate", runtime, precision)
    predictions, statistics = out.with_suffix(".predictions.json.gz"), statistics_file(out)
    evaluation.write_predictions(predictions)
    evaluation.write_statistics(statistics)
    document = evaluation.to_json(
        experiment=experiment,
        parts=resolved.parts,
        spec=spec,
        runtime=runtime,
        precision=precision,
        lineage=lineage(spec, "evaluate", runtime, precision),
    )
    write_json(out, sealed(document, inputs, digests(folder, [predictions, statistics])))
    print(evaluation.summary(), flush=True)
    for remark in document["remarks"]:
        print(f"evaluate: warning: {remark}", file=sys.stderr, flush=True)


@app.command()
def infer(
    experiment: Experiment,
    overrides: Overrides = None,
    runtime: Runtime = "torch",
    precision: Precision = "fp32",
    data_root: DataRoot = None,
    expect: Expect = None,
    log: Log = None,
) -> None:
    """Write overlays and machine-readable results for the images of `inference.images`, or of the evaluated split."""
    from tessera.inference.results import infer
    from tessera.inference.sources import ImageSource

    resolved = _open(experiment, overrides, data_root, expect, log, "infer", runtime, precision)
    spec = resolved.spec
    folder = (_folder(experiment) / record_file("infer", runtime, precision)).parent
    inputs = _model_digests(experiment, folder, (runtime, precision))
    predictor = _predictor(resolved, runtime, precision, _device(runtime))
    images: list[ImageSource] = []
    if spec.inference.images is None:
        from tessera.data.datasets import open_dataset

        catalog = predictor.header.catalog
        split = open_dataset(spec.dataset, spec.evaluate.split, catalog, spec.model.mode, spec.data_root)
        images = [
            ImageSource(split.image_path(index), split.file_names[index], split.image_ids[index])
            for index in range(len(split))
        ]
    infer(predictor, spec, folder, images, inputs)


@app.command("import")
def import_weights(
    experiment: Experiment,
    file: Annotated[Path, typer.Argument(help="Published checkpoint, or a folder of the transformers library.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="pretrained/<experiment>.pth")] = None,
    reset_heads: Annotated[
        bool, typer.Option(help="Class heads start afresh, for a dataset of other classes.")
    ] = False,
    classes_by_id: Annotated[
        bool, typer.Option(help="Take the rows of the class heads that have the numbers of the dataset's category ids.")
    ] = False,
    verbose: Annotated[bool, typer.Option(help="List every tensor with its name there and here.")] = False,
    data_root: DataRoot = None,
    log: Log = None,
) -> None:
    """Make a file for train.pretrained_model_path of a published checkpoint, every tensor accounted for."""
    from tessera.data.catalog import load_catalog
    from tessera.files import digest_file
    from tessera.models import build_model
    from tessera.models.artifact import save_model
    from tessera.models.published import weights_file
    from tessera.models.published.importing import take_over
    from tessera.provenance import Header
    from tessera.spec.compose import load_grid

    _start_log(log)
    if reset_heads and classes_by_id:
        raise UserError("--reset-heads and --classes-by-id: choose one of them")
    spec = load_grid(data_root=data_root).resolve(experiment, overrides or ()).spec
    catalog = load_catalog(spec.dataset, spec.data_root, spec.model.mode)
    network = build_model(spec.model, catalog, spec.postprocess, load_pretrained=False).network
    imported = take_over(file, network, spec.model, catalog, reset_heads, classes_by_id)
    source = {"form": imported.form.title, "sha256": digest_file(weights_file(file))}
    path = out or Path("pretrained") / f"{experiment}.pth"
    save_model(path, imported.state, Header("import", experiment, spec, source, catalog))
    print(imported.describe(verbose))
    print(f"wrote {path}: set train.pretrained_model_path to it")


@app.command()
def compare(table: str, data_root: DataRoot = None, log: Log = None) -> None:
    """Write results/tables/<table>.{csv,md,tex,html,json} from the evaluations that config/config.yaml lists for it."""
    from tessera.reporting.compare import compare
    from tessera.spec.compose import load_grid

    _start_log(log)
    compare(load_grid(data_root=data_root), table, RESULTS)


@app.command()
def metrics(data_root: DataRoot = None, log: Log = None) -> None:
    """Write results/metrics.json and metrics.csv: metrics of the experiments that config/config.yaml lists."""
    from tessera.reporting.metrics import write_metrics
    from tessera.spec.compose import load_grid

    _start_log(log)
    write_metrics(load_grid(data_root=data_root), RESULTS)


@app.command()
def verify(
    path: Annotated[
        Path, typer.Argument(help="results, results/<experiment>, results/tables or results/figures.")
    ] = RESULTS,
    data_root: DataRoot = None,
    log: Log = None,
) -> None:
    """Say of every file of a results tree whether it still is what its stage wrote, from the present spec, and whether its numbers follow."""
    from tessera.reporting.verify import verify
    from tessera.spec.compose import load_grid

    _start_log(log)
    counts = {"holds": 0, "broken": 0, "warning": 0}
    for finding in verify(load_grid(data_root=data_root), path, RESULTS):
        counts[finding.verdict] += 1
        print(finding, flush=True)
    if counts["broken"]:
        raise UserError(f"{path}: {counts['broken']} of these lines say that something no longer holds")
    print(f"{path}: all of it holds, {counts['warning']} warnings", flush=True)


@app.command()
def figures(table: str, data_root: DataRoot = None, log: Log = None) -> None:
    """Draw results/figures/<table>/*.{png,pdf}: curves, accuracy against time, scores by class and pictures of a table's experiments."""
    from tessera.reporting.figures import figures
    from tessera.spec.compose import load_grid

    _start_log(log)
    figures(load_grid(data_root=data_root), table, RESULTS)


@app.command()
def spec(experiment: Experiment, overrides: Overrides = None, data_root: DataRoot = None) -> None:
    """Print the resolved spec with the origin of every value."""
    from tessera.spec.compose import load_grid, render_spec

    print(render_spec(load_grid(data_root=data_root).resolve(experiment, overrides or ())))


@app.command()
def why(
    experiment: Experiment,
    stage: Annotated[str, typer.Argument(help=f"One of {', '.join(STAGES)}.")],
    overrides: Overrides = None,
    runtime: Runtime = "torch",
    precision: Precision = "fp32",
    data_root: DataRoot = None,
) -> None:
    """Say what differs between the spec as it is now and the one that an existing output was made with."""
    from tessera.spec.compose import explain, load_grid

    resolved = load_grid(data_root=data_root).resolve(experiment, overrides or ())
    found = _found_lineage(experiment, stage, runtime, precision)
    print(explain(found, resolved, stage, runtime, precision))


@app.command("import-spec")
def import_spec(
    files: Annotated[
        list[Path], typer.Argument(help="Experiment specs of NVIDIA TAO (YAML); several are read as one.")
    ],
    name: Annotated[str, typer.Option(help="What the dataset is to be called here.")],
    variant: Annotated[str, typer.Option(help="What the recipe is to be called here.")] = "tao",
    model: Annotated[
        str | None,
        typer.Option(help="mask2former, oneformer or deformable_detr; left out, the keys tell.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Root of the project, which holds config/.")] = Path(),
) -> None:
    """Turn TAO specs into parts of this project, and say of every key what became of it."""
    from tessera.spec.tao import import_spec, write_files

    done = import_spec(files, name, model, variant, out)
    write_files(done.files)
    print(done.report)


@app.command()
def reference(
    out: Annotated[Path, typer.Option(help="Markdown reference of every key.")] = Path("docs/spec.md"),
    schema: Annotated[Path, typer.Option(help="JSON Schema for editors.")] = Path("config/spec.schema.json"),
) -> None:
    """Write the reference of every key of a spec, and the JSON Schema, from the schema itself."""
    from tessera.spec.document import json_schema, reference_markdown

    write_text(out, reference_markdown())
    write_json(schema, json_schema())


def main() -> None:
    """Entry point: a user's mistake is one clear message and exit code 1, never a traceback."""
    try:
        app(standalone_mode=False)
    except UserError as error:
        _fail(str(error), 1)
    except typer.Abort:
        _fail("interrupted", 130)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except typer.TyperException as error:
        _fail(error.format_message(), 2)
    except BrokenPipeError:
        os._exit(141)
    except PermissionError as error:
        found = error.filename or "a file"
        _fail(f"{found}: this user may not read or write it; change its owner or mode and run the same again", 1)
    except OSError as error:
        reason = refusal(error)
        if reason is None:
            raise
        _fail(f"{error.filename or 'a file'}: cannot be written: {reason} and run the same again", 1)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def _open(
    experiment: str,
    overrides: list[str] | None,
    data_root: str | None,
    expect: str | None,
    log: Path | None,
    verb: str,
    runtime: str = "torch",
    precision: str = "fp32",
) -> Resolved:
    """Resolve the spec and make sure that it is still the one the workflow planned with."""
    from tessera.spec.compose import load_grid

    _start_log(log)
    if runtime not in RUNTIMES:
        raise UserError(f"--runtime {runtime}: expected one of {', '.join(RUNTIMES)}")
    _require_precision(precision)
    if verb in RUN_STAGES and runtime == "torch" and precision != "fp32":
        raise UserError(
            f"--precision {precision}: PyTorch evaluates the trained fp32 weights; choose --runtime onnx or trt"
        )
    resolved = load_grid(data_root=data_root).resolve(experiment, overrides or ())
    if verb == "train":
        gpus.hold(resolved.spec.train.processes, resolved.spec.train.gpu_ids)
    elif runtime == "trt" or verb == "engine" or (runtime == "torch" and verb in ("evaluate", "infer")):
        gpus.hold()
    found = lineage_digest(resolved.spec, verb, runtime, precision)
    if expect is not None and found != expect:
        raise UserError(
            f"{experiment}: the configuration or the dataset changed while the workflow was running "
            f"(planned {expect}, now {found}); run snakemake again"
        )
    return resolved


def _require_precision(precision: str, allowed: tuple[str, ...] = ("fp32", "fp16")) -> None:
    if precision not in allowed:
        raise UserError(f"--precision {precision}: expected {' or '.join(allowed)}; int8 is not available yet")


def _folder(experiment: str) -> Path:
    return RESULTS / experiment


def _model(experiment: str, runtime: str = "torch", precision: str = "fp32") -> Path:
    suffix = {"torch": ".pth", "onnx": ".onnx", "trt": ".engine"}[runtime]
    return _folder(experiment) / ("model" + ("" if precision == "fp32" else f".{precision}") + suffix)


def _model_digests(experiment: str, folder: Path, *models: tuple[str, str]) -> dict[str, str]:
    """``provenance.digests`` of models by runtime and precision, as far as they are there: a missing one is refused when it is opened."""
    paths = (_model(experiment, runtime, precision) for runtime, precision in models)
    return digests(folder, (path for path in paths if path.is_file()))


def _predictor(
    resolved: Resolved, runtime: str, precision: str, device: str, testing: ViewsSpec | None = None
) -> Predictor:
    """The stage's parent model, found by name and refused when it was made from another spec. ``testing`` replaces the spec's."""
    from tessera.inference import load_predictor

    path = _model(resolved.name, runtime, precision)
    stage = {"torch": "train", "onnx": "export" if precision == "fp32" else "precision", "trt": "engine"}[runtime]
    if not path.exists():
        raise UserError(f"{path}: no such file; make it with `snakemake --cores 2 {path}`")
    predictor = load_predictor(path, resolved.spec.postprocess, device, testing or resolved.spec.testing)
    predictor.header.require(path, stage, lineage(resolved.spec, stage, precision=precision))
    return predictor


def _device(runtime: str) -> str:
    """The rules of ONNX Runtime take no GPU, so another stage may be computing on it."""
    return "cpu" if runtime == "onnx" else "auto"


def _found_lineage(experiment: str, stage: str, runtime: str, precision: str) -> dict[str, object]:
    """Of the output that exists now."""
    if stage not in STAGES:
        raise UserError(f"{stage}: no such stage; expected one of {', '.join(STAGES)}")
    path = _folder(experiment) / record_file(stage, runtime, precision)
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("lineage"), dict):
        raise UserError(f"{path}: has no `lineage`; expected a file that the stage {stage} wrote")
    found: dict[str, object] = content["lineage"]
    return found


def _start_log(log: Path | None) -> None:
    """One process of a training on several machines writes it; SLURM collects what the others print."""
    if log is not None and not int(os.environ.get("SLURM_PROCID", "0")):
        start_log(log)


if __name__ == "__main__":
    main()
