"""What goes and what stays when checkpoints are pruned, by folders as a training leaves them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tessera import cli
from tessera.files import UserError, write_json
from tessera.provenance import sealed
from tessera.spec.compose import load_grid
from tessera.spec.lineage import Lineages, lineage, resume_digest
from tessera.training.prune import prune

NAME = "mask2former_swin"
OLD = "0123456789ab"
CONFIG = {"models": ["mask2former"], "backbones": ["swin"], "datasets": ["demo"], "experiments": [NAME]}
PARTS = {
    "models/mask2former": {"model": {"name": "mask2former"}},
    "backbones/swin": {"model": {"backbone": {"name": "swin_tiny"}}},
    "datasets/demo": {"dataset": {"generator": {}}},
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    for part, content in {"config": CONFIG, **PARTS}.items():
        path = tmp_path / "config" / f"{part}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def digest():
    return resume_digest(Lineages(load_grid().resolve(NAME).spec))


def leave(root, name, digest):
    """Of three epochs, the second the best; a million bytes each."""
    folder = root / "checkpoints" / name / digest
    (folder / "tensorboard").mkdir(parents=True)
    (folder / "lock").touch()
    (folder / "tensorboard/events").write_bytes(bytes(1000))
    for epoch in (1, 2, 3):
        (folder / f"model_epoch_{epoch:03d}.pth").write_bytes(bytes(1_000_000))
    os.link(folder / "model_epoch_002.pth", folder / "mask2former_best.pth")
    os.link(folder / "model_epoch_003.pth", folder / "mask2former_latest.pth")
    return folder


def finish(root):
    spec = load_grid().resolve(NAME).spec
    write_json(root / "results" / NAME / "train.json", sealed({"lineage": lineage(spec, "train")}))


def run(dry_run=False):
    return list(prune(load_grid(), Path("checkpoints"), Path("results"), dry_run))


def files(root):
    return sorted(path.relative_to(root).as_posix() for path in (root / "checkpoints").rglob("*") if not path.is_dir())


def test_what_no_experiment_continues_from_goes(root):
    live = leave(root, NAME, digest())
    other, unknown = leave(root, NAME, OLD), leave(root, "deformable_detr_swin", OLD)
    before = files(root)

    def said(dry_run):
        """Sizes in thousands: a lock holds a few bytes while it is looked at."""
        return [(item.verdict, root / item.path, item.size // 1000) for item in run(dry_run)]

    planned = said(True)
    assert files(root) == before, "a dry run removes nothing"
    assert planned == said(False)
    assert sorted(planned) == sorted([("remove", unknown, 3_001), ("remove", other, 3_001), ("keep", live, 3_001)]), (
        "a file of two names counts once"
    )
    assert live.is_dir() and not other.exists() and not unknown.parent.exists()
    assert len(files(root)) == 7


def test_of_a_finished_training_the_last_and_the_best_stay(root):
    folder = leave(root, NAME, digest())
    finish(root)
    said = {item.path.name: (item.verdict, item.size) for item in run()}
    assert said == {
        "mask2former_best.pth": ("keep", 1_000_000),
        "mask2former_latest.pth": ("keep", 1_000_000),
        "model_epoch_001.pth": ("remove", 1_000_000),
        "model_epoch_002.pth": ("keep", 1_000_000),
        "model_epoch_003.pth": ("keep", 1_000_000),
    }
    assert not (folder / "model_epoch_001.pth").exists() and len(list(folder.glob("*.pth"))) == 4


def test_a_record_of_other_settings_finishes_nothing(root):
    leave(root, NAME, digest())
    write_json(root / "results" / NAME / "train.json", sealed({"lineage": {}}))
    assert [(item.verdict, item.reason) for item in run()] == [("keep", "the experiment continues from it")]


def test_a_folder_in_use_stays(root):
    folder = leave(root, NAME, OLD)
    program = "import fcntl, sys; s = open(sys.argv[1], 'r+'); fcntl.lockf(s, fcntl.LOCK_EX); print(1, flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    before = files(root)
    (item,) = run()
    assert item.verdict == "keep" and item.reason.startswith("is in use (") and files(root) == before
    process.communicate()
    assert [item.verdict for item in run()] == ["remove"]


def test_what_the_configuration_names_and_what_is_not_ours_stays(root):
    folder = leave(root, NAME, OLD)
    (root / "config/experiments").mkdir()
    named = f"checkpoints/{NAME}/{OLD}/model_epoch_001.pth"
    part = {"train": {"pretrained_model_path": named}}
    (root / f"config/experiments/{NAME}-demo.yaml").write_text(yaml.safe_dump(part))
    run()
    assert [path.name for path in folder.glob("*.pth")] == ["model_epoch_001.pth"]
    (root / f"config/experiments/{NAME}-demo.yaml").unlink()
    (folder / "notes.txt").write_text("mine")
    run()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_nothing_outside_of_the_root_goes(root):
    elsewhere = root / "elsewhere"
    leave(elsewhere, NAME, OLD)
    (root / "checkpoints").mkdir()
    (root / "checkpoints/link").symlink_to(elsewhere / "checkpoints" / NAME)
    (root / "checkpoints" / NAME).mkdir()
    (root / "checkpoints" / NAME / OLD).symlink_to(elsewhere / "checkpoints" / NAME / OLD)
    (root / "checkpoints" / NAME / "mine").mkdir()
    assert {item.verdict for item in run()} == {"keep"}
    assert len(files(elsewhere)) == 7
    state = root / "checkpoints" / NAME / ("a" * 12)
    state.mkdir()
    (state / "model_epoch_001.pth").symlink_to(elsewhere / "checkpoints" / NAME / OLD / "model_epoch_001.pth")
    (state / "tensorboard").symlink_to(elsewhere / "checkpoints" / NAME / OLD / "tensorboard")
    run()
    assert len(files(elsewhere)) == 7


CONVERT = {
    "type": "coco",
    "label_map": "given.json",
    "convert": {"input_source": ["here"], "mapping_path": "map.json"},
    "train": {"images": ".", "annotations": "demo/converted/shards/train-*.json", "names": "names.txt"},
}
ARCHIVE = {"address": "x.tar", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("dataset", "here", "absent"),
    [
        ({"train": {"images": "i", "annotations": "a.json", "panoptic": "p"}}, [], "a.json"),
        (CONVERT, ["map.json", "names.txt"], "given.json"),
        (CONVERT, ["given.json", "names.txt"], "map.json"),
        (CONVERT, ["given.json", "map.json"], "names.txt"),
        (
            {
                "fetch": {"images": ARCHIVE},
                "train": {"images": "demo/images", "annotations": "demo/mine.json", "panoptic": "demo/images"},
            },
            [],
            "demo/mine.json",
        ),
        (
            {
                **CONVERT,
                "fetch": {"images": ARCHIVE},
                "convert": {"input_source": ["demo/images"], "mapping_path": "map.json"},
            },
            ["given.json", "names.txt"],
            "map.json",
        ),
    ],
)
def test_where_data_are_not_here_nothing_is_abandoned(root, dataset, here, absent):
    """Their digest would be another one."""
    for folder in ("images", "labels"):
        (root / "data/here" / folder).mkdir(parents=True)
    for name in here:
        (root / "data" / name).touch()
    (root / "config/datasets/demo.yaml").write_text(yaml.safe_dump({"dataset": dataset}))
    leave(root, NAME, OLD)
    before = files(root)
    (item,) = run()
    assert (
        item.verdict == "keep"
        and f"cannot be told: data/{absent}: no such file" in item.reason
        and files(root) == before
    )


def test_the_command_says_the_total(root, capsys):
    leave(root, NAME, OLD)
    cli.prune(dry_run=True)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"remove     3.0 MB  checkpoints/{NAME}/{OLD}: made from other settings than the experiment's"
    assert said[1] == "checkpoints: 3.0 MB would be removed (--dry-run), 0.0 MB kept"
    cli.prune()
    assert capsys.readouterr().out.splitlines()[1] == "checkpoints: 3.0 MB removed, 0.0 MB kept"
    with pytest.raises(UserError, match="nowhere: no such folder; expected the root of the checkpoints"):
        cli.prune(checkpoints=root / "nowhere")
