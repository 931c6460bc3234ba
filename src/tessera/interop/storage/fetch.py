"""Archives of a dataset, brought from S3 or from the data root and unpacked into the project's data/<dataset>/.

Every archive is checked by its sha256 before anything of it is unpacked, fills a folder of its own, and appears there whole or not at
all. A download that was cut off goes on where it stopped, unless the object has changed meanwhile.
"""

from __future__ import annotations

import lzma
import os
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Self

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from tessera.files import (
    UNWRITABLE,
    UserError,
    atomic_folder,
    digest_file,
    digest_text,
    missing,
    only_process,
    read_json,
    remove_abandoned,
    write_json,
    writing,
)
from tessera.spec.lineage import GENERATED_ROOT
from tessera.spec.schema import ArchiveSpec, DatasetSpec

MANIFEST = "fetch.json"
"""In data/<dataset>/, written after everything else; rules wait for it."""
MARK = ".fetched.json"
"""In every unpacked folder: what it was made from, and how much it holds."""

TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    DownloadColumn(),
    TransferSpeedColumn(),
    TimeRemainingColumn(),
)
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError, ValueError, RecursionError, MemoryError)
"""What tarfile raises of an archive that is none, or not whole."""
_HEADERS = (
    tarfile.XHDTYPE + tarfile.XGLTYPE + tarfile.SOLARIS_XHDTYPE + tarfile.GNUTYPE_LONGNAME + tarfile.GNUTYPE_LONGLINK
)
"""A byte for each type of member that is read into memory as a whole."""
_PIECE = 1 << 20
_MOST_MEMBERS = 100_000_000
"""Of an archive, where the disk tells no limit of its own."""
_LONGEST_HEADER = 1 << 20
"""Bytes of a member's long name or attributes, which are read into memory as a whole."""
_MOST_ATTRIBUTES = 100
"""That an archive sets for all members."""
_LONGEST_END = 1 << 26
"""Bytes behind the end of the archive; tar fills up with a few thousand zeros."""


def fetch_dataset(dataset: DatasetSpec, data_root: str, progress: bool = True) -> None:
    """``data_root``: what addresses other than s3:// are relative to. Folders that are there already, whole, stay.

    Raises UserError: no such bucket, object or archive, no credentials, another digest than declared (or none declared: the message has
    the one that was found), a full disk, an archive that is damaged or would write outside its folder, a folder that something else made.
    """
    home = Path(GENERATED_ROOT) / dataset.name
    busy = f"{home}: another `tessera fetch {dataset.name}` is at work; wait for it, or stop it first"
    undeclared: list[str] = []
    with writing(home), only_process(home / ".fetch.lock", busy), Progress(*_COLUMNS, disable=not progress) as bars:
        for folder, archive in dataset.fetch.items():
            target = home / folder
            remove_abandoned(target.resolve().parent)
            if _is_whole(target, archive.sha256):
                continue
            _require_own(target, dataset, folder)
            path, found = _acquire(archive, home / ".downloads", data_root, bars)
            if archive.sha256 is None:
                undeclared.append(f"  fetch.{folder} ({archive.address}):\n    sha256: {found}")
                continue
            _unpack(path, archive, target, bars)
            if path.is_relative_to(home / ".downloads"):
                path.unlink()
    if undeclared:
        raise UserError(
            f"config/datasets/{dataset.name}.yaml: dataset.fetch lacks the sha256 of what was found; if that is what you expect, add\n"
            + "\n".join(undeclared)
        )
    shutil.rmtree(home / ".downloads", ignore_errors=True)
    archives = {folder: read_json(home / folder / MARK) for folder in dataset.fetch}
    write_json(home / MANIFEST, {"dataset": dataset.name, "archives": archives})


def _is_whole(target: Path, sha256: str | None) -> bool:
    """Unpacked from the archive of this digest, and nothing is missing since."""
    if sha256 is None or not (target / MARK).is_file():
        return False
    return _read_mark(target) == (sha256, *_extent(target))


def _read_mark(target: Path) -> tuple[str, int, int]:
    """sha256 of the archive, number and bytes of the files."""
    mark = read_json(target / MARK)
    try:
        return mark["sha256"], int(mark["files"]), int(mark["bytes"])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{target / MARK}: expected sha256, files and bytes, as `tessera fetch` writes them; delete {target}, and it is fetched again"
        ) from None


def _extent(folder: Path) -> tuple[int, int]:
    """Number and bytes of the files below a folder; hidden ones, such as the mark, do not count."""
    files = size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            if not name.startswith("."):
                files += 1
                size += os.lstat(f"{place}/{name}").st_size
    return files, size


def _require_own(target: Path, dataset: DatasetSpec, folder: str) -> None:
    """Raises UserError where replacing the folder would lose what something else put there."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / MARK).is_file():
        raise UserError(
            f"{target}: exists and was not made by `tessera fetch`; move it away, or give dataset.fetch.{folder} of {dataset.name} "
            "another folder"
        )
    found, expected = _extent(target)[0], _read_mark(target)[1]
    if found > expected:
        raise UserError(
            f"{target}: holds {found} files, but {expected} were unpacked there; move the others away (files of your own may lie "
            f"anywhere in {GENERATED_ROOT}/ outside of fetched folders), or delete the folder, and it is fetched again"
        )


def _acquire(archive: ArchiveSpec, downloads: Path, data_root: str, bars: Progress) -> tuple[Path, str]:
    """The archive as a local file, and its digest. A download that is not what was declared is deleted."""
    address, declared = archive.address, archive.sha256
    if not address.startswith("s3://"):
        path = Path(data_root) / address
        if not path.is_file():
            raise UserError(
                f"{missing(path)}; put the archive there, or name the folder that holds {address} as the data root"
            )
        address, found = str(path), digest_file(path)
    else:
        from tessera.interop.storage.s3 import download

        path = downloads / digest_text(address)  # A key may be longer than a file name.
        if declared is None:
            path.unlink(missing_ok=True)  # The object may be another one by now.
        resumed = download(address, path, bars)
        found = digest_file(path)
        if resumed and declared not in (None, found):
            # Of the part that an earlier run left nobody knows how that run ended.
            path.unlink()
            download(address, path, bars)
            found = digest_file(path)
        if declared not in (None, found):
            path.unlink()
    if declared not in (None, found):
        raise UserError(
            f"{address}: its sha256 is {found}, declared is {declared}; is it another version, or was the upload cut off?"
        )
    return path, found


def _unpack(path: Path, archive: ArchiveSpec, target: Path, bars: Progress) -> None:
    with atomic_folder(target) as folder:
        if archive.address.lower().endswith(TAR):
            extract(path, folder, archive.address, bars)
        else:
            name = PurePosixPath(archive.address).name
            _Room(folder, archive.address).take(name, path.stat().st_size)
            shutil.copyfile(path, folder / name)
        files, size = _extent(folder)
        if not files:
            raise UserError(f"{archive.address}: holds no file; expected at least one")
        content = {"address": archive.address, "sha256": archive.sha256, "files": files, "bytes": size}
        write_json(folder / MARK, content)


def extract(path: Path, folder: Path, address: str, bars: Progress) -> None:
    """Files and folders of a tar archive, nothing else: no links, no devices, no owners, no modes, and nothing outside ``folder``.

    Raises UserError, naming the member, and for an archive that is cut off or damaged, and before the first byte of what the disk has no room
    for by the size that it declares. Memory does not grow with the number of members.
    """
    room = _Room(folder, address)
    task = bars.add_task(f"unpack {address}", total=path.stat().st_size)
    try:
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:*", tarinfo=_Member) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every member for a second look, which nobody takes
                if len(tar.pax_headers) > _MOST_ATTRIBUTES:
                    raise _BombError(f"more than {_MOST_ATTRIBUTES} attributes for all members")
                if member.issparse():
                    raise _BombError(_sparse(member.name))
                room.take(member.name, member.size if member.isreg() else 0)
                _extract_member(tar, member, folder, address)
                bars.update(task, completed=stream.tell())
            # The checksum of what is compressed stands after the end of the tar archive.
            behind = 0
            while tar.fileobj is not None and (piece := tar.fileobj.read(_PIECE)):
                behind += len(piece)
                if behind > _LONGEST_END:
                    raise _BombError(f"more than {_LONGEST_END} bytes behind its end")
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise
        reason = (
            "it needs more memory than there is" if isinstance(error, MemoryError) else str(error).partition("\n")[0]
        )
        raise UserError(
            f"{address}: cannot be unpacked ({reason}); expected a whole tar archive, plain or compressed"
        ) from None


class _BombError(ValueError):
    """Of what would take more than it should. tarfile, which tries one compression after the other, passes over errors of its own."""


class _Room:
    """What the disk can still take, by what the members declare."""

    def __init__(self, folder: Path, address: str) -> None:
        status = os.statvfs(folder)
        self._address, self._folder = address, folder
        self._bytes = status.f_bavail * status.f_frsize
        self._members = min(status.f_favail, _MOST_MEMBERS) if status.f_files else _MOST_MEMBERS

    def take(self, name: str, size: int) -> None:
        if size < 0:
            raise _BombError(f"member {name!r} declares {size} bytes")
        if size > self._bytes:
            raise UserError(
                f"{self._address}: member {name!r} has {size} bytes, but the disk of {self._folder.parent} has room for {self._bytes} more; "
                "make room there, or look whether the archive is what it should be"
            )
        if not self._members:
            raise UserError(
                f"{self._address}: has more members than the disk of {self._folder.parent} can hold; is the archive what it should be?"
            )
        self._bytes -= size
        self._members -= 1


class _Member(tarfile.TarInfo):
    """Tells the end of an archive, a block of zeros, from one that is cut off or damaged: tarfile ends at either without an error.

    Refuses what tarfile would read into memory as a whole before anybody sees the member.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            found = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf == bytes(tarfile.BLOCKSIZE):
                raise
            raise tarfile.ReadError(f"{error}, where a member or the end should be") from None
        if found.type == tarfile.GNUTYPE_SPARSE:
            raise _BombError(_sparse(found.name))
        if found.size < 0 or (found.type in _HEADERS and found.size > _LONGEST_HEADER):
            raise _BombError(f"a header of {found.size} bytes, expected at most {_LONGEST_HEADER}")
        return found

    def _proc_gnusparse_10(self, next: tarfile.TarInfo, *_: object) -> None:
        """The map of holes, of any length, stands where the content should."""
        raise _BombError(_sparse(next.name))


def _sparse(name: str) -> str:
    return f"member {name!r} is a sparse file, which a few bytes make as large as they like; pack it without --sparse"


def _extract_member(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, address: str) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise UserError(
            f"{address}: member {member.name!r} would be written outside the dataset; the archive was refused as a whole"
        )
    place = folder / name
    if member.isdir():
        place.mkdir(parents=True, exist_ok=True)
        return
    source = tar.extractfile(member) if member.isreg() else None
    if source is None:
        raise UserError(
            f"{address}: member {member.name!r} is neither a file nor a folder; pack the files themselves (tar --dereference --hard-dereference)"
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    with source, place.open("wb") as stream:
        shutil.copyfileobj(source, stream, _PIECE)
