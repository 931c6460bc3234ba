"""Files that appear whole or not at all, and the one way to digest them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Something the user gave is wrong. The command line prints the message as it is, without a traceback, and exits with 1.

    A message names the file, the record, what was found, what was expected and what to do.
    """


SHOWN = 50
"""Faults that one message holds in full."""


def raise_all(title: str, faults: Sequence[str], count: int | None = None) -> None:
    """Raises one UserError with all faults, if any; ``count``: how many there are where ``faults`` are only the first of them."""
    found = len(faults) if count is None else count
    if found == 1:
        raise UserError(f"{title}: {faults[0]}")
    if found:
        more = f"\n  ... and {found - SHOWN} more" if found > SHOWN else ""
        raise UserError(f"{title}: {found} problem(s)\n  " + "\n  ".join(faults[:SHOWN]) + more)


UNWRITABLE = {
    errno.ENOSPC: "no space left on the disk; make room",
    errno.EDQUOT: "the disk quota is used up; make room",
    errno.EROFS: "the file system is read-only; mount it writable",
    errno.EACCES: "this user may not write there; change its owner or mode",
    errno.EPERM: "this user may not write there; change its owner or mode",
}
"""What a disk refuses, and what to do."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a full, read-only or protected disk raises into a UserError naming ``path``."""
    try:
        yield
    except OSError as error:
        found = None if error.filename is None else Path(error.filename)
        elsewhere = found is not None and not (found.is_relative_to(path.parent) or path.is_relative_to(found))
        if error.errno not in UNWRITABLE or elsewhere:
            raise
        raise UserError(
            f"{path}: cannot be written: {UNWRITABLE[error.errno]} and run the same again. Nothing half-written was left"
        ) from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``; what was written there is flushed and renamed on success, deleted on any error.

    The temporary name keeps the suffix, because writers such as Pillow choose the format by it.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that replaces ``path`` whole on success and disappears on any error.

    Of a link it replaces the folder that the link leads to. The former folder stays until the new one is complete, and only between two
    renames is there none. What killed processes left beside it is removed. Unlike in ``atomic_path`` the content is not flushed: a power cut
    soon afterwards may harm it. Raises UserError where ``path`` is a file.
    """
    path = _place(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, expected a folder or nothing; move it away")
    with writing(path), contextlib.ExitStack() as stack:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
        temporary = _temporary_folder(path, stack)
        former = temporary.with_name(f"{temporary.name}.former")
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            if path.exists():
                path.rename(former)
            temporary.rename(path)
            _sync_folder(path.parent)
        finally:
            if former.exists() and not path.exists():
                former.rename(path)
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(former, ignore_errors=True)


def remove_abandoned(path: Path) -> None:
    """Removes what killed processes left of ``atomic_folder(path)``; what a living one works at stays."""
    path = _place(path)
    if not path.parent.is_dir():
        return
    ours = re.compile(re.escape(f".{path.name}.") + r"[a-z0-9_]{8}(\.former)?")
    for left in [entry for entry in path.parent.iterdir() if ours.fullmatch(entry.name)]:
        maker = left.with_suffix("") if left.suffix == ".former" else left
        with contextlib.suppress(OSError), _locked(maker if maker.exists() else path, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(left)


@contextlib.contextmanager
def only_process(path: Path, busy: str | None = None, lockless: str = "put the project elsewhere") -> Iterator[None]:
    """Holds the lock file ``path``, which stays there. While another process holds it: waits, or given ``busy`` raises UserError of it.

    ``lockless``: what the user can do where the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise UserError(busy) from None
        except OSError as error:
            raise UserError(
                f"{path}: cannot be locked ({error.strerror}); mount the file system with locks (Lustre: -o flock), or {lockless}"
            ) from None
        yield


def write_bytes(path: Path, content: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline; NaN and infinities are refused, because JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises UserError with the position when the file is missing, is not UTF-8 or is not JSON."""
    with reading_json(path):
        return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def reading_json(path: Path) -> Iterator[None]:
    """Turns what opening, decoding and parsing the file raises into the UserError of ``read_json``."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a JSON file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); expected a JSON file") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); is the file cut off?"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else "a number of thousands of digits"
        raise UserError(f"{path}: not valid JSON ({reason}); make the file again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def canonical_json(value: Any) -> str:
    """Sorted keys, no spaces: equal values give equal text, so that text can be compared and digested."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def digest_text(text: str) -> str:
    """sha256 in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of the content in hexadecimal, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _temporary_folder(path: Path, stack: contextlib.ExitStack) -> Path:
    """Beside ``path``, locked until ``stack`` closes, so that nobody takes it for abandoned."""
    while True:
        made = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        with contextlib.suppress(OSError):  # a file system without locks, where nothing is ever taken for abandoned
            stack.enter_context(_locked(made, fcntl.LOCK_EX))
        if made.exists():  # else another process was faster than the lock
            return made


@contextlib.contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)


def _place(path: Path) -> Path:
    """Where a link leads."""
    return path.resolve() if path.is_symlink() else path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(path: Path) -> None:
    """Makes the rename itself survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
