"""What planning reads of DVC's files: the digests of raw data, and whether `dvc repro` may run here at all (docs/dvc.md)."""

from __future__ import annotations

import functools
from pathlib import Path

from tessera.files import UserError, canonical_json, digest_text
from tessera.spec.parts import read_mapping

DIGESTS = ("md5", "etag", "checksum", "files")
"""Keys of an output in a `.dvc` file that tell its content; all others (size, remote, description) may change without it."""


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
