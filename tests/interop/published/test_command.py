"""From a published file to numbers without training: `tessera import`, zero epochs, and an evaluation, all by the command line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from tessera.data.catalog import load_catalog
from tessera.data.demo import write_demo
from tessera.models import build_model
from tessera.models.artifact import load_model
from tessera.spec.compose import load_grid
from tests.interop.published.test_oneformer import original_names
from tests.malformed.conftest import Answer, call
from tests.malformed.project import EXPERIMENT, FOLDER, RECIPE, content, write_config

FILE = "downloads/model_final.pkl"
IMPORTED = f"pretrained/{EXPERIMENT}.pth"

Run = Callable[..., Answer]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_config(tmp_path)
    generator = load_grid(tmp_path).dataset("demo").generator
    assert generator is not None
    write_demo(tmp_path / "data/demo", generator, progress=False)
    return tmp_path


@pytest.fixture
def weights(folder: Path) -> dict[str, Tensor]:
    """Of a network of the experiment's sizes; ``FILE`` holds them under the original code's names."""
    spec = load_grid(folder).resolve(EXPERIMENT).spec
    torch.manual_seed(0)
    network = build_model(spec.model, load_catalog(spec.dataset, str(folder / "data"), spec.model.mode)).network
    write(folder / FILE, original(network))
    return network.state_dict()


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *words: call(list(words), folder, capsys)


def take_over(folder: Path, weights: str = IMPORTED) -> None:
    """Makes the experiment one of zero epochs."""
    recipe = yaml.safe_load((folder / RECIPE).read_text())
    recipe["train"] |= {"num_epochs": 0, "pretrained_model_path": weights}
    (folder / RECIPE).write_text(yaml.safe_dump(recipe))


def original(network: Any) -> dict[str, Tensor]:
    state = original_names(network)
    state["sem_seg_head.predictor.query_feat.weight"] = state.pop("query_feat.weight")
    return state


def write(path: Path, state: dict[str, Tensor]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps({"model": {name: value.numpy() for name, value in state.items()}}, protocol=2))


def test_published_weights_are_evaluated_without_training(folder: Path, weights: dict[str, Tensor], run: Run) -> None:
    answer = run("import", EXPERIMENT, FILE, "--verbose")
    assert answer.code == 0, answer.err
    assert "Mask2Former, original code" in answer.out and f"wrote {IMPORTED}" in answer.out
    assert "sem_seg_head.predictor.decoder_norm.weight" in answer.out and "decoder.heads.norm.weight" in answer.out
    assert "1 dropped: a constant of the loss (model.loss.no_object_weight): criterion.empty_weight" in answer.out

    take_over(folder)
    answer = run("train", EXPERIMENT)
    assert answer.code == 0, answer.err
    model, header = load_model(folder / FOLDER / "model.pth")
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert sorted(path.name for path in (folder / FOLDER).iterdir()) == ["metrics.csv", "model.pth", "train.json"]
    assert (folder / FOLDER / "metrics.csv").read_text() == "epoch,step\n"
    report = json.loads((folder / FOLDER / "train.json").read_text())
    assert report["steps"] == 0 and report["last"] == {} and report["best"] is None
    assert report["initial_weights"]["network"]["loaded"] == len(weights) and report["lineage"] == header.lineage
    assert not (folder / "checkpoints").exists()

    answer = run("evaluate", EXPERIMENT)
    assert answer.code == 0, answer.err
    assert json.loads((folder / FOLDER / "eval.json").read_text())["metrics"]

    # Other weights under the same name: what was made from the first ones is refused until it is made again.
    path = folder / IMPORTED
    content_of = torch.load(path, weights_only=True)
    content_of["state"]["query_feat.weight"] += 1
    torch.save(content_of, path)
    answer = run("evaluate", EXPERIMENT)
    assert answer.code == 1 and "weights.train.pretrained_model_path: " in answer.err


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda state: state.pop("sem_seg_head.predictor.decoder_norm.bias"), [], "1 missing: decoder.heads.norm.bias"),
        (lambda state: state.update({"extra.weight": torch.ones(2)}), [], "1 that the network does not have: extra.weight"),
        (lambda state: None, ["model.decoder.layers=2"], "26 missing: "),
        (lambda state: None, ["--reset-heads", "--classes-by-id"], "choose one of them"),
        (lambda state: None, ["--classes-by-id"], "only published Deformable DETR"),
    ],
    ids=["missing", "left over", "another depth", "both", "by id"],
)  # fmt: skip
def test_nothing_is_written_on_an_error(
    folder: Path,
    weights: dict[str, Tensor],
    run: Run,
    change: Callable[[dict[str, Tensor]], object],
    options: list[str],
    message: str,
) -> None:
    with (folder / FILE).open("rb") as stream:
        state = {name: torch.from_numpy(value) for name, value in pickle.load(stream)["model"].items()}
    change(state)
    write(folder / FILE, state)
    before = content(folder)
    answer = run("import", EXPERIMENT, FILE, *options)
    assert answer.code == 1 and answer.err.startswith("error: ") and message in answer.err
    assert content(folder) == before


def test_heads_of_other_classes(folder: Path, weights: dict[str, Tensor], run: Run) -> None:
    """They start afresh on request; zero epochs then refuse the file, because nobody would train them."""
    with (folder / FILE).open("rb") as stream:
        state = {name: torch.from_numpy(value) for name, value in pickle.load(stream)["model"].items()}
    for kind in ("weight", "bias"):
        name = f"sem_seg_head.predictor.class_embed.{kind}"
        state[name] = state[name].repeat_interleave(2, dim=0)
    write(folder / FILE, state)
    answer = run("import", EXPERIMENT, FILE)
    assert answer.code == 1 and "have 15 classes, the experiment's dataset has 7" in answer.err
    answer = run("import", EXPERIMENT, FILE, "--reset-heads", "--out", "elsewhere/weights.pth")
    assert answer.code == 0 and "2 not taken from the file: class heads start afresh" in answer.out
    assert not (folder / "pretrained").exists()
    take_over(folder, "elsewhere/weights.pth")
    answer = run("train", EXPERIMENT)
    assert answer.code == 1 and "does not hold all weights of mask2former" in answer.err
    assert "2 not in the file, start afresh: decoder.heads.class_embed.weight" in answer.err
    assert not (folder / FOLDER).exists()


def test_zero_epochs_need_weights(folder: Path, run: Run) -> None:
    answer = run("train", EXPERIMENT, "train.num_epochs=0")
    assert answer.code == 1 and "train.num_epochs" in answer.err and "train.pretrained_model_path" in answer.err
    take_over(folder)
    answer = run("train", EXPERIMENT)
    assert answer.code == 1 and f"{IMPORTED}: no such file" in answer.err
