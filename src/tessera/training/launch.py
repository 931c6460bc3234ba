"""One process per GPU on this machine, watched by their parent: when one ends badly, all end, and its reason is told once."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from tessera.data.loader import end_with
from tessera.files import UserError
from tessera.log import join_log, log_path
from tessera.spec.lineage import differences
from tessera.spec.schema import Spec
from tessera.training.hardware import choose
from tessera.training.interrupt import StopRequest, TrainingStopped

GRACE_SECONDS = 20.0
"""What the others get to end by themselves after one has failed."""


def external_rank(world_size: int) -> int | None:
    """This process's rank where torchrun or srun started all processes of the training; None where we are alone."""
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return int(os.environ["RANK"])
    # Of srun's step: a batch script has SLURM_PROCID and SLURM_NTASKS, too, and is alone.
    if world_size > 1 and os.environ.get("SLURM_STEP_NUM_TASKS") == str(world_size):
        return int(os.environ["SLURM_PROCID"])
    return None


def launch(spec: Spec, experiment: str, checkpoints: Path, processes: int, lineage: dict[str, Any]) -> None:
    """Runs ``fit`` in ``processes`` processes; raises UserError or TrainingStopped as the first of them did. ``lineage``: of the
    train stage, which each of them must find as well."""
    context = torch.multiprocessing.get_context("spawn")
    reports = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [
        context.Process(
            target=_work, args=(rank, port, os.getpid(), log_path(), reports, spec, experiment, checkpoints, lineage)
        )
        for rank in range(processes)
    ]
    forward = _Forward(workers)
    forward.install()
    try:
        for worker in workers:
            worker.start()
        running = {worker.sentinel: worker for worker in workers}
        failed = False
        while running:
            done = wait(list(running), timeout=GRACE_SECONDS if failed else None)
            if not done:
                for worker in running.values():
                    worker.kill()
            for sentinel in done:
                worker = running.pop(sentinel)  # type: ignore[arg-type]  # wait() answers with what it was given
                worker.join()  # the sentinel is ready a moment before the exit code is
                failed = failed or worker.exitcode != 0
    finally:
        forward.remove()
    if failed:
        raise _reason(reports, [worker.exitcode for worker in workers])


class _Forward(StopRequest):
    """Passes signals on to the workers, which save and end."""

    def __init__(self, workers: list[Any]) -> None:
        super().__init__(silent=True)
        self.workers = workers

    def _handle(self, signum: int, _: Any) -> None:
        for worker in self.workers:
            if worker.pid is not None and worker.is_alive():
                os.kill(worker.pid, signum)


def _reason(reports: Any, codes: list[int | None]) -> Exception:
    found = []
    while not reports.empty():
        found.append(reports.get())
    for kind, signum, message in sorted(found, key=lambda report: report[0] != "user"):
        return UserError(message) if kind == "user" else TrainingStopped(signum, message)
    return RuntimeError(f"a training process failed (exit codes {codes}); its traceback is above")


def _work(
    rank: int,
    port: int,
    parent: int,
    log: Path | None,
    reports: Any,
    spec: Spec,
    experiment: str,
    checkpoints: Path,
    lineage: dict[str, Any],
) -> None:
    end_with(parent)  # whose lock of the folder is then free
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if log is not None:
        join_log(log)
    from tessera.training.fit import fit
    from tessera.training.plan import Plan

    try:
        plan = Plan.of(spec, experiment, checkpoints, choose(spec.train).world_size)
        if found := differences(lineage, plan.data.lineages.of("train")):
            raise UserError(f"the dataset changed while the training began ({'; '.join(found)}); run it again")
        fit(spec, experiment, plan, rank)
    except UserError as error:
        reports.put(("user", 0, str(error)))
    except TrainingStopped as stopped:
        reports.put(("stopped", stopped.signum, str(stopped)))
    except Exception:
        traceback.print_exc()
    else:
        return
    sys.stderr.flush()
    os._exit(1)  # a peer may be stuck in a collective call that an orderly exit would wait for
