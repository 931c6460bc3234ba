"""One sub-command per stage. Every stage is imported when it is called, so that `tessera compare` needs no torch."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.commands import (
    CHECKS,
    ELSEWHERE,
    RESULTS,
    infer_files,
    is_model_file,
    model_file,
    open_job,
    require_outside,
    require_run,
    run,
    split_arguments,
)
from tessera.files import UserError, raise_open_file_limit, read_json, refusal, write_json, write_text
from tessera.log import start_log
from tessera.spec.lineage import GENERATED_ROOT, STAGES, dataset_root
from tessera.spec.planning import record_file
from tessera.spec.sources import CONVERTED

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Experiment = Annotated[
    str, typer.Argument(help="Name of an experiment: <model>_<backbone>[-<dataset>][-<variant>][-seed<n>].")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Keys of the spec as a.b=c, applied last.", show_default=False)
]
DataRoot = Annotated[
    str | None,
    typer.Option(
        help="Folder that datasets' paths are relative to; generated and fetched ones lie in data/ all the same.",
        show_default="config/config.yaml's",
    ),
]
Expect = Annotated[
    str | None, typer.Option(help="Lineage digest planned by the workflow; another one is refused.", show_default=False)
]
Log = Annotated[Path | None, typer.Option(help="File that receives everything printed, too.", show_default=False)]
Runtime = Annotated[str, typer.Option(help="What executes the network: torch, onnx or trt.")]
Precision = Annotated[str, typer.Option(help="fp32 or fp16; of the ONNX graph or the engine.")]
Testing = Annotated[
    str,
    typer.Option(help="Another way of testing: the name of a file in config/testing.", show_default="the experiment's"),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="Weights to read in place of the experiment's own model: a checkpoint such as checkpoints/.../model_epoch_005.pth, or another "
        "model file. Needs --out.",
        show_default=False,
    ),
]
Table = Annotated[str, typer.Argument(help="Name of a table in config/config.yaml.")]


def _show_version(asked: bool) -> None:
    if asked:
        print(f"tessera {importlib.metadata.version('tessera')}")
        raise typer.Exit


def _out(what: str) -> Any:
    return typer.Option(
        help=f"{what} to write in place of the workflow's; needed with overrides.",
        show_default="in results/<experiment>/",
    )


OutFolder = Annotated[Path | None, _out("Folder")]
OutGraph = Annotated[Path | None, _out(".onnx file")]
OutEngine = Annotated[Path | None, _out(".engine file")]
OutRecord = Annotated[Path | None, _out(".json file")]


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Reproducible segmentation and detection experiments. Each sub-command is one stage; `snakemake` runs them in order."""


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
    folder = Path(grid.root_of(dataset)) / dataset
    write_demo(folder, spec.generator)
    _wrote(folder)


@app.command()
def fetch(
    dataset: Annotated[str, typer.Argument(help="Name of a dataset with archives.")],
    data_root: DataRoot = None,
    log: Log = None,
) -> None:
    """Fetch and unpack a dataset's archives into data/<dataset>/."""
    from tessera.interop.storage import fetch_dataset
    from tessera.spec.compose import load_grid

    _start_log(log)
    grid = load_grid(data_root=data_root)
    spec = grid.dataset(dataset)
    if not spec.fetch:
        raise UserError(f"config/datasets/{dataset}.yaml: has no `fetch`, so nothing is to be fetched")
    fetch_dataset(spec, grid.data_root)
    _wrote(Path(GENERATED_ROOT) / dataset)


@app.command()
def convert(
    dataset: Annotated[str, typer.Argument(help="Name of a dataset of KITTI folders.")],
    processes: Annotated[int, typer.Option(min=1, help="Of them reading at once; the result is the same.")] = 1,
    data_root: DataRoot = None,
    log: Log = None,
) -> None:
    """Make COCO shards of KITTI folders, with a report of every label that is left out."""
    from tessera.interop.kitti import convert_dataset, describe
    from tessera.spec.compose import load_grid

    _start_log(log)
    grid = load_grid(data_root=data_root)
    print(describe(convert_dataset(grid.dataset(dataset), grid.root_of(dataset), processes)))
    _wrote(Path(GENERATED_ROOT) / dataset / CONVERTED)


@app.command("export-kitti")
def export_kitti(
    dataset: Annotated[str, typer.Argument(help="Name of a dataset of type coco.")],
    out: Annotated[Path, typer.Option(help="Folder to make; a label file an image, in <out>/<split>/.")],
    data_root: DataRoot = None,
    log: Log = None,
) -> None:
    """Write the boxes of a COCO dataset as KITTI label files: the way back from `convert`."""
    from tessera.interop.kitti import export_kitti
    from tessera.spec.compose import load_grid

    _start_log(log)
    grid = load_grid(data_root=data_root)
    require_outside(out)
    counts = export_kitti(grid.dataset(dataset), grid.root_of(dataset), out)
    print("\n".join(f"{split}: {images} images, {boxes} boxes" for split, (images, boxes) in counts.items()))
    _wrote(out)


@app.command()
def check(
    dataset: Annotated[str, typer.Argument(help="Name of a dataset.")],
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="data/checks/<dataset>.json")] = None,
    data_root: DataRoot = None,
    log: Log = None,
) -> None:
    """Open every file of a dataset and list all problems at once."""
    from tessera.data.check import check_dataset
    from tessera.spec.compose import load_grid

    _start_log(log)
    grid = load_grid(data_root=data_root)
    root, own = grid.root_of(dataset), CHECKS / f"{dataset}.json"
    path = own if out is None else out
    if out is None and root != dataset_root(grid.dataset(dataset), grid.file.data_root):
        words = ["tessera", "check", dataset, "--data-root", root, "--out", str(ELSEWHERE / own.name)]
        raise UserError(
            f"--data-root {root}: {own} is the workflow's, of the data below {grid.file.data_root}; write elsewhere: `{shlex.join(words)}`"
        )
    if path.resolve() != own.resolve():
        require_outside(path)
    report = check_dataset(grid.dataset(dataset), root)
    write_json(path, report)
    _wrote(path)


@app.command()
def train(
    experiment: Experiment,
    overrides: Overrides = None,
    checkpoints: Annotated[Path, typer.Option(help="Root of the resume state.")] = Path("checkpoints"),
    out: OutFolder = None,
    data_root: DataRoot = None,
    expect: Expect = None,
    log: Log = None,
) -> None:
    """Train; continues by itself from the newest valid checkpoint of the same training."""
    _start_log(log)
    run(open_job("train", experiment, overrides, data_root, expect, out=out), checkpoints)


@app.command()
def export(
    experiment: Experiment,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    out: OutGraph = None,
    data_root: DataRoot = None,
    expect: Expect = None,
    log: Log = None,
) -> None:
    """Write model.onnx, and what it was made from."""
    _start_log(log)
    run(open_job("export", experiment, overrides, data_root, expect, checkpoint=checkpoint, out=out))


@app.command()
def precision(
    experiment: Experiment,
    overrides: Overrides = None,
    precision: Precision = "fp16",
    out: OutGraph = None,
    data_root: DataRoot = None,
    expect: Expect = None,
    log: Log = None,
) -> None:
    """Write model.fp16.onnx from model.onnx, and a report of size and difference."""
    _start_log(log)
    run(open_job("precision", experiment, overrides, data_root, expect, precision=precision, out=out))


@app.command()
def engine(
    experiment: Experiment,
    overrides: Overrides = None,
    precision: Precision = "fp32",
    out: OutEngine = None,
    data_root: DataRoot = None,
    expect: Expect = None,
    log: Log = None,
) -> None:
    """Build a TensorRT engine from the ONNX graph of that precision. Needs an NVIDIA GPU."""
    _start_log(log)
    run(open_job("engine", experiment, overrides, data_root, expect, precision=precision, out=out))


@app.command()
def parity(
    experiment: Experiment,
    overrides: Overrides = None,
    runtime: Runtime = "onnx",
    precision: Precision = "fp32",
    out: OutRecord = None,
    data_root: DataRoot = None,
    expect: Expect = None,
    log: Log = None,
) -> None:
    """Compare a runtime's outputs with PyTorch's on real images; fails outside the tolerance."""
    _start_log(log)
    run(open_job("parity", experiment, overrides, data_root, expect, runtime, precision, out=out))


@app.command()
def evaluate(
    experiment: Experiment,
    overrides: Overrides = None,
    runtime: Runtime = "torch",
    precision: Precision = "fp32",
    testing: Testing = "",
    checkpoint: Checkpoint = None,
    out: OutRecord = None,
    data_root: DataRoot = None,
    expect: Expect = None,
    log: Log = None,
) -> None:
    """Measure a runtime on every image of the evaluated split."""
    _start_log(log)
    run(open_job("evaluate", experiment, overrides, data_root, expect, runtime, precision, checkpoint, out, testing))


@app.command()
def infer(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="Name of an experiment, or a model file anywhere: .pth (also a checkpoint), .onnx or .engine."
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            help="Images, folders (with their sub-folders), http(s) addresses, or a COCO .json file that lists images (`image_info`); and keys "
            "of the spec as a.b=c. Without any image an experiment takes its own: `inference.images`, or the evaluated split.",
            show_default=False,
        ),
    ] = None,
    runtime: Runtime = "torch",
    precision: Precision = "fp32",
    testing: Testing = "",
    checkpoint: Checkpoint = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The first so many images alone.", show_default="all that are named")
    ] = None,
    draw: Annotated[
        str | None,
        typer.Option(
            help="Pictures: off, one per image, or all that the mode has. An experiment's key is inference.draw.",
            show_default="all",
        ),
    ] = None,
    label_map: Annotated[
        Path | None,
        typer.Option(help="Label map with names and colours for the class ids.", show_default="the model file's"),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of the images that a .json file lists.", show_default="the folder of that file"),
    ] = None,
    out: OutFolder = None,
    data_root: DataRoot = None,
    expect: Expect = None,
    log: Log = None,
) -> None:
    """Write overlays and machine-readable results: of an experiment for its own images, of any model file for the images that are named."""
    _start_log(log)
    places, overrides = split_arguments(arguments or ())
    settings = [] if draw is None else [f"inference.draw={draw}"]
    if is_model_file(model) or places:
        refused = dict.fromkeys(("data_root", "expect"), "is for an experiment's own images")
        refused["checkpoint"] = f"images that are named take one model; name this one in place of {model}"
        if is_model_file(model):
            refused |= dict.fromkeys(("runtime", "precision"), f"is for an experiment; {model} is one kind of file")
        for name, reason in refused.items():
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                raise UserError(f"--{name.replace('_', '-')} {context.params[name]}: {reason}")
        require_run("infer", runtime, precision)
        path = Path(model) if is_model_file(model) else model_file(model, runtime, precision)
        infer_files(path, places, [*overrides, *settings], out, limit, label_map, images, testing)
        return
    for option, value in (("--label-map", label_map), ("--images", images)):
        if value is not None:
            raise UserError(f"{option} {value}: is for images that are named, and none are")
    settings += [] if limit is None else [f"inference.max_images={limit}"]
    overrides += settings
    run(open_job("infer", model, overrides, data_root, expect, runtime, precision, checkpoint, out, testing))


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
    from tessera.interop.published import take_over, weights_file
    from tessera.models import build_model
    from tessera.models.artifact import save_model
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
    require_outside(path)
    save_model(path, imported.state, Header("import", experiment, spec, source, catalog))
    print(imported.describe(verbose))
    print(f"wrote {path}: set train.pretrained_model_path to it")


@app.command()
def compare(table: Table, data_root: DataRoot = None, log: Log = None) -> None:
    """Write results/tables/<table>.{csv,md,tex,html,json} from the evaluations that config/config.yaml lists for it."""
    from tessera.spec.compose import load_grid
    from tessera.tables.compare import compare

    _start_log(log)
    compare(load_grid(data_root=data_root), table, RESULTS)
    _wrote(*(RESULTS / "tables" / f"{table}.{ending}" for ending in ("csv", "md", "tex", "html", "json")))


@app.command()
def metrics(data_root: DataRoot = None, log: Log = None) -> None:
    """Write results/metrics.json and metrics.csv: metrics of the experiments that config/config.yaml lists."""
    from tessera.spec.compose import load_grid
    from tessera.tables.flat import write_metrics

    _start_log(log)
    write_metrics(load_grid(data_root=data_root), RESULTS)
    _wrote(RESULTS / "metrics.json", RESULTS / "metrics.csv")


@app.command()
def verify(
    path: Annotated[
        Path, typer.Argument(help="results, results/<experiment>, results/tables or results/figures.")
    ] = RESULTS,
    data_root: DataRoot = None,
    log: Log = None,
) -> None:
    """Say of every file of a results tree whether it still is what its stage wrote, from the present spec, and whether its numbers follow."""
    from tessera.spec.compose import load_grid
    from tessera.tables.verify import verify

    _start_log(log)
    counts = {"holds": 0, "broken": 0, "warning": 0}
    for finding in verify(load_grid(data_root=data_root), path, RESULTS):
        counts[finding.verdict] += 1
        print(finding, flush=True)
    if counts["broken"]:
        raise UserError(f"{path}: {counts['broken']} of these lines say that something no longer holds")
    print(f"{path}: all of it holds, {counts['warning']} warnings", flush=True)


@app.command()
def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    checkpoints: Annotated[
        Path | None, typer.Option(help="Root of the resume state.", show_default="config/config.yaml's")
    ] = None,
    data_root: DataRoot = None,
    log: Log = None,
) -> None:
    """Remove checkpoints that no experiment of the grid can continue from, and of finished trainings all but the last and the best."""
    from tessera.spec.compose import load_grid
    from tessera.training.prune import describe_size, prune

    _start_log(log)
    grid = load_grid(data_root=data_root)
    root = checkpoints or Path(grid.file.checkpoints)
    sizes = {"remove": 0, "keep": 0}
    for item in prune(grid, root, RESULTS, dry_run):
        sizes[item.verdict] += item.size
        print(item, flush=True)
    done = "would be removed (--dry-run)" if dry_run else "removed"
    print(f"{root}: {describe_size(sizes['remove'])} {done}, {describe_size(sizes['keep'])} kept", flush=True)


@app.command()
def figures(table: Table, data_root: DataRoot = None, log: Log = None) -> None:
    """Draw results/figures/<table>/*.{png,pdf}: curves, accuracy against time, scores by class and pictures of a table's experiments."""
    from tessera.spec.compose import load_grid
    from tessera.tables.figures import figures

    _start_log(log)
    figures(load_grid(data_root=data_root), table, RESULTS)
    _wrote(RESULTS / "figures" / table)


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
    testing: Testing = "",
    data_root: DataRoot = None,
) -> None:
    """Say what differs between the spec as it is now and the one that an existing output was made with."""
    from tessera.spec.compose import explain, load_grid

    resolved = load_grid(data_root=data_root).resolve(experiment, overrides or (), testing)
    found = _found_lineage(experiment, stage, runtime, precision, testing)
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
    from tessera.interop.tao import import_spec, write_files

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
    _wrote(out, schema)


def main() -> None:
    """Entry point: a user's mistake is one clear message and exit code 1, never a traceback."""
    raise_open_file_limit()
    try:
        code = app(standalone_mode=False)
        if code == 130:  # Typer swallows Ctrl-C and gives what the exit code would be.
            raise KeyboardInterrupt
    except UserError as error:
        _fail(str(error) or f"{type(error).__name__} without a message", 1)
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
    """The message of a call without any command is the help, which was printed already."""
    if message:
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def _wrote(*paths: Path) -> None:
    print(f"wrote {', '.join(map(str, paths))}", flush=True)


def _found_lineage(experiment: str, stage: str, runtime: str, precision: str, testing: str) -> dict[str, object]:
    """Lineage in the output that exists now."""
    if stage not in STAGES:
        raise UserError(f"{stage}: no such stage; expected one of {', '.join(STAGES)}")
    path = RESULTS / experiment / record_file(stage, runtime, precision, testing)
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
