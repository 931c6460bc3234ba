"""What goes wrong while experiments run: a clear message, nothing lost, and a later run ends with what an undisturbed one gives.

docs/faults.md lists every fault with the test that shows it; those that other files show are not repeated here.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera import files
from tessera.cli import app
from tessera.files import UserError, workflow_command, write_json
from tessera.spec.planning import Plan
from tessera.training.loop import Loop
from tests.training import toy
from tests.workflow.project import Project, make_project, wait_until

TARGET = "results/mask2former_swin/eval.json"
CHAIN = ["demo", "check", "train", "evaluate"]
EVERY_STEP = {
    "train.checkpoint_interval": 1,
    "train.checkpoint_interval_unit": "step",
    "train.keep_checkpoints": None,
}
LARGE = "size=64m"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_project(tmp_path)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``results/whole``: the toy training, never interrupted; its checkpoints of every step."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("faults")
    toy.run(path, EVERY_STEP, "whole")
    return path


@pytest.fixture
def work(root: Path, tmp_path: Path) -> Path:
    """A place for a training on a copy of the same data."""
    torch.set_num_threads(1)
    shutil.copytree(root / "data", tmp_path / "data")
    return tmp_path


@contextlib.contextmanager
def tmpfs(path: Path, options: str) -> Iterator[None]:
    path.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"needs the right to mount a small disk: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def remount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(path)], check=True)


def verbs(project: Project) -> list[str]:
    return [line.split()[0] for line in project.calls()]


# Snakemake


@pytest.mark.parametrize(
    ("signum", "group"),
    [(signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGHUP, True)],
    ids=["kill-snakemake", "kill-group", "hangup"],
)
def test_snakemake_killed(project: Project, signum: int, group: bool) -> None:
    """Its lock stays, and a training that outlives it has the right to end; nothing of the killed run counts as made."""
    running = project.start(TARGET, wait="train")
    wait_until(lambda: "train" in verbs(project))
    (os.killpg if group else os.kill)(running.pid, signum)
    running.join()
    refused = project.snakemake(TARGET)
    assert refused.returncode != 0
    assert "Directory cannot be locked" in refused.stdout and "--unlock" in refused.stdout
    (project.root / "go").touch()
    if not group:
        wait_until((project.root / "results/mask2former_swin/train.json").exists)
    project.run("--unlock")
    project.run(TARGET)
    assert verbs(project) == ["demo", "check", "train", "train", "evaluate"]
    assert project.plan(TARGET) == {}


def test_snakemake_terminated(project: Project) -> None:
    """It waits for the running job, starts no other, and leaves no lock."""
    old = project.root / ".snakemake/planned/elsewhere-7.json"  # of a Snakemake that was killed long ago
    old.parent.mkdir(parents=True)
    old.write_text("{}")
    os.utime(old, (0, 0))
    running = project.start(TARGET, wait="train")
    wait_until(lambda: "train" in verbs(project))
    assert not old.exists()
    os.kill(running.pid, signal.SIGTERM)
    time.sleep(0.5)
    (project.root / "go").touch()
    running.join()
    assert verbs(project) == CHAIN[:3]
    project.run(TARGET)
    assert verbs(project) == CHAIN
    assert project.plan(TARGET) == {}


def test_two_at_once(project: Project) -> None:
    first = project.start(TARGET, wait="train")
    wait_until(lambda: "train" in verbs(project))
    second = project.snakemake(TARGET)
    assert second.returncode != 0
    assert "Directory cannot be locked" in second.stdout and "no other Snakemake process" in second.stdout
    (project.root / "go").touch()
    first.join()
    assert first.exitcode == 0, project.said.read_text()
    assert verbs(project) == CHAIN
    assert project.plan(TARGET) == {}


def test_clock_jumps(project: Project) -> None:
    """Times of files decide nothing while their content is the recorded one."""
    project.run(TARGET, "results/mask2former_swin/onnx_eval.json")
    files = sorted(path for path in project.root.rglob("results/**/*") if path.is_file())
    for number, path in enumerate(reversed([project.root / "data/demo/manifest.json", *files])):
        moment = time.time() + 3600 * (number % 3 - 1)
        os.utime(path, (moment, moment))
    assert project.plan(TARGET, "results/mask2former_swin/onnx_eval.json") == {}


def test_records_deleted(project: Project) -> None:
    """Without .snakemake/metadata nobody knows what the outputs were made from, and so it is said of every one."""
    short = "results/mask2former_swin-short/eval.json"
    project.run(TARGET, short)
    assert "no record" not in project.snakemake("--dry-run", TARGET).stdout
    shutil.rmtree(project.root / ".snakemake")
    assert "4 of 4 outputs have no record in .snakemake/metadata" in project.snakemake("-n", TARGET).stdout
    project.run(TARGET, "--forceall")
    said = project.snakemake("--dry-run", TARGET).stdout
    assert "2 of 4 outputs have no record" in said
    assert f"({short}, results/mask2former_swin-short/train.json)" in said
    long = "x" * 200  # Snakemake keeps the record of such a name in a folder
    (project.root / f"results/{long}").mkdir()
    (project.root / f"results/{long}/eval.json").touch()
    assert "3 of 5 outputs have no record" in project.snakemake("--dry-run", TARGET).stdout
    record = "@" + urlsafe_b64encode(f"results/{long}/eval.json".encode()).decode()[:254]
    (project.root / f".snakemake/metadata/{record}").mkdir()
    assert "2 of 5 outputs have no record" in project.snakemake("--dry-run", TARGET).stdout
    shutil.rmtree(project.root / f"results/{long}")
    project.run(short, "--forceall")
    assert "no record" not in project.snakemake("--dry-run", TARGET).stdout
    assert project.plan(TARGET) == {}


def test_data_that_a_rule_made_are_deleted(project: Project) -> None:
    """Snakemake does not make them again while their check stands: said before any stage runs, with the command that does."""
    project.run(TARGET)
    (project.root / "calls.txt").unlink()
    shutil.rmtree(project.root / "data/demo")
    assert project.plan(TARGET) == {}, "what is finished needs no data"
    for changed in ({"postprocess": {"object_mask_threshold": 0.6}}, {"train": {"optim": {"lr": 3.0e-4}}}):
        project.configure("experiments/mask2former_swin-demo", changed)
        failed = project.snakemake(TARGET)
        assert failed.returncode != 0
        assert "data/demo/manifest.json: no such file" in failed.stdout
        assert "`snakemake --cores 2 data/demo/manifest.json`" in failed.stdout
        assert project.calls() == []
    pictures = "results/mask2former_swin/inference/index.json"
    (project.root / "data/own.png").touch()
    project.configure("experiments/mask2former_swin-demo", {"inference": {"images": "own.png"}})
    project.run(pictures)  # of none of them
    project.configure("experiments/mask2former_swin-demo", {"train": {"optim": {"lr": 3.0e-4}}})
    project.run("data/demo/manifest.json")
    project.run(TARGET)
    assert verbs(project) == ["infer", "demo", "train", "evaluate"]


def test_configuration_changed_before_a_job_starts_elsewhere(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster's job is started by a Snakemake of its own, which reads the configuration again, maybe hours later: it must hold the stage to
    what was planned."""
    outer = project.start(TARGET, wait="train")
    wait_until(lambda: "train" in verbs(project))
    (plans,) = (project.root / ".snakemake/planned").iterdir()
    planned = project.calls()[-1]
    project.configure("experiments/mask2former_swin-demo", {"train": {"optim": {"lr": 3.0e-4}}})
    monkeypatch.setenv("TESSERA_PLANNED", str(plans))
    project.run("results/mask2former_swin/model.pth", "--force", "--no-hooks", "--nolock")
    assert project.calls()[-1] == planned
    monkeypatch.setenv("TESSERA_PLANNED", "/another/project/.snakemake/planned/host-1.json")
    project.run("results/mask2former_swin/model.pth", "--force", "--no-hooks", "--nolock")
    assert project.calls()[-1] != planned
    (project.root / "go").touch()
    outer.join()
    assert not plans.exists()


def test_the_way_back_after_a_failed_retraining(project: Project) -> None:
    """The score of the old learning rate is still that of the old learning rate; its weights are made again when they are asked for."""
    project.run(TARGET)
    before = project.configuration()
    project.configure("experiments/mask2former_swin-demo", {"train": {"optim": {"lr": 3.0e-4}}})
    assert project.snakemake(TARGET, fail="train").returncode != 0
    assert project.plan(TARGET) == {"train": 1, "evaluate": 1}
    project.restore(before)
    score = (project.root / TARGET).read_text()
    project.run(TARGET, "results/mask2former_swin/model.pth")
    assert (project.root / TARGET).read_text() == score
    assert project.plan(TARGET, "results/mask2former_swin/model.pth") == {}


def test_the_advised_command_leads_back(project: Project) -> None:
    """Whatever replaced or edited a file, Snakemake knows of nothing to do, which is why every message says --force."""
    folder = project.root / "results/mask2former_swin"
    project.run(TARGET, "results/mask2former_swin/inference/index.json")
    made = {
        "model.pth": "train",
        "train.json": "train",
        "metrics.csv": "train",
        "eval.json": "evaluate",
        "eval.statistics.json.gz": "evaluate",
        "inference/index.json": "infer",
    }
    for name, verb in made.items():
        path, before = folder / name, project.calls()
        moment = path.stat().st_mtime
        path.write_text("edited")
        os.utime(path, (moment, moment))
        assert project.plan(str(path.relative_to(project.root))) == {}, name
        project.run(*shlex.split(workflow_command(path.relative_to(project.root), again=True))[3:])
        assert project.calls()[len(before) :][-1].startswith(f"{verb} "), name
        assert path.read_text() != "edited"


def test_the_advised_command_finds_data_elsewhere() -> None:
    command = workflow_command("results/a/eval.json", again=True, data_root="/my data")
    assert command == "snakemake --cores 2 --force results/a/eval.json --config 'data_root=/my data'"


def test_every_message_names_the_command_that_leads_back() -> None:
    """`snakemake --cores` is written out in one place only, which the test above tries."""
    sources = Path(files.__file__).parent.rglob("*.py")
    assert [path.name for path in sources if "snakemake --cores" in path.read_text()] == []


def test_read_only_results(project: Project) -> None:
    with tmpfs(project.root / "results", LARGE):
        project.run(TARGET)
        project.configure("experiments/mask2former_swin-demo", {"postprocess": {"object_mask_threshold": 0.6}})
        remount(project.root / "results", "ro")
        failed = project.snakemake(TARGET)
        assert failed.returncode != 0
        assert "Write-protected output files" in failed.stdout and TARGET in failed.stdout
        remount(project.root / "results", "rw")
        assert project.plan(TARGET) == {"evaluate": 1}
        project.run(TARGET)
        assert project.plan(TARGET) == {}


# What a stage reads changes between planning and its start


def change_spec(project: Project) -> None:
    project.configure("experiments/mask2former_swin-streets", {"train": {"optim": {"lr": 3.0e-4}}})


def change_label_map(project: Project) -> None:
    (project.root / "data/streets/label_map.json").write_text("[]")


def change_annotations(project: Project) -> None:
    (project.root / "data/streets/train.json").write_text("[]")


def delete_annotations(project: Project) -> None:
    (project.root / "data/streets/train.json").unlink()


@pytest.mark.parametrize("change", [change_spec, change_label_map, change_annotations, delete_annotations])
def test_inputs_changed_during_the_run(
    project: Project, monkeypatch: pytest.MonkeyPatch, change: Callable[[Project], None]
) -> None:
    """The stage refuses to make what was not planned. (Deleted before planning: test_plan.py, a mistake fails while planning.)"""
    for name in ("label_map", "train", "val", "test"):
        path = project.root / f"data/streets/{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    monkeypatch.chdir(project.root)
    planned = Plan({}).digest("mask2former_swin-streets", "train")
    change(project)
    with pytest.raises(
        UserError, match=rf"changed while the workflow was running \(planned {planned}, now .*run snakemake"
    ):
        app(["train", "mask2former_swin-streets", "--expect", planned], standalone_mode=False)
    assert not (project.root / "results").exists()


# A real training


def starts(results: Path) -> list[int]:
    return [start["step"] for start in json.loads((results / "train.json").read_text())["starts"]]


def checkpoints(work: Path) -> Path:
    (folder,) = (work / "checkpoints/toy").iterdir()
    return folder


def unfinished(root: Path, work: Path, step: int) -> list[Path]:
    """The checkpoints of a training that was killed after ``step``, newest first: latest and the named ones."""
    (source,) = (root / "checkpoints/whole").iterdir()
    folder = work / "checkpoints/toy" / source.name
    folder.mkdir(parents=True)
    named = sorted(source.glob("model_epoch_*.pth"))[:step]
    for path in named:
        shutil.copy(path, folder)
    shutil.copy(named[-1], folder / "mask2former_latest.pth")
    return [folder / "mask2former_latest.pth", *(folder / path.name for path in reversed(named))]


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_newest_checkpoints_cut_off(root: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The latest and the two named ones before it; one alone: test_resume.py."""
    for path in unfinished(root, work, 6)[:3]:
        cut_off(path)
    results = toy.run(work, EVERY_STEP)
    assert starts(results) == [0, 4]
    said = {line for line in capsys.readouterr().err.splitlines() if "skipped a checkpoint" in line}
    assert len(said) == 3 and all("continuing from step 4" in line for line in said)
    toy.assert_same_results(root / "results/whole", results)


def test_checkpoints_of_any_time_and_what_a_killed_start_was_writing(root: Path, work: Path) -> None:
    """The newest is the one of the most steps, whatever the clock says; half-written files are removed."""
    paths = unfinished(root, work, 6)
    for number, path in enumerate(paths):
        os.utime(path, (1e9 + number, 1e9 + number))
    half = paths[0].with_name(f".mask2former_latest.tessera-{'f' * 24}.pth")  # of another machine, whose lock is gone
    half.write_bytes(b"PK")
    results = toy.run(work, EVERY_STEP)
    assert starts(results)[-1] == 6
    assert not half.exists()
    toy.assert_same_results(root / "results/whole", results)


def test_disk_full_at_a_checkpoint(root: Path, work: Path) -> None:
    with tmpfs(work / "checkpoints", "size=16m"):  # three of them fit
        with pytest.raises(
            UserError, match=r"checkpoints/toy/.*\.pth: cannot be written: no space left on the disk; make room"
        ):
            toy.run(work, EVERY_STEP)
        assert not list(checkpoints(work).glob(".*"))
        remount(work / "checkpoints", LARGE)
        results = toy.run(work, EVERY_STEP)
        assert starts(results)[-1] in (2, 3)
        toy.assert_same_results(root / "results/whole", results)


@pytest.mark.parametrize(("options", "reason"), [("size=8k", "no space left"), ("ro", "the file system is read-only")])
def test_results_of_a_training_cannot_be_written(root: Path, work: Path, options: str, reason: str) -> None:
    with tmpfs(work / "results", options):
        with pytest.raises(UserError, match=rf"results/toy/.*: cannot be written: {reason}"):
            toy.run(work, EVERY_STEP)
        assert not (work / "results/toy/model.pth").exists()
        remount(work / "results", f"rw,{LARGE}")
        toy.assert_same_results(root / "results/whole", toy.run(work, EVERY_STEP))


def test_disk_full_while_writing_an_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "disk/eval.json"
    with tmpfs(path.parent, "size=64k"):
        write_json(path, {"PQ": 0.5})
        with pytest.raises(UserError, match=r"eval\.json: cannot be written: no space left"):
            write_json(path, {"PQ": 0.6, "rows": ["x" * 1000] * 100})
        assert [entry.name for entry in path.parent.iterdir()] == ["eval.json"]
        assert json.loads(path.read_text()) == {"PQ": 0.5}


DRAW = """
import sys
from pathlib import Path
import numpy as np
from matplotlib.figure import Figure
from tessera.files import UserError
from tessera.pictures.style import save
figure = Figure()
figure.add_subplot().imshow(np.random.default_rng(0).random((300, 300)))
for name in ("curves.png", "curves.pdf"):
    try:
        save(figure, Path(sys.argv[1]) / name)
    except UserError as error:
        print(error)
"""


def test_disk_full_while_drawing_figures(tmp_path: Path) -> None:
    """Nor does matplotlib's open file leave a traceback when it is closed at last."""
    disk = tmp_path / "disk"
    with tmpfs(disk, "size=16k"):
        done = subprocess.run([sys.executable, "-c", DRAW, str(disk)], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        assert done.stdout.count("cannot be written: no space left on the disk") == 2
        assert not list(disk.iterdir())


def test_loader_process_killed(root: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the kernel when memory runs out."""
    original = Loop.on_train_batch_end

    def kill(self: Loop, *arguments: Any) -> None:
        original(self, *arguments)
        if self.state.step == 5:
            for process in multiprocessing.active_children():
                process.kill()
                process.join()

    monkeypatch.setattr(Loop, "on_train_batch_end", kill)
    changes = EVERY_STEP | {"dataset.train.num_workers": 1}
    with pytest.raises(UserError, match=r"a loader process ended from outside .*num_workers"):
        toy.run(work, changes)
    monkeypatch.setattr(Loop, "on_train_batch_end", original)
    results = toy.run(work, changes)
    assert starts(results) == [0, 5]
    toy.assert_same_results(root / "results/whole", results)


def delete(image: Path, _: Path) -> None:
    image.unlink()


def replace_by_another_size(image: Path, _: Path) -> None:
    from PIL import Image

    Image.open(image).resize((96, 64)).save(image)


@pytest.mark.parametrize("harm", [delete, replace_by_another_size])
def test_image_harmed_during_the_run(
    root: Path, work: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path, Path], None]
) -> None:
    """(Cut off: tests/malformed.)"""
    image = sorted((work / "data/demo/images/train").iterdir())[0]
    whole = image.read_bytes()
    original = Loop.on_train_batch_end

    def harm_after_two(self: Loop, *arguments: Any) -> None:
        original(self, *arguments)
        if self.state.step == 2:
            harm(image, work)

    monkeypatch.setattr(Loop, "on_train_batch_end", harm_after_two)
    with pytest.raises(UserError, match=image.name):
        toy.run(work, EVERY_STEP)
    monkeypatch.setattr(Loop, "on_train_batch_end", original)
    image.write_bytes(whole)
    results = toy.run(work, EVERY_STEP)
    assert starts(results)[-1] >= 2
    toy.assert_same_results(root / "results/whole", results)


def replace_after(step: int, path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """When that step was made."""
    original = Loop.on_train_batch_end

    def replace(self: Loop, *arguments: Any) -> None:
        original(self, *arguments)
        if self.state.step == step:
            path.write_bytes(content)

    monkeypatch.setattr(Loop, "on_train_batch_end", replace)


@pytest.mark.parametrize(("split", "step"), [("train", 3), ("val", 3), ("val", 7), ("train", 7)])
def test_annotations_replaced_during_a_training(
    root: Path, work: Path, monkeypatch: pytest.MonkeyPatch, split: str, step: int
) -> None:
    """Between two epochs, or before the end: it stops at the next epoch, whether or not somebody puts them back afterwards."""
    path = work / f"data/demo/panoptic_{split}.json"
    former = path.read_bytes()
    value = json.loads(former)
    for annotation in value["annotations"]:
        for segment in annotation["segments_info"]:
            segment["category_id"] = (
                segment["category_id"] % 4 + 1 if segment["category_id"] < 5 else segment["category_id"]
            )
    with monkeypatch.context() as patch:
        replace_after(step, path, json.dumps(value).encode(), patch)
        with pytest.raises(UserError, match=rf"panoptic_{split}\.json: changed during this run"):
            toy.run(work, EVERY_STEP)
    assert not (work / "results").exists()
    with pytest.raises(UserError, match=rf"panoptic_{split}\.json: differs from what demo wrote"):
        toy.run(work, EVERY_STEP)
    path.write_bytes(former)
    results = toy.run(work, EVERY_STEP)
    assert starts(results)[-1] >= 3
    toy.assert_same_results(root / "results/whole", results)


@pytest.mark.parametrize("changes", [{}, {"dataset.train.num_workers": 1}])
def test_an_image_replaced_by_one_of_the_same_size_during_a_training(
    root: Path, work: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    from PIL import Image

    image = sorted((work / "data/demo/images/train").iterdir())[0]
    former = image.read_bytes()
    other = work / "other.png"
    Image.open(image).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(other)
    with monkeypatch.context() as patch:
        replace_after(4, image, other.read_bytes(), patch)
        with pytest.raises(
            UserError, match=rf"{image.name} \(train split of .*\): the image or its masks changed during this run"
        ):
            toy.run(work, EVERY_STEP | {"train.num_epochs": 6} | changes)
    image.write_bytes(former)
    results = toy.run(work, EVERY_STEP | {"train.num_epochs": 6} | changes)
    toy.assert_same_results(toy.run(work, {"train.num_epochs": 6}, "again"), results)
