"""Evaluation files, checked on the way in: the right schema, the right experiment, made from the spec as it is now."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tessera.files import UserError, missing, read_json, workflow_command
from tessera.provenance import seal_holds
from tessera.spec.compose import Grid
from tessera.spec.lineage import differences, lineage
from tessera.spec.planning import Condition, evaluation_file, refuse_other_recipe, refuse_table, table_columns


class RowName(NamedTuple):
    """Everything in an experiment's name but the seed."""

    model: str
    backbone: str
    dataset: str
    variant: str
    """Variants joined by ``-``, the way of testing behind them where rows tell it; empty for the plain recipe."""


class Evaluation(BaseModel):
    """What a table needs of an evaluation file, whatever the runtime."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)

    experiment: str
    model: str
    backbone: str
    dataset: str
    variants: list[str]
    seed: int
    mode: str
    split: str
    runtime: str
    precision: str
    testing: str = ""
    """Name of the way of testing; empty for the experiment's own."""
    testing_as: Literal["columns", "rows"] = "columns"
    """Where a table tells ways of testing apart; no part of the file."""
    images: int = Field(ge=1)
    metrics: dict[str, float] = Field(min_length=1)
    """Fractions; without those that the images hold nothing of."""
    per_class: list[dict[str, Any]]
    remarks: list[str] = Field([])
    """What a reader of the numbers must know."""
    seconds: float = Field(gt=0)
    """Of the whole evaluation, loading included."""
    lineage: dict[str, Any]
    facts: dict[str, Any]
    """See ``provenance.collect``."""

    @property
    def row(self) -> RowName:
        told = [self.testing] if self.testing and self.testing_as == "rows" else []
        return RowName(self.model, self.backbone, self.dataset, "-".join([*self.variants, *told]))

    @property
    def column(self) -> Condition:
        return self.runtime, self.precision, self.testing if self.testing_as == "columns" else ""

    @property
    def key(self) -> tuple[str, Condition]:
        """What tells it from all others: the experiment, and the run."""
        return self.experiment, (self.runtime, self.precision, self.testing)


def read_evaluation(path: Path, data_root: str = "data") -> Evaluation:
    """Raises UserError naming the file and the key for anything but an evaluation file, and for one that was edited. ``data_root`` is told to
    make it again with."""
    document = _read_sealed(path, data_root)
    try:
        found = Evaluation.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the whole file"
        raise UserError(
            f"{path}: is no evaluation file of this version ({key}: {first['msg']}); {advice(path, data_root)}"
        ) from None
    for name, value in found.metrics.items():
        if not 0 <= value <= 1:
            raise UserError(f"{path}: the metric {name} is {value}, expected a fraction between 0 and 1")
    return found


def collect(grid: Grid, table: str, results: Path) -> list[Evaluation]:
    """Every evaluation of a table, in the table's order: experiments first, then runtimes, then precisions, then ways of testing.

    Raises UserError for an experiment listed twice, a missing or damaged file, a file of another experiment, runtime or precision,
    and one made from another spec than the present one.
    """
    refuse_table(grid, table)
    return [
        read_expected(grid, results, experiment, *run).model_copy(update={"testing_as": grid.tables[table].testing_as})
        for experiment in grid.table_experiments(table)
        for run in table_columns(grid.tables[table])
    ]


def read_expected(
    grid: Grid, results: Path, experiment: str, runtime: str, precision: str, testing: str = ""
) -> Evaluation:
    """Raises UserError for a file that is missing or damaged, of another experiment or run, or made from another spec."""
    path = results / experiment / evaluation_file(runtime, precision, testing)
    found = read_evaluation(path, grid.data_root)
    wanted = (experiment, (runtime, precision, testing))
    if found.key != wanted:
        written, asked = (" ".join(filter(None, (name, *run))) for name, run in (found.key, wanted))
        raise UserError(f"{path}: says it is of {written}, expected {asked}; was it copied by hand?")
    require_lineage(
        path,
        found.lineage,
        lineage(grid.resolve(experiment, testing=testing).spec, "evaluate", runtime, precision),
        grid.data_root,
    )
    return found


def rows_of(evaluations: Iterable[Evaluation]) -> dict[RowName, list[Evaluation]]:
    """Experiments that differ in nothing but the seed are one row. Raises UserError where their specs or data differ in something else."""
    rows: dict[RowName, list[Evaluation]] = {}
    firsts: dict[tuple[RowName, Condition], Evaluation] = {}
    for evaluation in evaluations:
        rows.setdefault(evaluation.row, []).append(evaluation)
        first = firsts.setdefault((evaluation.row, evaluation.column), evaluation)
        refuse_other_recipe(first.experiment, first.lineage, evaluation.experiment, evaluation.lineage)
    return rows


def read_document(path: Path, experiment: str, expected: dict[str, Any], data_root: str) -> dict[str, Any]:
    """What a stage wrote for ``experiment`` from the lineage ``expected``; raises UserError for anything else."""
    document = _read_sealed(path, data_root)
    if document.get("experiment") != experiment:
        raise UserError(
            f"{path}: says it is of {document.get('experiment')!r}, expected {experiment!r}; was it copied by hand?"
        )
    require_lineage(path, document.get("lineage"), expected, data_root)
    return document


def advice(path: Path, data_root: str) -> str:
    """How a file of the workflow that is there, but not as a stage left it, is made again."""
    return f"make it again with `{workflow_command(path, again=True, data_root=data_root)}`"


def _read_sealed(path: Path, data_root: str) -> dict[str, Any]:
    """Raises UserError for anything but a record as a stage left it."""
    if not path.exists():
        raise UserError(f"{missing(path)}; make it with `{workflow_command(path, data_root=data_root)}`")
    document = read_json(path)
    if not isinstance(document, dict) or "seal" not in document:
        problem = "carries no seal, because an older version wrote it or by hand"
    elif not seal_holds(document):
        problem = "was edited after it was written, its seal does not fit its content"
    else:
        return document
    raise UserError(f"{path}: {problem}; {advice(path, data_root)}")


def require_lineage(path: Path, found: Any, expected: dict[str, Any], data_root: str) -> None:
    """Raises UserError unless the file at ``path`` was made from exactly the present spec."""
    changed = differences(found, expected)
    if changed:
        lines = "\n  ".join(changed[:20])
        raise UserError(
            f"{path}: was made from another spec than the present one; {advice(path, data_root)}\n  {lines}"
        )
