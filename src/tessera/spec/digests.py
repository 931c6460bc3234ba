"""Digests of large files and of folders of many files, kept in the project: planning over 100 000 label files reads none of them the second time."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tessera.files import UserError, digest_file, write_text

MISSING = "missing"
"""In place of the digest of what does not exist: planning goes on, and the stage that needs it reports it."""
UNREADABLE = "unreadable"
"""The same of what is there and cannot be read: without permission, or a folder in place of a file."""

KEPT = Path("data/.digests")
"""One small file for each known state of a folder or large file, named by that state. May be deleted at any time."""

_LARGE = 1 << 24
"""Bytes. Smaller files are read faster than they are looked up."""
_SETTLED = 2_000_000_000
"""Nanoseconds. What changed later than this may change once more without a new time, so its state is not remembered."""


def file_digest(path: Path) -> str:
    """sha256 of a file, ``missing`` or ``unreadable``. Read when its size or a time differs from the last look."""
    try:
        status = path.stat()
        return _file_digest(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    except (FileNotFoundError, NotADirectoryError):
        return MISSING
    except OSError:
        return UNREADABLE


@functools.cache
def folder_digest(folder: Path) -> str:
    """sha256 of the names and contents of all files below the folder, ``missing`` or ``unreadable``; hidden ones, linked folders and links
    that lead nowhere do not count.

    Contents are read when the name, the size or a time of any file differs from the last look. The folder is looked at once per
    process, because planning asks for each experiment and stage; ``folder_digest.cache_clear()`` forgets.
    """
    try:
        return _folder_digest(folder) if folder.is_dir() else MISSING
    except OSError:
        return UNREADABLE


def _folder_digest(folder: Path) -> str:
    state, newest = hashlib.sha256(os.fsencode(folder.resolve())), 0
    names = []
    for name in _names(folder):
        try:
            status = os.stat(f"{folder}/{name}")  # noqa: PTH116  # Path objects double the time
        except FileNotFoundError:
            continue
        names.append(name)
        newest = max(newest, status.st_mtime_ns, status.st_ctime_ns)
        times = f"\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\0"
        state.update(os.fsencode(name) + times.encode())

    def read() -> str:
        content = hashlib.sha256()
        for name in names:
            content.update(os.fsencode(name) + b"\0" + digest_file(folder / name).encode() + b"\0")
        return content.hexdigest()

    return _kept(state.hexdigest(), newest, read)


@functools.cache
def names_digest(folder: Path) -> str:
    """sha256 of the names in the folder, ``missing`` or ``unreadable``; hidden ones do not count. Looked at once per process."""
    try:
        names = sorted(os.fsencode(name) for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208  # as above
    except (FileNotFoundError, NotADirectoryError):
        return MISSING
    except OSError:
        return UNREADABLE
    return hashlib.sha256(b"\0".join(names)).hexdigest()


@functools.cache
def _file_digest(path: Path, size: int, modified: int, changed: int) -> str:
    if size < _LARGE:
        return digest_file(path)
    state = hashlib.sha256(os.fsencode(path.resolve()) + f"\0{size}\0{modified}\0{changed}".encode())
    return _kept(state.hexdigest(), max(modified, changed), lambda: digest_file(path))


def _kept(state: str, newest: int, read: Callable[[], str]) -> str:
    """What ``read`` gives, asked once for each state; ``newest`` is the last time in it, in ns."""
    path = KEPT / state[:32]
    with contextlib.suppress(OSError):
        return path.read_text()
    found = read()
    if time.time_ns() - newest > _SETTLED:
        # A project that cannot be written to only plans more slowly.
        with contextlib.suppress(OSError, UserError):
            write_text(path, found)
    return found


def _names(folder: Path) -> Iterator[str]:
    """Relative to the folder, sorted within each of its folders."""
    for place, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(place, folder)
        for name in sorted(names):
            if not name.startswith("."):
                yield name if relative == "." else f"{relative}/{name}"


def _raise(error: OSError) -> None:
    raise error
