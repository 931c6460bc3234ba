"""Files that appear whole or not at all, and the one way to digest them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import os
import re
import resource
import secrets
import shlex
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import PIL.Image


class UserError(Exception):
    """Something the user gave is wrong. The command line prints the message as it is, without a traceback, and exits with 1.

    A message names the file, the record, what was found, what was expected and what to do.
    """


def workflow_command(*paths: Path | str, again: bool = False, data_root: str = "data") -> str:
    """What makes files of the workflow. ``again``: also where Snakemake knows of nothing to do, as after a change by hand."""
    words = ["snakemake", "--cores", "2", *(["--force"] if again else []), *map(str, paths)]
    # Whatever config/config.yaml says, it may be said once more; "data" is its default.
    return shlex.join(words if data_root == "data" else [*words, "--config", f"data_root={data_root}"])


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
    errno.EFBIG: "files may not become that large here; raise the limit (`ulimit -f unlimited`), or use another disk",
    errno.EROFS: "the file system is read-only; mount it writable",
    errno.EACCES: "this user may not write there; change its owner or mode",
    errno.EPERM: "this user may not write there; change its owner or mode",
}
"""What a disk refuses, and what to do."""

MISPLACED = {
    errno.EEXIST: "a file stands where a folder is expected; move it away",
    errno.ENOTDIR: "a file stands where a folder is expected; move it away",
    errno.ELOOP: "links lead in a circle; remove one of them",
    errno.ENAMETOOLONG: "the name is too long for the file system; choose a shorter one",
}
"""The same of what is in the way."""


def refusal(error: OSError) -> str | None:
    """Why something cannot be written and what to do; None where the error is of another kind."""
    place = None if error.filename is None else Path(os.fsdecode(error.filename))
    if error.errno == errno.EEXIST and place is not None and (link := _leads_nowhere(place)):
        return f"{link}; make that folder, or remove the link,"
    return (UNWRITABLE | MISPLACED).get(error.errno or 0)


def missing(path: Path, kind: str = "file") -> str:
    """Says that there is nothing; of a link that leads nowhere, on the way or at its end, where it leads."""
    return _leads_nowhere(path) or f"{path}: no such {kind}"


def _leads_nowhere(path: Path) -> str | None:
    links = (place for place in (path, *path.parents) if place.is_symlink() and not place.exists())
    return next((f"{link}: is a link to {link.readlink()}, where nothing is" for link in links), None)


OPEN_FILES = 1 << 20
"""Number that is enough for anything here: some libraries walk through all descriptors that are allowed, and some machines allow a billion."""


def raise_open_file_limit() -> None:
    """Raises it to what this user may have, of which the usual 1,024 are a fraction."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a full, read-only or protected disk raises into a UserError naming ``path``."""
    try:
        yield
    except OSError as error:
        found = None if error.filename is None else Path(os.fsdecode(error.filename))
        elsewhere = found is not None and not (found.is_relative_to(path.parent) or path.is_relative_to(found))
        reason = refusal(error)
        if reason is None or elsewhere:
            raise
        raise UserError(
            f"{path}: cannot be written: {reason} and run the same again. Nothing half-written was left"
        ) from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``; what was written there is flushed and renamed on success, deleted on any error.

    The temporary name keeps the suffix, because writers such as Pillow choose the format by it. What killed processes left in the
    folder is removed.
    """
    with writing(path), contextlib.ExitStack() as stack:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent)
        temporary = _temporary(path, _create_file, stack)
        try:
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that replaces ``path`` whole on success and disappears on any error.

    Of a link it replaces the folder that the link leads to. The former folder stays until the new one is complete, and only between two
    renames is there none; where a process was killed there, the next writer beside it moves the former back. What killed processes left
    beside it is removed. Unlike in ``atomic_path`` the content is not flushed: a power cut soon afterwards may harm it. Raises UserError
    where ``path`` is a file.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, expected a folder or nothing; move it away")
    with writing(path), contextlib.ExitStack() as stack:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent)
        temporary = _temporary(path, os.mkdir, stack)
        former = temporary.with_name(temporary.name + FORMER)
        try:
            yield temporary
            if path.exists():
                with contextlib.suppress(OSError):
                    stack.enter_context(_locked(path))
                path.rename(former)
            temporary.rename(path)
            _sync_folder(path.parent)
        finally:
            if former.exists() and not path.exists():
                former.rename(path)
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(former, ignore_errors=True)


TEMPORARY = re.compile(
    r"\.(?P<target>.+)\.tessera-(?P<host>[0-9a-f]{8})(?P<boot>[0-9a-f]{8})[0-9a-f]{8}(?P<suffix>\..*)?", re.DOTALL
)
"""Names of what is being written. Its maker holds a lock on it, which ends with the process, however that ends."""

FORMER = ".former"
"""Suffix of a folder that the new one of the same name is about to replace."""

FOREIGN_SECONDS = 86400.0
"""Some shared file systems keep locks of that kind to the machine: what another one made and did not touch for so long is abandoned."""


def remove_abandoned(folder: Path, alone: bool = False) -> None:
    """Removes what killed processes were writing in ``folder``; what a living one works at stays, as does what cannot be locked.

    A folder that was to be replaced comes back where the new one has not taken its place. ``alone``: no other machine writes here.
    """
    for path in temporaries(folder):
        with contextlib.suppress(OSError), _locked(path, wait=False):
            if not alone and _is_foreign(path):
                continue
            match = TEMPORARY.fullmatch(path.name)
            if not path.is_dir():
                path.unlink()
            elif match and match["suffix"] == FORMER and not os.path.lexists(target := path.with_name(match["target"])):
                path.rename(target)
            else:
                shutil.rmtree(path)


def temporaries(folder: Path) -> list[Path]:
    """What processes are writing in ``folder``, or were when they were killed."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if TEMPORARY.fullmatch(entry.name) and not entry.is_symlink()]
    except OSError:
        return []
    return sorted(Path(entry.path) for entry in found)


def is_abandoned(path: Path) -> bool | None:
    """Whether no living process works at this one of ``temporaries``; None where the lock does not tell."""
    try:
        with _locked(path, wait=False):
            return None if _is_foreign(path) else True
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:
        return None


def _is_foreign(path: Path) -> bool:
    """Whether another machine may be at work at this one of ``temporaries``."""
    match = TEMPORARY.fullmatch(path.name)
    if match is None or match["host"] == _machine()[0] or match["boot"] == _machine()[1]:
        return False
    oldest = time.time() - FOREIGN_SECONDS
    # Files that are written into a folder below leave the folder's own time as it is.
    return any(os.lstat(one).st_mtime > oldest for one in itertools.chain([path], path.rglob("*")))


@contextlib.contextmanager
def only_process(path: Path, busy: str | None = None, lockless: str = "put the project elsewhere") -> Iterator[None]:
    """Holds the lock file ``path``, which stays there and says who holds it. While another process does: waits, or given ``busy`` raises
    UserError of it, ``{holder}`` in it replaced. Freed by the kernel when the process ends, however it ends.

    A record lock (not ``flock``): loader processes do not inherit it, so that the orphans of a killed start do not keep it. It holds
    across machines. ``lockless``: what the user can do where the file system has no locks.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            raise UserError(f"{path}: is a link, expected a lock file or nothing; remove it")
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    with os.fdopen(handle, encoding="utf-8", errors="replace") as stream:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: is no regular file, expected a lock file or nothing; remove it")
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            holder = stream.read(200).strip() or "unknown process"
            raise UserError((busy or "").replace("{holder}", holder)) from None
        except OSError as error:
            raise UserError(
                f"{path}: cannot be locked ({error.strerror}); mount the file system with locks (Lustre: -o flock; NFS: lockd), or {lockless}"
            ) from None
        if found.st_nlink == 1:  # else the content is somebody else's, too
            with contextlib.suppress(OSError):
                os.ftruncate(handle, 0)
                job = os.environ.get("SLURM_JOB_ID")
                os.write(
                    handle,
                    f"pid {os.getpid()} on {os.uname().nodename}{f', SLURM job {job}' if job else ''}\n".encode(),
                )
        yield


def link_file(source: Path, path: Path) -> None:
    """``path`` becomes another name of the file ``source``, or a copy where the file system has no such names."""
    with atomic_path(path) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def write_bytes(path: Path, content: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def encoded(picture: PIL.Image.Image, suffix: str, **options: Any) -> bytes:
    """The file of a picture, in memory: what Pillow writes itself stays open and half-written where a disk refuses it."""
    from PIL import Image

    stream = io.BytesIO()
    picture.save(stream, Image.registered_extensions()[suffix], **options)
    return stream.getvalue()


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline; NaN and infinities are refused, because JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


_IRREGULAR = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_input(path: Path) -> BufferedReader:
    """Opens what a user names as a file. Raises OSError, also for what only looks like a file: reading a FIFO would wait for ever."""
    return open(path, "rb", opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    try:
        handle = os.open(path, flags | os.O_NONBLOCK)
    except FileNotFoundError:
        if not Path(path).is_symlink():
            raise
        raise OSError(errno.EINVAL, f"a link to {Path(path).readlink()}, which does not exist", path) from None
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise OSError(errno.EINVAL, "a socket or device, expected a regular file", path) from None
    kind = _IRREGULAR.get(stat.S_IFMT(os.fstat(handle).st_mode))
    if kind is None:
        return handle
    os.close(handle)
    raise OSError(errno.EINVAL, f"{kind}, expected a regular file", path)


@contextlib.contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Turns what opening and decoding the file raises into a UserError; ``expected`` completes "expected ..."."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{missing(path)}; expected {expected}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected {expected}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not {error.encoding.upper()} text (byte {error.start}); expected {expected}"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from None


def require_file(path: Path, expected: str) -> None:
    """Raises UserError where ``path`` is no file that can be opened; ``expected`` completes "expected ..."."""
    with reading(path, expected):
        open_input(path).close()


def read_text(path: Path) -> str:
    """Raises OSError as ``open_input`` does, and UnicodeDecodeError."""
    with open_input(path) as stream:
        return decode_text(stream.read())


def is_text(value: str) -> bool:
    """False where it holds half a pair of surrogates, which no file can be given as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def decode_text(content: bytes) -> str:
    """UTF-8, or UTF-16 as editors of Windows write it, without a byte order mark."""
    return content.decode(json.detect_encoding(content[:4]))


def read_json(path: Path) -> Any:
    """Raises UserError with the position when the file is missing, is neither UTF-8 nor UTF-16, or is not JSON."""
    with reading_json(path):
        return json.loads(read_text(path))


@contextlib.contextmanager
def reading_json(path: Path) -> Iterator[None]:
    """Turns what opening, decoding and parsing the file raises into the UserError of ``read_json``."""
    try:
        with reading(path, "a JSON file"):
            yield
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); is the file cut off?"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else "a number of thousands of digits"
        raise UserError(f"{path}: not valid JSON ({reason}); make the file again") from None


def canonical_json(value: Any) -> str:
    """Sorted keys, no spaces: equal values give equal text, so that text can be compared and digested."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def digest_text(text: str) -> str:
    """sha256 in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of the content in hexadecimal, read in pieces."""
    with open_input(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _temporary(path: Path, create: Callable[[Path], None], stack: contextlib.ExitStack) -> Path:
    """Beside ``path``, locked until ``stack`` closes, so that nobody takes it for abandoned."""
    stem, suffix = (path.name, "") if create is os.mkdir else (path.stem, path.suffix)
    while True:
        made = path.with_name(f".{stem}.tessera-{''.join(_machine())}{secrets.token_hex(4)}{suffix}")
        create(made)
        with contextlib.suppress(OSError):  # a file system without locks, where nothing is ever taken for abandoned
            stack.enter_context(_locked(made))
        if made.exists():  # else another process was faster than the lock
            return made


def _create_file(path: Path) -> None:
    path.touch(exist_ok=False)


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Raises OSError where it cannot be had. Ends with the process, whatever processes this one has forked."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, os.O_RDWR | flags)  # NFS locks no file that cannot be written
    except IsADirectoryError:
        handle = os.open(path, os.O_RDONLY | flags)
    _held.add(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        if handle in _held:
            _held.remove(handle)
            os.close(handle)


_held: set[int] = set()


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


@functools.cache
def _machine() -> tuple[str, str]:
    """Eight digits of the host, which outlive its restarts, and eight of its kernel since the last one, which its containers share."""
    host, boot = "", ""
    with contextlib.suppress(OSError):
        host = Path("/etc/machine-id").read_text(encoding="ascii")
    # Neither is enough: images of containers have a machine-id in common, and some machines a name.
    host = digest_text(f"{host}\0{os.uname().nodename}")[:8]
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
    return host, boot or host


def _sync_folder(path: Path) -> None:
    """Makes the rename itself survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
