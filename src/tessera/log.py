"""What a stage prints, also in the file that its ``--log`` names."""

from __future__ import annotations

import contextlib
import errno
import sys
import time
from io import FileIO
from pathlib import Path
from typing import TextIO

LOST = (errno.EPIPE, errno.EIO)
"""Nobody reads a stream any more: a closed pipe, a lost terminal."""


def start_log(path: Path) -> None:
    """What this process prints goes there as well from now on; what the file held is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.open("wb").close()
    join_log(path).write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(['tessera', *sys.argv[1:]])}\n")


def join_log(path: Path) -> Log:
    """The same in a process that a stage started, behind what the file holds."""
    log = Log(path, sys.stderr)
    sys.stdout = Tee(sys.stdout, log)
    sys.stderr = Tee(sys.stderr, log)
    return log


def log_path() -> Path | None:
    """The file of this process; None without one."""
    return sys.stderr.log.path if isinstance(sys.stderr, Tee) else None


class Log:
    """What its disk refuses ends the log and not the stage, which says so once."""

    def __init__(self, path: Path, stderr: TextIO) -> None:
        self.path, self.stderr = path, stderr
        self.file: FileIO | None = path.open("ab", buffering=0)  # nothing is left to be written when it is closed

    def write(self, text: str) -> None:
        if self.file is None:
            return
        try:
            self.file.write(text.encode(errors="backslashreplace"))
        except OSError as error:
            self.file = None
            with contextlib.suppress(OSError):
                print(
                    f"warning: {self.path}: cannot be written ({error.strerror}); the log ends here", file=self.stderr
                )


class Tee:
    """Writes to a stream and to a log; claims to be no terminal, so that progress comes as plain lines in both."""

    def __init__(self, stream: TextIO, log: Log) -> None:
        self.stream, self.log = stream, log
        self.rest = ""

    def write(self, text: str) -> int:
        # Whole lines: other processes may write to the same file, and `print` writes the end of a line by itself.
        lines, end, self.rest = (self.rest + text).rpartition("\n")
        if end:
            self.log.write(lines + end)
        try:
            self.stream.write(text)
        except OSError as error:
            if error.errno not in LOST:
                raise
        return len(text)

    def flush(self) -> None:
        if self.rest:
            self.log.write(self.rest)
            self.rest = ""
        try:
            self.stream.flush()
        except OSError as error:
            if error.errno not in LOST:
                raise

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self) -> str:
        return self.stream.encoding
