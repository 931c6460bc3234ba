"""A SLURM of three nodes with three GPUs each, all on this machine: real daemons, and device files that stand in for GPUs."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CONFIGURATION = Path("/etc/slurm")
"""Nowhere else: the executor hides the environment variable that names another place from its inner processes."""
MARK = "# Written by the tests of tessera; safe to delete.\n"
HOST = socket.gethostname().partition(".")[0]
NODES = (HOST, "zz-second")
"""The first in alphabetical order is the main address of a training on both, so it has a name that resolves."""
FRAGILE = "zz-third"
"""Alone in a partition of this name: what happens to it happens to nobody else's jobs."""

SETTINGS = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=3600
KillWait=20
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 RealMemory=200000 Gres=gpu:3
NodeName=zz-second NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16 RealMemory=200000 Gres=gpu:3
NodeName=zz-third NodeAddr=127.0.0.1 Port={ports[3]} CPUs=16 RealMemory=200000 Gres=gpu:3
PartitionName=gpu Nodes={host},zz-second Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=zz-third Nodes=zz-third MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""
DEVICES = "".join(f"Name=gpu File=/dev/{device}\n" for device in ("zero", "full", "null"))
"""SLURM asks of a device file that it exists, and then hands out its number."""


def missing() -> str | None:
    """Why no cluster can be started here; None where one can."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root here"
    for program, package in (
        ("slurmctld", "slurm-wlm"),
        ("slurmd", "slurm-wlm"),
        ("srun", "slurm-wlm"),
        ("munged", "munge"),
    ):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian's package {package})"
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        return "snakemake-executor-plugin-slurm is not installed"
    settings = CONFIGURATION / "slurm.conf"
    if settings.exists() and not settings.read_text().startswith(MARK):
        return f"this machine has a SLURM of its own ({settings})"
    return None


@contextlib.contextmanager
def running(folder: Path) -> Iterator[None]:
    """``folder`` holds logs and state. Afterwards no process and no configuration is left. Two runs of the tests take turns."""
    with (Path(tempfile.gettempdir()) / "tessera-tests-slurm.lock").open("a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield from _running(folder)


def _running(folder: Path) -> Iterator[None]:
    existed = CONFIGURATION.exists()
    for name in ("state", *(f"spool-{node}" for node in (*NODES, FRAGILE))):
        (folder / name).mkdir()
    CONFIGURATION.mkdir(exist_ok=True)
    settings = SETTINGS.format(host=HOST, folder=folder, ports=_free_ports(4))
    (CONFIGURATION / "slurm.conf").write_text(MARK + settings)
    (CONFIGURATION / "gres.conf").write_text(MARK + DEVICES)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge = {"socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
        daemons.append(
            _start(
                folder,
                "munged",
                "--foreground",
                "--force",
                f"--key-file={key}",
                *(f"--{option}={folder / name}" for option, name in munge.items()),
            )
        )
        _wait(lambda: (folder / "munge.socket").exists(), folder, "munged")
        daemons.append(_start(folder, "slurmctld", "-D", "-c"))
        daemons += [_start(folder, "slurmd", "-D", "-c", "-N", node) for node in (*NODES, FRAGILE)]
        _wait(lambda: ask("sinfo", "-h", "-N", "-p", "urgent", "-o", "%T").split() == ["idle"] * 3, folder, "sinfo")
        yield
    finally:
        with contextlib.suppress(AssertionError):
            _wait(_no_jobs, folder, "the end of all jobs", 120)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for name in ("slurm.conf", "gres.conf"):
            (CONFIGURATION / name).unlink()
        if not existed:
            CONFIGURATION.rmdir()


def ask(*command: str) -> str:
    """What a command of SLURM says; nothing where it fails."""
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _no_jobs() -> bool:
    ask("scancel", "--user", "root")
    return not ask("squeue", "-h")


def _start(folder: Path, *command: str) -> subprocess.Popen[bytes]:
    """Ends with this process, however that ends."""
    with (folder / "daemons.log").open("ab") as log:
        return subprocess.Popen(["setpriv", "--pdeathsig", "TERM", *command], stdout=log, stderr=log)


def _wait(ready: Callable[[], bool], folder: Path, what: str, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            said = "".join(path.read_text(errors="replace")[-2000:] for path in sorted(folder.glob("*.log")))
            raise AssertionError(f"{what} never became ready\n{said}")
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]
