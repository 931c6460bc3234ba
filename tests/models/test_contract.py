"""What every model promises (``models/base.py``), for every family and decoder, every kind of backbone and every mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import onnxruntime
import pytest
import torch

from tessera.deploy.export import to_onnx
from tessera.models import build_model, task_input, tasks
from tessera.models.base import Model, Network
from tessera.spec.compose import load_grid
from tessera.spec.networks import DecodeHeadSpec, Mode, ModelSpec
from tessera.spec.schema import SPECS, ExportSpec
from tessera.structures import Batch, Target
from tests.models import tiny, tiny_deformable_detr, tiny_encoder_decoder, tiny_oneformer

ROOT = Path(__file__).parents[2]
SIZE = (64, 96)
VALID = (60, 90)
"""Of the second image; the rest is padding."""

DECODERS = get_args(DecodeHeadSpec.model_fields["type"].annotation)
FAMILIES: dict[str, Callable[..., ModelSpec]] = {
    "mask2former": tiny.spec,
    "oneformer": tiny_oneformer.spec,
    "deformable_detr": tiny_deformable_detr.spec,
    **{decoder: partial(tiny_encoder_decoder.spec, decoder=decoder) for decoder in DECODERS},
}
BACKBONES = ("swin_tiny", "efficientvit_b0", "resnet18", "gc_vit_xxtiny")
PAIRS = [(family, backbone) for family in FAMILIES for backbone in BACKBONES]
EXPORTED = [
    (family, backbone)
    for family, backbone in PAIRS
    if backbone == "resnet18" or family in SPECS or family == "deeplabv3plus"
]
CHECKPOINTED = [(family, backbone) for family, backbone in PAIRS if family in (*SPECS, "deeplabv3plus", "upernet")]


def modes(family: str) -> tuple[Mode, ...]:
    return FAMILIES[family]().modes


def build(
    family: str, backbone: str, mode: Mode | None = None, dropout: float = 0.0, checkpoint: bool = False
) -> Model:
    torch.manual_seed(0)
    mode = mode or modes(family)[0]
    spec = FAMILIES[family](backbone, mode, dropout=dropout)
    return build_model(spec, tiny.catalog(mode), activation_checkpoint=checkpoint)


def target(count: int, size: tuple[int, int]) -> Target:
    """Objects with masks, boxes inside ``size`` and a class for most pixels of (64, 96)."""
    corner = torch.rand(count, 2) * torch.tensor([size[1] / 2, size[0] / 2])
    boxes = torch.cat([corner, corner + 4 + torch.rand(count, 2) * 20], dim=1)
    return replace(tiny_encoder_decoder.target(count, SIZE), boxes=boxes, labels=torch.randint(3, (count,)), size=size)


def make_batch(model: Model, spec: ModelSpec, counts: tuple[int, int] = (3, 2)) -> Batch:
    images = torch.rand(2, 3, *SIZE)
    padding = torch.zeros(2, *SIZE, dtype=torch.bool)
    padding[1, VALID[0] :] = True
    padding[1, :, VALID[1] :] = True
    metas = [tiny.meta((48, 72), SIZE), tiny.meta((48, 100), VALID)]
    task = tasks(spec)[0]
    targets = [target(counts[0], VALID), target(counts[1], VALID)]
    return Batch(images, padding, metas, targets, truths=None, tasks=None if task is None else [task] * 2)


def network_inputs(network: Network, batch: Batch) -> dict[str, torch.Tensor]:
    """What a runtime gives the network."""
    found = network.inputs(batch)
    return {name: found[name] for name in network.input_names}


def gradients(
    family: str, backbone: str, mode: Mode | None = None, dropout: float = 0.0, checkpoint: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Model]:
    """Of one step with fixed images, targets and random numbers; and the buffers after it."""
    model = build(family, backbone, mode, dropout, checkpoint)
    spec = FAMILIES[family](backbone, mode or modes(family)[0], dropout=dropout)
    torch.manual_seed(1)
    batch = make_batch(model, spec)
    network = model.network.train()
    with torch.no_grad():  # published initialisation has zeros that block gradients at the first step
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    assert batch.targets is not None
    losses = model.criterion(network(**network.inputs(batch)), batch.targets)
    torch.stack(list(losses.values())).sum().backward()
    found = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    return found, dict(network.named_buffers()), model


TRAINED = [(family, backbone, mode) for family, backbone in PAIRS for mode in modes(family)]


@pytest.mark.parametrize(("family", "backbone", "mode"), TRAINED)
def test_trains_and_predicts(family: str, backbone: str, mode: Mode):
    found, _, model = gradients(family, backbone, mode)
    network = model.network
    assert found.keys() == {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    silent = [name for name, gradient in found.items() if not gradient.any()]
    assert not silent, "no gradient"

    network.eval()
    spec = FAMILIES[family](backbone, mode)
    batch = make_batch(model, spec)
    assert set(network_inputs(network, batch)) == set(network.input_names)
    with torch.no_grad():
        outputs = network(**network_inputs(network, batch))
        again = network(**network.inputs(batch))
    assert tuple(outputs) == network.output_names
    assert all(torch.equal(outputs[name], again[name]) for name in outputs), "evaluation is not repeatable"
    if "pred_logits" in outputs:
        no_object = 0 if mode == "detection" else 1
        assert outputs["pred_logits"].shape == (2, 7, len(tiny.catalog(mode)) + no_object)
    else:
        assert outputs["logits"].shape[:2] == (2, len(tiny.catalog(mode)))

    for task in tasks(spec):
        predictions = model.postprocess(outputs, batch.metas, SIZE, task)
        parts = {"panoptic": ("semantic", "instance", "panoptic")}.get(mode, (mode,)) if task is None else (task,)
        for one, described in zip(predictions, batch.metas, strict=True):
            assert one.meta == described
            assert (one.semantic is not None) == ("semantic" in parts)
            assert (one.instances is not None) == bool({"instance", "detection"} & set(parts))
            assert (one.panoptic is not None) == ("panoptic" in parts)
            if one.semantic is not None:
                assert one.semantic.shape == described.original_size and one.semantic.dtype == torch.int64
            if one.instances is not None:
                assert (one.instances.masks is None) == (mode == "detection")
                assert one.instances.labels.numel() == 0 or int(one.instances.labels.max()) < (
                    5 if mode == "detection" else 3
                )
                assert bool((one.instances.scores.diff() <= 0).all()), "sorted by score"
            if one.instances is not None and one.instances.masks is not None:
                assert one.instances.masks.shape[1:] == described.original_size
            if one.panoptic is not None:
                assert one.panoptic.ids.shape == described.original_size and one.panoptic.ids.dtype == torch.int32


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_with_nothing_to_find_has_finite_losses(family: str):
    model = build(family, "resnet18")
    batch = make_batch(model, FAMILIES[family]("resnet18"), counts=(0, 0))
    network = model.network.train()
    assert batch.targets is not None
    losses = model.criterion(network(**network.inputs(batch)), batch.targets)
    assert all(bool(value.isfinite()) for value in losses.values())
    torch.stack(list(losses.values())).sum().backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_weights_bring_back_the_outputs(family: str, tmp_path: Path):
    model = build(family, "resnet18")
    torch.save(model.network.state_dict(), tmp_path / "weights.pth")
    torch.manual_seed(5)
    spec = FAMILIES[family]("resnet18")
    other = build_model(spec, tiny.catalog(spec.mode), load_pretrained=False).network
    other.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    network = model.network.eval()
    inputs = network_inputs(network, make_batch(model, spec))
    with torch.no_grad():
        expected, found = network(**inputs), other.eval()(**inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("family", "backbone"), CHECKPOINTED)
def test_activation_checkpoint_changes_no_number(family: str, backbone: str):
    """Dropout and stochastic depth included; running means count a batch once."""
    plain, plain_buffers, _ = gradients(family, backbone, dropout=0.2)
    recomputed, buffers, _ = gradients(family, backbone, dropout=0.2, checkpoint=True)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name
    for name, value in plain_buffers.items():
        assert torch.equal(value, buffers[name]), name


@pytest.mark.parametrize(("family", "backbone"), CHECKPOINTED)
def test_activation_checkpoint_keeps_fewer_activations(family: str, backbone: str):
    kept = []
    for checkpoint in (False, True):
        model = build(family, backbone, checkpoint=checkpoint)
        batch = make_batch(model, FAMILIES[family](backbone))
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        network = model.network.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(**network.inputs(batch))
        kept.append(sum(sizes))
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.parametrize(("family", "backbone"), EXPORTED)
def test_the_exported_graph_agrees_for_any_batch(family: str, backbone: str):
    model = build(family, backbone)
    network = model.network.eval()
    spec = FAMILIES[family](backbone)
    batch = make_batch(model, spec)
    task = tasks(spec)[0]
    settings = ExportSpec(input_height=SIZE[0], input_width=SIZE[1])
    graph = to_onnx(network, settings, None if task is None else task_input(spec, task))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    assert tuple(entry.name for entry in session.get_inputs()) == network.input_names
    inputs = network_inputs(network, batch)
    for count in (1, 2, 3):
        some = {name: torch.cat([value, value])[:count] for name, value in inputs.items()}
        with torch.no_grad():
            expected = network(**some)
        found = session.run(list(network.output_names), {name: value.numpy() for name, value in some.items()})
        for name, value in zip(network.output_names, found, strict=True):
            wanted = expected[name].numpy()
            assert np.abs(value - wanted).max() < 1e-4 * max(1.0, np.abs(wanted).max()), (name, count)


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_precision_trains(family: str):
    model = build(family, "resnet18")
    batch = make_batch(model, FAMILIES[family]("resnet18"))
    network = model.network.train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network(**network.inputs(batch))
    assert batch.targets is not None
    losses = model.criterion(outputs, batch.targets)
    assert all(value.dtype == torch.float32 and bool(value.isfinite()) for value in losses.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_parameters_are_those_of_the_backbone(family: str):
    network = build(family, "swin_tiny").network
    assert network.backbone_parameters() == {
        f"backbone.{name}" for name, _ in network.get_submodule("backbone").named_parameters()
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_images_of_any_size(family: str, backbone: str):
    """Multiples of the network's divisor, which is what batches are padded to; transformers take any."""
    model = build(family, backbone)
    network = model.network.eval()
    height, width = 3 * network.size_divisor, network.size_divisor
    task = tasks(FAMILIES[family](backbone))[0]
    batch = Batch(
        torch.rand(1, 3, height, width),
        torch.zeros(1, height, width, dtype=torch.bool),
        [tiny.meta((50, 20), (height, width))],
        None,
        None,
        None if task is None else [task],
    )
    with torch.no_grad():
        outputs = network(**network_inputs(network, batch))
    assert all(bool(value.isfinite().all()) for value in outputs.values())


def pairs_of_the_grid() -> list[str]:
    grid = load_grid(ROOT)
    return [f"{model}_{backbone}" for model in grid.file.models for backbone in grid.file.backbones]


@pytest.mark.parametrize("name", pairs_of_the_grid())
def test_every_pair_of_the_grid_builds_at_its_published_size(name: str, monkeypatch: pytest.MonkeyPatch):
    """On tensors without content: shapes and channels must fit, whatever the size."""
    spec = load_grid(ROOT).resolve(name).spec.model
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it does not know the device
    with torch.device("meta"):
        model = build_model(spec, tiny.CATALOG, load_pretrained=False)
        inputs = {"images": torch.zeros(2, 3, *SIZE)}
        if "padding" in model.network.input_names:
            inputs["padding"] = torch.zeros(2, *SIZE, dtype=torch.bool)
        if "task" in model.network.input_names:
            inputs["task"] = torch.zeros(2, spec.task_length)  # type: ignore[attr-defined]  # only OneFormer's has one
        with torch.no_grad():
            outputs = model.network.eval()(**inputs)
    assert tuple(outputs) == model.network.output_names
    assert all(value.shape[0] == 2 for value in outputs.values())
