"""GPUs are handed out one stage each, and come back however the stage ends. No GPU is needed: their number is given."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tessera import gpus
from tessera.files import UserError

STAGE = """
import os, sys
from pathlib import Path
from tessera import gpus
os.umask({umask})
gpus.LOCKS = Path(sys.argv[1])
gpus.hold({arguments})
print(os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
{then}
"""
STAY = "sys.stdin.read()"
CHOSEN = {"CUDA_VISIBLE_DEVICES": "7", "SLURM_JOB_ID": "7", "LOCAL_RANK": "7", "SLURM_STEP_NUM_TASKS": "2"}
"""Of those who chose already: the user, SLURM, torchrun, srun."""


@pytest.fixture
def start(tmp_path: Path):
    """Starts a stage that holds GPUs until its stdin closes or it is killed."""
    started = []

    def start_stage(arguments: str = "", then: str = STAY, umask: int = 0o022, **changes: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name not in CHOSEN}
        process = subprocess.Popen(
            [sys.executable, "-c", STAGE.format(arguments=arguments, then=then, umask=umask), str(tmp_path)],
            env=environment | {"TESSERA_GPUS": "2"} | changes,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start_stage
    for process in started:
        process.kill()
        process.wait()


def got(process: subprocess.Popen[str]) -> str:
    return process.stdout.readline().strip()


def test_two_stages_get_different_gpus_and_a_third_waits_for_a_killed_one(start) -> None:
    first, second = start(), start()
    assert {got(first), got(second)} == {"0", "1"}
    third = start()
    assert "waiting for 1 free GPU" in third.stderr.readline()
    assert third.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    begun = time.monotonic()
    assert got(third) in ("0", "1")
    assert time.monotonic() - begun < 10


def test_two_gpus_are_taken_both_or_none(start) -> None:
    one = start()
    held = got(one)
    both = start("2")
    assert "waiting for 2 free GPU" in both.stderr.readline()
    # What it waits for stays free for others.
    other = start()
    assert {held, got(other)} == {"0", "1"}
    for process in (one, other):
        process.stdin.close()
    assert got(both) == "0,1"


def test_named_gpus_are_waited_for_and_keep_their_numbers(start) -> None:
    named = start("1, [1]")
    assert got(named) == "None"
    assert got(start()) == "0"
    again = start("1, [1]")
    assert "waiting for 1 free GPU(s) of 1;" in again.stderr.readline()


@pytest.mark.parametrize("chosen", CHOSEN)
def test_who_chose_already_is_not_contradicted(start, chosen: str) -> None:
    holders = [start(), start()]
    assert {got(holder) for holder in holders} == {"0", "1"}
    assert got(start(**{chosen: CHOSEN[chosen]})) == ("7" if chosen == "CUDA_VISIBLE_DEVICES" else "None")


@pytest.mark.parametrize("job", ["", "11"])
def test_of_several_visible_gpus_each_stage_gets_its_own(start, job: str) -> None:
    """The user made two visible to Snakemake, or SLURM gave two to one interactive job."""
    visible = {"CUDA_VISIBLE_DEVICES": "2,GPU-3"} | ({"SLURM_JOB_ID": job} if job else {})
    first, second = start(**visible), start(**visible)
    assert {got(first), got(second)} == {"2", "GPU-3"}
    assert "waiting for 1 free GPU(s) of 2, GPU-3;" in start(**visible).stderr.readline()
    assert got(start("2", **visible)) == "2,GPU-3"
    # The numbers of another job are those of other GPUs.
    assert got(start(**visible | {"SLURM_JOB_ID": "12"})) == "2"


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ("0, 1", ["0", "1"]),
        ("1,", ["1"]),
        ("GPU-a,-1,3", ["GPU-a"]),
        ("", []),
        ("-1", []),
        ("MIG-a/1/0,2", ["MIG-a/1/0", "2"]),
    ],
)
def test_visible_gpus_are_read_as_cuda_reads_them(start, chosen: str, names: list[str]) -> None:
    """Where no more are visible than wanted nothing is changed."""
    stages = [start(CUDA_VISIBLE_DEVICES=chosen) for _ in range(max(1, len(names)))]
    assert {got(stage) for stage in stages} == (set(names) if len(names) > 1 else {chosen})


def test_named_ones_are_counted_among_the_visible(start) -> None:
    named = start("1, [1]", CUDA_VISIBLE_DEVICES="2,3")
    assert got(named) == "2,3"
    assert got(start(CUDA_VISIBLE_DEVICES="3,2")) == "2"


def test_another_user_can_lock_what_a_user_of_any_umask_made(start, tmp_path: Path) -> None:
    assert got(start(umask=0o077)) == "0"
    assert (tmp_path / "tessera-gpu-0.lock").stat().st_mode & 0o777 == 0o644


def test_a_machine_without_enough_gpus_leaves_the_choice_to_the_stage(start) -> None:
    assert got(start(TESSERA_GPUS="0")) == "None"
    assert got(start("3")) == "None"


def test_a_number_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_GPUS", "two")
    with pytest.raises(UserError, match="TESSERA_GPUS=two"):
        gpus.count_gpus()


@pytest.mark.parametrize(
    ("wanted", "ids", "available", "expected"),
    [(1, [0], 4, [0]), (2, [3], 4, [3, 0]), (3, [0], 2, [0, 1, 2]), (2, [2, 1], 4, [2, 1]), (1, [5], 2, [5])],
)
def test_named_ones_first_then_the_lowest(wanted: int, ids: list[int], available: int, expected: list[int]) -> None:
    assert gpus.choose(wanted, ids, available) == expected


def test_a_lock_of_a_gpu_is_no_link(start, tmp_path: Path) -> None:
    (tmp_path / "tessera-gpu-0.lock").symlink_to(tmp_path / "elsewhere")
    stage = start()
    assert "tessera-gpu-0.lock: is a link, expected a lock file or nothing; remove it" in stage.communicate()[1]
    assert not (tmp_path / "elsewhere").exists()
