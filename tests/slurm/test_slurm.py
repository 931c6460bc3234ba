"""The workflow on a real SLURM: what SLURM does to a training costs the running step at most and changes no weight.

The slow parts run side by side: two of them are waiting for SLURM most of the time.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from tessera.training.checkpoint import read_checkpoint
from tests.dvc import test_dvc
from tests.slurm.cluster import FRAGILE, NODES, ask
from tests.training import toy
from tests.training.test_processes import CALM
from tests.workflow import project, small

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

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
echo "$1 $2 $SLURMD_NODENAME ${CUDA_VISIBLE_DEVICES:-none} ${SLURM_PROCID:-none}" >> calls.txt
[ $1 = train ] || exit 1
touch met-$2
for second in $(seq 200); do
    [ $(ls met-* | wc -l) = 3 ] && break
    sleep 1
done
if [ "$SLURM_PROCID" = 0 ]; then
    mkdir -p results/$2
    for name in model.pth metrics.csv train.json; do echo $second > results/$2/$name; done
fi
"""
"""A training that ends when three of them run at once; every other stage fails."""


OVER = threading.Event()
"""Nobody waits any longer for what runs in the background."""


def wait(ready: Callable[[], object], what: str, seconds: float = 500) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert not OVER.is_set(), f"the tests ended before {what} came"
        assert time.monotonic() < deadline, f"{what} never came\n{ask('squeue', '-t', 'all')}"
        time.sleep(0.1)


def state(job: str) -> str:
    return ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")


def training_job() -> str:
    """Number of the running train job of the main experiment; empty while there is none."""
    rows = (row.split() for row in ask("squeue", "-h", "-t", "running", "-p", FRAGILE, "-o", "%A %k").splitlines())
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


def of_job(job: str) -> tuple[list[int], list[int]]:
    """Its processes, and those of SLURM that watch over them."""
    own, watching = [], []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if (entry / "cmdline").read_bytes().startswith(f"slurmstepd: [{job}.".encode()):
                watching.append(int(entry.name))
            elif f"SLURM_JOB_ID={job}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                own.append(int(entry.name))
    return own, watching


# --- one training, through everything that SLURM does to it ---


def main_job(folder: Path) -> list[int]:
    """From nothing to eval.json, through all that SLURM does to it on the way; the steps that were saved each time."""
    target = f"results/{EXPERIMENT}/eval.json"
    log = folder / "snakemake.log"
    with log.open("wb") as stream:
        snakemake = subprocess.Popen(
            ["snakemake", target, *PROFILE, *PATIENCE],
            cwd=folder,
            env=small.ENVIRONMENT,
            stdout=stream,
            stderr=stream,
        )
    try:
        saved = [interrupt(folder, way) for way in (preempt, lose_node, near_limit, cancel)]
        wait(lambda: snakemake.poll() is not None, "the end of snakemake", 400)
        assert snakemake.returncode == 0, log.read_text()[-6000:]
    finally:
        snakemake.kill()
    return saved


def interrupt(folder: Path, way: Callable[[str, Path, int], None]) -> int:
    """The training is stopped where it has made steps of its own, so that it cannot finish first; SLURM's signals wait for it."""
    log = folder / f"logs/train/{EXPERIMENT}.log"
    wait(lambda: under_way(log) and training_job(), "two steps of training")
    job = training_job()
    trainer = small.trainer(folder)
    os.kill(trainer, signal.SIGSTOP)
    way(job, log, trainer)
    (latest,) = folder.glob(f"checkpoints/{EXPERIMENT}/*/*_latest.pth")
    step: int = read_checkpoint(latest)["state"]["step"]
    return step


def under_way(log: Path) -> bool:
    """Two steps since the start; Snakemake takes the log of the start before away a while after the job began."""
    text = log.read_text() if log.exists() else ""
    return "stopped after" not in text and len(re.findall(r"step \d+:", text)) >= 2


def resume_when_signalled(trainer: int) -> None:
    """SLURM may have woken it itself."""
    status = Path(f"/proc/{trainer}/status")

    def signalled() -> bool:
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return bool(int(fields["ShdPnd"], 16) >> (signal.SIGTERM - 1) & 1)

    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        wait(signalled, "SIGTERM")
        os.kill(trainer, signal.SIGCONT)


def wait_for_the_end(log: Path) -> None:
    wait(lambda: "stopped after step" in log.read_text(), "the end of the training", 30)


def start_requeued(job: str) -> None:
    """SLURM has put it back into the queue, for two minutes in which its daemons are done with the former start; here seconds are enough."""
    wait(lambda: state(job) == "PENDING", "the requeued job")
    time.sleep(5)
    ask("scontrol", "update", f"JobId={job}", "StartTime=now")


def preempt(job: str, log: Path, trainer: int) -> None:
    """A job of higher priority takes the node."""
    urgent = ["sbatch", "-p", "urgent", "-w", FRAGILE, "--exclusive", "-o", "/dev/null", "--wrap", "true"]
    subprocess.run(urgent, check=True, capture_output=True)
    wait_for_the_end(log)
    start_requeued(job)


def lose_node(job: str, log: Path, trainer: int) -> None:
    """All of the job ends without a word, as when the power is cut, and SLURM takes the node for lost. It comes back empty."""
    ask("scontrol", "update", f"NodeName={FRAGILE}", "State=DOWN", "Reason=test")
    for process in of_job(job)[0]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    wait(lambda: not any(of_job(job)), "the end of the job's processes")
    log.unlink()  # it has no last word that would tell it from the next start's
    ask("scontrol", "update", f"NodeName={FRAGILE}", "State=RESUME")
    start_requeued(job)


def near_limit(job: str, log: Path, trainer: int) -> None:
    """Two minutes are left: the profile asks for a signal now."""
    ask("scontrol", "update", f"JobId={job}", "TimeLimit=2")
    resume_when_signalled(trainer)
    wait_for_the_end(log)
    wait(lambda: state(job) == "FAILED", "the end of the job")


def cancel(job: str, log: Path, trainer: int) -> None:
    ask("scancel", job)
    wait_for_the_end(log)
    wait(lambda: state(job) == "CANCELLED", "the end of the job")


def limited_job(root: Path) -> str:
    """A training that is too slow for the hard limit of its job; the job's last state."""
    command = [sys.executable, "-m", "tests.training.toy", str(root), "limited", json.dumps({"train.verbose": True})]
    log = root / "limited.log"
    submit = ["sbatch", "--parsable", "-t", "9", "--mem", "1000", "-o", str(log), "-D", str(toy.REPOSITORY)]
    job = subprocess.run(
        [*submit, "--wrap", "srun " + shlex.join(command)], check=True, capture_output=True, text=True
    ).stdout.strip()
    wait(lambda: log.exists() and "step 2:" in log.read_text(), "two steps of training")
    os.kill(process_of("tests.training.toy", "limited"), signal.SIGSTOP)
    ask("scontrol", "update", f"JobId={job}", "TimeLimit=1")
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
    folder = small.make_project(tmp_path_factory.mktemp("main"))
    tiny = small.TINY | {"train": small.TINY["train"] | {"checkpoint_interval_unit": "epoch", "verbose": True}}
    (folder / f"config/experiments/{EXPERIMENT}-demo.yaml").write_text(yaml.safe_dump(tiny))
    profile = folder / "profiles/slurm/config.yaml"
    profile.write_text(profile.read_text().replace("slurm_partition: gpu", f"slurm_partition: {FRAGILE}"))
    return folder


@pytest.fixture(scope="module")
def main(slurm: Path, main_folder: Path) -> Iterator[Future[list[int]]]:
    with ThreadPoolExecutor() as pool:
        yield pool.submit(main_job, main_folder)
        OVER.set()


@pytest.fixture(scope="module")
def limited(slurm: Path, root: Path) -> Iterator[Future[str]]:
    with ThreadPoolExecutor() as pool:
        yield pool.submit(limited_job, root)
        OVER.set()


# --- meanwhile ---


def test_jobs_side_by_side_on_two_nodes_and_counted_retries(
    main: Future[list[int]], limited: Future[str], tmp_path: Path
) -> None:
    made = project.make_project(tmp_path)
    made.configure("config", project.CONFIG | {"variants": ["a", "b", "wide"], "tables": {}})
    for variant in "a", "b":
        made.configure(f"variants/{variant}", {"train": {"num_epochs": 2}})
    made.configure("variants/wide", {"train": {"num_gpus": 2, "num_nodes": 2}})
    (tmp_path / "bin/tessera").write_text(STUB)
    broken = f"results/{EXPERIMENT}/model.onnx"
    for name in ("data/demo/manifest.json", "data/checks/demo.json", f"results/{EXPERIMENT}/model.pth"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    trained = [f"results/{EXPERIMENT}-{variant}/model.pth" for variant in ("a", "b", "wide")]
    environment = small.ENVIRONMENT | {"PATH": f"{tmp_path / 'bin'}:{small.ENVIRONMENT['PATH']}"}
    done = subprocess.run(
        ["snakemake", *trained, broken, *PROFILE, *PATIENCE, "--retries", "2"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert all((tmp_path / path).exists() for path in trained), done.stderr
    assert not (tmp_path / broken).exists()

    calls = [line.split() for line in (tmp_path / "calls.txt").read_text().splitlines()]
    assert [verb for verb, *_ in calls].count("export") == 1 + 2
    places: dict[str, list[list[str]]] = {}
    for verb, experiment, *place in calls:
        if verb == "train":
            places.setdefault(experiment.removeprefix(f"{EXPERIMENT}-"), []).append(place)
    assert {variant: len(rows) for variant, rows in places.items()} == {"a": 1, "b": 1, "wide": 4}
    # They met, so what they held they held at once: six GPUs, none of them twice.
    assert "200" not in {(tmp_path / path).read_text().strip() for path in trained}
    held = {
        (variant, node, device)
        for variant, rows in places.items()
        for node, devices, _ in rows
        for device in devices.split(",")
    }
    assert sorted((node, device) for _, node, device in held) == sorted(itertools.product(NODES, "012"))
    # Two processes on either node, each with a rank of its own.
    assert sorted(node for node, _, _ in places["wide"]) == sorted([*NODES, *NODES])
    assert {rank for _, _, rank in places["wide"]} == {"0", "1", "2", "3"}


def test_two_ranks_on_two_nodes_equal_one_process_with_the_same_global_batch(slurm: Path, root: Path) -> None:
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


JOBS = """
with Path("jobs.txt").open("a") as jobs:
    jobs.write(f"{verb} {'SLURM_JOB_ID' in os.environ}\\n")
"""


def test_dvc_repro_on_the_cluster(main: Future[list[int]], tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    folder.mkdir()
    checkout = test_dvc.add_dvc(project.make_project(folder).root)
    stub = folder / "bin/tessera"
    stub.write_text(stub.read_text() + JOBS)
    target = f"results/{EXPERIMENT}/eval.json"
    test_dvc.edit(checkout, "snakemake all", f"snakemake {target}")
    checkout.commit("start")
    checkout.call("snakemake", "data/checks/demo.json", "--cores", "1")
    checkout.call("dvc", "repro", SNAKEMAKE_ARGS=shlex.join([*PROFILE, *PATIENCE]))
    jobs = (folder / "jobs.txt").read_text().splitlines()
    assert jobs == ["demo False", "check False", "train True", "evaluate True"]
    checkout.commit("results")
    assert checkout.plan(target) == {}
    assert "Data and pipelines are up to date" in checkout.call("dvc", "status")


# --- what the background made ---


def test_training_beyond_its_time_limit_continues_to_the_same_weights(limited: Future[str], root: Path) -> None:
    whole = toy.run(root, name="whole")
    assert limited.result() == "TIMEOUT"
    assert not (root / "results/limited").exists()
    rest = toy.run(root, {"train.verbose": True}, "limited")
    toy.assert_same_results(rest, whole)
    assert len(json.loads((rest / "train.json").read_text())["starts"]) == 2


def test_main_job_survives_all_that_slurm_does_to_it(
    main: Future[list[int]], main_folder: Path, tmp_path: Path
) -> None:
    saved = main.result()
    results = main_folder / "results" / EXPERIMENT
    starts = [start["step"] for start in json.loads((results / "train.json").read_text())["starts"]]
    # One that saved nothing is not among them: the next one began at the same step.
    assert starts == [0, *sorted(set(saved))] and saved == sorted(saved) and len(starts) >= len(saved)
    evaluation = json.loads((results / "eval.json").read_text())
    assert evaluation["images"] == 3 and {"PQ", "mIoU"} <= evaluation["metrics"].keys()
    assert project.Project(main_folder).plan(f"results/{EXPERIMENT}/eval.json") == {}

    for name in ("config", "data"):
        shutil.copytree(main_folder / name, tmp_path / name)
    subprocess.run(
        ["tessera", "train", EXPERIMENT], cwd=tmp_path, env=small.ENVIRONMENT, check=True, capture_output=True
    )
    toy.assert_same_results(results, tmp_path / "results" / EXPERIMENT)
