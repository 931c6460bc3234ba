"""Names, the number kept, and one writer at a time."""

import errno
import fcntl
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from tessera.files import UserError
from tessera.training.checkpoint import Folder, read_checkpoint


def content(step):
    return {"state": {"step": step, "origin": None}, "network": {}, "optimizer": {}}


def test_names_and_number_kept(tmp_path):
    folder = Folder(tmp_path, "tiny", steps_per_epoch=10, keep=2)
    for step in (10, 20, 30):
        folder.save(content(step), folder.name(step, "epoch"))
    folder.save(content(35), None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model_epoch_002.pth",
        "model_epoch_003.pth",
        "tiny_latest.pth",
    ]
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
