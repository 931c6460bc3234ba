"""The GPUs of this machine, one stage each: Snakemake counts them but does not say which.

The lock of a GPU is an ``flock`` on a file of its own, which the kernel frees when the stage ends, however it ends; loader processes
that outlive a killed one keep it for the seconds until they notice. Known without torch, so that nothing touches a GPU before it is chosen.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tessera.files import UserError

COUNT = "TESSERA_GPUS"
"""Environment variable: number of GPUs to hand out, in place of those found; 0 hands out none. Tests without a GPU set it. Not asked where
``VISIBLE`` is set."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Environment variable: numbers or names of the GPUs that a process sees. The user sets it, and SLURM."""
LOCKS = Path("/tmp")
"""One folder for all users of a machine, whatever their TMPDIR."""
POLL_SECONDS = 1.0

_held: list[int] = []
"""Open files; they stay so until the process ends."""


def count_gpus() -> int:
    """NVIDIA's device files: a container has those of its own GPUs only."""
    given = os.environ.get(COUNT)
    if given is None:
        return sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))
    if not given.isdigit():
        raise UserError(f"environment variable {COUNT}={given}: expected the number of GPUs to hand out")
    return int(given)


def choose(wanted: int, ids: Sequence[int], available: int) -> list[int]:
    """``ids`` first, then the lowest others; may name some that are not available."""
    others = [index for index in range(max(available, wanted)) if index not in ids]
    return [*ids, *others][:wanted]


def hold(wanted: int = 1, ids: Sequence[int] = (0,)) -> None:
    """Waits until ``wanted`` GPUs are free, keeps them until this process ends and makes them the only visible ones.

    ``ids`` other than the default are taken at their word: exactly these are waited for and all stay visible. Does nothing where srun or
    torchrun started one process a GPU, where no more GPUs were made visible than are wanted, and where the machine has fewer, which the
    stage itself reports.
    """
    job, chosen = os.environ.get("SLURM_JOB_ID"), os.environ.get(VISIBLE)
    if "LOCAL_RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return
    if chosen is None and job is not None:  # SLURM gave none
        return
    names = [str(index) for index in range(count_gpus())] if chosen is None else _visible(chosen)
    named = list(ids) != [0]
    candidates = choose(wanted, ids, len(names)) if named else list(range(len(names)))
    if not names or max(candidates) >= len(names) or wanted > len(names):
        return
    if chosen is not None and wanted == len(names):
        return
    # Within a job SLURM may count its GPUs from 0.
    locks = {index: f"{job}-{names[index]}" if job else names[index] for index in candidates}
    said = False
    while (taken := _take(locks, wanted)) is None:
        if not said:
            which = ", ".join(names[index] for index in candidates)
            print(
                f"waiting for {wanted} free GPU(s) of {which}; other stages hold them. {VISIBLE}=<number> takes one regardless",
                file=sys.stderr,
                flush=True,
            )
            said = True
        time.sleep(POLL_SECONDS)
    if not named:
        os.environ[VISIBLE] = ",".join(names[index] for index in taken)


def _visible(chosen: str) -> list[str]:
    """As CUDA reads it: up to the first entry that is empty or negative."""
    names = [name.strip() for name in chosen.split(",")]
    return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))


def _take(locks: Mapping[int, str], wanted: int) -> list[int] | None:
    """All or none, so that two stages never wait for each other."""
    taken: dict[int, int] = {}
    for index, name in locks.items():
        if len(taken) < wanted and (handle := _lock(name)) is not None:
            taken[index] = handle
    if len(taken) < wanted:
        for handle in taken.values():
            os.close(handle)
        return None
    _held.extend(taken.values())
    return list(taken)


def _lock(name: str) -> int | None:
    """Another user's file can be read, and that is enough to lock it."""
    path = LOCKS / f"tessera-gpu-{name.replace('/', '_')}.lock"
    mask = os.umask(0)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        # Without O_CREAT: the kernel refuses it for another user's file in /tmp.
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            reason = "is a link" if error.errno == errno.ELOOP else f"cannot be opened ({error.strerror})"
            raise UserError(f"{path}: {reason}, expected a lock file or nothing; remove it") from None
    finally:
        os.umask(mask)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle
