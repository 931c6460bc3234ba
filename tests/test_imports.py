"""Imports point one way (DESIGN.md, section 3), and planning, tables and the command line start without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "tessera"

GROUND = {"files", "structures", "spec", "provenance"}
ALLOWED: dict[str, set[str]] = {
    "files": set(),
    "structures": set(),
    "spec": {"files", "structures"},
    "provenance": {"files", "structures", "spec"},
    "ops": GROUND,
    "data": GROUND | {"ops"},
    "models": GROUND | {"ops"},
    "progress": set(),
    "metrics": GROUND | {"ops", "progress"},
    "pictures": GROUND | {"ops", "metrics"},
    "tables": GROUND | {"metrics", "pictures"},
    "inference": GROUND | {"ops", "models", "pictures", "progress"},
    "gpus": {"files"},
    "log": set(),
    "training": GROUND | {"ops", "models", "data", "metrics", "pictures", "gpus", "log"},
    "deploy": GROUND | {"ops", "models", "data", "inference"},
    "interop": GROUND | {"ops", "models", "data"},
}
"""Package or module -> what it may import of ours, wherever in a file the import stands. `cli` and `commands` may import all."""

SHARED_BY_FAMILIES = {"common", "backbone", "base", "swin", "gcvit", "pyramid", "artifact"}
"""Everything else below models/ that is a folder is a family, and no family imports another."""

EXCEPTIONS = {
    ("spec/told.py", "data"): "label maps and lists of categories need no torch, and planning tells what they lack",
    ("models/backbone.py", "interop"): "the one place where a network takes over weights that others published",
    ("inference/sources.py", "data"): "data/coco_index.py is the one reader of COCO files, lists of images among them",
}


def imports(path: Path) -> Iterator[str]:
    """Dotted names below tessera that a file imports, lazy and type-only imports included."""
    package = ["tessera", *path.relative_to(SOURCE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        else:
            continue
        yield from (name.removeprefix("tessera.") for name in names if name.startswith("tessera."))


def violations(path: Path) -> list[str]:
    place = path.relative_to(SOURCE).as_posix()
    package = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if package in ("cli", "commands", "__init__"):
        return []
    found = []
    for name in sorted(set(imports(path))):
        other = name.split(".")[0]
        if other != package and other not in ALLOWED[package] and (place, other) not in EXCEPTIONS:
            found.append(f"{place} imports tessera.{name}: {package} may import {sorted(ALLOWED[package])} only")
    return found


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    assert violations(path) == []


def test_another_format_has_one_entrance() -> None:
    """What reads it lies in a package of interop/ that others import whole, and that knows no other format."""
    formats = {path.name for path in (SOURCE / "interop").iterdir() if (path / "__init__.py").exists()}
    assert "tao" in formats
    for path in FILES:
        inside = path.relative_to(SOURCE).parts[1] if path.is_relative_to(SOURCE / "interop") else ""
        for name in imports(path):
            pieces = name.split(".")
            if pieces[0] != "interop" or pieces[1] == inside:
                continue
            assert not inside, f"{path} imports {name}, another format"
            module = SOURCE.joinpath(*pieces[:3])
            assert not (module.is_dir() or module.with_suffix(".py").exists()) or len(pieces) < 3, f"{path}: {name}"


def test_every_package_has_a_direction() -> None:
    packages = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in FILES}
    assert packages - {"cli", "commands", "__init__"} == ALLOWED.keys()


def test_exceptions_are_needed() -> None:
    for (place, other), reason in EXCEPTIONS.items():
        assert reason
        assert any(name.split(".")[0] == other for name in imports(SOURCE / place)), (
            f"{place} no longer imports {other}"
        )


def test_directions_have_no_circle() -> None:
    done: list[str] = []
    while len(done) < len(ALLOWED):
        free = [name for name, allowed in ALLOWED.items() if name not in done and allowed <= set(done)]
        assert free
        done += free


def test_a_family_never_imports_a_family() -> None:
    families = (
        {path.name for path in (SOURCE / "models").iterdir() if path.is_dir()} - SHARED_BY_FAMILIES - {"__pycache__"}
    )
    assert "mask2former" in families
    for family in families:
        for path in sorted((SOURCE / "models" / family).rglob("*.py")):
            for name in imports(path):
                pieces = name.split(".")
                assert pieces[0] != "models" or pieces[1] not in families - {family}, f"{path}: {name}"
    for shared in SHARED_BY_FAMILIES - {"artifact"}:
        place = SOURCE / "models" / shared
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]:
            for name in imports(path):
                pieces = name.split(".")
                assert pieces[0] != "models" or pieces[1] not in families, f"{path}: {name}"


def test_the_walk_sees_lazy_relative_and_dynamic_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    path = tmp_path / "metrics" / "bad.py"
    path.parent.mkdir()
    path.write_text(
        "import tessera.models.base\nfrom .. import data\nfrom ..training import train\n"
        "def lazy():\n    from tessera.deploy.engine import build\n    importlib.import_module('tessera.inference')\n"
    )
    assert set(imports(path)) == {"models.base", "data", "training.train", "deploy.engine.build", "inference"}
    assert len(violations(path)) == 5


def module_name(path: Path) -> str:
    pieces = ["tessera", *path.relative_to(SOURCE).with_suffix("").parts]
    return ".".join(pieces[:-1] if pieces[-1] == "__init__" else pieces)


LIGHT = [
    module_name(path)
    for path in FILES
    if path.relative_to(SOURCE).parts[0].removesuffix(".py")
    in ("spec", "files", "gpus", "log", "structures", "metrics", "progress", "provenance", "tables", "cli", "commands")
    or path.is_relative_to(SOURCE / "interop" / "tao")
]


def loaded_by(modules: list[str]) -> set[str]:
    """Top-level packages in memory after importing the modules in a fresh process."""
    code = "import sys\n" + "\n".join(f"import {module}" for module in modules)
    code += "\nprint(' '.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_planning_tables_and_command_line_start_without_torch() -> None:
    assert {"tessera.spec.compose", "tessera.cli", "tessera.tables.compare"} <= set(LIGHT)
    assert not loaded_by(LIGHT) & {
        "torch",
        "torchvision",
        "pytorch_lightning",
        "timm",
        "onnx",
        "onnxruntime",
        "tensorrt",
    }


def test_planning_starts_without_pandas() -> None:
    assert not loaded_by([name for name in LIGHT if name.startswith("tessera.spec")]) & {
        "pandas",
        "numpy",
        "matplotlib",
    }
