from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.models.gcvit import GlobalContextVit, GlobalContextVitBlock
from torch import Tensor
from torch.export import Dim

from tessera.files import UserError
from tessera.interop.published import gcvit, load_strictly
from tessera.models.gcvit import GCViT
from tests.models.noise import noisy

SIZES = {"embed_dim": 16, "depths": [2, 3, 2, 2], "num_heads": [1, 2, 4, 8], "mlp_ratio": 2}
RESOLUTION = 64
"""Windows of 2, 2, 4 and 2 tokens."""


def timm_model(layer_scale: float | None = None) -> GlobalContextVit:
    return noisy(GlobalContextVit(img_size=RESOLUTION, num_classes=3, layer_scale=layer_scale, **SIZES))


def load(state: dict[str, Tensor], layer_scale: float | None = None) -> GCViT:
    network = GCViT(**SIZES, layer_scale=layer_scale, resolution=RESOLUTION)
    load_strictly(network, gcvit.rename(state), "test", gcvit.starts_afresh, gcvit.belongs_to_classifier)
    return network.eval()


def original_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint of the original code looks like: its names, linear squeeze-and-excitation, derived buffers."""

    def convolutions(name: str) -> str:
        for timm, original in (("conv_dw", "0"), ("se.fc1", "2.fc.0"), ("se.fc2", "2.fc.2"), ("conv_pw", "3")):
            name = name.replace(f".{timm}.", f".{original}.")
        return name

    named = {"levels.0.blocks.0.attn.relative_position_index": torch.zeros(4, 4)}
    for name, value in state.items():
        if ".se.fc" in name:
            value = value.flatten(1)
        parts = name.split(".")
        if name.startswith("head."):
            name = f"head.{parts[-1]}"
        elif name.startswith("stages.3.norm."):
            name = f"norm.{parts[-1]}"
        elif name.startswith("stem."):
            name = name.replace("stem.conv1", "patch_embed.proj").replace("stem.down", "patch_embed.conv_down")
            name = convolutions(name).replace("conv_block", "conv")
        elif parts[2] == "downsample":
            name = f"levels.{int(parts[1]) - 1}." + convolutions(".".join(parts[2:])).replace("conv_block", "conv")
        elif parts[2] == "global_block":
            number = int(parts[4].removeprefix("conv")) - 1
            rest = convolutions("." + ".".join(parts[5:]))
            name = f"levels.{parts[1]}.q_global_gen.to_q_global.{number}.conv{rest}"
        else:
            name = name.replace("stages.", "levels.").replace(".rel_pos.", ".")
            name = name.replace("ls1.gamma", "gamma1").replace("ls2.gamma", "gamma2")
        named[name] = value
    return named


@pytest.mark.parametrize("layer_scale", [None, 0.5])
@pytest.mark.parametrize("named", [dict, original_names])
def test_same_as_timm_at_the_pretraining_size(named: Callable, layer_scale: float | None):
    model = timm_model(layer_scale)
    network = load(named(model.state_dict()), layer_scale)
    images = torch.rand(2, 3, RESOLUTION, RESOLUTION)
    with torch.no_grad():
        found = network(images)
        *maps, last = model.forward_intermediates(images, intermediates_only=True)
        for output, expected in zip(found, maps, strict=False):
            normed = F.layer_norm(expected.permute(0, 2, 3, 1), expected.shape[1:2]).permute(0, 3, 1, 2)
            assert torch.equal(output, normed)
        assert torch.equal(found[3], last)


def test_file_of_another_size_is_refused():
    state = timm_model().state_dict()
    del state["stages.1.blocks.2.mlp.fc1.weight"]
    with pytest.raises(
        UserError,
        match=r"1 missing: stages\.1\.blocks\.2\.mlp\.fc1\.weight\n  1 that the network does not have: surprise",
    ):
        load(state | {"surprise": torch.zeros(1)})


@pytest.mark.parametrize(("height", "width"), [(6, 10), (5, 7), (1, 3)])
def test_blocks_pad_to_whole_windows(height: int, width: int):
    """As timm's own block does with what the published detector hands it: the normed map, padded with zeros."""
    block = noisy(GCViT(**SIZES, resolution=RESOLUTION)).stages[2].blocks[1]
    x, query = torch.rand(2, height, width, 64), torch.rand(2, 4, 4, 64)
    rows, columns = -(-height // 4) * 4, -(-width // 4) * 4
    padded = torch.zeros(2, rows, columns, 64)
    padded[:, :height, :width] = x
    with torch.no_grad():
        expected = GlobalContextVitBlock._window_attn(block, padded, query)[:, :height, :width]
        torch.testing.assert_close(block._window_attn(x, query), expected)


@pytest.mark.parametrize(("height", "width"), [(96, 160), (200, 333), (30, 31)])
def test_any_size(height: int, width: int):
    network = noisy(GCViT(**SIZES, resolution=RESOLUTION))
    images = torch.rand(2, 3, height, width)
    with torch.no_grad():
        outputs, alone = network(images), network(images[1:])
    for stage, (output, one) in enumerate(zip(outputs, alone, strict=True)):
        stride = 4 * 2**stage
        assert output.shape == (2, 16 * 2**stage, -(-height // stride), -(-width // stride))
        torch.testing.assert_close(output[1:], one)  # no window takes another image's query


def test_activation_checkpoints_change_nothing():
    def gradients(activation_checkpoint: bool) -> list[Tensor]:
        torch.manual_seed(0)
        network = GCViT(**SIZES, resolution=RESOLUTION, activation_checkpoint=activation_checkpoint, drop_path_rate=0.5)
        sum(output.square().sum() for output in network(torch.rand(2, 3, 70, 50))).backward()
        return [parameter.grad for parameter in network.parameters()]

    for kept, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(kept, recomputed)


def test_exported_with_free_sizes():
    network = noisy(GCViT(embed_dim=16, depths=[2], num_heads=[1], mlp_ratio=2, resolution=RESOLUTION))
    free = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    program = torch.onnx.export(network, (torch.rand(2, 3, 48, 80),), dynamo=True, dynamic_shapes=(free,))
    for size in ((1, 64, 64), (3, 50, 77)):
        images = torch.rand(size[0], 3, *size[1:])
        with torch.no_grad():
            for found, expected in zip(program(images), network(images), strict=True):
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
