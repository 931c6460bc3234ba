"""Names, the number kept, and one writer at a time."""

import errno
import fcntl
import os
import re
import stat
import subprocess
import sys
import textwrap

import pytest
import torch

from tessera.files import UserError
from tessera.spec.schema import TrainSpec
from tessera.training.checkpoint import Folder, read_checkpoint
from tessera.training.state import State


def content(step, **changes):
    state = State(step=step).to_plain()
    return {"state": state, "network": {}, "optimizer": {}, "lineage": {}, "steps_per_epoch": 10} | changes


def test_names_and_number_kept(tmp_path):
    folder = Folder(tmp_path, "tiny", steps_per_epoch=10, keep=TrainSpec().keep_checkpoints)
    for step in (10, 20, 30):
        folder.save(content(step), folder.name(step, "epoch"), best=step == 10)
    assert (tmp_path / "tiny_latest.pth").samefile(tmp_path / "model_epoch_003.pth")
    folder.save(content(35), None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model_epoch_002.pth",
        "model_epoch_003.pth",
        "tiny_best.pth",
        "tiny_latest.pth",
    ]
    assert read_checkpoint(tmp_path / "tiny_best.pth")["state"]["step"] == 10
    assert folder.name(12, "step") == "model_epoch_001_step_00012.pth"
    assert read_checkpoint(tmp_path / "model_epoch_003.pth")["state"]["step"] == 30
    assert folder.newest(100)["state"]["step"] == 35
    assert folder.newest(34)["state"]["step"] == 30
    assert folder.newest(9) is None


def test_latest_may_be_the_damaged_one(tmp_path, capsys):
    folder = Folder(tmp_path, "tiny", steps_per_epoch=10)
    folder.save(content(10), folder.name(10, "epoch"))
    folder.save(content(15), None)
    folder.latest.write_bytes(b"")
    assert folder.newest(100)["state"]["step"] == 10
    assert "tiny_latest.pth" in capsys.readouterr().err
    (tmp_path / "model_epoch_001.pth").unlink()
    assert folder.newest(100) is None
    assert "starting afresh" in capsys.readouterr().err
    folder.latest.unlink()
    assert folder.is_empty()
    folder.latest.symlink_to(tmp_path / "scratch")
    assert not folder.is_empty() and folder.newest(100) is None
    assert (
        "tiny_latest.pth: cannot be read (a link to" in (said := capsys.readouterr().err) and "starting afresh" in said
    )


def test_what_was_just_written_outlives_files_of_later_steps(tmp_path):
    """As of a longer training, whose files are passed over; those still in reach of a start stay the longest."""
    folder = Folder(tmp_path, "tiny", steps_per_epoch=10, keep=2)
    for step in (80, 90):
        folder.save(content(step), folder.name(step, "epoch"))
    for step, kept in ((10, ["001", "009"]), (20, ["001", "002"]), (30, ["002", "003"])):
        folder.save(content(step), folder.name(step, "epoch"))
        assert sorted(path.stem.removeprefix("model_epoch_") for path in folder.named()) == kept


def test_the_best_is_the_last_resort(tmp_path, capsys):
    folder = Folder(tmp_path, "tiny", steps_per_epoch=10)
    folder.save(content(15), None, best=True)
    folder.save(content(10), folder.name(10, "epoch"))
    folder.save(content(20), folder.name(20, "epoch"))
    assert folder.newest(100)["state"]["step"] == 20
    folder.latest.unlink()
    assert folder.newest(100)["state"]["step"] == 20
    (tmp_path / "model_epoch_002.pth").write_bytes(b"")
    assert folder.newest(100)["state"]["step"] == 15
    assert folder.newest(14)["state"]["step"] == 10
    (tmp_path / "model_epoch_001.pth").unlink()
    capsys.readouterr()
    assert folder.newest(100)["state"]["step"] == 15
    assert "continuing from step 15" in capsys.readouterr().err
    (tmp_path / "model_epoch_002.pth").unlink()
    assert not folder.is_empty()
    folder.best.write_bytes(b"")
    assert folder.newest(100) is None and "tiny_best.pth" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "no training checkpoint"),
        ({"weight": torch.ones(1)}, r"train\.pretrained_model_path"),
        ({"format": 99, **content(1)}, "format 99"),
    ],
)
def test_other_files(tmp_path, value, message):
    torch.save(value, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / "x.pth")


WHOLE = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}


def without(value, key):
    return {name: part for name, part in value.items() if name != key}


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda whole: whole | {"state": without(whole["state"], "step")}, "its state has no `step`"),
        (lambda whole: whole | {"state": whole["state"] | {"step": "many"}}, r"its state\.step: .*integer"),
        (lambda whole: whole | {"state": whole["state"] | {"best": [1]}}, r"its state\.best: .*dictionary"),
        (lambda whole: whole | {"state": whole["state"] | {"moon": 1}}, "unexpected keyword argument 'moon'"),
        (lambda whole: whole | {"state": 3}, "its `state` is no dict"),
        (lambda whole: without(whole, "lineage"), "its `lineage` is no dict"),
        (lambda whole: without(whole, "steps_per_epoch"), "its `steps_per_epoch` is no int"),
        (
            lambda whole: whole | {"network": without(WHOLE, "bias")},
            r"its bias is of shape None, the model's of \(2,\)",
        ),
        (lambda whole: whole | {"network": WHOLE | {"bias": torch.zeros(3)}}, r"its bias is of shape \(3,\)"),
        (lambda whole: whole | {"best": WHOLE | {"bias": 1}}, "its bias is of shape None"),
        (
            lambda whole: whole | {"optimizer": {"state": {0: {"exp_avg": torch.zeros(5)}}}},
            r"the optimiser's exp_avg of parameter 0 is of shape \(5,\)",
        ),
    ],
)
def test_what_is_no_checkpoint_of_this_network_is_passed_over(tmp_path, capsys, harm, said):
    network = torch.nn.Linear(3, 2)
    folder = Folder(tmp_path, "tiny", steps_per_epoch=10)
    folder.save(content(10, network=WHOLE), folder.name(10, "epoch"))
    folder.save(harm(content(20, network=WHOLE)), folder.name(20, "epoch"))
    assert folder.newest(100, network=network)["state"]["step"] == 10
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and all(line.endswith("continuing from step 10") for line in told)
    assert re.search(rf"skipped a checkpoint: .*model_epoch_002\.pth: is a damaged checkpoint \(.*{said}.*\);", told[1])


@pytest.mark.parametrize(
    ("mode", "owner", "said"),
    [
        (0o755, 65534, r"belongs to another user \(uid 65534\)"),
        (0o757, None, "may be written by everybody"),
        (0o775, None, r"may be written by a group \(gid 65534\)"),
    ],
)
def test_a_folder_that_others_can_write_is_refused_unless_told(tmp_path, mode, owner, said):
    path = tmp_path / "state"
    path.mkdir()
    if os.geteuid():
        pytest.skip("needs the right to give a folder away")
    os.chown(path, -1 if owner is None else owner, 65534)
    path.chmod(mode)
    with (
        pytest.raises(UserError, match=rf"state: {said}, .*train\.shared_checkpoints=true"),
        Folder(path, "tiny", 10).lock(),
    ):
        pass
    assert not list(path.iterdir())
    with Folder(path, "tiny", 10, shared=True).lock():
        pass


def test_a_folder_of_ours_in_one_that_all_can_write_is_taken(tmp_path):
    """As on the scratch disk of a cluster; whatever this user's umask is."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    scratch.chmod(0o1777)
    mask = os.umask(0o002)
    try:
        with Folder(scratch / "toy" / "0123", "tiny", 10).lock():
            assert stat.S_IMODE((scratch / "toy" / "0123").stat().st_mode) == 0o755
    finally:
        os.umask(mask)


def test_second_writer_is_refused_and_a_killed_one_forgotten(tmp_path):
    program = textwrap.dedent("""
        import os, sys, time
        from pathlib import Path
        from tessera.training.checkpoint import Folder
        with Folder(Path(sys.argv[1]), "tiny", 10).lock():
            if os.fork() == 0:  # a loader process, which outlives its killed parent for a while
                time.sleep(30)
                os._exit(0)
            print("locked", flush=True)
            time.sleep(30)
    """)
    environment = os.environ | {"SLURM_JOB_ID": "4711"}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "locked\n"
    folder = Folder(tmp_path, "tiny", 10)
    with pytest.raises(UserError, match=rf"pid {process.pid} on .*SLURM job 4711.*delete .*/lock"), folder.lock():
        pass
    process.kill()
    process.wait(10)
    with folder.lock():
        assert f"pid {os.getpid()} on" in (tmp_path / "lock").read_text()
    os.killpg(process.pid, 9)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    """Lustre and NFS, as some of them are mounted."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with (
        pytest.raises(UserError, match=r"lock: cannot be locked \(.*set `checkpoints`"),
        Folder(tmp_path, "tiny", 10).lock(),
    ):
        pass
