from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from tessera.interop.published import load_strictly, swin
from tessera.models.swin import Swin, shifted_window_mask
from tests.models.noise import noisy

SIZES = {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "window_size": 4}
IMAGE = 256
"""Every stage's map (64, 32, 16, 8) is a multiple of the window and larger: where timm and torchvision define the same as the paper."""


def load(state: dict[str, Tensor]) -> Swin:
    network = Swin(**SIZES)
    load_strictly(network, swin.rename(state), "test", swin.starts_afresh, swin.belongs_to_classifier)
    return network.eval()


def original_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint of the original code looks like: derived buffers, a classifier, mergings at the end of a stage."""
    named = {}
    for name, value in state.items():
        parts = name.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) - 1)
        named[".".join(parts)] = value
    named["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16)
    named["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    return named


@pytest.mark.parametrize("naming", ["timm", "original"])
def test_same_as_timm_where_timm_is_as_published(naming: str):
    model = noisy(
        SwinTransformer(
            img_size=IMAGE, embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window_size=4, num_classes=3
        )
    )
    state = model.state_dict()
    network = load(state if naming == "timm" else original_names(state))
    images = torch.rand(1, 3, IMAGE, IMAGE)
    with torch.no_grad():
        outputs = network(images)
        x = model.patch_embed(images)
        for layer, output in zip(model.layers, outputs, strict=True):
            x = layer(x)
            expected = F.layer_norm(x, x.shape[-1:]).permute(0, 3, 1, 2)
            torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


def test_same_as_torchvision_where_torchvision_is_as_published():
    model = noisy(
        torchvision.models.SwinTransformer(
            patch_size=[4, 4],
            embed_dim=16,
            depths=[2, 2, 2, 2],
            num_heads=[1, 2, 4, 8],
            window_size=[4, 4],
            num_classes=3,
        )
    )
    network = load(model.state_dict())
    images = torch.rand(1, 3, IMAGE, IMAGE)
    with torch.no_grad():
        expected = F.layer_norm(model.features(images), (128,)).permute(0, 3, 1, 2)
        torch.testing.assert_close(network(images)[3], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 4), (5, 9), (1, 1)])
def test_shifted_window_mask_is_that_of_the_original_code(height: int, width: int):
    window, shift = 4, 2
    rows, columns = -(-height // window) * window, -(-width // window) * window
    regions = torch.zeros(rows, columns)
    count = 0
    for down in (slice(0, -window), slice(-window, -shift), slice(-shift, None)):
        for across in (slice(0, -window), slice(-window, -shift), slice(-shift, None)):
            regions[down, across] = count
            count += 1
    expected = []
    for top in range(0, rows, window):
        for left in range(0, columns, window):
            inside = regions[top : top + window, left : left + window].flatten()
            expected.append(torch.where(inside[:, None] == inside[None, :], 0.0, -100.0))
    found = shifted_window_mask(height, width, window, torch.zeros(1))
    assert torch.equal(found.squeeze(1), torch.stack(expected))


def test_windows_neither_shrink_nor_stop_shifting_on_small_maps():
    """At 32 pixels the maps are 8, 4, 2 and 1 wide: shift and bias of every block still matter."""
    network = noisy(Swin(**SIZES))
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        before = network(images)
        for layer in network.layers:
            layer.blocks[1].shift = 0
        after = network(images)
    for stage, (one, other) in enumerate(zip(before, after, strict=True)):
        assert one.shape[-1] == 8 // 2**stage
        assert not torch.equal(one, other)


@pytest.mark.parametrize(("height", "width"), [(33, 70), (4, 4), (100, 31)])
def test_any_size(height: int, width: int):
    with torch.no_grad():
        outputs = Swin(**SIZES).eval()(torch.rand(2, 3, height, width))
    for stage, output in enumerate(outputs):
        stride = 4 * 2**stage
        assert output.shape == (2, 16 * 2**stage, -(-height // stride), -(-width // stride))
