"""What the command line does around its stages."""

from __future__ import annotations

import errno
import importlib.metadata
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tessera import cli
from tessera.cli import app
from tessera.files import UserError
from tessera.log import Log, Tee


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_on_a_full_disk_hides_no_message(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tessera.cli", "compare", "t", "--log", "/dev/full"]
    done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 1
    warning, error = done.stderr.splitlines()
    assert warning == "warning: /dev/full: cannot be written (No space left on device); the log ends here"
    assert error.startswith("error: config/config.yaml: no such file")


def test_lines_of_several_processes_stay_whole(tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    tees = [Tee(io.StringIO(), Log(log, sys.stderr)) for _ in range(2)]
    for tee in tees:
        print("one", "line", file=tee, end="")
    for tee in tees:
        print(" of it\nand more", file=tee, end="")
    assert log.read_text() == "one line of it\n" * 2
    tees[0].flush()
    assert log.read_text() == "one line of it\n" * 2 + "and more"


LOST = """
import os, sys
from pathlib import Path
from tessera.log import start_log

terminal, own = os.openpty()
os.dup2(own, 2)
start_log(Path(sys.argv[1]))
print("heard", file=sys.stderr, flush=True)
os.close(terminal)
print("unheard", file=sys.stderr, flush=True)
"""


def test_a_lost_terminal_ends_no_stage(tmp_path: Path) -> None:
    """What is printed afterwards is in the log alone."""
    log = tmp_path / "logs/stage.log"
    subprocess.run([sys.executable, "-c", LOST, str(log)], check=True)
    assert log.read_text().endswith("\nheard\nunheard\n")


COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_argument_has_help(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    assert [parameter.name for parameter in command.params if not getattr(parameter, "help", None)] == []


def called(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tessera.cli", *arguments], capture_output=True, text=True)


def test_the_version_is_the_packages() -> None:
    done = called("--version")
    assert (done.returncode, done.stdout) == (0, f"tessera {importlib.metadata.version('tessera')}\n")


def test_without_a_command_there_is_help_and_no_empty_error() -> None:
    done = called()
    assert done.returncode == 2 and "--version" in done.stdout and "error:" not in done.stderr


@pytest.mark.parametrize("error", [UserError(""), OSError(errno.ENOSPC, ""), KeyboardInterrupt()])
def test_no_error_is_without_a_text(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main()
    assert re.fullmatch(r"error: \S.*\n", capsys.readouterr().err)
