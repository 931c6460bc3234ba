"""What planning reads of DVC's files: the digests of raw data, and whether `dvc repro` may run here at all (docs/dvc.md)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from tessera.files import UserError, canonical_json, digest_text
from tessera.spec.parts import read_mapping

DIGESTS = ("md5", "etag", "checksum", "files")
"""Keys of an output in a `.dvc` file that tell its content; all others (size, remote, description) may change without it."""

CHECKS = "data/checks"
"""Where the check stage writes: an output of every run."""


def raw_digest(path: Path) -> str | None:
    """What DVC recorded of the file or folder ``path`` in ``<path>.dvc`` beside it; None where it tracks no such thing.

    Raises UserError for a `.dvc` file without a digest.
    """
    beside = Path(f"{path}.dvc")
    try:
        status = beside.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _recorded(beside, status.st_size, status.st_mtime_ns)


@functools.cache
def _recorded(path: Path, _size: int, _modified: int) -> str:
    outputs = read_mapping(path).get("outs")
    entries = outputs if isinstance(outputs, list) else []
    told = [{key: entry[key] for key in DIGESTS if key in entry} for entry in entries if isinstance(entry, dict)]
    if not told or not all(told):
        raise UserError(
            f"{path}: expected outs with one of {', '.join(DIGESTS)}; is it cut off? Take it from git, or make it again with "
            f"`dvc add {path.with_suffix('')}`"
        )
    md5 = told[0].get("md5")
    return md5 if len(told) == 1 and isinstance(md5, str) else digest_text(canonical_json(told))


def refuse_unsafe_repro(stage: str, made: set[str], tracked: set[str], root: Path = Path()) -> None:
    """Raises UserError where ``stage`` of dvc.yaml, which is being reproduced, would leave stale or missing results behind.

    ``made``: folders of data that the planned rules write; ``tracked``: planned raw data with a `.dvc` file.
    """
    _refuse_links(root)
    definition = read_mapping(root / "dvc.yaml").get("stages", {}).get(stage)
    if definition is None:
        return
    outputs, dependencies = (set(_paths(definition.get(key))) for key in ("outs", "deps"))
    lines = [
        f"outs: add `- {path}: {{persist: true}}`; a rule makes it, and a clone without it could not train again"
        for path in sorted(made - outputs)
    ]
    lines += [
        f"outs: remove {path}; nothing that is planned makes it, and DVC fails when it is not there"
        for path in sorted(outputs - made)
        if path.startswith("data/") and path != CHECKS and not (root / path).exists()
    ]
    lines += [
        f"deps: add `- {path}`; otherwise `dvc repro` does not see that it changed"
        for path in sorted(tracked - dependencies)
    ]
    if lines:
        raise UserError("\n  ".join([f"dvc.yaml, stages.{stage} does not fit the planned datasets:", *lines]))


def _refuse_links(root: Path) -> None:
    from dvc.config import Config

    kinds = Config(str(root / ".dvc"))["cache"].get("type") or []
    links = [kind for kind in kinds if kind in ("hardlink", "symlink")]
    if links:
        raise UserError(
            f"DVC's cache.type is {','.join(kinds)}: with {' and '.join(links)} `dvc repro` writes persistent outputs anew before it starts "
            "Snakemake, so that old results look newer than what they are made from, and stay. Set it back with "
            "`dvc config cache.type reflink,copy` (`dvc config --list --show-origin` tells which file has it), then `dvc checkout --relink`"
        )


def _paths(entries: Any) -> list[str]:
    """Of outs or deps, each of which is a path or a mapping of one path to its settings."""
    return [str(next(iter(entry)) if isinstance(entry, dict) else entry) for entry in entries or []]
