"""DVC around the workflow: real DVC, git and Snakemake in folders of their own. The stages are stubs where the point is bookkeeping."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest

from tests import s3
from tests.workflow import small
from tests.workflow.project import CONFIG, ROOT, Project, make_project

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")

SHORT, STREETS = "mask2former_swin-short", "mask2former_swin-streets"
RATE = "config/experiments/mask2former_swin-demo-short.yaml"

NUMBERS = """
if verb == "metrics":  # A number that changes with what the evaluation was made from.
    import hashlib, json
    found = {path.parent.name: int(hashlib.md5(path.read_bytes()).hexdigest()[:6], 16) for path in Path("results").glob("*/eval.json")}
    outputs[0].write_text(json.dumps(found))
    outputs[1].write_text("label,value\\n" + "".join(f"{name},{value}\\n" for name, value in found.items()))
"""


@dataclass
class Checkout(Project):
    """A checkout with the DVC files of this repository."""

    home: Path = Path()
    """Keeps what DVC and git would otherwise read and write in the user's home."""

    def environment(self, **more: str) -> dict[str, str]:
        return os.environ | {
            "PATH": f"{self.root / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SHELL": "/bin/sh",
            "HOME": str(self.home),
            "DVC_NO_ANALYTICS": "1",
            "DVC_SITE_CACHE_DIR": str(self.home / "site"),
            "SNAKEMAKE_ARGS": "--cores 1",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
            **{f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
            **more,
        }

    def call(self, *command: str, fail: bool = False, **more: str) -> str:
        """What the command says; it fails exactly when it should."""
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self.environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert (done.returncode != 0) == fail, f"{' '.join(command)}\n{done.stdout}"
        return done.stdout

    def commit(self, message: str) -> None:
        self.call("git", "add", "--all")
        self.call("git", "commit", "--quiet", "--message", message)

    def clone(self, name: str) -> Checkout:
        made = Checkout(self.root.parent / name, self.home)
        self.call("git", "clone", "--quiet", ".", str(made.root))
        if (self.root / "bin").exists():
            shutil.copytree(self.root / "bin", made.root / "bin")
        return made

    def new_calls(self) -> list[str]:
        """What the rules called since the last time: `verb subject`."""
        found = [" ".join(line.split()[:2]) for line in self.calls()]
        (self.root / "calls.txt").unlink()
        return found

    def assert_current(self) -> None:
        assert self.plan() == {}
        assert "Data and pipelines are up to date" in self.call("dvc", "status")
        assert self.call("git", "status", "--short") == ""


def add_dvc(root: Path) -> Checkout:
    """Git and the repository's own DVC files around a copy of the workflow."""
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config", ".dvc/.gitignore"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    with (root / ".gitignore").open("a") as stream:
        stream.write("/bin/\n/calls.txt\n/said.txt\n/snakemake.log\n")
    (root / "src").mkdir()
    (root / "src/code.py").touch()
    home = root.parent / "home"
    home.mkdir()
    made = Checkout(root, home)
    made.call("git", "init", "--quiet", "--initial-branch", "main")
    return made


def picture(checkout: Checkout, content: str) -> None:
    path = checkout.root / "data/streets/images/a.png"
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)


def make_checkout(folder: Path) -> Checkout:
    """Stub stages over the generated dataset and over `streets`, raw data that DVC tracks; nothing reproduced yet."""
    folder.mkdir(parents=True)
    made = add_dvc(make_project(folder).root)
    stub = folder / "bin/tessera"
    stub.write_text(stub.read_text() + NUMBERS)
    made.configure("config", {**CONFIG, "experiments": ["mask2former_swin", SHORT, STREETS]})
    made.configure("experiments/mask2former_swin-demo-short", {"train": {"optim": {"lr": 2.0e-4}}})
    for name in ("label_map", "train", "val", "test"):
        path = folder / f"data/streets/{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    picture(made, "as delivered")
    made.call("dvc", "add", "--quiet", "data/streets")
    edit(made, "      - config\n", "      - config\n      - data/streets\n")
    made.commit("start")
    return made


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """Reproduced, committed and pushed to the default remote."""
    made = make_checkout(tmp_path_factory.mktemp("dvc") / "origin")
    made.call("dvc", "repro")
    made.commit("results")
    made.call("dvc", "push")
    return made


def only(experiment: str, *verbs: str) -> list[str]:
    return sorted(f"{verb} {experiment}" for verb in verbs)


RETRAINED = sorted(
    [
        *only(SHORT, "train", "export", "parity", "evaluate", "evaluate", "infer"),
        "compare demo",
        "figures demo",
        "metrics --data-root",
    ]
)


def test_round_trip(origin: Checkout) -> None:
    origin.assert_current()
    clone = origin.clone("clone")
    clone.call("dvc", "pull")
    clone.assert_current()
    assert (clone.root / "data/streets/images/a.png").read_text() == "as delivered"

    # One learning rate trains one experiment; metrics, plots and params tell the two commits apart.
    clone.configure("experiments/mask2former_swin-demo-short", {"train": {"optim": {"lr": 3.0e-4}}})
    clone.call("dvc", "repro")
    assert sorted(clone.new_calls()) == RETRAINED
    clone.commit("a higher rate")
    clone.assert_current()
    changed = json.loads(clone.call("dvc", "metrics", "diff", "HEAD~1", "HEAD", "--json"))
    assert list(changed) == ["results/metrics.json"]
    assert list(changed["results/metrics.json"]) == [SHORT]
    rates = json.loads(clone.call("dvc", "params", "diff", "HEAD~1", "HEAD", "--json"))
    assert rates == {RATE: {"train.optim.lr": {"old": 2.0e-4, "new": 3.0e-4, "diff": pytest.approx(1.0e-4)}}}
    plot = clone.call("dvc", "plots", "diff", "HEAD~1", "HEAD", "--json", "--targets", "results/metrics.csv")
    points = json.loads(plot)["data"]
    assert SHORT in str(points)

    # Another branch and back: nothing to do on either side.
    clone.call("git", "checkout", "--quiet", "-b", "before", "HEAD~1")
    clone.call("dvc", "checkout")
    clone.assert_current()
    clone.call("git", "checkout", "--quiet", "main")
    clone.call("dvc", "checkout")
    clone.assert_current()

    # An experiment of DVC's is as incremental.
    clone.call("dvc", "exp", "run", "--name", "higher", "-S", f"{RATE}:train.optim.lr=0.0005")
    assert sorted(clone.new_calls()) == RETRAINED
    assert "higher" in clone.call("dvc", "exp", "list")
    assert clone.plan() == {}


def test_changed_raw_data_rerun_what_depends_on_them(origin: Checkout) -> None:
    clone = origin.clone("pictures")
    clone.call("dvc", "pull")
    picture(clone, "another picture")
    assert clone.plan() == {}, "images are not digested: DVC has to look"

    # Settings under which old results would pass for new are refused before anything runs.
    clone.call("dvc", "config", "cache.type", "hardlink,copy")
    said = clone.call("dvc", "repro", fail=True)
    assert "cache.type is hardlink,copy" in said
    assert "dvc config cache.type reflink,copy" in said
    assert not (clone.root / "calls.txt").exists()
    clone.call("dvc", "config", "--unset", "cache.type")

    clone.call("dvc", "repro")
    assert sorted(clone.new_calls()) == sorted(
        [
            "check streets",
            *only(STREETS, "train", "export", "parity", "evaluate", "evaluate", "infer"),
            "metrics --data-root",
        ]
    )
    clone.commit("another picture")
    clone.assert_current()
    assert "data/streets.dvc" in clone.call("git", "show", "--stat")


def test_a_remote_that_comes_and_goes(origin: Checkout) -> None:
    s3.require()
    pusher, port = origin.clone("pusher"), s3.free_port()
    address = f"http://127.0.0.1:{port}"
    pusher.call("dvc", "pull")
    pusher.call("dvc", "remote", "add", "--default", "store", "s3://bucket/tessera")
    pusher.call("dvc", "remote", "modify", "store", "endpointurl", address)
    pusher.commit("results in S3")
    said = pusher.call("dvc", "push", fail=True)
    assert "ERROR" in said
    assert address in said
    with s3.serving(port):
        client = boto3.client(
            "s3", endpoint_url=address, aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1"
        )
        client.create_bucket(Bucket="bucket")
        pusher.call("dvc", "push")
        clone = pusher.clone("puller")
        clone.call("dvc", "pull")
        clone.assert_current()


def edit(checkout: Checkout, old: str, new: str) -> None:
    path = checkout.root / "dvc.yaml"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


@pytest.mark.slow
def test_a_killed_repro_continues_its_training(tmp_path: Path) -> None:
    """Real stages: -9 to DVC, Snakemake and the training at once."""
    folder = small.make_project(tmp_path / "checkout")
    checkout = add_dvc(folder)
    edit(checkout, "snakemake all", "snakemake results/mask2former_swin/eval.json")
    checkout.commit("start")
    with (folder / "snakemake.log").open("ab") as log:
        process = subprocess.Popen(
            ["dvc", "repro"], cwd=folder, env=checkout.environment(), stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + 300
    while not list(folder.glob("checkpoints/*/*/*step_00008.pth")):
        assert process.poll() is None, (folder / "snakemake.log").read_text()[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    training = small.trainer(folder)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.kill(training, signal.SIGKILL)
    time.sleep(0.5)
    checkout.call("snakemake", "--unlock")
    checkout.call("dvc", "repro")
    checkout.commit("results")
    assert checkout.plan("results/mask2former_swin/eval.json") == {}
    assert "Data and pipelines are up to date" in checkout.call("dvc", "status")
    report = json.loads((folder / "results/mask2former_swin/train.json").read_text())
    assert [start["step"] >= 8 for start in report["starts"]] == [False, True]
    plots = json.loads(checkout.call("dvc", "plots", "show", "results/mask2former_swin/metrics.csv", "--json"))["data"]
    assert "train_loss" in str(plots)
