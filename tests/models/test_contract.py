"""What every model promises (``models/base.py``), for every family, kind of backbone and mode."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from tessera.models import build_model
from tessera.models.base import Model
from tessera.spec.networks import Mode
from tests.models import tiny

MODES = get_args(Mode)
SIZE = (64, 96)


def build(backbone: str, mode: Mode = "panoptic", dropout: float = 0.0, checkpoint: bool = False) -> Model:
    torch.manual_seed(0)
    return build_model(tiny.spec(backbone, mode, dropout=dropout), tiny.catalog(mode), activation_checkpoint=checkpoint)


def gradients(model: Model) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Of one step with fixed images, targets and random numbers; and the buffers after it."""
    torch.manual_seed(1)
    images = torch.rand(2, 3, *SIZE)
    targets = [tiny.target(3, SIZE), tiny.target(0, SIZE)]
    network = model.network.train()
    with torch.no_grad():  # published initialisation has zeros that block gradients at the first step
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    losses = model.criterion(network(images), targets)
    torch.stack(list(losses.values())).sum().backward()
    found = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    return found, dict(network.named_buffers())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_trains_and_predicts(backbone: str, mode: Mode):
    model = build(backbone, mode)
    found, _ = gradients(model)
    assert found.keys() == {name for name, _ in model.network.named_parameters()}
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    silent = [name for name, gradient in found.items() if not gradient.any()]
    assert not silent, "no gradient"

    network = model.network.eval()
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        outputs = network(images, torch.zeros(2, *SIZE, dtype=torch.bool))
        again = network(images)
    assert tuple(outputs) == network.output_names
    assert outputs["pred_logits"].shape == (2, 7, len(tiny.catalog(mode)) + 1)
    assert outputs["pred_masks"].shape == (2, 7, SIZE[0] // 4, SIZE[1] // 4)
    assert all(torch.equal(outputs[name], again[name]) for name in outputs), "evaluation is not repeatable"

    metas = [tiny.meta((48, 100), (46, 96)), tiny.meta(SIZE, SIZE)]
    predictions = model.postprocess(outputs, metas, SIZE)
    for one, described in zip(predictions, metas, strict=True):
        assert one.meta == described
        assert (one.semantic is not None) == (mode != "instance")
        assert (one.instances is not None) == (mode != "semantic")
        assert (one.panoptic is not None) == (mode == "panoptic")
        if one.semantic is not None:
            assert one.semantic.shape == described.original_size and one.semantic.dtype == torch.int64
        if one.instances is not None:
            assert one.instances.masks is not None and one.instances.masks.shape[1:] == described.original_size
            assert one.instances.labels.numel() == 0 or int(one.instances.labels.max()) < 3
        if one.panoptic is not None:
            assert one.panoptic.ids.shape == described.original_size and one.panoptic.ids.dtype == torch.int32


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_saved_weights_bring_back_the_outputs(backbone: str, tmp_path: Path):
    network = build(backbone).network
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    torch.manual_seed(5)
    other = build_model(tiny.spec(backbone), tiny.CATALOG, load_pretrained=False).network
    other.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    images = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        expected, found = network.eval()(images), other.eval()(images)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_activation_checkpoint_changes_no_number(backbone: str):
    """Dropout and stochastic depth included; running means count a batch once."""
    plain, plain_buffers = gradients(build(backbone, dropout=0.2))
    recomputed, buffers = gradients(build(backbone, dropout=0.2, checkpoint=True))
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name
    for name, value in plain_buffers.items():
        assert torch.equal(value, buffers[name]), name


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_activation_checkpoint_keeps_fewer_activations(backbone: str):
    kept = []
    for checkpoint in (False, True):
        model = build(backbone, checkpoint=checkpoint)
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.network.train()(torch.rand(2, 3, *SIZE))
        kept.append(sum(sizes))
    assert kept[1] < 0.6 * kept[0]


def test_mixed_precision_trains():
    model = build("swin_tiny")
    images = torch.rand(2, 3, *SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model.network.train()(images)
    losses = model.criterion(outputs, [tiny.target(2, SIZE), tiny.target(4, SIZE)])
    assert all(value.dtype == torch.float32 and bool(value.isfinite()) for value in losses.values())


def test_backbone_parameters_are_those_of_the_backbone():
    network = build("swin_tiny").network
    assert network.backbone_parameters() == {
        f"backbone.{name}" for name, _ in network.get_submodule("backbone").named_parameters()
    }


def test_images_of_any_size():
    network = build("swin_tiny").network.eval()
    with torch.no_grad():
        outputs = network(torch.rand(1, 3, 37, 75))
    assert outputs["pred_masks"].shape[2:] == (10, 19)
