"""The part files that a TAO spec becomes, and the report that accounts for each of its keys."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.files import UserError, write_text
from tessera.interop.tao.convert import Converted, convert
from tessera.interop.tao.read import read_files
from tessera.interop.tao.table import Fate
from tessera.spec.layers import OWNED
from tessera.spec.mistakes import refuse
from tessera.spec.parts import inline_yaml, parse_yaml, read_mapping, render_yaml

WITH_THE_DATA = ("inference.images", "evaluate.split")
"""Keys that any part may set and that belong to the data."""


UNMEASURED = "Cost and expected score: not measured here."


@dataclass(frozen=True)
class Import:
    converted: Converted
    files: dict[Path, str]
    """Path -> content, below the project's root; those that say the same already are left out."""
    experiment: str | None
    """Its name in the grid; None where the spec is of no experiment."""
    report: str


def import_spec(
    paths: Sequence[Path], name: str, model: str | None = None, variant: str = "tao", root: Path = Path()
) -> Import:
    """Reads TAO's files as one spec and says what has to be written below ``root``. Raises UserError with every mistake at once.

    ``name``: of the dataset's file; ``variant``: of the recipe's.
    """
    for option, value in (("--name", name), ("--variant", variant)):
        if not re.fullmatch(r"[A-Za-z0-9_]+", value):
            raise UserError(
                f"{option} {value!r}: expected letters, digits and underscores only, because it becomes part of a name"
            )
    found = read_files(paths, model)
    converted = convert(found)
    refuse(", ".join(map(str, paths)), found.mistakes)
    if not converted.is_experiment:
        return Import(
            converted, {}, None, _account(converted, paths) + "\n\nnothing written: the file describes no experiment"
        )
    backbone = str(converted.values["model.backbone.name"])
    files = _part_files(converted, paths, name, variant, root)
    model_part = _find_or_make(root, "models", ("model", "name"), converted.family, files)
    backbone_part = _find_or_make(root, "backbones", ("model", "backbone", "name"), backbone, files)
    for path, text in files.items():
        if path.exists() and read_mapping(path) != (parse_yaml(text, str(path)) or {}):
            option = "--name" if path.parent.name == "datasets" else "--variant"
            raise UserError(f"{path}: exists and says something else; choose another {option}, or remove the file")
    experiment, grid = _grid_lines(converted, root, model_part, backbone_part, name, variant)
    written = [f"{'unchanged' if path.exists() else 'written'}: {path}" for path in files]
    report = "\n".join([_account(converted, paths), "", *written, *grid])
    return Import(converted, {path: text for path, text in files.items() if not path.exists()}, experiment, report)


def write_files(files: Mapping[Path, str]) -> None:
    for path, text in files.items():
        write_text(path, text)


# Parts


def _part_files(converted: Converted, paths: Sequence[Path], name: str, variant: str, root: Path) -> dict[Path, str]:
    read, folder, family = ", ".join(path.name for path in paths), root / "config", converted.family
    of_data = {key for key in converted.values if OWNED.get(key) == "datasets" or key in WITH_THE_DATA}
    dataset = [key for key in converted.values if converted.names_data and key in of_data]
    recipe = [key for key in converted.values if key not in {*dataset, "seed", "model.backbone.name"}]
    files: dict[Path, str] = {}
    if dataset:
        head = f"# {name}: data of the TAO spec {read}, relative to the data root, which was {converted.data_root}.\n"
        files[folder / "datasets" / f"{name}.yaml"] = head + _render(converted, dataset)
    files[folder / "variants" / f"{variant}.yaml"] = (
        f"# {variant}: recipes read from TAO specs by `tessera import-spec`; what they say is in the file of each family beside this one.\n"
    )
    files[folder / "variants" / f"{variant}.{family}.yaml"] = (
        f"# {variant} for {family}: read from the TAO spec {read}. Every TAO default that TAO would have used is written out.\n"
        f"# {UNMEASURED}\n{_render(converted, recipe)}"
    )
    return files


def _render(converted: Converted, keys: Sequence[str]) -> str:
    return render_yaml([(key, converted.values[key], converted.origins[key]) for key in keys]) + "\n" if keys else ""


def _find_or_make(root: Path, folder: str, key: tuple[str, ...], value: str, files: dict[Path, str]) -> str:
    """The part that sets ``key`` to ``value``: that of the same name, else the first, else one that is added to ``files``."""
    fitting = []
    for path in sorted((root / "config" / folder).glob("*.yaml")):
        content: Any = read_mapping(path)
        for piece in key:
            content = content.get(piece) if isinstance(content, dict) else None
        if content == value and "." not in path.stem:  # Companions do not count.
            fitting.append(path.stem)
    if fitting:
        return value if value in fitting else fitting[0]
    name = re.sub(r"\W", "_", value)
    defaults = " with the schema's defaults"
    head = f"# {value}{defaults if folder == 'models' else ''}. {UNMEASURED}\n"
    files[root / "config" / folder / f"{name}.yaml"] = head + render_yaml([(".".join(key), value, "")]) + "\n"
    return name


# Report


def _account(converted: Converted, paths: Sequence[Path]) -> str:
    lines = [f"{', '.join(map(str, paths))}: a TAO spec of {converted.family}, {len(converted.outcomes)} keys"]
    for fate in Fate:
        outcomes = [outcome for outcome in converted.outcomes if outcome.fate is fate]
        if outcomes:
            lines.append(f"\n{fate.value}")
        for outcome in outcomes:
            ours = "; ".join(f"{key} = {_short(value)}" for key, value in outcome.ours.items())
            lines.append(f"  {outcome.key} = {_short(outcome.value)}" + (f" -> {ours}" if ours else ""))
            lines += [f"      {note}" for note in outcome.notes]
    given = {key for outcome in converted.outcomes for key in outcome.ours}
    others = [key for key in converted.values if key not in given]
    if others:
        lines.append("\nnot in the file, but what TAO does without (its defaults and what its code fixes), written out")
        lines += [f"  {key} = {_short(converted.values[key])}  ({converted.origins[key]})" for key in others]
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = inline_yaml(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _written(files: Mapping[Path, str]) -> list[str]:
    return [f"{'unchanged' if path.exists() else 'written'}: {path}" for path in files]


def _grid_lines(
    converted: Converted, root: Path, model: str, backbone: str, name: str, variant: str
) -> tuple[str, list[str]]:
    """The experiment's name, and what config/config.yaml has to say for it to exist."""
    path = root / "config" / "config.yaml"
    grid = read_mapping(path) if path.exists() else {}
    defaults = grid.get("defaults") or {}
    default_dataset, default_seed = defaults.get("dataset", "demo"), defaults.get("seed", 0)
    seed = converted.values.get("seed", default_seed)
    dataset = name if converted.names_data else default_dataset
    pieces = [f"{model}_{backbone}"]
    pieces += [] if dataset == default_dataset else [dataset]
    pieces += [variant]
    pieces += [] if seed == default_seed else [f"seed{seed}"]
    wanted = {"models": model, "backbones": backbone, "datasets": dataset, "variants": variant, "seeds": seed}
    missing = [
        f"  {key}: add {value}"
        for key, value in wanted.items()
        if value not in (grid.get(key) or ([0] if key == "seeds" else []))
    ]
    lines = [f"in {path}:", *missing] if missing else []
    if converted.data_root is not None:
        lines += [
            f"data root: {converted.data_root} (data_root in {path}, or --data-root, or where a copy of the data lies)"
        ]
    if converted.data_root == "/":
        lines += ["  the data lie in several trees; below one folder they would have a data root that can be moved"]
    experiment = "-".join(pieces)
    return experiment, [*lines, f"experiment: {experiment}  (tessera spec {experiment})"]
