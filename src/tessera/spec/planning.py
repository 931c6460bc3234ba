"""What the rules ask while Snakemake plans. Every answer is text, or a list of texts, and needs neither torch nor pandas."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import shlex
import socket
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tessera.files import UserError, canonical_json, read_json, workflow_command, write_json
from tessera.spec import checks
from tessera.spec.compose import Grid, GridFile, Table, full_name, load_grid
from tessera.spec.describe import closest
from tessera.spec.dvc import refuse_unsafe_repro
from tessera.spec.layers import SOURCE_KEYS, SPLIT_SOURCE_KEYS
from tessera.spec.lineage import (
    GENERATED_ROOT,
    GENERATOR_VERSION,
    SPLITS,
    STAGES,
    Lineages,
    data_digest,
    differences,
    lineage_digest,
    missing_data,
    recorded_by_dvc,
)
from tessera.spec.schema import Spec
from tessera.spec.sources import CONVERTED
from tessera.spec.told import data_mistakes

RESULTS = "results"

COMPARE_VERSION = 5
"""Raised when a change of src/tessera/tables or pictures changes the tables."""

FIGURES = ("curves", "accuracy_time", "classes", "pictures")
"""Each a PNG and a PDF below ``results/figures/<table>/``."""

FIGURES_VERSION = 3
"""Raised when a change of src/tessera/tables or pictures changes the figures."""

MAX_FIGURE_ROWS = 12
"""Figures tell no more rows of a table apart."""

PLANNED_FILE = "TESSERA_PLANNED"
"""Environment variable: the file with what was planned, for jobs that Snakemake starts through a Snakemake of their own."""
PLANS = Path(".snakemake/planned")
"""Holds one such file for each Snakemake that runs."""
PLANS_DAYS = 30
"""So long a job may wait in a queue after its Snakemake was killed."""

READ_DATA = ("train", *(verb for verb, stage in STAGES.items() if stage.reads_split))
"""Stages that open the dataset."""


RECORDS = {
    "train": "train.json",
    "export": "export.json",
    "precision": "precision.json",
    "engine": "model.engine.json",
    "parity": "parity.json",
    "evaluate": "eval.json",
    "infer": "inference/index.json",
}
"""By stage, what it leaves for PyTorch and fp32; see ``record_file``."""

RUN_STAGES = ("parity", "evaluate", "infer")
"""A runtime executes them."""
TESTED_STAGES = ("evaluate", "infer")
"""Of them, those that every way of testing has its own results of."""


def record_file(stage: str, runtime: str = "torch", precision: str = "fp32", testing: str = "") -> str:
    """Below an experiment's folder, the JSON that a stage leaves, such as ``onnx_eval.fp16.slide.json``: the runtime is a prefix except for
    PyTorch, the precision a suffix except for fp32, then the way of testing where it has a name. A stage without one of them ignores it."""
    name, slash, inside = RECORDS[stage].partition("/")
    stem, dot, ending = name.partition(".")
    prefix = f"{runtime}_" if stage in RUN_STAGES and runtime != "torch" else ""
    suffix = "" if stage in ("train", "export") or precision == "fp32" else f".{precision}"
    suffix += f".{testing}" if testing and stage in TESTED_STAGES else ""
    return f"{prefix}{stem}{suffix}{dot}{ending}{slash}{inside}"


def evaluation_file(runtime: str, precision: str, testing: str = "") -> str:
    return record_file("evaluate", runtime, precision, testing)


def statistics_file(evaluation: Path) -> Path:
    """What each image contributed, beside the evaluation file: ``onnx_eval.fp16.statistics.json.gz``."""
    return evaluation.with_suffix(".statistics.json.gz")


Condition = tuple[str, str, str]
"""Of an evaluation: runtime, precision and way of testing."""


def table_columns(table: Table) -> list[Condition]:
    """In the order of the table's own lists; PyTorch has fp32 only."""
    return [
        (runtime, precision, testing)
        for runtime in table.runtimes
        for precision in (["fp32"] if runtime == "torch" else table.precisions)
        for testing in table.testing
    ]


def listed_evaluations(grid: Grid) -> list[tuple[str, str, str, str]]:
    """(experiment, runtime, precision, testing): of the experiments that config/config.yaml lists those of PyTorch and ONNX Runtime, and what the
    tables with any of them ask for.
    """
    rows = [(name, runtime, "fp32", "") for name in grid.experiments for runtime in ("torch", "onnx")]
    for table in grid.tables:
        names = grid.table_experiments(table)
        if not set(grid.experiments).isdisjoint(names):
            rows += [(name, *column) for name in names for column in table_columns(grid.tables[table])]
    return list(dict.fromkeys(rows))


def figure_files(experiments: Iterable[str], columns: Sequence[Condition]) -> list[str]:
    """Below the results, what figures are drawn from; ``columns`` as ``table_columns`` gives them."""
    files = [*(evaluation_file(*column) for column in columns), "metrics.csv", "train.json", "inference/index.json"]
    return [f"{experiment}/{file}" for experiment in dict.fromkeys(experiments) for file in files]


def table_rows(grid: Grid, table: str) -> list[tuple[str, Condition]]:
    """(experiment, run) of every evaluation that a table asks for, in its order."""
    return list(itertools.product(grid.table_experiments(table), table_columns(grid.tables[table])))


Digest = Callable[..., str]
"""Of a lineage, by experiment, verb, runtime, precision and way of testing, as ``Plan.digest``."""


def digests_of(grid: Grid) -> Digest:
    def digest(experiment: str, verb: str, runtime: str = "torch", precision: str = "fp32", testing: str = "") -> str:
        return lineage_digest(grid.resolve(experiment, testing=testing).spec, verb, runtime, precision)

    return functools.cache(digest)


def refuse_table(grid: Grid, table: str) -> None:
    """Raises UserError where config/config.yaml asks a table for what it cannot have."""
    place = f"config/config.yaml, tables.{table}"
    experiments = grid.table_experiments(table)
    if twice := sorted({name for name in experiments if experiments.count(name) > 1}):
        raise UserError(f"{place}.experiments: {', '.join(twice)} stands twice; keep one")
    if not table_rows(grid, table):
        raise UserError(f"{place}: asks for no evaluation; list experiments and runtimes")
    modes = list(dict.fromkeys(grid.resolve(name).spec.model.mode for name in experiments))
    measured = "|".join(checks.METRICS[mode] for mode in modes)
    if foreign := [name for name in grid.tables[table].metrics if not re.fullmatch(measured, name)]:
        raise UserError(
            f"{place}.metrics: no evaluation has {', '.join(foreign)}; the experiments' mode is {' or '.join(modes)}"
        )


def refuse_other_recipe(first: str, lineage: Mapping[str, Any], name: str, other: Mapping[str, Any]) -> None:
    """``lineage`` and ``other``: of evaluations of two seeds."""
    if changed := differences({**lineage, "seed": None}, {**other, "seed": None}):
        lines = "\n  ".join(changed[:20])
        raise UserError(
            f"{first} and {name} are one row of the table, as seeds of one recipe, but they differ in more than the seed; make the "
            f"difference a variant, which has rows of its own, or list one of the two\n  {lines}"
        )


def table_lineage(grid: Grid, table: str, digest: Digest) -> dict[str, Any]:
    """The table's definition and the lineage of every number in it."""
    definition = grid.tables[table].model_dump(mode="json")
    return {"table": definition, "version": COMPARE_VERSION, "evaluations": _evaluations(grid, table, digest)}


def figures_lineage(grid: Grid, table: str, digest: Digest) -> dict[str, Any]:
    """What figures read of the table's definition, and the lineage of everything in them."""
    return {
        "metrics": grid.tables[table].metrics,
        "version": FIGURES_VERSION,
        "evaluations": _evaluations(grid, table, digest),
        "pictures": {experiment: digest(experiment, "infer") for experiment in grid.table_experiments(table)},
    }


def _evaluations(grid: Grid, table: str, digest: Digest) -> dict[str, str]:
    return {f"{name}/{evaluation_file(*run)}": digest(name, "evaluate", *run) for name, run in table_rows(grid, table)}


class Plan:
    def __init__(self, config: Mapping[str, Any], root: Path = Path()) -> None:
        """``config`` is Snakemake's: config/config.yaml overlaid with ``--config``; of the latter, ``data_root`` and ``checkpoints`` count."""
        self.grid = load_grid(root, config.get("data_root"))
        _refuse_unheard(config, self.grid.content)
        self.data_root = self.grid.data_root
        self.checkpoints = str(config.get("checkpoints", self.grid.file.checkpoints))
        self.lineages = functools.cache(self._lineages)
        self.refuse_stage = functools.cache(self._refuse_stage)
        self.data = functools.cache(self._data)
        self.checked = functools.cache(self._checked)

    def spec(self, experiment: str) -> Spec:
        return self.grid.resolve(experiment).spec

    def _lineages(self, experiment: str, testing: str = "") -> Lineages:
        spec = self.grid.resolve(experiment, testing=testing).spec
        own = self.grid.dataset(spec.dataset.name)

        def data(splits: tuple[str, ...]) -> str:
            if all(getattr(spec.dataset, split) == getattr(own, split) for split in splits if testing):
                return self.data(own.name, splits)
            return data_digest(spec.dataset, self.data_root, splits)

        return Lineages(spec, data)

    def _data(self, dataset: str, splits: tuple[str, ...]) -> str:
        """Where data lie is said by the dataset's own file alone, so that all experiments on it share one digest."""
        return data_digest(self.grid.dataset(dataset), self.data_root, splits)

    def lineage(
        self, experiment: str, verb: str, runtime: str = "torch", precision: str = "fp32", testing: str = ""
    ) -> str:
        self.refuse_stage(experiment, verb, runtime, testing)
        return self.lineages(experiment, testing).text(verb, runtime, precision)

    def digest(
        self, experiment: str, verb: str, runtime: str = "torch", precision: str = "fp32", testing: str = ""
    ) -> str:
        self.refuse_stage(experiment, verb, runtime, testing)
        return self.lineages(experiment, testing).digest(verb, runtime, precision)

    def _refuse_stage(self, experiment: str, verb: str, runtime: str, testing: str) -> None:
        """Raises UserError for what the stage would refuse, maybe after a night of training."""
        resolved = self.grid.resolve(experiment, testing=testing)
        resolved.refuse([*checks.stage_mistakes(resolved.spec, verb, runtime), *data_mistakes(resolved.spec, verb)])

    def options(
        self, experiment: str, verb: str, runtime: str = "torch", precision: str = "fp32", testing: str = ""
    ) -> str:
        """What a stage's command is told besides its name: where the data lie, and the digest of the lineage that was planned."""
        root = shlex.quote(self.root_of(self.dataset_of(experiment)))
        named = f"--testing {testing} " if testing else ""
        return f"{named}--data-root {root} --expect {self.digest(experiment, verb, runtime, precision, testing)}"

    def refuse_lost_data(self, stages: Iterable[tuple[str, str]], made: Collection[str]) -> None:
        """Raises UserError where data that a rule made are gone and nothing that is planned makes them again.

        Snakemake would do so only together with their check, which stands. ``stages``: (rule, experiment) of all that is going to run, which
        makes the files ``made``.
        """
        datasets = {self.dataset_of(name) for rule, name in stages if self._reads_data(rule, name)}
        markers = [path for dataset in sorted(datasets) for path in self._markers(dataset)]
        lost = [path for path in dict.fromkeys(markers) if path not in made and not Path(path).exists()]
        if lost:
            command = workflow_command(*lost, data_root=self.data_root)
            raise UserError(
                f"{', '.join(lost)}: no such file, so these data are gone, and what is about to run needs them; make them again with "
                f"`{command}`, then start this one again"
            )

    def _reads_data(self, rule: str, experiment: str) -> bool:
        verb, spec = rule.partition("_")[0], self.spec(experiment)
        if verb == "export":
            return not spec.export.dynamic_size and None in (spec.export.input_height, spec.export.input_width)
        return verb in READ_DATA and (verb != "infer" or spec.inference.images is None)

    def _markers(self, name: str) -> list[str]:
        """The manifests that rules write when a dataset is whole; that of what a conversion reads stands before the conversion's own."""
        dataset = self.grid.dataset(name)
        made_first = dataset.convert is not None and (dataset.fetch or dataset.generator is not None)
        return [*(self.given_files(name) if made_first else ()), *self.dataset_files(name)]

    def remember(self, options: Mapping[str, str]) -> None:
        """For ``planned_options`` of the processes that this one starts, elsewhere and maybe much later: what is configured by then must not
        pass for what was planned. Until ``forget``; where this process is killed the file stays for the jobs that go on, for ``PLANS_DAYS``."""
        for left in PLANS.glob("*.json"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > PLANS_DAYS * 86400:
                    left.unlink()
        path = PLANS.resolve() / f"{socket.gethostname()}-{os.getpid()}.json"
        write_json(path, options)
        os.environ[PLANNED_FILE] = str(path)

    def forget(self) -> None:
        """Ends ``remember``, when no job runs any longer."""
        Path(os.environ.pop(PLANNED_FILE)).unlink(missing_ok=True)

    def precision(self, suffix: str) -> str:
        """Of the suffix in a file's name: ``.fp16``, or nothing for fp32."""
        return suffix.removeprefix(".") or "fp32"

    def training_resources(self, experiment: str) -> dict[str, int | str]:
        """Of the train rule, as Snakemake's SLURM executor reads them. Processes on one machine are one task, which starts them itself;
        on several machines SLURM starts every process as a task."""
        train = self.spec(experiment).train
        processes, nodes = train.processes, train.num_nodes
        threads = self.cores_of_process(experiment)
        found: dict[str, int | str] = {"gpu": processes * nodes, "nodes": nodes}
        if nodes == 1:
            return found | {"threads": threads * processes}
        # The executor refuses tasks_per_node=1.
        tasks = {"tasks_per_node": processes} if processes > 1 else {"tasks": nodes}
        return found | {"threads": threads, "mpi": "srun"} | tasks

    def cores_of_process(self, experiment: str) -> int:
        """Of each process of a training: its own threads, and its loader processes."""
        spec = self.spec(experiment)
        return spec.train.threads + max(spec.dataset.train.num_workers, spec.dataset.val.num_workers)

    def launcher(self, experiment: str, threads: int) -> str:
        """What stands before the command of the train rule: nothing, unless the training spans machines and this is a job of SLURM's. Elsewhere
        `srun` would ask for machines of its own, without GPUs; there the training says what is missing."""
        train = self.spec(experiment).train
        if train.num_nodes == 1 or "SLURM_JOB_ID" not in os.environ:
            return ""
        return f"srun --nodes={train.num_nodes} --ntasks-per-node={train.processes} --cpus-per-task={threads} --kill-on-bad-exit=1 "

    def datasets_with(self, key: str) -> str:
        """Regular expression that matches the names of the datasets with a ``generator``, ``fetch`` or ``convert``, and nothing else."""
        names = [name for name in self.grid.file.datasets if getattr(self.grid.dataset(name), key)]
        return "|".join(map(re.escape, names)) or "(?!)"

    def testing_pattern(self) -> str:
        """Regular expression of what names a way of testing in the name of a file or folder: nothing, or a dot and its name."""
        names = "|".join(map(re.escape, self.grid.testings)) or "(?!)"
        return rf"(\.({names}))?"

    def conversion(self, name: str) -> str:
        """What the shards are made from."""
        return canonical_json({"data": self.data(name, SPLITS)})

    def archives(self, name: str) -> str:
        """What makes fetching again necessary: where an archive lies does not."""
        return canonical_json({folder: archive.sha256 for folder, archive in self.grid.dataset(name).fetch.items()})

    def root_of(self, dataset: str) -> str:
        """Folder that the dataset's paths are relative to."""
        return self.grid.root_of(dataset)

    def dataset_of(self, experiment: str) -> str:
        return self.spec(experiment).dataset.name

    def dataset_files(self, name: str) -> list[str]:
        """Files that the check waits for: the manifest of a converted, generated or fetched dataset, none of any other."""
        if self.grid.dataset(name).convert is not None:
            return [f"{GENERATED_ROOT}/{name}/{CONVERTED}/manifest.json"]
        return self.given_files(name)

    def given_files(self, name: str) -> list[str]:
        """The same before a conversion, which waits for them.

        The content of the annotations is in every lineage; naming the files as inputs as well would make the same data under another
        root a reason to rerun. Raises UserError when some of them are missing.
        """
        dataset = self.grid.dataset(name)
        if dataset.generator is not None:
            return [f"{GENERATED_ROOT}/{name}/manifest.json"]
        if missing := missing_data(dataset, self.data_root):
            raise UserError(
                f"dataset {name}: {', '.join(map(str, missing))} not found under the data root {self.root_of(name)}; put the dataset there "
                f"(config/datasets/{name}.yaml says where it expects its files), or name the folder that holds it with "
                "`--config data_root=...`"
            )
        return [f"{GENERATED_ROOT}/{name}/fetch.json"] if dataset.fetch else []

    def generator(self, name: str) -> str:
        keys = self.grid.dataset(name).model_dump(mode="json", include={"generator"})
        return canonical_json(keys | {"version": GENERATOR_VERSION})

    def _checked(self, name: str) -> str:
        """What training reads of a dataset's files. Never more: a check that runs again makes Snakemake train again, and so it may run
        only where the training's own lineage changed too. (An input marked ``ancient`` is no way out: while its producer is planned,
        Snakemake 9.27 does not look at the params of the consumer.) Where convert makes the files, an edited test label does run all of
        it again, because the shards of all splits are made together; the training then finds itself finished.
        """
        dataset = self.grid.dataset(name)
        made = {"generator", "fetch", "convert"}
        source: dict[str, Any] = dataset.model_dump(mode="json", include=set(SOURCE_KEYS) - made)
        for split in ("train", "val"):
            source[split] = getattr(dataset, split).model_dump(mode="json", include=set(SPLIT_SOURCE_KEYS))
        return canonical_json({"dataset": source, "data": self.data(name, ("train", "val"))})

    def absence_notice(self) -> str | None:
        """What to say where config/config.yaml asks for all experiments and some of them cannot be; nothing in processes for jobs."""
        asked = [self.grid.file.experiments, *(table.experiments for table in self.grid.tables.values())]
        left_out = self.grid.left_out if "all" in asked else {}
        if not left_out or PLANNED_FILE in os.environ:
            return None
        count = len(self.grid.names) - len(self.grid.present)
        lines = "\n".join(f"  {what}: {why}" for what, why in left_out.items())
        return f"`experiments: all` leaves out {count} of {len(self.grid.names)} experiments:\n{lines}"

    def default_targets(self) -> list[str]:
        """The experiments that config/config.yaml lists, as far as a machine without a GPU can take them, all their metrics, and the tables
        that any of them is in, with their figures."""
        listed = set(self.grid.experiments)
        files = ("eval.json", "onnx_eval.json", "inference/index.json")
        tables = [table for table in self.grid.tables if not listed.isdisjoint(self._experiments(table))]
        return [
            *(f"{RESULTS}/{name}/{file}" for name in self.grid.experiments for file in files),
            *([f"{RESULTS}/metrics.json"] if listed else []),
            *(f"{RESULTS}/tables/{table}.md" for table in tables),
            *(f"{RESULTS}/figures/{table}/{FIGURES[0]}.png" for table in tables if self._fits_figures(table)),
        ]

    def metrics_evaluations(self) -> list[str]:
        return [f"{RESULTS}/{experiment}/{evaluation_file(*run)}" for experiment, *run in listed_evaluations(self.grid)]

    def metrics_lineage(self) -> str:
        evaluations = {
            f"{experiment}/{evaluation_file(*run)}": self.digest(experiment, "evaluate", *run)
            for experiment, *run in listed_evaluations(self.grid)
        }
        return canonical_json({"version": COMPARE_VERSION, "evaluations": evaluations})

    def refuse_unsafe_repro(self) -> None:
        """Under `dvc repro`, raises UserError where its settings do not fit the data of the listed experiments; see spec/dvc.py."""
        if "DVC_STAGE" not in os.environ:
            return
        made, tracked = set(), set()
        for name in {self.dataset_of(experiment) for experiment, *_ in listed_evaluations(self.grid)}:
            folders = {PurePosixPath(file).parent for file in (*self.dataset_files(name), *self.given_files(name))}
            made |= {str(folder) for folder in folders if folders.isdisjoint(folder.parents)}
            if self.grid.dataset(name).generator is None and not Path(self.data_root).is_absolute():
                places = recorded_by_dvc(self.grid.dataset(name), self.data_root)
                tracked |= {(Path(self.data_root) / place).as_posix().removesuffix(".dvc") for place in places}
        refuse_unsafe_repro(os.environ["DVC_STAGE"], made, tracked, self.grid.root)

    def _experiments(self, table: str) -> set[str]:
        return {experiment for experiment, _ in self._rows(table)}

    def table_evaluations(self, table: str) -> list[str]:
        return [f"{RESULTS}/{experiment}/{evaluation_file(*run)}" for experiment, run in self._rows(table)]

    def table_sources(self, table: str) -> list[str]:
        """The evaluations, the trainings' reports where parameters are shown, and the statistics where images are resampled."""
        evaluations = self.table_evaluations(table)
        definition = self.grid.tables[table]
        trainings = dict.fromkeys(f"{RESULTS}/{experiment}/train.json" for experiment, _ in self._rows(table))
        statistics = [str(statistics_file(Path(path))) for path in evaluations]
        return [
            *evaluations,
            *(trainings if definition.parameters else ()),
            *(statistics if definition.resampled else ()),
        ]

    def table_lineage(self, table: str) -> str:
        refuse_table(self.grid, table)
        firsts: dict[str, str] = {}
        for name in self.grid.table_experiments(table):
            first = firsts.setdefault(full_name(self.grid.parts[name]), name)
            if first != name:
                refuse_other_recipe(
                    first, self.lineages(first).of("evaluate"), name, self.lineages(name).of("evaluate")
                )
        return canonical_json(table_lineage(self.grid, table, self.digest))

    def figure_sources(self, table: str) -> list[str]:
        experiments = self.grid.table_experiments(table)
        return [f"{RESULTS}/{file}" for file in figure_files(experiments, table_columns(self.grid.tables[table]))]

    def figures_lineage(self, table: str) -> str:
        refuse_table(self.grid, table)
        return canonical_json(figures_lineage(self.grid, table, self.digest))

    def _fits_figures(self, table: str) -> bool:
        parts = (self.grid.parts[experiment] for experiment in self._experiments(table))
        return (
            len({(part["model"], part["backbone"], part["dataset"], *part["variants"]) for part in parts})
            <= MAX_FIGURE_ROWS
        )

    def _rows(self, table: str) -> list[tuple[str, Condition]]:
        return table_rows(self.grid, table)


class Answers:
    """A plan for the rules. What the user got wrong ends Snakemake with the message as its last line: of any exception but SystemExit it
    would print a traceback."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._plan = self._told(Plan)(config)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._plan, name)
        return self._told(found) if callable(found) else found

    @staticmethod
    def _told(ask: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*arguments: Any) -> Any:
            try:
                return ask(*arguments)
            except UserError as error:
                raise SystemExit(f"error: {error}") from None

        return answer


def engine_notice(rules: Iterable[str], availability: Callable[[], str | None]) -> str | None:
    """What to say when TensorRT stages are planned on a machine that cannot run them; the stages themselves fail with the same reason.

    ``availability`` answers what is missing, or None; it is asked only when such stages are planned.
    """
    if not any(rule == "engine" or rule.endswith("_trt") for rule in rules):
        return None
    missing = availability()
    if missing is None:
        return None
    return (
        f"TensorRT stages are planned, but this machine cannot run them: {missing}\n"
        "What it can make is onnx_eval.json in place of trt_eval.json: the same graph, measured in ONNX Runtime."
    )


def records_notice(root: Path = Path()) -> str | None:
    """What to say when there are outputs whose making Snakemake knows nothing about, as after .snakemake was deleted. Nothing in the
    processes that a Snakemake starts for its jobs."""
    if PLANNED_FILE in os.environ:
        return None
    records, results = root / ".snakemake/metadata", root / RESULTS
    outputs = [path.relative_to(root).as_posix() for path in results.glob("*/*.json")]
    known = set(os.listdir(records)) if records.is_dir() else set()  # noqa: PTH208  # one for each output of every experiment
    unknown = sorted(name for name in outputs if _record_name(name) not in known)
    if not unknown:
        return None
    named = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
    return (
        f"{len(unknown)} of {len(outputs)} outputs have no record in {records} of what they were made from ({named}): what changed since "
        "goes unnoticed. Bring the records back (`dvc checkout`), or make the outputs again with --forceall (finished trainings are not "
        "repeated); `tessera verify` says which of them still hold"
    )


def planned_options() -> dict[str, str]:
    """First output of a job -> its options, as the Snakemake that started this one planned them; empty where none did."""
    path = Path(os.environ.get(PLANNED_FILE, ""))
    # That of another project came along with the environment of a Snakemake there.
    return read_json(path) if path.parent == PLANS.resolve() else {}


def _record_name(output: str) -> str:
    """What Snakemake 9.27 calls the record of an output, or the folder that it begins with: names end at 255 characters."""
    name = urlsafe_b64encode(output.encode()).decode()
    return name if len(name) < 255 else f"@{name[:254]}"


def _refuse_unheard(config: Mapping[str, Any], file: Mapping[str, Any]) -> None:
    """Raises UserError for a ``--config`` that nothing would listen to."""
    heard = ("data_root", "checkpoints")
    for key, value in config.items():
        if key in heard or (key in file and file[key] == value):
            continue
        near = closest(key, list(GridFile.model_fields))
        hint = f"; did you mean {near[0]}?" if near and key not in GridFile.model_fields else ""
        raise UserError(
            f"--config {key}={value}: on the command line only {' and '.join(heard)} can be set{hint}; other keys belong in config/config.yaml"
        )
