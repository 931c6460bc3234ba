from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision

from tessera.files import UserError
from tessera.models import backbone
from tessera.models.backbone import build_backbone
from tessera.spec.networks import BackboneSpec, SwinSpec
from tests.models import tiny


def build(name: str, pretrained: str | Path | None = None, drop_path_rate: float = 0.0, swin: SwinSpec | None = None):
    return build_backbone(
        BackboneSpec(
            name=name,
            drop_path_rate=drop_path_rate,
            pretrained=None if pretrained is None else str(pretrained),
            swin=swin or SwinSpec(),
        )
    )


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("swin_tiny", [96, 192, 384, 768]),
        ("swin_small", [96, 192, 384, 768]),
        ("swin_base", [128, 256, 512, 1024]),
        ("swin_large", [192, 384, 768, 1536]),
        ("swin_huge", [352, 704, 1408, 2816]),
    ],
)
def test_sizes_of_swin(name: str, channels: list[int]):
    with torch.device("meta"):
        found = build(name)
    assert found.channels == channels and found.strides == [4, 8, 16, 32]


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("efficientvit_b0", [16, 32, 64, 128]),
        ("efficientvit_b1", [32, 64, 128, 256]),
        ("efficientvit_b2", [48, 96, 192, 384]),
        ("efficientvit_b3", [64, 128, 256, 512]),
        ("efficientvit_l0", [64, 128, 256, 512]),
        ("efficientvit_l1", [64, 128, 256, 512]),
        ("efficientvit_l2", [64, 128, 256, 512]),
        ("efficientvit_l3", [128, 256, 512, 1024]),
        ("convnext_atto", [40, 80, 160, 320]),
        ("mobilenetv3_small_050", [8, 16, 24, 288]),
    ],
)
def test_pyramids_of_timm(name: str, channels: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backbone.TimmBackbone, "_probe", lambda self: None)  # its numbers need real tensors
    with torch.device("meta"):
        found = build(name)
    assert found.channels == channels and found.strides == [4, 8, 16, 32]


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
        ({"name": "swin_tiny", "swin": SwinSpec(num_heads=[5, 6, 12, 24])}, r"num_heads\[0\] is 5, expected a divisor"),
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


def test_weights_of_torchvision(tmp_path: Path):
    model = torchvision.models.resnet18()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    found = build("resnet18", tmp_path / "weights.pth")
    assert torch.equal(found.net.state_dict()["layer4.1.bn2.weight"], model.layer4[1].bn2.weight)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path):
    path = tmp_path / "weights.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    with pytest.raises(UserError, match=r"resnet34: these weights do not fit\n  80 missing: layer1.2.conv1.weight"):
        build("resnet34", path)
    with pytest.raises(UserError, match=r"missing: patch_embed\.proj\.weight"):
        build("swin_tiny", path, swin=tiny.SWIN)
    state = build("swin_tiny", swin=tiny.SWIN).state_dict()
    torch.save(state | {"surprise": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="1 unknown: surprise"):
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


def test_downloads_that_fail_are_told(monkeypatch: pytest.MonkeyPatch):
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: object):
        if pretrained:
            raise OSError("no route to host")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    for name in ("resnet18", "swin_tiny"):
        with pytest.raises(UserError, match=r"could not be downloaded \(no route to host\); go online once"):
            build(name, "timm")
