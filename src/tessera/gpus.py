"""The GPUs of this machine, one stage each: Snakemake counts them but does not say which.

The lock of a GPU is an ``flock`` on a file of its own, which the kernel frees when the process ends, however it ends. Known without
torch, so that nothing touches a GPU before it is chosen.
"""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tessera.files import UserError

COUNT = "TESSERA_GPUS"
"""Environment variable: number of GPUs to hand out, in place of those found; 0 hands out none. Tests without a GPU set it."""
CHOSEN = ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "LOCAL_RANK")
"""Environment variables of those who chose already: the user, SLURM, torchrun."""
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

    ``ids`` other than the default are taken at their word: exactly these are waited for and all stay visible. Does nothing where somebody
    else chose, and where there are fewer GPUs than wanted, which the stage itself reports.
    """
    if any(name in os.environ for name in CHOSEN):
        return
    available = count_gpus()
    named = list(ids) != [0]
    candidates = choose(wanted, ids, available) if named else list(range(available))
    if not available or wanted > available or max(candidates) >= available:
        return
    said = False
    while (taken := _take(candidates, wanted)) is None:
        if not said:
            which = ", ".join(map(str, candidates))
            print(
                f"waiting for {wanted} free GPU(s) of {which}; other stages hold them. CUDA_VISIBLE_DEVICES=<number> takes one regardless",
                file=sys.stderr,
                flush=True,
            )
            said = True
        time.sleep(POLL_SECONDS)
    if not named:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, taken))


def _take(candidates: Sequence[int], wanted: int) -> list[int] | None:
    """All or none, so that two stages never wait for each other."""
    taken: dict[int, int] = {}
    for index in candidates:
        if len(taken) < wanted and (handle := _lock(index)) is not None:
            taken[index] = handle
    if len(taken) < wanted:
        for handle in taken.values():
            os.close(handle)
        return None
    _held.extend(taken.values())
    return list(taken)


def _lock(index: int) -> int | None:
    """Another user's file can be read, and that is enough to lock it."""
    path = Path(tempfile.gettempdir()) / f"tessera-gpu-{index}.lock"
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        handle = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle
