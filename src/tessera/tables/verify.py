"""Does a results tree still hold? Every stage leaves a JSON record that is sealed and names the digests of the files before and after it
(``provenance.sealed``), so that an edited or swapped file is found by following them; reads no model and needs no torch.

Nothing of this is a signature: whoever makes all records of a chain anew goes unseen.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from tessera import provenance
from tessera.files import TEMPORARY, UserError, digest_file, is_abandoned, missing, read_json, temporaries
from tessera.metrics.formulas import disagreements
from tessera.metrics.statistics import read_statistics
from tessera.spec.compose import RESERVED, Grid
from tessera.spec.lineage import RUNTIMES, differences, lineage
from tessera.spec.planning import (
    RUN_STAGES,
    TESTED_STAGES,
    digests_of,
    figures_lineage,
    record_file,
    statistics_file,
    table_lineage,
)
from tessera.spec.schema import Spec

HIDDEN = (".DS_Store", ".gitignore", ".gitkeep", ".snakemake_timestamp")
"""Files that other tools keep beside results."""


REPORTS = {"tables": ("{}.json", table_lineage), "figures": ("{}/figures.json", figures_lineage)}
"""Folders of what is made of several experiments: where the record of a table lies, and its lineage."""


class Expected(NamedTuple):
    """What a record should hold."""

    lineage: dict[str, Any] | None = None
    """None where nothing says it."""
    says: Mapping[str, str] = MappingProxyType({})
    evaluates: bool = False
    """Its metrics follow from the statistics beside it."""


@dataclass(frozen=True)
class Finding:
    verdict: Literal["holds", "broken", "warning"]
    path: Path
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:<7}  {self.path}: {self.text}"


@dataclass(frozen=True)
class Record:
    """Which stage leaves a file."""

    stage: str
    runtime: str = "torch"
    precision: str = "fp32"
    testing: str = ""


def records(testings: Iterable[str]) -> dict[str, Record]:
    """Records by path below an experiment's folder. ``testings``: the ways of testing that have names."""
    found = [Record("train"), Record("export"), Record("precision", precision="fp16")]
    for precision in ("fp32", "fp16"):
        found.append(Record("engine", precision=precision))
        found += [Record(stage, runtime, precision) for runtime in RUNTIMES for stage in RUN_STAGES]
        found += [Record(*one) for one in itertools.product(TESTED_STAGES, RUNTIMES, (precision,), testings)]
    return {record_file(one.stage, one.runtime, one.precision, one.testing): one for one in found}


def verify(grid: Grid, path: Path, results: Path) -> Iterator[Finding]:
    """Findings of one folder in ``results`` (an experiment's, ``tables``, ``figures``), or of all of them. Raises UserError for any other path."""
    if not path.is_dir():
        raise UserError(
            f"{missing(path, 'folder')}; expected {results} or a folder in it, such as {results}/<experiment>"
        )
    if path.resolve() == results.resolve():
        folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if not folders:
            raise UserError(f"{path}: holds no results; nothing to verify")
        yield from _litter(path, deep=False)
        for entry in sorted(path.iterdir()):
            if entry.is_symlink() and not entry.exists():
                yield Finding("broken", entry, f"is a link to {entry.readlink()}, where nothing is")
        yield from _verify_flat_metrics(grid, results)
    elif path.parent.resolve() == results.resolve():
        folders = [path]
    else:
        raise UserError(f"{path}: expected {results} or a folder in it, such as {results}/<experiment>")
    for folder in folders:
        try:
            yield from _verify_folder(grid, folder)
        except OSError as error:
            yield Finding(
                "broken",
                folder,
                f"{error.filename} cannot be read ({error.strerror}); the rest of the folder went unchecked",
            )


def _verify_folder(grid: Grid, folder: Path) -> Iterator[Finding]:
    expected: dict[Path, Expected] = {}
    yield from _expect_reports(grid, folder, expected) if folder.name in REPORTS else _expect(grid, folder, expected)
    found: dict[Path, dict[str, Any]] = {}
    for path, record in expected.items():
        document = yield from _verify_record(path, record.lineage, record.says)
        if document is not None:
            found[path] = document
            if record.evaluates:
                yield from _verify_metrics(path, document)
    yield from _strangers(folder, found)
    yield from _facts(grid.root, folder, found)


def _expect_reports(grid: Grid, folder: Path, expected: dict[Path, Expected]) -> Iterator[Finding]:
    """Fills ``expected`` with the records of tables or of figures."""
    place, lineage_of = REPORTS[folder.name]
    known, digest = {folder / place.format(name): name for name in grid.tables}, digests_of(grid)
    for path in sorted(folder.glob(place.format("*"))):
        if path not in known:
            yield Finding("broken", path, "config/config.yaml has no such table")
            continue
        try:
            expected[path] = Expected(lineage_of(grid, known[path], digest), {"table": known[path]})
        except UserError as error:
            yield Finding("broken", path, f"what it should be made from can no longer be said: {error}")


def _expect(grid: Grid, folder: Path, expected: dict[Path, Expected]) -> Iterator[Finding]:
    """Fills ``expected`` with the records of an experiment, those of ways of testing that the configuration no longer has among them."""
    named = {piece for path in folder.glob("*eval.*.json") for piece in path.name.split(".")[1:-1]}
    ways = sorted((named | {*grid.testings}) - {*RESERVED})
    known = {folder / name: record for name, record in records(ways).items() if (folder / name).is_file()}
    if folder.name not in grid.parts:
        expected |= dict.fromkeys(known, Expected())
        if known:
            text = "config/config.yaml has no such experiment: nothing says what it should be made from"
            yield Finding("broken", folder, text)
        return
    specs: dict[str, Spec] = {}
    for testing in dict.fromkeys(["", *(record.testing for record in known.values())]):
        try:
            specs[testing] = grid.resolve(folder.name, testing=testing).spec
        except UserError as error:
            way = f" of its way of testing {testing}" if testing else ""
            yield Finding("broken", folder, f"the spec{way} can no longer be made: {error}")
    for path, record in known.items():
        says = {"experiment": folder.name}
        if record.stage in RUN_STAGES:
            says |= {"runtime": record.runtime, "precision": record.precision}
        if record.stage in TESTED_STAGES:
            says["testing"] = record.testing
        spec = specs.get(record.testing)
        wanted = None if spec is None else lineage(spec, record.stage, record.runtime, record.precision)
        expected[path] = Expected(wanted, says, record.stage == "evaluate")
    if not known:
        yield Finding("broken", folder, "holds nothing that a stage recorded")


def _verify_flat_metrics(grid: Grid, results: Path) -> Iterator[Finding]:
    """metrics.json and metrics.csv carry nothing but numbers, for `dvc metrics`: they are made again."""
    written = [path for path in (results / "metrics.json", results / "metrics.csv") if path.is_file()]
    if not written:
        return
    from tessera.tables.flat import make_metrics  # needs pandas

    try:
        document, numbers = make_metrics(grid, results)
        for path in written:
            same = read_json(path) == document if path.suffix == ".json" else path.read_bytes() == numbers.encode()
            if same:
                yield Finding("holds", path, "made again from the evaluations")
            else:
                yield Finding("broken", path, "the evaluations give other numbers")
    except (UserError, OSError) as error:
        yield Finding("broken", written[0], f"cannot be made again: {error}")


def _verify_record(path: Path, wanted: dict[str, Any] | None, expected: Mapping[str, str]) -> Iterator[Finding] | Any:
    """Yields findings and returns the document; None where there is nothing more to be said of it."""
    try:
        document = read_json(path)
    except UserError as error:
        yield Finding("broken", path, str(error).removeprefix(f"{path}: "))
        return None
    if not isinstance(document, dict) or not all(isinstance(document.get(key), dict) for key in ("inputs", "outputs")):
        yield Finding("broken", path, "carries no digests, because an older version wrote it or by hand; make it again")
        return None
    problems = []
    if not provenance.seal_holds(document):
        problems.append("was edited after it was written: its seal does not fit its content")
    for key, value in expected.items():
        if document.get(key) != value:
            problems.append(f"says that its {key} is {document.get(key)}, expected {value}; was it copied by hand?")
    changed = [] if wanted is None else differences(document.get("lineage"), wanted)
    problems += [f"was made from another spec: {line}" for line in changed[:20]]
    outputs, inputs = (_compare(path.parent, document[key]) for key in ("outputs", "inputs"))
    problems += [f"{name}, which was written with it, is not there" for name in outputs["missing"]]
    problems += [f"{name} is not the file that was written with it" for name in outputs["other"]]
    problems += [f"was made from another {name} than the one here" for name in inputs["other"]]
    problems += [f"{name} cannot be read" for name in outputs["unreadable"] + inputs["unreadable"]]
    for name in inputs["missing"]:
        yield Finding("warning", path, f"{name}, from which it was made, is not here to be compared")
    for problem in problems:
        yield Finding("broken", path, problem)
    if not problems:
        held = outputs["same"] + inputs["same"]
        files = f"{', '.join(held[:6])}{f' and {len(held) - 6} more files' if len(held) > 6 else ''}"
        parts = ["seal", *(["lineage"] if wanted is not None else []), *([files] if files else [])]
        yield Finding("holds", path, ", ".join(parts))
    return document


def _compare(folder: Path, digests: Mapping[str, str]) -> dict[str, list[str]]:
    """Names of files, by what became of them: ``same``, ``other``, ``missing``, ``unreadable``."""
    found: dict[str, list[str]] = {state: [] for state in ("same", "other", "missing", "unreadable")}
    for name, digest in digests.items():
        try:
            present = (folder / name).is_file()
            state = "missing" if not present else "same" if digest_file(folder / name) == digest else "other"
        except OSError:
            state = "unreadable"
        found[state].append(name)
    return found


def _verify_metrics(path: Path, document: Mapping[str, Any]) -> Iterator[Finding]:
    """The numbers of eval.json made again from its statistics."""
    written = document.get("metrics")
    try:
        statistics = read_statistics(statistics_file(path))
        if not isinstance(written, dict):
            raise UserError(f"{path}: has no `metrics`")
    except UserError as error:
        yield Finding("broken", path, f"its metrics cannot be made again: {error}")
        return
    wrong = disagreements(written, statistics)
    for line in wrong:
        yield Finding("broken", path, line)
    if not wrong:
        yield Finding("holds", path, f"{len(written)} metrics made again from {statistics_file(path).name}")


def _litter(folder: Path, deep: bool = True) -> Iterator[Finding]:
    """What processes were writing when they were killed; what living ones write is not their business."""
    texts = {
        True: "a killed process left it half-written; the next stage that writes in its folder removes it",
        None: "a process of another machine or user is writing it, or left it half-written; if none is, remove it",
    }
    for place in [folder, *(sorted(path for path in folder.rglob("*") if path.is_dir()) if deep else ())]:
        for path in temporaries(place):
            abandoned = is_abandoned(path)
            if abandoned is not False:
                yield Finding("warning", path, texts[abandoned])


def _strangers(folder: Path, found: Mapping[Path, Mapping[str, Any]]) -> Iterator[Finding]:
    """Files that no record names: nothing can be said of them."""
    yield from _litter(folder)
    named = {path.resolve() for path in found}
    named |= {(path.parent / name).resolve() for path, document in found.items() for name in document["outputs"]}
    unknown = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.resolve() not in named]
    shown = [
        path
        for path in unknown
        if path.name not in HIDDEN and not any(TEMPORARY.fullmatch(part) for part in path.relative_to(folder).parts)
    ]
    if shown:
        names = ", ".join(path.relative_to(folder).as_posix() for path in shown[:6])
        more = f" and {len(shown) - 6} more" if len(shown) > 6 else ""
        yield Finding("warning", folder, f"no record speaks of {names}{more}")


def _facts(root: Path, folder: Path, found: Mapping[Path, Mapping[str, Any]]) -> Iterator[Finding]:
    """Commits other than the checkout's, and packages other than the locked ones: reasons to be careful, not faults."""
    present = provenance.commit()
    locked = locked_versions(root / "envs" / "tessera.lock")
    remarks: dict[str, list[str]] = {}
    for path, document in found.items():
        facts = document.get("facts")
        if not isinstance(facts, dict):
            continue
        if facts.get("commit") != present:
            remarks.setdefault(f"made at commit {facts.get('commit')}, the checkout is at {present}", []).append(
                path.name
            )
        elif present is not None and present.endswith("-dirty"):
            remarks.setdefault(f"made from a checkout with uncommitted changes ({present})", []).append(path.name)
        for package, version in (facts.get("packages") or {}).items():
            pinned = locked.get(package)
            # Builds of one version differ behind the plus.
            if pinned is not None and str(version).partition("+")[0] != pinned:
                remarks.setdefault(f"made with {package} {version}, envs/tessera.lock has {pinned}", []).append(
                    path.name
                )
    for remark, names in remarks.items():
        yield Finding("warning", folder, f"{', '.join(names)}: {remark}")


def locked_versions(path: Path) -> dict[str, str]:
    """Package -> version that a lock file has for this Python; empty without one."""
    from packaging.requirements import Requirement

    if not path.is_file():
        return {}
    lines = re.findall(r"^([A-Za-z0-9._-]+==[^\\\n]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    found = [Requirement(line.strip()) for line in lines]
    return {
        one.name: str(one.specifier).removeprefix("==") for one in found if one.marker is None or one.marker.evaluate()
    }
