"""Which signals stop a training, and when a second one does more."""

import io
import os
import signal
import sys
import threading
import time

import pytest

from tessera.training.interrupt import AGAIN_SECONDS, StopRequest
from tessera.training.launch import external_rank


@pytest.fixture
def stop():
    request = StopRequest()
    request.install()
    yield request
    request.remove()


@pytest.fixture
def later(monkeypatch):
    """``later()``: some seconds have passed. Signals that this process sends itself are listed and not sent."""
    now = [time.monotonic()]
    sent = []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "kill", lambda _, signum: sent.append(signum))

    def pass_time():
        now[0] += AGAIN_SECONDS + 1

    pass_time.sent = sent
    return pass_time


def test_ctrl_c_again_after_some_seconds_leaves_at_once(stop, later, capsys):
    for _ in range(2):  # of the terminal, and of the parent process, which got it as well
        signal.raise_signal(signal.SIGINT)
    assert stop.signum == signal.SIGINT
    stop.remove()  # has said everything
    assert capsys.readouterr().err.count("once more to leave at once") == 1
    assert later.sent == []
    stop.install()
    later()
    signal.raise_signal(signal.SIGINT)
    assert later.sent == [signal.SIGINT]


def test_slurms_second_sigterm_leaves_time_to_save(stop, later, capsys):
    signal.raise_signal(signal.SIGTERM)
    later()
    signal.raise_signal(signal.SIGTERM)
    assert stop.signum == signal.SIGTERM
    assert later.sent == []
    stop.remove()
    assert capsys.readouterr().err == "SIGTERM: finishing this step, then saving\n"


def test_a_signal_in_the_middle_of_a_print_waits_for_nothing(stop, monkeypatch):
    """Whoever prints holds locks that the message needs, too."""
    lock = threading.Lock()
    said = []

    class Stream(io.StringIO):
        def write(self, text):
            if not lock.acquire(timeout=5):
                raise TimeoutError
            said.append(text)
            lock.release()

    monkeypatch.setattr(sys, "stderr", Stream())
    with lock:
        signal.raise_signal(signal.SIGTERM)
        assert said == []
    stop.remove()
    assert "".join(said) == "SIGTERM: finishing this step, then saving\n"


def test_under_nohup_a_lost_terminal_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        request = StopRequest()
        request.install()
        signal.raise_signal(signal.SIGHUP)
        request.remove()
        assert request.signum == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, None),  # a batch script, which starts no second one
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}, 1),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1"}, 1),
    ],
)
def test_who_started_this_process(monkeypatch, variables, rank):
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert external_rank(2) == rank
