"""What other people's tools read of the project: licence, citation, version, types, the entry of the workflow catalogue."""

from __future__ import annotations

import shutil
import tomllib
from importlib.metadata import metadata, version
from pathlib import Path

import yaml

import tessera
from tests.workflow.project import make_project

ROOT = Path(__file__).parents[1]


def test_one_version_and_one_licence() -> None:
    assert version("tessera") == tessera.__version__
    assert metadata("tessera")["License-Expression"] == "Apache-2.0"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "Apache-2.0"
    assert f"## {tessera.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_what_is_installed_carries_its_types() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    assert [(ROOT / package / "py.typed").is_file() for package in packages] == [True]


def test_the_catalogues_snakefile_plans_what_ours_does(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    shutil.copytree(ROOT / "workflow", tmp_path / "workflow")
    planned = project.plan()
    assert planned["all"] == 1
    assert project.plan("--snakefile", "workflow/Snakefile") == planned


def test_hints_name_a_command_that_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for path in (ROOT / "src").rglob("*.py"):
        assert "pip install" not in path.read_text(), (
            f"{path}: the environment has no pip; name a target of the Makefile"
        )
    assert "\ntensorrt: " in makefile
