"""Fine-tuning takes what fits and says what did not; freezing refuses names that are none."""

import pytest
import torch
from torch import nn

from tessera.files import UserError, digest_file
from tessera.training.weights import count_parameters, describe, freeze, load_matching


def make(classes=3):
    return nn.ModuleDict({"backbone": nn.Linear(2, 4), "head": nn.Linear(4, classes)})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"header": {}, "state": state},
        lambda state: {"state": {"step": 3}, "network": state},
        lambda state: {"model": state},
        lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    ],
    ids=["bare", "model.pth", "checkpoint", "model", "data parallel"],
)
def test_report(tmp_path, wrap):
    source, network = make(5), make(3)
    state = {**source.state_dict(), "extra": torch.ones(1)}
    del state["backbone.bias"]
    path = tmp_path / "weights.pth"
    torch.save(wrap(state), path)
    head, bias = network["head"].weight.clone(), network["backbone"].bias.clone()
    report = load_matching(network, path)
    assert report == {
        "file": "weights.pth",
        "sha256": digest_file(path),
        "loaded": 1,
        "other_shape": ["head.weight: (5, 4) in the file, (3, 4) here", "head.bias: (5,) in the file, (3,) here"],
        "missing": ["backbone.bias"],
        "unused": ["extra"],
    }
    assert torch.equal(network["backbone"].weight, source["backbone"].weight)
    assert torch.equal(network["head"].weight, head) and torch.equal(network["backbone"].bias, bias)
    assert "weights.pth: 1 tensors loaded" in describe(report) and "(5, 4) in the file, (3, 4) here" in describe(report)


def test_nothing_fits(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"encoder.weight": torch.ones(2)}, path)
    with pytest.raises(UserError, match=r"none of its 1 tensors.*encoder\.weight.*backbone\.weight"):
        load_matching(make(), path)


def test_freeze():
    network = make()
    assert freeze(network, ["backbone"]) == [network["backbone"]]
    assert count_parameters(network) == {"total": 27, "trained": 15}


@pytest.mark.parametrize(("name", "closest"), [("backbon", "closest: backbone"), ("xyz", "closest: backbone, head")])
def test_freeze_unknown_name(name, closest):
    with pytest.raises(UserError, match=f"no module '{name}'; {closest}"):
        freeze(make(), [name])
