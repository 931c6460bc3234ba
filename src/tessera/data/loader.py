"""Batches from processes of their own, which neither a small /dev/shm nor a low limit of open files keeps from arriving.

PyTorch hands every tensor over as a file in /dev/shm with a descriptor of its own. Where either runs out, the process prints a traceback and
drops the batch, and the receiver waits for it for ever. Here a batch is one anonymous file (memfd): memory of the process, whatever the
size of /dev/shm, which the receiver opens by way of /proc. What can fail fails before the batch is on its way, and is raised.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import functools
import gc
import io
import multiprocessing
import os
import pickle
import re
import resource
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tessera.files import UserError, raise_open_file_limit

FORK = multiprocessing.get_context("fork")
"""How processes start: they share what this one has opened."""
AHEAD = 2
"""Batches that a process makes before they are asked for."""
POLL_SECONDS = 1.0
"""Time between two looks at the processes, and calls of ``Loader.waiting``, while no batch is there."""
GRACE_SECONDS = 3.0
"""Time for a process to end by itself when no further batch is wanted."""
DESCRIPTORS = 4
"""Number that the receiver holds for each process: both ends of a queue, and of what tells that the process lives."""
SPARE = 16
"""Descriptors for everything else that opens while batches are made: images, a checkpoint, a log."""
_SMALL = 1 << 20
"""Bytes of a tensor that is copied out of its batch, so that who keeps it does not keep the whole batch."""
_ALIGNMENT = 64


class Loader(DataLoader[Any]):
    """What goes wrong in a process, with a process or for want of one is a UserError of one line."""

    waiting: Callable[[], None] | None = None
    """Runs about once a second while no batch is there; may raise to end the wait."""
    sits_out: Sequence[int] = ()
    """Signals that the processes ignore, because this one decides what follows from them."""

    def __init__(
        self,
        dataset: Dataset[Any],
        batches: Sequence[Any] | Sampler[Any],
        collate: Callable[[list[Any]], Any],
        workers: int,
        key: str,
        check: Callable[[Any], None],
    ) -> None:
        """``key``: section of the spec that ``workers`` comes from, such as dataset.val. 0 makes the batches in this process. ``check`` sees
        every batch first, in this process, and may raise."""
        self.key = key
        self.check = check
        super().__init__(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            multiprocessing_context=FORK if workers else None,
            collate_fn=_Handover(collate, key) if workers else collate,
            # The seed of the processes would otherwise come from the global generator, and shift what training draws from it.
            generator=torch.Generator().manual_seed(0),
            timeout=POLL_SECONDS if workers else 0,
            prefetch_factor=AHEAD if workers else None,
        )

    def __iter__(self) -> Any:  # a generator, which does all that is asked of PyTorch's own class
        if not self.num_workers:
            for batch in super().__iter__():
                self.check(batch)
                yield batch
            return
        require_room({self.key: self.num_workers})
        self.worker_init_fn = functools.partial(_begin, os.getpid(), self.sits_out)
        batches, workers = self._start()
        kill = functools.partial(_kill, workers)
        # Before multiprocessing's own, which waits for processes that may sit out its SIGTERM.
        atexit.register(kill)
        try:
            while True:
                with self._reasons(workers):
                    batch = self._next(batches)
                if batch is None:
                    return
                self.check(batch)
                yield batch
        finally:
            late = threading.Timer(GRACE_SECONDS, kill)
            late.start()
            batches._shutdown_workers()
            late.cancel()
            atexit.unregister(kill)

    def _start(self) -> tuple[Any, list[BaseProcess]]:
        others = set(multiprocessing.active_children())
        before = signal.getsignal(signal.SIGCHLD)
        try:
            batches: Any = super().__iter__()
        except OSError as error:
            _kill([worker for worker in multiprocessing.active_children() if worker not in others])
            raise UserError(
                f"{self.key}.num_workers={self.num_workers}: the loader processes cannot be started ({error.strerror}); the limits of "
                f"processes (`ulimit -u`) or of memory may be too low for them. Raise them, or set {self.key}.num_workers=0"
            ) from None
        finally:
            # PyTorch's handler raises in the middle of whatever runs when a process ends; here the wait for its batch finds it.
            if threading.current_thread() is threading.main_thread() and before is not None:
                signal.signal(signal.SIGCHLD, before)
        return batches, [worker for worker in multiprocessing.active_children() if worker not in others]

    def _next(self, batches: Iterator[Any]) -> Any:
        """Next batch, or None after the last one."""
        while True:
            try:
                return next(batches, None)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
            if self.waiting is not None:
                self.waiting()

    @contextlib.contextmanager
    def _reasons(self, workers: Sequence[BaseProcess]) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            own = f"{UserError.__module__}.{UserError.__qualname__}: "
            raise UserError(str(error).rpartition(own)[2].strip()) from None
        except RuntimeError as error:
            if str(error).startswith("Too many open files"):
                raise _too_few_descriptors({self.key: self.num_workers}) from None
            ended = re.match(r"DataLoader worker \(pid\(s\) ([\d, ]+)\) exited unexpectedly", str(error))
            if ended is None:
                raise
            told = ", ".join(_ending(worker) for worker in workers if str(worker.pid) in ended[1].split(", "))
            raise UserError(
                f"a loader process ended from outside ({told}); where memory ran out, set {self.key}.num_workers or batch_size lower. "
                "The same command starts again, a training from its last checkpoint"
            ) from None


def require_room(workers: dict[str, int]) -> None:
    """Raises UserError where the limits of this process do not let so many loader processes, by section of the spec, run at once."""
    if not sum(workers.values()):
        return
    raise_open_file_limit()
    used, limit = _descriptors()
    if used + _needed(workers) > limit:
        gc.collect()  # Queues of former loaders, which Python has not closed yet.
        used, _ = _descriptors()
    if used + _needed(workers) > limit:
        raise _too_few_descriptors(workers)
    locks = []
    try:
        for _ in range(8 + 4 * sum(workers.values())):
            locks.append(FORK.Lock())
    except OSError as error:
        disk = Path("/dev/shm")
        size = "does not exist"
        with contextlib.suppress(OSError):
            found = os.statvfs(disk)
            size = (
                f"has {found.f_blocks * found.f_frsize >> 10} kB, {found.f_bavail * found.f_frsize >> 10} kB of it free"
            )
        raise UserError(
            f"{_told(workers)}: the locks of the loader processes cannot be made ({error.strerror}): {disk} {size}. Give it 64 MB "
            f"(`docker run --shm-size=64m`), or set num_workers: 0"
        ) from None


def _begin(parent: int, sits_out: Sequence[int], _: int) -> None:
    for signum in sits_out:
        signal.signal(signum, signal.SIG_IGN)
    end_with(parent)


def end_with(parent: int) -> None:
    """Has the kernel kill this process when its ``parent`` ends, however that ends; where it ended already, this one ends here."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


class _Handover:
    """A collate function whose batches arrive by themselves in the process that asked for them."""

    def __init__(self, collate: Callable[[list[Any]], Any], key: str) -> None:
        self._collate = collate
        self._key = key
        self._kept: deque[int] = deque()

    def __call__(self, samples: list[Any]) -> _Parcel:
        batch = self._collate(samples)
        try:
            parcel = _pack(batch)
        except OSError as error:
            used, limit = _descriptors()
            raise UserError(
                f"{self._key}: a loader process cannot hand over a batch ({error.strerror}; {used} of {limit} open files, `ulimit -n`, are "
                f"in use). Where memory ran out, lower {self._key}.batch_size or num_workers; num_workers: 0 hands nothing over"
            ) from None
        self._kept.append(parcel.file)
        # A process is asked for a batch only when all but AHEAD of those before have been received.
        if len(self._kept) > AHEAD:
            os.close(self._kept.popleft())
        return parcel


@dataclass(frozen=True)
class _Parcel:
    """A batch in a file that this process holds open. Unpickled elsewhere it is the batch."""

    process: int
    file: int
    inode: int
    size: int
    start: int
    """Place of the pickle, behind the tensors."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (self.process, self.file, self.inode, self.size, self.start)


def _pack(batch: Any) -> _Parcel:
    file = os.memfd_create("batch")
    try:
        with open(file, "wb", closefd=False) as stream:
            pickled = io.BytesIO()
            _Pickler(pickled, stream).dump(batch)
            start = stream.tell()
            stream.write(pickled.getbuffer())
        status = os.fstat(file)
    except BaseException:
        os.close(file)
        raise
    return _Parcel(os.getpid(), file, status.st_ino, status.st_size, start)


def _receive(process: int, file: int, inode: int, size: int, start: int) -> Any:
    """Tensors of the batch share its memory, the small ones aside. A descriptor is needed for a moment only."""
    path = Path(f"/proc/{process}/fd/{file}")
    try:
        if path.stat().st_ino != inode:
            raise FileNotFoundError(errno.ENOENT, "closed too early", str(path))
        content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        used, limit = _descriptors()
        raise UserError(
            f"a batch of {size >> 20} MB from loader process {process} cannot be received ({error}; {used} of {limit} open files, "
            "`ulimit -n`, are in use); set num_workers: 0, or raise the limit"
        ) from None
    return _Unpickler(io.BytesIO(content[start:].numpy().data), content).load()


class _Pickler(pickle.Pickler):
    def __init__(self, pickled: BinaryIO, tensors: BinaryIO) -> None:
        super().__init__(pickled, pickle.HIGHEST_PROTOCOL)
        self._tensors = tensors

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        content = value.contiguous().flatten().view(torch.uint8).numpy()
        self._tensors.write(bytes(-self._tensors.tell() % _ALIGNMENT))
        start = self._tensors.tell()
        self._tensors.write(content.data)
        return start, len(content), value.dtype, tuple(value.shape)


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: BinaryIO, content: Tensor) -> None:
        super().__init__(pickled)
        self._content = content

    def persistent_load(self, identity: Any) -> Tensor:
        start, length, dtype, shape = identity
        tensor = self._content[start : start + length].view(dtype).view(shape)
        return tensor.clone() if length < _SMALL else tensor


def _descriptors() -> tuple[int, int]:
    """Number in use, and number allowed."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir()), resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _needed(workers: dict[str, int]) -> int:
    return DESCRIPTORS * sum(workers.values()) + SPARE


def _told(workers: dict[str, int]) -> str:
    return ", ".join(f"{key}.num_workers={count}" for key, count in workers.items() if count)


def _too_few_descriptors(workers: dict[str, int]) -> UserError:
    used, limit = _descriptors()
    needed = used + _needed(workers)
    return UserError(
        f"{_told(workers)}: {limit} open files are allowed (`ulimit -n`), {used} of them are in use, and the loader processes need "
        f"{needed} in all; raise the limit with `ulimit -n {max(1024, needed)}` (`docker run --ulimit nofile={max(1024, needed)}`), or set "
        "num_workers: 0"
    )


def _ending(worker: BaseProcess) -> str:
    code = worker.exitcode
    if code is None or code >= 0:
        return f"pid {worker.pid}, exit code {code}"
    return f"pid {worker.pid}, {signal.Signals(-code).name}"


def _kill(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()
