"""A training that is stopped anywhere and started again ends with the same bits as one that never was."""

import json
import os
import pickle
import pty
import random
import signal
import sys
import time

import pytest
import torch

from tessera.files import UserError
from tessera.training.loop import Loop
from tests.training import toy

EVERY_STEP = {
    "train.checkpoint_interval": 1,
    "train.checkpoint_interval_unit": "step",
    "train.keep_checkpoints": None,
}


class CrashError(Exception):
    pass


@pytest.fixture
def crash(monkeypatch):
    """``crash(step)``: the next training fails when that step was made, before anything of it is saved."""

    def arm(step):
        original = Loop.on_train_batch_end

        def fail(self, trainer, module, outputs, batch, batch_idx):
            if self.state.step + 1 == step:
                monkeypatch.setattr(Loop, "on_train_batch_end", original)
                raise CrashError
            original(self, trainer, module, outputs, batch, batch_idx)

        monkeypatch.setattr(Loop, "on_train_batch_end", fail)

    return arm


def crash_and_resume(work, crash, step, changes):
    crash(step)
    with pytest.raises(CrashError):
        toy.run(work, changes)
    assert not (work / "results").exists()
    return toy.run(work, changes)


def state_folder(work):
    (folder,) = (work / "checkpoints/toy").iterdir()
    return folder


def starts(results):
    return [start["step"] for start in json.loads((results / "train.json").read_text())["starts"]]


@pytest.mark.parametrize(
    ("step", "changes", "expected"),
    [
        (3, {}, [0]),  # before the first checkpoint: starts afresh
        (6, {}, [0, 4]),  # from the end of an epoch
        (4, EVERY_STEP, [0, 3]),  # inside an epoch, on its last step
        (7, EVERY_STEP, [0, 6]),  # inside an epoch
        (8, EVERY_STEP | {"dataset.train.num_workers": 2}, [0, 7]),
    ],
)
def test_failure_then_resume_equals_uninterrupted(root, work, crash, step, changes, expected):
    results = crash_and_resume(work, crash, step, changes)
    toy.assert_same_results(root / "results/whole", results)
    assert starts(results) == expected


def test_sgd_plateau_and_step_validation_resume(work, crash):
    changes = {
        "train.optim.type": "SGD",
        "train.optim.lr_scheduler": "ReduceOnPlateau",
        "train.optim.monitor_name": "val_loss",
        "train.optim.patience": 0,
        "train.optim.lr": 1.0,
        "train.num_epochs": 3,
        "train.validation_interval": 2,
        "train.validation_interval_unit": "step",
        "train.select": "best",
        "train.clip_grad_type": "value",
    }
    crashed = crash_and_resume(work, crash, 11, changes | EVERY_STEP)
    whole = toy.run(work, changes, "whole")
    toy.assert_same_results(whole, crashed)


def test_kill_9_then_resume_equals_uninterrupted(root, work):
    """Reads the log of a process, kills it at a random step with its loader workers running, and starts it again."""
    changes = EVERY_STEP | {"dataset.train.num_workers": 1, "train.verbose": True}
    process = toy.start(work, changes)
    step = random.randint(1, 7)
    toy.read_until(process, f"step {step}:")
    process.kill()
    process.wait(10)
    results = toy.run(work, changes)
    assert starts(results)[-1] >= step - 1, f"killed after step {step}"
    toy.assert_same_results(root / "results/whole", results)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_and_leaves(root, work, signum, code):
    changes = {"train.verbose": True, "dataset.train.num_workers": 1}
    process = toy.start(work, changes, start_new_session=True)
    toy.read_until(process, "step 2:")
    os.killpg(process.pid, signum)
    rest = process.stderr.read()
    assert process.wait(20) == code, rest
    assert "stopped after step" in rest and "Traceback" not in rest and "worker" not in rest
    assert not (work / "results").exists()
    results = toy.run(work, changes)
    assert starts(results)[-1] >= 2
    toy.assert_same_results(root / "results/whole", results)


def test_lost_terminal_saves_and_leaves(root, work):
    """As of an ssh connection: SIGHUP, and nothing can be printed any more."""
    process, terminal = pty.fork()
    if not process:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup make test` hands on that it is ignored
        os.chdir(toy.REPOSITORY)
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, toy.command(work, {"train.verbose": True}))
    said = b""
    while b"step 2:" not in said:
        said += os.read(terminal, 4096)
    os.close(terminal)
    deadline = time.monotonic() + 60
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            pytest.fail(f"still there a minute after its terminal was lost, having said {said.decode()}")
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(ended[1]) == 129, said.decode()
    assert not (work / "results").exists()
    results = toy.run(work)
    assert starts(results)[-1] >= 2
    toy.assert_same_results(root / "results/whole", results)


def damage_cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class Hostile:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('executed').touch()",))


def damage_pickle(path):
    path.write_bytes(pickle.dumps(Hostile()))


@pytest.mark.parametrize("damage", [damage_cut_off, damage_flip, damage_pickle])
def test_damaged_checkpoint_is_passed_over(root, work, crash, capsys, monkeypatch, damage):
    monkeypatch.chdir(work)
    crash(7)
    with pytest.raises(CrashError):
        toy.run(work, EVERY_STEP)
    folder = state_folder(work)
    for name in ("mask2former_latest.pth", "model_epoch_001_step_00006.pth"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()  # two names of one file
        (folder / name).write_bytes(content)
        damage(folder / name)
    capsys.readouterr()
    results = toy.run(work, EVERY_STEP)
    log = capsys.readouterr().err
    assert "skipped a checkpoint" in log and "model_epoch_001_step_00006.pth" in log and "continuing from step 5" in log
    assert starts(results) == [0, 5]
    toy.assert_same_results(root / "results/whole", results)
    assert not (work / "executed").exists()


def test_more_epochs_equal_a_longer_training(root, work):
    short = toy.run(work, {"train.num_epochs": 1, "train.validation_interval": 2})
    assert "val_PQ" in (short / "metrics.csv").read_text()  # the last epoch always ends with a validation
    longer = toy.run(work, {"train.validation_interval": 2})
    assert starts(longer) == [0, 4]
    whole = toy.run(work, {"train.validation_interval": 2}, "whole")
    toy.assert_same_results(whole, longer)


def test_fewer_epochs_use_an_earlier_checkpoint(root, work):
    toy.run(work, {})
    fewer = toy.run(work, {"train.num_epochs": 1})
    assert starts(fewer) == [0]
    toy.assert_same_results(toy.run(work, {"train.num_epochs": 1}, "short"), fewer)


def test_finished_training_writes_its_files_again(root, work, crash):
    results = toy.run(work)
    for path in results.iterdir():
        path.unlink()
    crash(1)  # not one more step
    toy.assert_same_results(root / "results/whole", toy.run(work))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train.optim.lr": 0.5}, "train.optim.lr: 0.001 -> 0.5"),
        ({"model.decoder.num_object_queries": 9}, "model.decoder.num_object_queries: 8 -> 9"),
        ({"dataset.augmentation.flip": 0.0}, "dataset.augmentation.flip: 0.5 -> 0.0"),
        ({"seed": 3}, "seed: 0 -> 3"),
        ({"train.num_epochs": 1}, "raise train.num_epochs"),
    ],
)
def test_named_checkpoint_of_another_training_is_refused(root, work, changes, named):
    (folder,) = (root / "checkpoints/whole").iterdir()
    path = folder / "model_epoch_002.pth"
    with pytest.raises(UserError) as caught:
        toy.run(work, changes | {"train.resume_training_checkpoint_path": str(path)})
    assert named in str(caught.value) and str(path) in str(caught.value)
    assert not (work / "results").exists()


def test_named_checkpoint_overrules_the_latest_until_it_was_continued(root, work, crash):
    whole = toy.run(work)
    named = {"train.resume_training_checkpoint_path": str(state_folder(work) / "model_epoch_001.pth")}
    crash(8)
    with pytest.raises(CrashError):
        toy.run(work, named | EVERY_STEP)
    results = toy.run(work, named | EVERY_STEP)
    assert starts(results) == [0, 4, 7]
    assert toy.weights(results / "model.pth").keys() == toy.weights(whole / "model.pth").keys()
    toy.assert_same_results(root / "results/whole", results)


def test_model_file_is_no_checkpoint(root, work):
    path = root / "results/whole/model.pth"
    with pytest.raises(UserError, match=r"is no training checkpoint.*train\.pretrained_model_path"):
        toy.run(work, {"train.resume_training_checkpoint_path": str(path)})


def test_changed_optimiser_never_takes_the_old_state(work):
    before = toy.weights(toy.run(work, {"train.num_epochs": 1}) / "model.pth")
    results = toy.run(work, {"train.num_epochs": 1, "train.optim.lr": 0.5})
    after = toy.weights(results / "model.pth")
    assert starts(results) == [0]
    assert len(list((work / "checkpoints/toy").iterdir())) == 2
    assert any(not torch.equal(before[name], after[name]) for name in before)
