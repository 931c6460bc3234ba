"""The workflow on a real SLURM: what SLURM does to a training costs the running step at most and changes no weight.

The slow parts run side by side: two of them are waiting for SLURM most of the time.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from tests.slurm.cluster import NODES, ask
from tests.training import toy
from tests.training.test_processes import CALM
from tests.workflow import project, test_kill

pytestmark = pytest.mark.slow

EXPERIMENT = "mask2former_swin"
PROFILE = ["--workflow-profile", "profiles/slurm"]
PATIENCE = [
    "--slurm-init-seconds-before-status-checks",
    "1",
    "--latency-wait",
    "5",
    "--set-threads",
    "train=1",
    "evaluate=1",
]
"""What the profile leaves to a real cluster is shorter here."""

STUB = """\
#!/bin/sh
started=$(date +%s.%N)
case $2 in *broken*) sleep 1 ;; *) sleep 8 ;; esac
echo "$2 $SLURMD_NODENAME ${CUDA_VISIBLE_DEVICES:-none} $SLURM_PROCID $started $(date +%s.%N)" >> calls.txt
case $2 in *broken*) exit 1 ;; esac
if [ "$SLURM_PROCID" = 0 ]; then
    mkdir -p results/$2
    for name in model.pth metrics.csv train.json; do echo $2 > results/$2/$name; done
fi
"""


def wait(ready: Callable[[], object], what: str, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"{what} never came\n{ask('squeue', '-t', 'all')}"
        time.sleep(0.1)


def state(job: str) -> str:
    return ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")


def training_job() -> str:
    """Number of the running train job of the main experiment; empty while there is none."""
    rows = (row.split() for row in ask("squeue", "-h", "-t", "running", "-o", "%A %k").splitlines())
    return next((row[0] for row in rows if row[1:] == [f"rule_train_wildcards_{EXPERIMENT}"]), "")


def process_of(*words: str) -> int:
    """The process whose command line has all the words; 0 while there is none."""
    for entry in Path("/proc").iterdir():
        try:
            found = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "python" in found[0] and set(words) <= set(found):
            return int(entry.name)
    return 0


# --- one training, through everything that SLURM does to it ---


def main_job(folder: Path) -> list[int]:
    """From nothing to eval.json, preempted, warned of its time limit and cancelled on the way; the steps that were saved each time."""
    target = f"results/{EXPERIMENT}/eval.json"
    log = folder / "snakemake.log"
    with log.open("wb") as stream:
        snakemake = subprocess.Popen(
            ["snakemake", target, *PROFILE, *PATIENCE],
            cwd=folder,
            env=test_kill.ENVIRONMENT,
            stdout=stream,
            stderr=stream,
        )
    try:
        saved = [interrupt(folder, way) for way in (preempt, near_limit, cancel)]
        assert snakemake.wait(300) == 0, log.read_text()[-6000:]
    finally:
        snakemake.kill()
    return saved


def interrupt(folder: Path, way: Callable[[str, Path, int], str]) -> int:
    """The training is stopped where it has made steps of its own, so that it cannot finish first; SLURM's signals wait for it."""
    wait(training_job, "a train job")
    job = training_job()
    log = folder / f"logs/train/{EXPERIMENT}.log"
    wait(lambda: log.exists() and len(re.findall(r"step \d+:", log.read_text())) >= 2, "two steps of training")
    trainer = test_kill.trainer(folder)
    os.kill(trainer, signal.SIGSTOP)
    text = way(job, log, trainer)
    match = re.search(r"stopped after step (\d+)", text)
    assert match, text
    return int(match[1])


def resume_when_signalled(trainer: int) -> None:
    def signalled() -> bool:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{trainer}/status").read_text().splitlines())
        return bool(int(fields["ShdPnd"], 16) >> (signal.SIGTERM - 1) & 1)

    wait(lambda: not Path(f"/proc/{trainer}").exists() or signalled(), "SIGTERM")
    os.kill(trainer, signal.SIGCONT)


def said_last(log: Path) -> str:
    """Snakemake empties the log when the job starts again."""
    wait(lambda: "stopped after step" in log.read_text(), "the end of the training", 30)
    return log.read_text()


def preempt(job: str, log: Path, trainer: int) -> str:
    """A job of higher priority takes the node; SLURM puts ours back into the queue, for two minutes that nobody has to wait here."""
    node = ask("squeue", "-h", "-j", job, "-o", "%N")
    urgent = ["sbatch", "-p", "urgent", "-w", node, "--exclusive", "-o", "/dev/null", "--wrap", "true"]
    subprocess.run(urgent, check=True, capture_output=True)
    text = said_last(log)
    wait(lambda: state(job) == "PENDING", "the requeued job")
    ask("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait(
        lambda: state(job) == "RUNNING" and (not log.exists() or "stopped after" not in log.read_text()),
        "the second start",
    )
    return text


def near_limit(job: str, log: Path, trainer: int) -> str:
    """Two minutes are left: the profile asks for a signal now."""
    ask("scontrol", "update", f"JobId={job}", "TimeLimit=2")
    resume_when_signalled(trainer)
    text = said_last(log)
    wait(lambda: state(job) == "FAILED", "the end of the job")
    return text


def cancel(job: str, log: Path, trainer: int) -> str:
    ask("scancel", job)
    text = said_last(log)
    wait(lambda: state(job) == "CANCELLED", "the end of the job")
    return text


def limited_job(root: Path) -> str:
    """A training that is too slow for the hard limit of its job, of one minute; the job's last state."""
    command = [sys.executable, "-m", "tests.training.toy", str(root), "limited", json.dumps({"train.verbose": True})]
    log = root / "limited.log"
    submit = ["sbatch", "--parsable", "-t", "1", "--mem", "1000", "-o", str(log), "-D", str(toy.REPOSITORY)]
    job = subprocess.run(
        [*submit, "--wrap", "srun " + shlex.join(command)], check=True, capture_output=True, text=True
    ).stdout.strip()
    wait(lambda: log.exists() and "step 2:" in log.read_text(), "two steps of training")
    os.kill(process_of("tests.training.toy", "limited"), signal.SIGSTOP)
    wait(lambda: "stopped after step" in log.read_text(), "the time limit")
    wait(lambda: state(job) not in ("RUNNING", "COMPLETING"), "the end of the job")
    return state(job)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the toy trainings."""
    path = tmp_path_factory.mktemp("toys")
    toy.make_spec(path)
    return path


@pytest.fixture(scope="module")
def main_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = test_kill.make_project(tmp_path_factory.mktemp("main"))
    tiny = test_kill.TINY | {"train": test_kill.TINY["train"] | {"checkpoint_interval_unit": "epoch", "verbose": True}}
    (folder / f"config/experiments/{EXPERIMENT}.yaml").write_text(yaml.safe_dump(tiny))
    return folder


@pytest.fixture(scope="module")
def running(slurm: Path, root: Path, main_folder: Path) -> Iterator[dict[str, Future]]:
    with ThreadPoolExecutor() as pool:
        yield {"main": pool.submit(main_job, main_folder), "limited": pool.submit(limited_job, root)}


# --- what needs no training: places, numbers, repetitions ---


def test_jobs_side_by_side_on_two_nodes_and_counted_retries(running: dict[str, Future], tmp_path: Path) -> None:
    made = project.make_project(tmp_path)
    made.configure("config", project.CONFIG | {"variants": ["a", "b", "wide", "broken"]})
    for variant in "a", "b", "broken":
        made.configure(f"variants/{variant}", {"train": {"num_epochs": 2}})
    made.configure("variants/wide", {"train": {"num_gpus": 2, "num_nodes": 2}})
    (tmp_path / "bin/tessera").write_text(STUB)
    for made_before in ("data/demo/manifest.json", "data/checks/demo.json"):
        (tmp_path / made_before).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / made_before).write_text("{}")
    targets = [f"results/{EXPERIMENT}-{variant}/model.pth" for variant in ("a", "b", "wide", "broken")]
    environment = test_kill.ENVIRONMENT | {"PATH": f"{tmp_path / 'bin'}:{test_kill.ENVIRONMENT['PATH']}"}
    done = subprocess.run(
        ["snakemake", *targets, *PROFILE, *PATIENCE, "--retries", "2"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert [(tmp_path / target).exists() for target in targets] == [True, True, True, False], done.stderr

    calls = [line.split() for line in (tmp_path / "calls.txt").read_text().splitlines()]
    by_variant = {
        variant: [call[1:] for call in calls if call[0].endswith(f"-{variant}")]
        for variant in ("a", "b", "wide", "broken")
    }
    assert len(by_variant["broken"]) == 1 + 2
    assert len(by_variant["a"]) == len(by_variant["b"]) == 1

    # Two processes on either node, each of which sees the two GPUs there and has a rank of its own.
    assert sorted(call[0] for call in by_variant["wide"]) == sorted([*NODES, *NODES])
    assert {call[1] for call in by_variant["wide"]} == {"0,1"}
    assert {call[2] for call in by_variant["wide"]} == {"0", "1", "2", "3"}

    held = [
        (job, node, device, float(start), float(end))
        for job, rows in by_variant.items()
        for node, devices, _, start, end in rows
        for device in devices.split(",")
    ]
    assert all(device in ("0", "1") for _, _, device, _, _ in held)
    together = [
        (one, other)
        for one, other in itertools.combinations(held, 2)
        if one[3] < other[4] and other[3] < one[4] and one[0] != other[0]
    ]
    assert {"a", "b"} in [{one[0], other[0]} for one, other in together]
    assert any(one[1] == other[1] for one, other in together), "no node had two jobs at once"
    assert not [pair for pair in together if pair[0][1:3] == pair[1][1:3]], "a GPU was given to two jobs"


def test_two_ranks_on_two_nodes_equal_one_process_with_the_same_global_batch(
    running: dict[str, Future], root: Path
) -> None:
    ways = {
        "one": ([], {}),
        "two_nodes": (
            ["srun", "--nodes=2", "--ntasks-per-node=1", "--gpus=2", "--mem=1000"],
            {"train.num_nodes": 2, "dataset.train.batch_size": 1},
        ),
        # The train rule of two GPUs on one machine: one task, which starts the processes.
        "one_task": (
            ["srun", "--nodes=1", "--ntasks=1", "--gpus=2", "--mem=1000"],
            {"train.num_gpus": 2, "dataset.train.batch_size": 1},
        ),
    }
    for name, (launcher, changes) in ways.items():
        command = [sys.executable, "-m", "tests.training.toy_mean", str(root), name, json.dumps(CALM | changes)]
        done = subprocess.run([*launcher, *command], cwd=toy.REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("2 processes" in done.stderr) == bool(launcher), done.stderr
        assert done.stderr.count("wrote ") == 1
    one = toy.weights(root / "results/one/model.pth")
    for name in ("two_nodes", "one_task"):
        other = toy.weights(root / f"results/{name}/model.pth")
        assert one.keys() == other.keys()
        for key, value in one.items():
            toy.torch.testing.assert_close(
                other[key], value, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
            )


# --- what the background made ---


def test_training_beyond_its_time_limit_continues_to_the_same_weights(running: dict[str, Future], root: Path) -> None:
    whole = toy.run(root, name="whole")
    assert running["limited"].result() == "TIMEOUT"
    assert not (root / "results/limited").exists()
    rest = toy.run(root, {"train.verbose": True}, "limited")
    toy.assert_same_results(rest, whole)
    assert len(json.loads((rest / "train.json").read_text())["starts"]) == 2


def test_main_job_survives_preemption_warning_and_scancel(
    running: dict[str, Future], main_folder: Path, tmp_path: Path
) -> None:
    saved = running["main"].result()
    results = main_folder / "results" / EXPERIMENT
    starts = [start["step"] for start in json.loads((results / "train.json").read_text())["starts"]]
    assert starts == [0, *saved] and starts == sorted(set(starts))
    evaluation = json.loads((results / "eval.json").read_text())
    assert evaluation["images"] == 3 and {"PQ", "mIoU"} <= evaluation["metrics"].keys()
    assert project.Project(main_folder).plan(f"results/{EXPERIMENT}/eval.json") == {}

    for name in ("config", "data"):
        shutil.copytree(main_folder / name, tmp_path / name)
    subprocess.run(
        ["tessera", "train", EXPERIMENT], cwd=tmp_path, env=test_kill.ENVIRONMENT, check=True, capture_output=True
    )
    toy.assert_same_results(results, tmp_path / "results" / EXPERIMENT)
