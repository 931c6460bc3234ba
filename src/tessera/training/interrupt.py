"""Ctrl-C, SIGTERM and a lost terminal during training: finish the step, save, leave with 130, 143 or 129."""

from __future__ import annotations

import os
import signal
import threading
import time
from queue import SimpleQueue
from types import FrameType
from typing import Any

from tessera.data.loader import Loader
from tessera.training.checkpoint import say

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN_SECONDS = 2.0
"""Signals closer together are one request: a terminal, SLURM and our own parent process may each pass on the same one."""
PATIENCE_SECONDS = 5.0
"""For a batch that is not there when a signal comes: with it the step is made, saved, and all processes of the training stop together."""


class TrainingStopped(Exception):  # noqa: N818  # a request obeyed is no error
    """Raised between two steps, after the state was saved, or while no batch comes."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class NoBatchCame(TrainingStopped):
    """Nothing was saved yet."""


class StopRequest:
    """Remembers the first signal. Ctrl-C some seconds later ends the process at once; SIGTERM does not, because SLURM sends another one at
    the time limit and then gives time to save."""

    def __init__(self, silent: bool = False) -> None:
        self.signum = 0
        self._since = 0.0
        self.silent = silent
        self._before: dict[int, Any] = {}
        self._unsaid: SimpleQueue[str | None] = SimpleQueue()
        self._speaker: threading.Thread | None = None

    def install(self) -> None:
        """Only the main thread can; elsewhere the caller's handling stays. Called again it takes back what others set meanwhile."""
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in SIGNALS:
            if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:  # as under nohup
                continue
            previous = signal.signal(signum, self._handle)
            self._before.setdefault(signum, previous)
        if not self.silent and self._speaker is None:
            self._speaker = threading.Thread(target=self._speak, daemon=True)
            self._speaker.start()

    def _speak(self) -> None:
        """In a thread, because a handler that prints would wait for ever where it interrupted a print: the bar's own thread may hold one of
        its locks and want the other, which the interrupted print has."""
        for message in iter(self._unsaid.get, None):
            say(message)

    def remove(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}
        if self._speaker is not None:
            self._unsaid.put(None)
            self._speaker.join()
            self._speaker = None

    def attend(self, loader: Loader) -> Loader:
        """Lets the loader's processes sit out signals to the whole process group, and its wait for a batch end after one."""
        loader.sits_out = SIGNALS
        loader.waiting = self._waiting
        return loader

    def _waiting(self) -> None:
        if self.signum and time.monotonic() - self._since > PATIENCE_SECONDS:
            raise NoBatchCame(
                self.signum,
                "stopped while waiting for a batch that does not come (do its images lie on a disk that hangs?). The same command continues "
                "from the last checkpoint",
            )

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if self.signum:
            if signum == signal.SIGINT and time.monotonic() - self._since > AGAIN_SECONDS:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        self.signum = signum
        self._since = time.monotonic()
        if not self.silent:
            again = "; once more to leave at once" if signum == signal.SIGINT else ""
            self._unsaid.put(f"{signal.Signals(signum).name}: finishing this step, then saving{again}")
