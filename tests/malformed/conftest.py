from __future__ import annotations

import contextlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tessera import cli
from tessera.files import write_json
from tests.malformed.project import EXPERIMENT, FOLDER, MODEL, write_config


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


def call(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> Answer:
    """The command line in this process, at work in ``folder``."""
    before = Path.cwd(), sys.argv
    os.chdir(folder)
    sys.argv = ["tessera", *arguments]
    code: int | str | None = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    finally:
        os.chdir(before[0])
        sys.argv = before[1]
    captured = capsys.readouterr()
    assert isinstance(code, int)
    return Answer(code, captured.out, captured.err)


@pytest.fixture(scope="session")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration, generated data, a model as initialised, its graph and its evaluation, each written by its own stage."""
    from tessera.data.catalog import load_catalog
    from tessera.data.demo import write_demo
    from tessera.deploy.export import export
    from tessera.models import build_model
    from tessera.models.artifact import save_model
    from tessera.provenance import Header, digests, sealed
    from tessera.spec.compose import load_grid
    from tessera.spec.lineage import lineage
    from tessera.training.weights import count_parameters

    root = tmp_path_factory.mktemp("valid")
    write_config(root)
    grid = load_grid(root)
    generator = grid.dataset("demo").generator
    assert generator is not None
    write_demo(root / "data/demo", generator, progress=False)
    spec = grid.resolve(EXPERIMENT).spec
    torch.manual_seed(0)
    catalog = load_catalog(spec.dataset, str(root / "data"), spec.model.mode)
    model = build_model(spec.model, catalog)
    header = Header("train", EXPERIMENT, spec, lineage(spec, "train"), catalog)
    save_model(root / MODEL, model.network.state_dict(), header)
    report = {
        "experiment": EXPERIMENT,
        "parameters": count_parameters(model.network),
        "lineage": header.lineage,
        "facts": header.facts,
    }
    outputs = digests(root / FOLDER, [root / MODEL])
    write_json(root / FOLDER / "train.json", sealed(report, outputs=outputs))
    with contextlib.chdir(root):
        export(root / MODEL, root / FOLDER / "model.onnx", spec, EXPERIMENT)
    return root


@pytest.fixture(scope="session")
def measured(valid: Path) -> Path:
    """``valid`` with eval.json."""
    before = Path.cwd(), sys.argv
    os.chdir(valid)
    sys.argv = ["tessera", "evaluate", EXPERIMENT]
    try:
        cli.main()
    finally:
        os.chdir(before[0])
        sys.argv = before[1]
    return valid


@pytest.fixture
def project(measured: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    shutil.copytree(measured, tmp_path / "project")
    return tmp_path / "project"
