"""One wrong input each: one clear line, an exit code that says so, and no file that was not there before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.malformed import cases_data, cases_models, cases_spec
from tests.malformed.conftest import Answer, call
from tests.malformed.project import ALIEN, Case, content

CASES = [*cases_spec.CASES, *cases_data.CASES, *cases_models.CASES]
IN_A_PROCESS = ("spec-unknown-key", "evaluation-cut-off", "model-pickle-with-code")


def test_names_are_unique_and_there_are_at_least_fifty() -> None:
    assert len({case.id for case in CASES}) == len(CASES) >= 50
    assert set(IN_A_PROCESS) <= {case.id for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_one_clear_line_and_no_output(case: Case, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in case.broken:
        step(project)
    before = content(project)
    answer = call(case.command.split(), project, capsys)
    _judge(case, answer)
    assert not (project / ALIEN).exists()
    assert content(project) == before


@pytest.mark.parametrize("case", [case for case in CASES if case.id in IN_A_PROCESS], ids=lambda case: case.id)
def test_in_a_process_of_its_own(case: Case, project: Path) -> None:
    for step in case.broken:
        step(project)
    before = content(project)
    done = subprocess.run(
        [sys.executable, "-m", "tessera.cli", *case.command.split()], cwd=project, capture_output=True, text=True
    )
    _judge(case, Answer(done.returncode, done.stdout, done.stderr))
    assert not (project / ALIEN).exists()
    assert content(project) == before


def _judge(case: Case, answer: Answer) -> None:
    shown = f"code {answer.code}\n{answer.err}\n{answer.out}"
    assert answer.code == case.code, shown
    assert answer.err.startswith("error: "), shown
    lines = answer.err.rstrip("\n").split("\n")
    assert len(lines) == case.lines, shown
    assert case.first in lines[0], shown
    for word in case.words:
        assert word in answer.err, f"{word!r} not in\n{shown}"
    for noise in ("Traceback", "Caught ", "\x1b[", "weights_only"):
        assert noise not in answer.err + answer.out, shown
