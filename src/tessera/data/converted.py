"""Shards as `tessera convert` left them: none missing, none added, none changed."""

from __future__ import annotations

from pathlib import Path

from tessera.files import UserError, digest_file, read_json, workflow_command
from tessera.spec.lineage import GENERATED_ROOT
from tessera.spec.schema import DatasetSpec
from tessera.spec.sources import CONVERTED


def require_whole(dataset: DatasetSpec, data_root: str, contents: bool = False) -> None:
    """Raises UserError where the shards of a converted dataset are not those of its manifest; ``contents``: by their sha256, not only by name.

    A pattern would pass over a shard that is missing. Hidden files, which no pattern matches, do not count.
    """
    if dataset.convert is None:
        return
    folder = Path(GENERATED_ROOT) / dataset.name / CONVERTED
    path = folder / "manifest.json"
    command = workflow_command(path, data_root=data_root)
    advice = f"remove {folder} and convert again: {command}"
    if not path.exists():
        raise UserError(f"{path}: no such file; the dataset is not converted, or its last conversion failed: {command}")
    try:
        manifest = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; {advice}") from None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        raise UserError(f"{path}: has no `files`; expected what tessera convert wrote; {advice}")
    listed = {name for name in files if name.startswith("shards/")}
    found = {f"shards/{path.name}" for path in (folder / "shards").glob("[!.]*")}
    for name in sorted(listed ^ found):
        state = "is missing" if name in listed else "is none of the converted files"
        raise UserError(f"{folder / name}: {state}; {advice}")
    for name in sorted(listed) if contents else ():
        if digest_file(folder / name) != files[name]:
            raise UserError(f"{folder / name}: differs from what convert wrote; {advice}")
