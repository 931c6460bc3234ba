"""What stages left, checked on the way in: sealed, of the right experiment, made from the spec as it is now."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tessera.files import UserError, missing, read_json, workflow_command
from tessera.metrics.record import Evaluation, RowName
from tessera.provenance import seal_holds
from tessera.spec.compose import Grid
from tessera.spec.lineage import differences, lineage
from tessera.spec.planning import Condition, evaluation_file, refuse_other_recipe, refuse_table, table_columns


def collect(grid: Grid, table: str, results: Path) -> list[Evaluation]:
    """Every evaluation of a table, in the table's order: experiments first, then runtimes, then precisions, then ways of testing. Raises
    UserError for an experiment listed twice, and as ``read_evaluation`` does."""
    refuse_table(grid, table)
    return [
        read_evaluation(grid, results, experiment, *run).model_copy(
            update={"testing_as": grid.tables[table].testing_as}
        )
        for experiment in grid.table_experiments(table)
        for run in table_columns(grid.tables[table])
    ]


def read_evaluation(
    grid: Grid, results: Path, experiment: str, runtime: str, precision: str, testing: str = ""
) -> Evaluation:
    """Raises UserError for a file that is missing, damaged or edited, of another experiment or run, or made from another spec."""
    path = results / experiment / evaluation_file(runtime, precision, testing)
    try:
        found = Evaluation.model_validate(_read_sealed(path, grid.data_root))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the whole file"
        raise UserError(
            f"{path}: is no evaluation file of this version ({key}: {first['msg']}, found {first['input']!r:.60}); "
            f"{advice(path, grid.data_root)}"
        ) from None
    wanted = (experiment, (runtime, precision, testing))
    if found.key != wanted:
        written, asked = (" ".join(filter(None, (name, *run))) for name, run in (found.key, wanted))
        raise UserError(f"{path}: says it is of {written}, expected {asked}; was it copied by hand?")
    expected = lineage(grid.resolve(experiment, testing=testing).spec, "evaluate", runtime, precision)
    _require_lineage(path, found.lineage, expected, grid.data_root)
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
    _require_lineage(path, document.get("lineage"), expected, data_root)
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


def _require_lineage(path: Path, found: Any, expected: dict[str, Any], data_root: str) -> None:
    """Raises UserError unless the file at ``path`` was made from exactly the present spec."""
    changed = differences(found, expected)
    if changed:
        lines = "\n  ".join(changed[:20])
        raise UserError(
            f"{path}: was made from another spec than the present one; {advice(path, data_root)}\n  {lines}"
        )
