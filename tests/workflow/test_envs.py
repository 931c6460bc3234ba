"""The pinned environments: complete, in agreement, and free of addresses."""

from __future__ import annotations

import hashlib
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVS = ROOT / "envs"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lock: str) -> dict[str, set[str]]:
    """Package -> versions (several where they differ by Python version)."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", (ENVS / lock).read_text(), re.MULTILINE):
        found.setdefault(normal(name), set()).add(version)
    return found


def wishes(text: list[str]) -> set[str]:
    return {line.replace(" ", "") for line in text if line and not line.startswith(("#", "-"))}


@pytest.mark.parametrize("lock", sorted(path.name for path in ENVS.glob("*.lock")))
def test_locks_hold_hashes_and_no_address(lock: str) -> None:
    text = (ENVS / lock).read_text()
    assert "://" not in text
    assert not re.search(r"index-url|find-links|file:", text)
    entries = re.split(r"\n(?=[A-Za-z0-9])", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    assert all("--hash=sha256:" in entry for entry in entries if entry.strip())


def test_the_wishes_of_a_run_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = set(project["project"]["dependencies"])
    listed = wishes((ENVS / "tessera.in").read_text().splitlines())
    builders = {wish for wish in listed if wish.startswith(("hatchling", "editables"))}
    assert len(builders) == 2
    assert listed - builders == wanted
    assert wishes((ENVS / "dev.in").read_text().splitlines()) == set(project["project"]["optional-dependencies"]["dev"])


@pytest.mark.parametrize(("wish", "lock"), [("tessera.in", "tessera.lock"), ("dev.in", "dev.lock")])
def test_every_wish_is_pinned(wish: str, lock: str) -> None:
    names = {normal(re.split(r"[<>=!~\[;]", line)[0]) for line in wishes((ENVS / wish).read_text().splitlines())}
    assert names <= pins(lock).keys()


def test_checks_run_on_the_versions_of_a_run() -> None:
    run, dev = pins("tessera.lock"), pins("dev.lock")
    assert {name: dev.get(name) for name in run} == run


def test_conda_installs_the_lock_as_it_is() -> None:
    script = (ENVS / "tessera.post-deploy.sh").read_text()
    digest = hashlib.sha256((ENVS / "tessera.lock").read_bytes()).hexdigest()
    assert f'"{digest}  envs/tessera.lock"' in script, "run `make lock`"
    assert "--require-hashes --requirement envs/tessera.lock" in script
    definition = (ENVS / "tessera.yaml").read_text()
    assert "python=3.11" in definition
    rules = "\n".join(path.read_text() for path in sorted((ROOT / "rules").glob("*.smk")))
    assert set(re.findall(r'"\.\./envs/(.+?)"', rules)) == {"tessera.yaml"}
