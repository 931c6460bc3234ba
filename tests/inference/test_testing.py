"""Windows, scales and mirror images against the same averages made by hand, under PyTorch and ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tessera.files import UserError
from tessera.inference import load_predictor
from tessera.inference.results import infer
from tessera.inference.testing import ViewsPredictor, window_starts, with_views
from tessera.inference.torch_runtime import TorchPredictor
from tessera.models.encoder_decoder import build_postprocess
from tessera.ops.images import make_batch, resize
from tessera.spec.networks import EncoderDecoderSpec
from tessera.spec.schema import PostprocessSpec, ViewsSpec
from tests.inference.tiny import CATALOG, make_graph, make_model, make_picture, save_picture


@pytest.fixture(scope="module")
def plain() -> TorchPredictor:
    return TorchPredictor(*make_model("semantic"))


def views(predictor: TorchPredictor, **keys: object) -> ViewsPredictor:
    found = with_views(predictor, ViewsSpec.model_validate(keys))
    assert isinstance(found, ViewsPredictor)
    return found


def batch_of(height: int, width: int, seed: int = 0):
    image = torch.from_numpy(make_picture(height, width, seed)).permute(2, 0, 1)
    augmentation = make_model("semantic")[1].spec.dataset.augmentation
    return make_batch([image], [1], ["1.png"], augmentation, (0.485, 0.456, 0.406))


def scores_of(predictor: TorchPredictor, batch) -> Tensor:
    """(C, H, W) at original size, the whole image at once."""
    outputs = predictor.ask(batch.images, batch.padding, predictor.tasks[0])
    return predictor.postprocess.scores(outputs, batch.metas, tuple(batch.images.shape[2:]), predictor.tasks[0])[0]


def content(batch) -> Tensor:
    height, width = batch.metas[0].resized_size
    return batch.images[0, :, :height, :width]


def score(predictor: ViewsPredictor, batch) -> Tensor:
    return predictor.scores(content(batch), batch.metas[0])


def by_hand(predictor: TorchPredictor, image: Tensor, original: tuple[int, int]) -> Tensor:
    """Scores of a (3, h, w) image in [0, 1] without any resizing before it, at the size ``original``."""
    height, width = image.shape[1:]
    size = (-(-height // 32) * 32, -(-width // 32) * 32)
    padded = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).repeat(1, 1, *size)
    padded[0, :, :height, :width] = image
    outputs = predictor.network(padded)
    masks = F.interpolate(outputs["pred_masks"], size, mode="bilinear", align_corners=False)[..., :height, :width]
    masks = F.interpolate(masks, original, mode="bilinear", align_corners=False).sigmoid()
    return torch.einsum("qc,qhw->chw", outputs["pred_logits"].softmax(-1)[0, :, :-1], masks[0])


def test_the_default_is_the_predictor_itself(plain):
    assert with_views(plain, ViewsSpec()) is plain


def test_a_semantic_prediction_is_the_argmax_of_its_scores(plain):
    batch = batch_of(60, 80)
    assert torch.equal(scores_of(plain, batch).argmax(0), plain(batch)[0].semantic)


def test_probabilities_of_the_encoder_decoder_family():
    postprocess = build_postprocess(EncoderDecoderSpec(), CATALOG, PostprocessSpec())
    batch = batch_of(60, 80)
    outputs = {"logits": torch.randn(1, 3, 24, 24)}
    (scores,) = postprocess.scores(outputs, batch.metas, (96, 96))
    (prediction,) = postprocess(outputs, batch.metas, (96, 96))
    assert scores.shape == (3, 60, 80) and torch.allclose(scores.sum(0), torch.ones(60, 80))
    assert torch.equal(scores.argmax(0), prediction.semantic)


def test_one_window_over_the_whole_image_changes_nothing(plain):
    batch = batch_of(64, 96)
    assert torch.equal(
        score(views(plain, mode="slide", crop_size=(64, 96), stride=(64, 96)), batch), scores_of(plain, batch)
    )


def test_resized_images_are_windowed_before_they_are_resized_back(plain):
    batch = batch_of(48, 60)
    found = score(views(plain, mode="slide", crop_size=(64, 96), stride=(64, 96)), batch)
    assert found.shape[1:] == (48, 60)
    assert (found.argmax(0) == scores_of(plain, batch).argmax(0)).float().mean() > 0.97


def test_overlapping_windows_are_averaged(plain):
    batch = batch_of(64, 96)
    found = score(views(plain, mode="slide", crop_size=(64, 64), stride=(64, 24)), batch)
    total, count = torch.zeros(3, 64, 96), torch.zeros(64, 96)
    for left in (0, 24, 32):
        total[..., left : left + 64] += by_hand(plain, content(batch)[..., left : left + 64], (64, 64))
        count[:, left : left + 64] += 1
    assert torch.allclose(found, total / count, atol=1e-6)


def test_mirror_images_are_averaged(plain):
    batch = batch_of(60, 80)
    image = content(batch)
    expected = (by_hand(plain, image, (60, 80)) + by_hand(plain, image.flip(-1), (60, 80)).flip(-1)) / 2
    assert torch.allclose(score(views(plain, flip=True), batch), expected, atol=1e-6)


def test_scales_are_averaged(plain):
    batch = batch_of(60, 80)
    image = content(batch)
    assert image.shape[1:] == (64, 85)
    sizes = ((32, 42), (64, 85), (96, 128))
    expected = sum(by_hand(plain, resize(image, size), (60, 80)) for size in sizes) / 3
    assert torch.allclose(score(views(plain, scales=[0.5, 1.0, 1.5]), batch), expected, atol=1e-6)


def test_scales_windows_and_mirror_images_together(plain):
    found = views(plain, mode="slide", crop_size=(64, 64), stride=(48, 48), scales=[1.0, 1.5], flip=True)
    (prediction,) = found(batch_of(60, 80))
    assert prediction.semantic.shape == (60, 80) and prediction.semantic.dtype == torch.int64


@pytest.mark.parametrize(
    ("side", "crop", "stride", "starts"),
    [
        (96, 64, 32, [0, 32]),
        (100, 64, 32, [0, 32, 36]),
        (64, 64, 32, [0]),
        (50, 64, 32, [0]),
        (65, 64, 64, [0, 1]),
    ],
    ids=["fits", "the last one moves back", "one", "smaller image", "one pixel more"],
)
def test_windows(side: int, crop: int, stride: int, starts: list[int]):
    assert window_starts(side, crop, stride) == starts


@pytest.fixture
def graph(tmp_path: Path):
    def write(size: tuple[int, int] | None = None, batch: int | str = "batch", **sections: dict) -> Path:
        onnx.save(make_graph("semantic", batch, size, **sections), tmp_path / "model.onnx")
        return tmp_path / "model.onnx"

    return write


@pytest.mark.parametrize(
    ("size", "testing"),
    [
        (None, {"mode": "slide", "crop_size": (64, 64), "stride": (64, 24), "scales": [0.75, 1.25], "flip": True}),
        ((64, 64), {"mode": "slide", "crop_size": (64, 64), "stride": (32, 32), "scales": [1.0, 1.5]}),
        (None, {"scales": [0.5, 1.5], "flip": True}),
    ],
    ids=["free size", "fixed size", "scales"],
)
def test_every_runtime_gives_the_same(graph, plain, size, testing):
    """Of one image at a time, and of a graph that takes two: what is left of a batch is filled up."""
    for batch in ("batch", 2):
        predictor = load_predictor(graph(size, batch), device="cpu", testing=ViewsSpec.model_validate(testing))
        wanted = views(plain, **testing)
        picture = make_picture(75, 100, 3)
        found, expected = predictor.predict(picture), wanted.predict(picture)
        assert found.semantic.shape == (75, 100)
        assert (found.semantic == expected.semantic).float().mean() > 0.999


def test_mirror_images_fit_a_fixed_graph(graph):
    predictor = load_predictor(graph((64, 96)), device="cpu", testing=ViewsSpec(flip=True))
    assert predictor.input_size == (64, 96)
    assert predictor.predict(make_picture(75, 100, 3)).semantic.shape == (75, 100)


def test_what_a_fixed_graph_cannot_take_is_refused_early(graph):
    with pytest.raises(UserError, match=r"testing\.crop_size is \[32, 64\], but the onnx fp32 graph takes \[64, 96\]"):
        load_predictor(graph((64, 96)), testing=ViewsSpec(mode="slide", crop_size=(32, 64), stride=(32, 32)))
    with pytest.raises(UserError, match=r"testing\.scales is \[1\.0, 2\.0\].*export\.dynamic_size=true"):
        load_predictor(graph((64, 96)), testing=ViewsSpec(scales=[1.0, 2.0]))


def test_other_modes_are_refused():
    with pytest.raises(UserError, match="mode is instance"):
        with_views(TorchPredictor(*make_model("instance")), ViewsSpec(flip=True))


def test_a_model_brings_its_own_views_and_label_pngs_need_no_truth(tmp_path: Path):
    """What a test server wants: one PNG per image in the dataset's ids, made from images alone."""
    testing = {"flip": True, "scales": [1.0, 0.5]}
    save_picture(tmp_path / "unlabelled" / "a.png", 64, 96, 1)
    model, header = make_model("semantic", testing=testing, data_root=str(tmp_path), inference={"images": "unlabelled"})
    predictor = with_views(TorchPredictor(model, header), header.spec.testing)
    infer(predictor, header.spec, tmp_path / "inference")
    expected = predictor.predict(tmp_path / "unlabelled" / "a.png")
    ids = np.array([category.id for category in CATALOG.categories])
    with Image.open(tmp_path / "inference/semantic/a.png") as picture:
        assert np.array_equal(np.asarray(picture), ids[expected.semantic.numpy()])
