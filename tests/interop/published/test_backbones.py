"""Pretrained backbones of other libraries: same feature maps from the files that those write."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

from tessera.files import UserError
from tessera.models.backbone import build_backbone
from tessera.spec.networks import BackboneSpec, SwinSpec
from tests.models.noise import noisy

IMAGES = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def build(name: str, path: Path, **options: Any) -> nn.Module:
    return build_backbone(BackboneSpec(name=name, pretrained=str(path), drop_path_rate=0, **options)).eval()


def torchvision_maps(model: torchvision.models.ResNet) -> list[Tensor]:
    x = model.maxpool(model.relu(model.bn1(model.conv1(IMAGES))))
    maps = []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = layer(x)
        maps.append(x)
    return maps


def detectron2_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As detectron2's own script names torchvision's tensors; it leaves the counters of batches out."""
    named = {}
    for name, value in state.items():
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        for number in "123":
            name = name.replace(f"bn{number}", f"conv{number}.norm")
        for number in "1234":
            name = name.replace(f"layer{number}", f"res{int(number) + 1}")
        if not name.endswith("num_batches_tracked"):
            named[name if name.startswith("res") else f"stem.{name}"] = value
    return named


def save(state: dict[str, Tensor], naming: str, folder: Path) -> Path:
    if naming == "torchvision":
        torch.save(state, folder / "weights.pth")
        return folder / "weights.pth"
    arrays = {name: value.numpy() for name, value in detectron2_names(state).items()}
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    (folder / "weights.pkl").write_bytes(pickle.dumps(content))
    return folder / "weights.pkl"


@pytest.mark.parametrize("naming", ["torchvision", "detectron2"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@torch.no_grad()
def test_resnet_of_torchvision_and_detectron2(name: str, naming: str, tmp_path: Path):
    model = noisy(getattr(torchvision.models, name)())
    path = save(model.state_dict(), naming, tmp_path)
    for found, expected in zip(build(name, path)(IMAGES), torchvision_maps(model), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("resnet18", {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}),
        ("resnet50", {"hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3], "layer_type": "bottleneck"}),
    ],
)
@pytest.mark.parametrize("kind", [transformers.ResNetModel, transformers.ResNetForImageClassification])
@torch.no_grad()
def test_resnet_of_transformers(kind: Any, name: str, sizes: dict[str, Any], tmp_path: Path):
    model = noisy(kind(transformers.ResNetConfig(**sizes)))
    model.save_pretrained(tmp_path)
    expected = model(IMAGES, output_hidden_states=True).hidden_states[1:]
    for found, wanted in zip(build(name, tmp_path / "model.safetensors")(IMAGES), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


SWIN = {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "window_size": 4}
SWIN_IMAGES = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
"""No map smaller than two windows: below that, transformers shrinks windows as classifiers do."""


@pytest.mark.parametrize("stored", ["file", "modules"])
@torch.no_grad()
def test_swin_backbone_of_transformers(stored: str, tmp_path: Path):
    config = transformers.SwinConfig(image_size=256, out_features=["stage1", "stage2", "stage3", "stage4"], **SWIN)
    model = noisy(transformers.SwinBackbone(config))
    path = tmp_path / "model.safetensors"
    if stored == "file":
        model.save_pretrained(tmp_path)
    else:
        path = tmp_path / "model.pth"
        torch.save(model.state_dict(), path)
    found = build("swin_tiny", path, swin=SwinSpec(**SWIN))(SWIN_IMAGES)
    for output, expected in zip(found, model(SWIN_IMAGES).feature_maps, strict=True):
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [transformers.SwinModel, transformers.SwinForImageClassification])
@torch.no_grad()
def test_swin_classifier_of_transformers(kind: Any, tmp_path: Path):
    """Its maps are those before our outputs' norms, which start afresh."""
    model = noisy(kind(transformers.SwinConfig(image_size=256, **SWIN)))
    model.save_pretrained(tmp_path)
    found = build("swin_tiny", tmp_path / "model.safetensors", swin=SwinSpec(**SWIN))(SWIN_IMAGES)
    encoder = getattr(model, "swin", model).encoder
    kept: list[Tensor] = []
    for layer in encoder.layers:
        layer.blocks[-1].register_forward_hook(lambda module, inputs, output: kept.append(output))
    model(SWIN_IMAGES)
    for output, before in zip(found, kept, strict=True):
        before = before[0] if isinstance(before, tuple) else before
        side = output.shape[-1]
        expected = nn.functional.layer_norm(before, before.shape[-1:]).transpose(1, 2).unflatten(2, (side, side))
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_gcvit_of_timm_at_its_published_size(tmp_path: Path):
    model = noisy(timm.create_model("gcvit_xxtiny"))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    network = build("gc_vit_xxtiny", tmp_path / "weights.pth")
    images = torch.rand(1, 3, 224, 224)
    *maps, last = model.forward_intermediates(images, intermediates_only=True)
    *found, found_last = network(images)
    assert torch.equal(found_last, last)
    for output, expected in zip(found, maps, strict=True):
        normed = nn.functional.layer_norm(expected.permute(0, 2, 3, 1), expected.shape[1:2]).permute(0, 3, 1, 2)
        assert torch.equal(output, normed)
    shapes = [tuple(output.shape[1:]) for output in network(torch.rand(1, 3, 200, 333))]
    assert shapes == [(64, 50, 84), (128, 25, 42), (256, 13, 21), (512, 7, 11)]


@pytest.mark.parametrize("naming", ["detectron2", "transformers"])
def test_resnet_files_with_a_tensor_too_many_or_too_few_are_refused(naming: str, tmp_path: Path):
    if naming == "detectron2":
        state = detectron2_names(torchvision.models.resnet18().state_dict())
        del state["res3.0.shortcut.norm.weight"]
    else:
        sizes = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
        state = transformers.ResNetModel(transformers.ResNetConfig(**sizes)).state_dict()
        del state["encoder.stages.1.layers.0.shortcut.normalization.weight"]
    torch.save(state | {"surprise": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(
        UserError, match=r"1 missing: layer2\.0\.downsample\.1\.weight\n  1 that the network does not have: surprise"
    ):
        build("resnet18", tmp_path / "weights.pth")
