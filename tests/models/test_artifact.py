"""model.pth round-trips, and every other file in its place is refused with a clear line."""

import os
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from tessera import models
from tessera.files import UserError
from tessera.models.artifact import load_model, save_model
from tessera.models.base import Model, Network
from tessera.provenance import Header
from tessera.spec.lineage import lineage
from tessera.spec.schema import Mask2FormerExperiment, PostprocessSpec
from tessera.structures import Category, ClassCatalog

CATALOG = ClassCatalog((Category(1, "disc", (255, 0, 0), True), Category(7, "grass", (0, 255, 0), False)))


class TinyNetwork(Network):
    def __init__(self, classes):
        super().__init__((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
        self.head = nn.Conv2d(3, classes, 1)


@pytest.fixture
def built(monkeypatch):
    """The arguments that ``build_model`` was called with; the networks are one layer wide."""
    calls = []

    def build_model(spec, catalog, postprocess, activation_checkpoint=False, load_pretrained=True):
        calls.append((spec, catalog, postprocess, load_pretrained))
        return Model(TinyNetwork(len(catalog)), criterion=None, postprocess=postprocess)

    monkeypatch.setattr(models, "build_model", build_model, raising=False)
    return calls


def make_header(**changes):
    spec = Mask2FormerExperiment(postprocess=PostprocessSpec(overlap_threshold=0.25))
    return replace(Header("train", "tiny", spec, lineage(spec, "train"), CATALOG, facts={"commit": None}), **changes)


def test_round_trip(tmp_path, built):
    path = tmp_path / "results/model.pth"
    state = TinyNetwork(2).state_dict()
    save_model(path, state, make_header())
    model, header = load_model(path)
    assert header == make_header()
    assert all(torch.equal(value, model.network.state_dict()[name]) for name, value in state.items())
    assert not model.network.training
    assert built == [(header.spec.model, CATALOG, header.spec.postprocess, False)]


def test_postprocess_is_replaced(tmp_path, built):
    path = tmp_path / "model.pth"
    save_model(path, TinyNetwork(2).state_dict(), make_header())
    other = PostprocessSpec(overlap_threshold=0.75)
    assert load_model(path, other)[0].postprocess == other


def test_tensors_of_another_network(tmp_path, built):
    path = tmp_path / "model.pth"
    save_model(path, TinyNetwork(3).state_dict(), make_header())
    with pytest.raises(UserError, match=r"model.pth.*not those of the mask2former(.|\n)*head.weight"):
        load_model(path)


def cut_off(path):
    save_model(path, TinyNetwork(2).state_dict(), make_header())
    path.write_bytes(path.read_bytes()[:-500])


def flip_a_bit(path):
    save_model(path, {"weight": torch.zeros(100_000)}, make_header())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n not a model"), "damaged"),
        (cut_off, "damaged"),
        (flip_a_bit, "checksum of"),
        (lambda path: path.write_bytes(pickle.dumps(Hostile())), "nothing in it was executed"),
        (lambda path: torch.save({"state": Hostile()}, path), "nothing in it was executed"),
        (lambda path: torch.save(TinyNetwork(2).state_dict(), path), "holds no `header`"),
        (lambda path: torch.save([1, 2], path), "holds no `header`"),
        (lambda path: torch.save({"header": 3, "state": {}}, path), "no tessera header"),
        (lambda path: torch.save({"header": make_header().to_json() | {"format": 99}, "state": {}}, path), "format 99"),
        (lambda path: torch.save({"header": {"format": 1}, "state": {}}, path), "header is damaged"),
        (lambda path: torch.save({"header": make_header().to_json(), "state": {}}, path), "no named tensors"),
        (lambda path: torch.save({"header": make_header().to_json(), "state": {"head.weight": 1}}, path), "'head.weight' is a int"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, monkeypatch, built, write, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pth"
    write(path)
    with pytest.raises(UserError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(AttributeError):
        save_model(tmp_path / "model.pth", {"weight": 1}, make_header())
    assert list(tmp_path.iterdir()) == []
