"""What the command of a stage does around the stage: which spec and model it reads, where it may write, and what it says at the end.

Everything heavy is imported where it is used, as in ``cli``.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessera import gpus
from tessera.files import UserError, digest_file, missing, read_json, workflow_command, write_json
from tessera.provenance import OtherSpecError, digests, sealed
from tessera.spec import planning
from tessera.spec.lineage import RUNTIMES, Lineages
from tessera.spec.planning import RUN_STAGES, record_file, statistics_file

if TYPE_CHECKING:
    from tessera.data.opened import OpenedData
    from tessera.inference.predictor import Predictor
    from tessera.inference.results import Written
    from tessera.inference.sources import ImageSource
    from tessera.provenance import Header
    from tessera.spec.compose import Resolved
    from tessera.spec.networks import Mode
    from tessera.spec.schema import Spec
    from tessera.structures import Batch, ClassCatalog

RESULTS = Path(planning.RESULTS)
CHECKS = Path("data/checks")
ELSEWHERE = Path("out")
"""Folder that a refused command is told to write to."""

SUFFIXES = {"torch": ".pth", "onnx": ".onnx", "trt": ".engine"}
"""Endings of the model that a runtime executes."""

MAKES = {"export": ".onnx", "precision": ".onnx", "engine": ".engine", "parity": ".json", "evaluate": ".json"}
"""How ``--out`` ends by stage; the others make a folder."""


@dataclass(frozen=True)
class Job:
    """One call of a stage."""

    verb: str
    resolved: Resolved
    lineages: Lineages
    """State of them when the command began: whatever it reads later must be what they say."""
    overrides: Sequence[str] = ()
    inert: bool = True
    """Whether the stage makes the same with the overrides as without them."""
    runtime: str = "torch"
    precision: str = "fp32"
    checkpoint: Path | None = None
    """Model file in place of the experiment's own."""
    out: Path | None = None
    """What is made in place of the experiment's own file or folder."""
    data_root: str | None = None
    """Folder given on the command line."""

    @property
    def name(self) -> str:
        return self.resolved.name

    @property
    def spec(self) -> Spec:
        return self.resolved.spec

    @property
    def testing(self) -> str:
        """Name of the way of testing."""
        return self.resolved.testing

    @property
    def changed(self) -> str | None:
        """What makes the result another one than the workflow's, in the words of the command line."""
        if not self.inert:
            return self.overrides[0]
        return None if self.checkpoint is None else f"--checkpoint {self.checkpoint}"

    @property
    def made(self) -> Path:
        """The file that the stage makes, or the folder that it fills."""
        return self.own if self.out is None else self.out

    @property
    def own(self) -> Path:
        """The same where the workflow has it."""
        folder, record = RESULTS / self.name, self.record_name
        if self.verb in ("export", "precision", "engine"):
            return model_file(self.name, "trt" if self.verb == "engine" else "onnx", self.precision)
        return folder / record if self.verb in MAKES else (folder / record).parent

    @property
    def record_name(self) -> str:
        """Below the experiment's folder."""
        return record_file(self.verb, self.runtime, self.precision, self.testing)

    @property
    def record(self) -> Path:
        """The JSON that the stage leaves; of a model that is written elsewhere it lies beside it and has its name."""
        record = RESULTS / self.name / self.record_name
        if self.out is None:
            return record
        if self.verb not in MAKES:
            return self.out / record.name
        return self.out if MAKES[self.verb] == ".json" else self.out.with_name(self.out.name + ".json")

    @property
    def model(self) -> Path:
        """What the stage reads."""
        return self.checkpoint or model_file(self.name, self.runtime, self.precision)

    def digests(self, *paths: Path) -> dict[str, str]:
        """Digests by place beside the record, as far as they are there: a missing one is refused when it is opened."""
        return digests(self.record.parent, [path for path in paths if path.is_file()])

    def command(self, out: Path) -> str:
        """The same call with ``--out``."""
        words = ["tessera", self.verb, self.name, *self.overrides]
        if self.verb in RUN_STAGES and self.runtime != ("onnx" if self.verb == "parity" else "torch"):
            words += ["--runtime", self.runtime]
        if self.precision != ("fp16" if self.verb == "precision" else "fp32"):
            words += ["--precision", self.precision]
        words += ["--testing", self.testing] if self.testing else []
        words += [] if self.checkpoint is None else ["--checkpoint", str(self.checkpoint)]
        words += [] if self.data_root is None else ["--data-root", self.data_root]
        return shlex.join([*words, "--out", str(out)])


def open_job(
    verb: str,
    experiment: str,
    overrides: Sequence[str] | None,
    data_root: str | None = None,
    expect: str | None = None,
    runtime: str = "torch",
    precision: str = "fp32",
    checkpoint: Path | None = None,
    out: Path | None = None,
    testing: str = "",
) -> Job:
    """Resolves the spec and makes sure that it is still the one the workflow planned with (``expect``), and that nothing of the workflow's is
    going to be replaced by something else. Raises UserError."""
    from tessera.spec.compose import load_grid

    require_run(verb, runtime, precision)
    overrides = tuple(overrides or ())
    grid = load_grid(data_root=data_root)
    resolved = grid.resolve(experiment, overrides, testing)
    lineages = Lineages(resolved.spec)
    found = lineages.digest(verb, runtime, precision)

    def makes_the_same() -> bool:
        try:
            workflow = grid.resolve(experiment, testing=testing).spec
        except UserError:  # makes nothing without the overrides
            return False
        return Lineages(workflow).digest(verb, runtime, precision) == found

    inert = not overrides or makes_the_same()
    job = Job(verb, resolved, lineages, overrides, inert, runtime, precision, checkpoint, out, data_root)
    if expect is not None and found != expect:
        raise UserError(
            f"{experiment}: the configuration or the dataset changed while the workflow was running "
            f"(planned {expect}, now {found}); run snakemake again"
        )
    _require_model(job)
    if out is not None and not job.changed and out.resolve() == job.own.resolve():
        job = replace(job, out=None)
    _require_place(job, planned=expect is not None)
    if verb == "train":
        gpus.hold(resolved.spec.train.processes, resolved.spec.train.gpu_ids)
    elif runtime == "trt" or verb == "engine" or (runtime == "torch" and verb in ("evaluate", "infer")):
        gpus.hold()
    return job


def run(job: Job, checkpoints: Path = Path("checkpoints")) -> None:
    """``checkpoints``: root of the resume state, for a training."""
    try:
        if job.verb == "train":
            from tessera.training.train import train

            _require_classes(job)
            train(job.spec, job.name, job.made, checkpoints, job.lineages)
        else:
            {
                "export": _export,
                "precision": _precision,
                "engine": _engine,
                "parity": _parity,
                "evaluate": _evaluate,
                "infer": _infer,
            }[job.verb](job)
    except OtherSpecError as error:
        advice = None if job.inert else _other_model(job, error.path)
        if advice is None:
            raise
        raise UserError(
            f"{error.path}: was made from another spec than these overrides give, and it is not made again here; {advice}\n{error.lines}"
        ) from None


def _require_classes(job: Job) -> None:
    """Raises UserError where later stages are asked for classes that the model to be trained will not have."""
    from tessera.data.catalog import load_catalog
    from tessera.spec.told import class_mistakes

    spec = job.spec
    if spec.evaluate.classes or spec.inference.color_map:
        catalog = load_catalog(spec.dataset, spec.data_root, spec.model.mode)
        job.resolved.refuse(class_mistakes(spec, catalog))


def _other_model(job: Job, path: Path) -> str | None:
    """How to come by the model that the overrides ask for in place of ``path``; None where they ask for no other one."""
    from tessera.spec.compose import load_grid

    try:
        before = Lineages(load_grid(data_root=job.data_root).resolve(job.name).spec)
    except UserError:  # makes nothing without the overrides
        before = None

    def differs(stage: str, precision: str = "fp32") -> bool:
        found = job.lineages.of(stage, precision=precision)
        return before is None or before.of(stage, precision=precision) != found

    stage = {".pth": "train", ".engine": "engine"}.get(path.suffix, "precision" if ".fp16." in path.name else "export")
    precision = "fp32" if stage in ("train", "export") else job.precision
    if not differs(stage, precision):
        return None
    if job.verb not in ("export", "evaluate", "infer") or stage not in ("train", "export"):
        return (
            "put the keys into config/variants/VARIANT.yaml and add VARIANT to `variants` in config/config.yaml; then "
            f"`{workflow_command(RESULTS / 'EXPERIMENT-VARIANT' / job.record_name)}` makes it and all before it"
        )
    words = [job.name, *job.overrides, *([] if job.data_root is None else ["--data-root", job.data_root])]
    folder, commands, made = ELSEWHERE / job.name, [], job.checkpoint
    if differs("train"):
        commands.append(["tessera", "train", *words, "--out", str(folder)])
        made = folder / "model.pth"
    if stage == "export":
        source = [] if made is None else ["--checkpoint", str(made)]
        made = folder / "model.onnx"
        commands.append(["tessera", "export", *words, *source, "--out", str(made)])
    steps = ", ".join(f"`{shlex.join(command)}`" for command in commands)
    return f"make another: {steps}, then `{replace(job, checkpoint=made).command(job.made)}`"


def require_run(verb: str, runtime: str, precision: str) -> None:
    """Raises UserError for a runtime or a precision that the stage does not have."""
    if runtime not in RUNTIMES:
        raise UserError(f"--runtime {runtime}: expected one of {', '.join(RUNTIMES)}")
    allowed = ("fp16",) if verb == "precision" else ("fp32", "fp16")
    if precision not in allowed:
        raise UserError(f"--precision {precision}: expected {' or '.join(allowed)}; int8 is not available yet")
    if verb in RUN_STAGES and runtime == "torch" and precision != "fp32":
        raise UserError(
            f"--precision {precision}: PyTorch evaluates the trained fp32 weights; choose --runtime onnx or trt"
        )


def model_file(experiment: str, runtime: str = "torch", precision: str = "fp32") -> Path:
    return RESULTS / experiment / ("model" + ("" if precision == "fp32" else f".{precision}") + SUFFIXES[runtime])


def device_of(runtime: str) -> str:
    """The rules of ONNX Runtime take no GPU, so another stage may be computing on it."""
    return "cpu" if runtime == "onnx" else "auto"


def _require_model(job: Job) -> None:
    """The file that ``--checkpoint`` names fits the runtime."""
    if job.checkpoint is None:
        return
    if not job.checkpoint.is_file():
        raise UserError(f"--checkpoint {missing(job.checkpoint)}")
    if job.checkpoint.suffix != SUFFIXES[job.runtime]:
        raise UserError(
            f"--checkpoint {job.checkpoint}: expected a name that ends in {SUFFIXES[job.runtime]}, which --runtime {job.runtime} executes"
        )


def require_outside(out: Path, advice: str = "name a place outside") -> None:
    """Raises UserError where ``out`` lies in the workflow's own trees."""
    for folder in (RESULTS, CHECKS):
        if out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--out {out}: what lies below {folder} is the workflow's alone; {advice}")


def _require_place(job: Job, planned: bool) -> None:
    """Nothing of the workflow's is replaced by what the workflow would not make. ``planned``: the workflow itself calls."""
    elsewhere = f"write elsewhere: `{job.command(ELSEWHERE / job.own.relative_to(RESULTS))}`"
    if job.out is None:
        if job.changed:
            raise UserError(f"{job.changed}: {job.own} is the workflow's, which makes it without that; {elsewhere}")
        if not planned and job.data_root is not None and _is_of_another_lineage(job):
            raise UserError(
                f"--data-root {job.data_root}: {job.own} is there, made from other data or keys; {elsewhere}"
            )
    elif job.changed or not planned:
        ending = MAKES.get(job.verb)
        if ending is not None and job.out.suffix != ending:
            raise UserError(f"--out {job.out}: expected the name of a file that ends in {ending}")
        if ending is None and job.out.exists() and not job.out.is_dir():
            raise UserError(f"--out {job.out}: is a file, expected a folder or nothing")
        require_outside(job.out, elsewhere)


def _is_of_another_lineage(job: Job) -> bool:
    """What the stage made before; False where it made nothing."""
    if not job.record.is_file():
        return False
    document = read_json(job.record)
    found = document.get("lineage") if isinstance(document, dict) else None
    return found != job.lineages.of(job.verb, job.runtime, job.precision)


def _export(job: Job) -> None:
    from tessera.deploy.export import export

    inputs = job.digests(job.model)
    report = export(job.model, job.made, job.spec, job.name, job.checkpoint is None, job.lineages)
    write_json(job.record, sealed(report, inputs, job.digests(job.made)))
    _said(job)


def _precision(job: Job) -> None:
    from tessera.deploy.precision import to_fp16

    source = model_file(job.name, "onnx")
    inputs = job.digests(source)
    report = to_fp16(source, job.made, job.spec, job.name, job.lineages)
    write_json(job.record, sealed(report, inputs, job.digests(job.made)))
    _said(job)


def _engine(job: Job) -> None:
    from tessera.deploy.engine import build_engine

    build_engine(model_file(job.name, "onnx", job.precision), job.made, job.spec, job.name, job.lineages)


def _parity(job: Job) -> None:
    from tessera.deploy.parity import check_parity, compare_predictions
    from tessera.inference.sources import ImageSource
    from tessera.inference.testing import one_view

    spec, device = job.spec, device_of(job.runtime)
    inputs = job.digests(model_file(job.name), job.model)
    reference, _ = _predictor(replace(job, runtime="torch", precision="fp32"), device)
    candidate, _ = _predictor(job, device)
    data = _split(job, reference, truths=False)
    sources = [ImageSource(*image) for image in data.images(spec.evaluate.split)[: spec.parity.images]]

    def images_for(predictor: Predictor) -> Iterator[Batch]:
        for source in sources:
            yield predictor.prepare([(source, source.read(spec.dataset.value_range, spec.dataset.max_pixels))])

    whole = one_view(candidate)
    report = check_parity(one_view(reference), whole, images_for(whole), spec)
    report["predictions"] = compare_predictions(
        reference, candidate, images_for(reference), images_for(candidate), spec
    )
    data.require_unchanged()
    report["lineage"] = job.lineages.of("parity", job.runtime, job.precision)
    write_json(job.record, sealed(report, inputs))
    worst = max(report["differences"].values(), key=lambda difference: difference["share_of_std"])["share_of_std"]
    print(
        f"{report['images']} images, largest difference {worst:.2g} of the standard deviation (tolerance {report['tolerance']:g})"
    )
    _said(job)


def _evaluate(job: Job) -> None:
    from tessera.data.datamodule import eval_loader
    from tessera.metrics.evaluate import evaluate
    from tessera.metrics.statistics import Limits

    spec = job.spec
    inputs = job.digests(job.model)
    predictor, origin = _predictor(job, device_of(job.runtime))
    catalog = predictor.header.catalog
    data = _split(job, predictor)
    loader = eval_loader(
        spec, data, spec.evaluate.split, fixed_size=predictor.input_size, max_batch=predictor.max_batch
    )
    limits = Limits.of(spec.evaluate)
    evaluation = evaluate(predictor, loader, catalog, predictor.mode, classes=spec.evaluate.classes, limits=limits)
    data.require_unchanged()
    predictions, statistics = job.record.with_suffix(".predictions.json.gz"), statistics_file(job.record)
    evaluation.write_predictions(predictions)
    evaluation.write_statistics(statistics)
    document = evaluation.to_json(
        experiment=job.name,
        parts=job.resolved.parts,
        spec=spec,
        runtime=job.runtime,
        precision=job.precision,
        testing=job.testing,
        lineage=job.lineages.of("evaluate", job.runtime, job.precision) | origin,
        input_size=predictor.input_size,
    )
    write_json(job.record, sealed(document, inputs, job.digests(predictions, statistics)))
    print(evaluation.summary(), flush=True)
    for remark in document["remarks"]:
        print(f"evaluate: warning: {remark}", file=sys.stderr, flush=True)
    _tell(origin)
    _said(job, predictions, statistics)


def _infer(job: Job) -> None:
    from tessera.inference.results import infer, require_replaceable
    from tessera.inference.sources import ImageSource

    spec = job.spec
    inputs = job.digests(job.model)
    predictor, origin = _predictor(job, device_of(job.runtime))
    images: list[ImageSource] = []
    data = None
    if spec.inference.images is None:
        data = _split(job, predictor, truths=False)
        images = [ImageSource(*image) for image in data.images(spec.evaluate.split)]
    if job.out is not None:
        require_replaceable(job.out)
    record = job.lineages.of("infer", job.runtime, job.precision) | origin
    finished = data.require_unchanged if data else None
    written = infer(predictor, spec, job.made, images, inputs, record, finished, job.testing)
    _tell(origin)
    _said_results(job.made, written, predictor.mode)


def _split(job: Job, predictor: Predictor, truths: bool = True) -> OpenedData:
    """What the stage is asked to read."""
    from tessera.data.opened import OpenedData

    return OpenedData(job.spec, (job.spec.evaluate.split,), predictor.header.catalog, job.lineages, truths)


def _predictor(job: Job, device: str) -> tuple[Predictor, dict[str, Any]]:
    """The stage's model, and what its lineage says beside the spec's own: where the model is the experiment's own, nothing, and one that was
    made from another spec is refused."""
    from tessera.inference import load_predictor

    path, spec = job.model, job.spec
    precision = "fp32" if job.runtime == "torch" else job.precision
    stage = {"torch": "train", "onnx": "export" if precision == "fp32" else "precision", "trt": "engine"}[job.runtime]
    if not path.exists():
        raise UserError(f"{missing(path)}; make it with `{workflow_command(path, data_root=spec.data_root)}`")
    predictor = load_predictor(path, spec.postprocess, device, spec.testing)
    predictor.target_size = spec.evaluated.target_size
    expected = job.lineages.of(stage, precision=precision)
    if job.checkpoint is not None:
        return predictor, predictor.header.stand_in(path, stage, expected)
    predictor.header.require(path, stage, expected, spec.data_root)
    return predictor, {}


def infer_files(
    model: Path,
    places: Sequence[str],
    overrides: Sequence[str],
    out: Path | None,
    limit: int | None = None,
    label_map: Path | None = None,
    images: Path | None = None,
    testing: str = "",
) -> None:
    """Predictions of a model file on images anywhere, without a project. ``places`` as ``sources.gather`` takes them; ``overrides`` of what the
    model file says about post-processing, testing and inference; ``testing``: name of a way of testing of the project that this is called in."""
    from tessera.inference import load_predictor
    from tessera.inference.results import limited, predict_to, require_replaceable
    from tessera.inference.sources import gather

    if not places:
        raise UserError(f"{model}: expected images, folders or addresses behind the model file")
    sources, notes = gather(places, images)
    if out is None:
        named = ["--testing", testing] if testing else []
        words = ["tessera", "infer", str(model), *places, *overrides, *named, "--out", str(ELSEWHERE / model.stem)]
        raise UserError(f"{model}: images that are named need a folder for the results: `{shlex.join(words)}`")
    require_outside(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file, expected a folder or nothing")
    for place in places:
        if Path(place).is_dir() and out.resolve().is_relative_to(Path(place).resolve()):
            raise UserError(
                f"--out {out}: lies in {place}, so that the next call would read its pictures; name a folder outside"
            )
    require_replaceable(out)
    if not model.exists() and model.is_relative_to(RESULTS):
        raise UserError(f"{missing(model)}; make it with `{workflow_command(model)}`")
    runtime = next((runtime for runtime, suffix in SUFFIXES.items() if suffix == model.suffix), "torch")
    if runtime != "onnx":
        gpus.hold()
    for note in notes:
        print(f"infer: {note}", file=sys.stderr, flush=True)
    sources = limited(sources, limit, "a larger --limit, or none, takes more")
    predictor = load_predictor(model, device=device_of(runtime))
    spec = predictor.header.spec
    if overrides or testing:
        spec = _changed(predictor.header, model, overrides, testing)
        predictor = load_predictor(model, spec.postprocess, device_of(runtime), spec.testing)
        predictor.target_size = spec.evaluated.target_size
    catalog = predictor.header.catalog if label_map is None else _renamed(predictor.header.catalog, label_map)
    facts = {
        "source": list(places),
        "model": {"file": model.name, "sha256": digest_file(model)},
        "testing": testing,
        "lineage": {
            "model": predictor.header.lineage,
            **spec.model_dump(mode="json", include={"postprocess", "testing", "inference"}),
        },
    }
    written = predict_to(predictor, sources, out, spec.inference, catalog, facts, skip_broken=True)
    _said_results(out, written, predictor.mode)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Places of images, and overrides ``a.b=c``."""
    overrides = [word for word in arguments if re.match(r"[a-z_]+(\.[^=/]+)?=", word) and not Path(word).exists()]
    return [word for word in arguments if word not in overrides], overrides


def is_model_file(name: str) -> bool:
    """Names of experiments have no suffix."""
    return Path(name).suffix in SUFFIXES.values() or Path(name).is_file()


def _changed(header: Header, model: Path, overrides: Sequence[str], testing: str) -> Spec:
    """The spec of a model file with other keys of how it is used."""
    from tessera.spec.compose import change, load_grid

    for text in overrides:
        if text.partition(".")[0] not in ("postprocess", "testing", "inference"):
            raise UserError(
                f"override {text!r}: of a model file only postprocess, testing and inference can be changed"
            )
    if not testing:
        return change(header.spec, str(model), overrides)
    if not Path("config/config.yaml").is_file():
        raise UserError(
            f"--testing {testing}: names a file in a project's config/testing, and there is no config/config.yaml here; give its keys, such "
            "as testing.flip=true"
        )
    layers = load_grid().testing_layers(testing, header.spec.model.name)
    return change(header.spec, str(model), overrides, layers)


def _renamed(catalog: ClassCatalog, path: Path) -> ClassCatalog:
    """Names and colours that a label map gives to the model's class ids."""
    from tessera.data.label_map import read_label_map
    from tessera.structures import ClassCatalog

    given = {category.id: category for category in read_label_map(path).categories}
    unnamed = [f"{category.id} ({category.name})" for category in catalog.categories if category.id not in given]
    if unnamed:
        raise UserError(f"{path}: does not name the model's classes {', '.join(unnamed[:10])}; name all of them")
    return ClassCatalog(
        tuple(
            replace(category, name=given[category.id].name, color=given[category.id].color)
            for category in catalog.categories
        )
    )


def _tell(origin: dict[str, Any]) -> None:
    """Prints the origin of a model that is not the experiment's own."""
    for found in origin.values():
        step = f", step {found['step']} (epoch {found['epoch']})" if "step" in found else ""
        print(f"weights of {found['file']}{step}", flush=True)


def _said_results(folder: Path, written: Written, mode: Mode) -> None:
    """Raises UserError where images could not be read."""
    what = {"panoptic": "segments", "instance": "instances", "detection": "detections"}.get(mode)
    found = f", {written.found} {what}" if what else ""
    print(f"wrote {folder}: index.json, which lists all files of {written.images} images{found}", flush=True)
    if written.broken:
        lines = "\n".join(f"  {line}" for line in written.broken)
        count = written.images + len(written.broken)
        raise UserError(f"{len(written.broken)} of {count} images cannot be read; the others are in {folder}\n{lines}")


def _said(job: Job, *beside: Path) -> None:
    names = ", ".join(path.name for path in (job.record, *beside) if path != job.made)
    print(f"wrote {job.made}{f' and beside it {names}' if names else ''}", flush=True)
