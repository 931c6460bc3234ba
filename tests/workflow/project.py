"""A copy of the workflow to plan and run in a test."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from tests.forks import FORKS

ROOT = Path(__file__).parents[2]

CONFIG: dict[str, Any] = {
    "models": ["mask2former"],
    "backbones": ["swin"],
    "datasets": ["demo", "streets"],
    "variants": ["short"],
    "experiments": ["mask2former_swin"],
    "tables": {"demo": {"experiments": ["mask2former_swin", "mask2former_swin-short"], "runtimes": ["torch", "onnx"]}},
}

PARTS: dict[str, Any] = {
    "models/mask2former": {"model": {"name": "mask2former"}},
    "backbones/swin": {"model": {"backbone": {"name": "swin_tiny"}}},
    "datasets/demo": {
        "dataset": {
            "generator": {},
            **{split: {"annotations": f"demo/{split}.json"} for split in ("train", "val", "test")},
        }
    },
    "datasets/streets": {
        "dataset": {
            "label_map": "streets/label_map.json",
            "train": {"images": "streets/images", "annotations": "streets/train.json", "panoptic": "streets/masks"},
            "val": {"images": "streets/images", "annotations": "streets/val.json", "panoptic": "streets/masks"},
            "test": {"images": "streets/images", "annotations": "streets/test.json", "panoptic": "streets/masks"},
        }
    },
    "variants/short": {"train": {"num_epochs": 2}},
}


@dataclass
class Project:
    """A copy of the workflow with a small configuration of its own, and a command line that does nothing but write files."""

    root: Path

    def configure(self, part: str, content: dict[str, object]) -> None:
        path = self.root / "config" / f"{part}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))

    def configuration(self) -> dict[Path, str]:
        return {path: path.read_text() for path in (self.root / "config").rglob("*.yaml")}

    def restore(self, configuration: dict[Path, str]) -> None:
        for path in self.configuration().keys() - configuration.keys():
            path.unlink()
        for path, text in configuration.items():
            path.write_text(text)

    def calls(self) -> list[str]:
        """What the rules called, in order."""
        path = self.root / "calls.txt"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def said(self) -> Path:
        """What the last Snakemake to start printed."""
        return self.root / "said.txt"

    def start(self, *arguments: str, fail: str = "", wait: str = "") -> BaseProcess:
        """Snakemake in a process group of its own; the stage ``fail`` fails, the stage ``wait`` waits for the file `go`."""
        path = f"{self.root / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        ours = {name: value for name, value in os.environ.items() if name.startswith("TESSERA_")}
        environment = {"PATH": path, "FAIL": fail, "WAIT": wait, **ours}
        process = FORKS.Process(
            target=_snakemake, args=(self.root, ["--cores", "2", *arguments], environment, self.said)
        )
        process.start()
        return process

    def snakemake(self, *arguments: str, fail: str = "") -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, fail=fail)
        process.join()
        return subprocess.CompletedProcess(arguments, process.exitcode or 0, self.said.read_text(), "")

    def run(self, *arguments: str) -> None:
        done = self.snakemake(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr

    def plan(self, *arguments: str) -> dict[str, int]:
        """Rule -> number of jobs that a dry run lists; empty when there is nothing to do."""
        done = self.snakemake("--dry-run", *arguments)
        text = done.stdout + done.stderr
        assert done.returncode == 0, text
        if "Nothing to be done" in text:
            return {}
        table = re.search(r"^job +count\n[- ]+\n(.*?)^total", text, re.DOTALL | re.MULTILINE)
        assert table is not None, text
        return {rule: int(count) for rule, count in (line.split() for line in table[1].splitlines() if line.strip())}


def make_project(root: Path) -> Project:
    shutil.copy(ROOT / "Snakefile", root)
    for folder in ("rules", "profiles", "envs"):
        shutil.copytree(ROOT / folder, root / folder)
    stub = root / "bin" / "tessera"
    stub.parent.mkdir()
    stub.write_text(f"#!{sys.executable} -SE\n" + (Path(__file__).parent / "tessera_stub.py").read_text())
    stub.chmod(0o755)
    made = Project(root)
    made.configure("config", CONFIG)
    for part, content in PARTS.items():
        made.configure(part, content)
    return made


def _snakemake(root: Path, arguments: list[str], environment: dict[str, str], said: Path) -> None:
    from snakemake.cli import main

    os.setpgid(0, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup make test` hands on that it is ignored
    os.chdir(root)
    os.environ.update(environment)
    said.unlink(missing_ok=True)
    with said.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.argv = ["snakemake", *arguments]
    main()


def wait_until(happened: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.05)
