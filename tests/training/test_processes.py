"""Two processes on the CPU train as one with the doubled batch, and stop and continue as one."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from tests.training import toy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two processors"),
]
CALM = {
    "model.backbone.drop_path_rate": 0.0,
    "model.pixel_decoder.dropout": 0.0,
    "model.decoder.dropout": 0.0,
    "model.loss.deep_supervision": False,
    "train.num_epochs": 1,
    "train.optim.type": "SGD",
    "train.optim.warmup_iters": 0,
    "train.clip_grad_norm": 0.1,
}
TWO = {"train.num_gpus": 2, "dataset.train.batch_size": 1}


def test_two_processes_equal_one_with_the_doubled_batch(root, work):
    results = {}
    for name, changes in (("one", CALM), ("two", CALM | TWO)):
        process = toy.start(work, changes, name, module="tests.training.toy_mean")
        log = process.stderr.read()
        assert process.wait(30) == 0, log
        results[name] = work / "results" / name
        assert ("2 processes" in log) == (name == "two")
        assert log.count("epoch 1/1") == log.count("wrote ") == 1
    one, two = (toy.weights(path / "model.pth") for path in results.values())
    start = toy.weights(root / "results/whole/model.pth")
    assert any(not torch.equal(one[name], start[name]) for name in one)
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_two_processes_stop_together_and_continue(work):
    """By what the parent passes on; and by what the whole group gets, which each then hears twice."""
    changes = TWO | {"train.verbose": True}
    for send, signum, code in ((os.kill, signal.SIGTERM, 143), (os.killpg, signal.SIGINT, 130)):
        process = toy.start(work, changes, threads=2, log=work / "train.log", start_new_session=True)
        before = "".join(toy.read_until(process, ": lr of"))
        assert "CPU, 1 thread(s), 2 processes" in before  # as the spec says, though the job has two
        send(process.pid, signum)
        rest = process.stderr.read()
        assert process.wait(30) == code, rest
        assert rest.count("stopped after step") == 1 and "Traceback" not in rest
        logged = (work / "train.log").read_text().partition("\n")[2]  # all that parent and workers said
        assert sorted(logged.splitlines()) == sorted((before + rest).splitlines())
    process = toy.start(work, changes)
    log = process.stderr.read()
    assert process.wait(30) == 0, log
    assert "continuing from step" in log
    starts = [start["step"] for start in json.loads((work / "results/toy/train.json").read_text())["starts"]]
    assert starts == sorted(set(starts)) and len(starts) == 3


def test_mistake_in_one_process_is_told_once(work):
    process = toy.start(work, TWO | {"train.freeze": ["backbon"]})
    log = process.stderr.read()
    assert process.wait(30) == 1
    assert "closest: backbone" in log.splitlines()[-1]


START = """
import sys
from pathlib import Path
from torch import distributed
from tessera.files import UserError
from tessera.training.checkpoint import Folder
from tessera.training.loop import require_same_start

distributed.init_process_group("gloo")
folder = Folder(Path("checkpoints"), "toy", 4)
require_same_start(8, folder)
try:
    require_same_start(4 * distributed.get_rank(), folder)
except UserError as error:
    print(error)
distributed.destroy_process_group()
"""


def test_machines_without_a_shared_disk_are_found_out():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    done = subprocess.run([*command, sys.executable, "-c", START], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("different steps there ([0, 4], by rank)") == 2, done.stdout + done.stderr
