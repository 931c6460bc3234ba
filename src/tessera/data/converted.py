"""Data as the rule that made them left them: none missing, none added, none changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tessera.files import UserError, digest_file, read_json, workflow_command
from tessera.spec.digests import MISSING
from tessera.spec.lineage import GENERATED_ROOT, differences
from tessera.spec.schema import DatasetSpec
from tessera.spec.sources import CONVERTED


def require_whole(dataset: DatasetSpec, data_root: str, contents: bool = False) -> None:
    """Raises UserError where the shards of a converted dataset are not those of its manifest; ``contents``: by their sha256, not only by name.

    A pattern would pass over a shard that is missing. Hidden files, which no pattern matches, do not count.
    """
    if dataset.convert is None:
        return
    folder = Path(GENERATED_ROOT) / dataset.name / CONVERTED
    advice = _advice(folder, "convert", data_root)
    files = _manifest(folder, "convert", data_root)["files"]
    listed = {name for name in files if name.startswith("shards/")}
    found = {f"shards/{path.name}" for path in (folder / "shards").glob("[!.]*")}
    for name in sorted(listed ^ found):
        state = "is missing" if name in listed else "is none of the converted files"
        raise UserError(f"{folder / name}: {state}; {advice}")
    for name in sorted(listed) if contents else ():
        if digest_file(folder / name) != files[name]:
            raise UserError(f"{folder / name}: differs from what convert wrote; {advice}")


def require_made(dataset: DatasetSpec, data_root: str, digests: Mapping[Path, str]) -> None:
    """Raises UserError where the files (by path, their sha256) of a converted or generated dataset are not those of its manifest, or the scenes
    were generated from other keys: its lineage speaks of what they are made from, and not of them."""
    if dataset.convert is not None:
        folder, verb = Path(GENERATED_ROOT) / dataset.name / CONVERTED, "convert"
    elif dataset.generator is not None:
        folder, verb = Path(data_root) / dataset.name, "demo"
    else:
        return
    manifest = _manifest(folder, verb, data_root)
    advice = _advice(folder, verb, data_root)
    if verb == "demo" and dataset.generator is not None:
        wanted = dataset.generator.model_dump(mode="json")
        if changed := differences(manifest.get("generator"), wanted):
            raise UserError(f"{folder}: was generated with other keys ({'; '.join(changed[:3])}); {advice}")
    for path, digest in digests.items():
        if path.is_relative_to(folder) and digest not in (
            MISSING,
            manifest["files"].get(str(path.relative_to(folder))),
        ):
            raise UserError(f"{path}: differs from what {verb} wrote; {advice}")


def _manifest(folder: Path, verb: str, data_root: str) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.exists():
        command = workflow_command(path, data_root=data_root)
        raise UserError(
            f"{path}: no such file; the dataset is not made, or the last `tessera {verb}` failed: {command}"
        )
    try:
        manifest: Any = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; {_advice(folder, verb, data_root)}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise UserError(
            f"{path}: has no `files`; expected what tessera {verb} wrote; {_advice(folder, verb, data_root)}"
        )
    return manifest


def _advice(folder: Path, verb: str, data_root: str) -> str:
    again = "convert" if verb == "convert" else "generate"
    return f"remove {folder} and {again} again: {workflow_command(folder / 'manifest.json', data_root=data_root)}"
