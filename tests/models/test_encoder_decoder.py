"""Beside the contract: strides, single images, any size, and exported graphs of free size."""

from __future__ import annotations

import onnxruntime
import pytest
import torch

from tessera.deploy.export import to_onnx
from tessera.files import UserError
from tessera.models import build_model
from tessera.models.base import Model
from tessera.models.encoder_decoder.decoders import DECODERS, BinPool, FcnBlocks, PooledNorm
from tessera.spec.schema import ExportSpec
from tests.models import tiny, tiny_encoder_decoder

SIZE = (64, 96)
LAST_MAP = ("fcn", "pspnet", "deeplabv3")
"""Decoders whose logits have the stride of the last map; the others go up to stride 4."""


def build(decoder: str, backbone: str = "resnet18", **keys: object) -> Model:
    torch.manual_seed(0)
    return build_model(tiny_encoder_decoder.spec(backbone, decoder=decoder, **keys), tiny.CATALOG)


@pytest.mark.parametrize("decoder", DECODERS)
def test_decoder(decoder: str):
    """Trains on one image, and gives logits where they belong, for sizes that no stride divides, too."""
    model = build(decoder)
    outputs = model.network.train()(torch.rand(1, 3, *SIZE))
    losses = model.criterion(outputs, [tiny_encoder_decoder.target(3, SIZE)])
    assert losses.keys() == {"loss_ce", "loss_ce_fcn"}
    torch.stack(list(losses.values())).sum().backward()

    stride = 16 if decoder in LAST_MAP else 4
    assert outputs["logits"].shape == (1, 5, SIZE[0] // stride, SIZE[1] // stride)
    network = model.network.eval()
    with torch.no_grad():
        assert network(torch.rand(2, 3, *SIZE)).keys() == {"logits"}
        assert network(torch.rand(1, 3, 37, 75))["logits"].shape == (1, 5, 37, 75)


@pytest.mark.parametrize("decoder", ["pspnet", "deeplabv3plus"])
def test_graph_of_free_size_agrees_with_the_network(decoder: str):
    network = build(decoder).network.eval()
    graph = to_onnx(network, ExportSpec(input_height=64, input_width=96, dynamic_size=True))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    for size in ((64, 96), (128, 64)):
        images = torch.rand(2, 3, *size)
        with torch.no_grad():
            expected = network(images)["logits"]
        (found,) = session.run(["logits"], {"images": images.numpy()})
        assert torch.allclose(torch.from_numpy(found), expected, rtol=0, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize(("stride", "shape"), [(8, (8, 12)), (16, (4, 6)), (32, (2, 3))])
def test_convolutions_are_dilated_to_the_output_stride(stride: int, shape: tuple[int, int]):
    network = build("fcn", output_stride=stride).network.eval()
    with torch.no_grad():
        assert network(torch.rand(1, 3, *SIZE))["logits"].shape[2:] == shape


def test_transformers_keep_their_stride():
    network = build("fcn", "swin_tiny", output_stride=8).network.eval()
    with torch.no_grad():
        assert network(torch.rand(1, 3, *SIZE))["logits"].shape[2:] == (2, 3)


def test_padding_inside_changes_nothing_of_images_that_need_none():
    """An image of a size that strides do not divide has the logits of the same image padded with the pixel mean, resized and cropped."""
    model = build("upernet")
    network = model.network.eval()
    padded = network.pixel_mean.repeat(1, 1, 64, 96)
    padded[..., :40, :70] = torch.rand(1, 3, 40, 70)
    with torch.no_grad():
        found = network(padded[..., :40, :70])["logits"]
        expected = network(padded)["logits"]
    expected = torch.nn.functional.interpolate(expected, (64, 96), mode="bilinear", align_corners=False)[..., :40, :70]
    assert torch.allclose(found, expected, atol=1e-5)


def test_pooled_norm_is_a_batch_norm_except_for_one_value():
    norm, reference = PooledNorm(4), torch.nn.BatchNorm2d(4)
    many, one = torch.rand(3, 4, 1, 1), torch.rand(1, 4, 1, 1)
    assert torch.equal(norm(many), reference(many))
    reference.eval()
    assert torch.equal(norm(one), reference(one))
    assert torch.equal(norm.running_mean, reference.running_mean)


@pytest.mark.parametrize("size", [(4, 6), (7, 11), (1, 3), (2, 16)])
@pytest.mark.parametrize("bins", [2, 3, 6])
def test_bins_are_those_of_adaptive_pooling(bins: int, size: tuple[int, int]):
    features = torch.rand(2, 3, *size)
    assert torch.allclose(BinPool(bins)(features), torch.nn.AdaptiveAvgPool2d(bins)(features), atol=1e-6)


def test_fcn_reads_its_map_beside_the_convolutions():
    maps = [torch.rand(2, 8, 6, 5), torch.rand(2, 12, 3, 3)]
    assert FcnBlocks(8, 16, convs=2, index=0)(maps).shape == (2, 16, 6, 5)
    assert FcnBlocks(12, 16, convs=0)(maps).equal(maps[1])
    with_input = FcnBlocks(12, 16, convs=1, concat_input=True)
    assert with_input(maps).shape == (2, 16, 3, 3)
    assert with_input.fuse is not None and with_input.fuse[0].in_channels == 28


def test_class_weights_must_be_one_per_class():
    with pytest.raises(
        UserError, match=r"model\.class_weights has 2 entries, expected one for each of the 5 classes.*class 4"
    ):
        build("fcn", class_weights=[1.0, 2.0])
