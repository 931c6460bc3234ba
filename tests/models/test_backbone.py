from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import yaml
from torch import nn

from tessera.files import UserError
from tessera.models.backbone import build_backbone, can_dilate
from tessera.models.pyramid import TimmBackbone
from tessera.spec.networks import BackboneSpec, SwinSpec
from tests.models import tiny
from tests.models.noise import noisy

CONFIG = Path(__file__).parents[2] / "config" / "backbones"


def build(name: str, pretrained: str | Path | None = None, output_stride: int = 32, **options: Any):
    values = {"drop_path_rate": 0.0, "pretrained": None if pretrained is None else str(pretrained)} | options
    return build_backbone(BackboneSpec(name=name, **values), output_stride=output_stride)


CHANNELS = {
    "swin_tiny": [96, 192, 384, 768],
    "swin_small": [96, 192, 384, 768],
    "swin_base": [128, 256, 512, 1024],
    "swin_large": [192, 384, 768, 1536],
    "swin_huge": [352, 704, 1408, 2816],
    "gc_vit_xxtiny": [64, 128, 256, 512],
    "gc_vit_xtiny": [64, 128, 256, 512],
    "gc_vit_tiny": [64, 128, 256, 512],
    "gc_vit_small": [96, 192, 384, 768],
    "gc_vit_base": [128, 256, 512, 1024],
    "gc_vit_large": [192, 384, 768, 1536],
    "gc_vit_large_384": [192, 384, 768, 1536],
    "efficientvit_b0": [16, 32, 64, 128],
    "efficientvit_b1": [32, 64, 128, 256],
    "efficientvit_b2": [48, 96, 192, 384],
    "efficientvit_b3": [64, 128, 256, 512],
    "efficientvit_l0": [64, 128, 256, 512],
    "efficientvit_l1": [64, 128, 256, 512],
    "efficientvit_l2": [64, 128, 256, 512],
    "efficientvit_l3": [128, 256, 512, 1024],
    "resnet18": [64, 128, 256, 512],
    "resnet34": [64, 128, 256, 512],
    "resnet50": [256, 512, 1024, 2048],
    "resnet101": [256, 512, 1024, 2048],
    "convnext_tiny": [96, 192, 384, 768],
    "pvt_v2_b0": [32, 64, 160, 256],
    "convnext_atto": [40, 80, 160, 320],
    "mobilenetv3_small_050": [8, 16, 24, 288],
}


@pytest.fixture
def unprobed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TimmBackbone, "_probe", lambda self: None)  # its numbers need real tensors


@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.usefixtures("unprobed")
def test_sizes(name: str):
    with torch.device("meta"):
        found = build(name)
    assert found.channels == CHANNELS[name] and found.strides == [4, 8, 16, 32]


@pytest.mark.parametrize("path", sorted(CONFIG.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.usefixtures("unprobed")
def test_part_files_say_how_large_they_are(path: Path):
    text = path.read_text(encoding="utf-8")
    with torch.device("meta"):
        network = build_backbone(BackboneSpec.model_validate(yaml.safe_load(text)["model"]["backbone"]))
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    said = re.search(r"^# Cost: ([0-9.]+) M parameters", text, re.MULTILINE)
    assert said, "its comment names no number of parameters"
    assert float(said[1]) == round(millions, 1 if millions < 10 else None)


@pytest.mark.parametrize(("output_stride", "strides"), [(16, [4, 8, 16, 16]), (8, [4, 8, 8, 8])])
@torch.no_grad()
def test_dilated_as_torchvision_does(output_stride: int, strides: list[int], tmp_path: Path):
    dilated = [False, output_stride <= 8, output_stride <= 16]
    model = noisy(torchvision.models.resnet50(replace_stride_with_dilation=dilated))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    network = build("resnet50", tmp_path / "weights.pth", output_stride).eval()
    assert network.strides == strides and network.channels == CHANNELS["resnet50"]
    images = torch.rand(1, 3, 64, 96)
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    for layer, found in zip((model.layer1, model.layer2, model.layer3, model.layer4), network(images), strict=True):
        x = layer(x)
        torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050"])
def test_other_convolutional_backbones_are_dilated(name: str):
    network = build(name, output_stride=8).eval()
    assert can_dilate(name) and network.channels == CHANNELS[name]
    with torch.no_grad():
        assert [map.shape[-1] for map in network(torch.rand(1, 3, 64, 128))] == [32, 16, 16, 16]


@pytest.mark.parametrize("name", ["swin_tiny", "gc_vit_tiny", "efficientvit_b0", "efficientvit_l0", "pvt_v2_b0"])
def test_backbones_that_cannot_be_dilated_say_so(name: str):
    assert not can_dilate(name)
    with pytest.raises(UserError, match=f"{name} cannot keep its deep feature maps at stride 16"):
        build(name, output_stride=16)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_frozen_batch_norms_are_constants(name: str, tmp_path: Path):
    trained = noisy(build(name))
    torch.save(
        {key.removeprefix("net."): value for key, value in trained.state_dict().items()}, tmp_path / "weights.pth"
    )
    frozen = build(name, tmp_path / "weights.pth", norm="frozen").train()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        for found, expected in zip(frozen(images), trained(images), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    optimizer = torch.optim.SGD(frozen.parameters(), lr=0.1)
    sum(map.square().mean() for map in frozen(images)).backward()
    optimizer.step()
    changed = {key for key, value in frozen.state_dict().items() if not torch.equal(value, before[key])}
    norms = {
        f"{prefix}.{key}"
        for prefix, module in trained.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for key in ("weight", "bias", "running_mean", "running_var")
    }
    assert norms and norms < before.keys() and not changed & norms
    assert changed == {key for key, _ in frozen.named_parameters()} and changed == before.keys() - norms


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet50x"}, "did you mean resnet50 or"),
        ({"name": "swin_tinny"}, "swin_tiny"),
        ({"name": "hf-hub:someone/something"}, "neither ours nor timm's"),
        ({"name": "vit_tiny_patch16_224"}, r"strides \[16, 16, 16\], expected \[4, 8, 16, 32\]"),
        ({"name": "swinv2_cr_tiny_ns_224"}, "choose another"),
        ({"name": "efficientvit_b0", "drop_path_rate": 0.1}, "efficientvit_b0 has no stochastic depth; set it to 0"),
        ({"name": "resnet18", "swin": SwinSpec(embed_dim=32)}, "swin.embed_dim: only with a Swin backbone"),
        ({"name": "swin_tiny", "norm": "frozen"}, "swin_tiny has no batch norms to freeze"),
        ({"name": "gc_vit_tiny", "norm": "frozen"}, "gc_vit_tiny has no batch norms to freeze"),
        ({"name": "convnext_atto", "norm": "frozen"}, "convnext_atto has no batch norms to freeze"),
        ({"name": "gc_vit_tinny"}, "did you mean gc_vit_tiny"),
        ({"name": "gcvit_xxtiny"}, "cannot take images of any size .* for GC ViT: gc_vit_tiny"),
        ({"name": "gc_vit_large", "pretrained": "timm"}, "timm publishes no weights of gcvit_large"),
        ({"name": "efficientvit_b0", "drop_path_rate": 0.1, "output_stride": 16}, "no stochastic depth"),
        ({"name": "swin_huge", "pretrained": "timm"}, "timm publishes no weights of swin_huge"),
        ({"name": "resnet18", "pretrained": "/no/such/file.pth"}, "/no/such/file.pth: no such file"),
    ],
)
def test_mistakes_are_told(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        build(**options)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "efficientvit_b0"])
def test_weights_of_a_whole_timm_model(name: str, wrapped: bool, tmp_path: Path):
    torch.manual_seed(0)
    whole = timm.create_model(name).eval()
    torch.save({"state_dict": whole.state_dict()} if wrapped else whole.state_dict(), tmp_path / "weights.pth")
    found = build(name, tmp_path / "weights.pth").eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = whole.stages(whole.stem(images)) if name == "efficientvit_b0" else whole.forward_features(images)
        assert torch.equal(found(images)[3], expected)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path):
    path = tmp_path / "weights.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    with pytest.raises(UserError, match=r"resnet34: these weights do not fit\n  80 missing: layer1.2.conv1.weight"):
        build("resnet34", path)
    with pytest.raises(UserError, match=r"missing: patch_embed\.proj\.weight"):
        build("swin_tiny", path, swin=tiny.SWIN)
    state = build("swin_tiny", swin=tiny.SWIN).state_dict()
    torch.save(state | {"surprise": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="1 that the network does not have: surprise"):
        build("swin_tiny", path, swin=tiny.SWIN)
    torch.save(state, path)
    larger = tiny.SWIN.model_copy(update={"window_size": 4})
    with pytest.raises(UserError, match=r"relative_position_bias_table is \(25, 1\), expected \(49, 1\)"):
        build("swin_tiny", path, swin=larger)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_of_another_kind_are_refused(content: bytes, suffix: str, tmp_path: Path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"weights{suffix}"):
        build("swin_tiny", path, swin=tiny.SWIN)


def test_weights_are_not_read_when_a_whole_model_is_loaded_later():
    spec = BackboneSpec(swin=tiny.SWIN, pretrained="/no/such/file.pth")
    assert build_backbone(spec, load_pretrained=False).channels == [16, 32, 64, 128]


@pytest.mark.parametrize(
    ("name", "published"), [("resnet18", "resnet18.a1_in1k"), ("gc_vit_xxtiny", "gcvit_xxtiny.in1k")]
)
def test_a_download_is_known_by_its_name_and_the_digest_of_its_tensors(
    name: str, published: str, monkeypatch: pytest.MonkeyPatch
):
    create = timm.create_model

    def downloaded(name: str, pretrained: bool = False, **options: object):
        torch.manual_seed(len(seeds) if pretrained else 0)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", downloaded)
    seeds: list[int] = []
    found = []
    for _ in range(2):
        found.append(build(name, "timm").origin)
    seeds.append(1)
    found.append(build(name, "timm").origin)
    assert {key: found[0][key] for key in ("source", "name")} == {"source": "timm", "name": published}
    assert found[0] == found[1] and found[0]["sha256"] != found[2]["sha256"]
    assert build(name).origin is None


def test_downloads_that_fail_are_told(monkeypatch: pytest.MonkeyPatch):
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: object):
        if pretrained:
            raise OSError("no route to host")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    for name in ("resnet18", "swin_tiny", "gc_vit_xxtiny"):
        with pytest.raises(UserError, match=r"could not be downloaded \(no route to host\); go online once"):
            build(name, "timm")
