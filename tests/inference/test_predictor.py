from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tessera.evaluation.evaluate import evaluate
from tessera.files import UserError
from tessera.inference import load_predictor
from tessera.inference.sources import open_source
from tessera.inference.testing import with_views
from tessera.inference.torch_runtime import TorchPredictor
from tessera.ops.images import make_batch, read_image
from tessera.spec.schema import ViewsSpec
from tests.evaluation.scenes import make_target
from tests.inference.tiny import CATALOG, assert_same, make_model, make_picture, save_picture


@pytest.fixture(scope="module")
def predictor():
    return TorchPredictor(*make_model())


@pytest.fixture
def folder(tmp_path):
    """Every kind of image, two sizes, one sub-folder that is not searched, one hidden file, one that is no image."""
    folder = tmp_path / "images"
    for number, name in enumerate(("b.png", "a.JPG", "c.jpeg", "d.bmp", "e.webp", "f.tiff")):
        save_picture(folder / name, 70 if number % 2 else 90, 80, number)
    save_picture(folder / "deeper" / "g.png", 70, 80, 9)
    save_picture(folder / ".hidden.png", 70, 80, 9)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_one_image_is_predicted_alike_from_every_source(predictor, tmp_path):
    path = save_picture(tmp_path / "one.png", 75, 100, 1)
    array = make_picture(75, 100, 1)
    wanted = predictor.predict(path)
    assert wanted.meta.file_name == "one.png" and wanted.meta.original_size == (75, 100)
    assert len(wanted.instances.scores) and wanted.panoptic.segments and len(wanted.semantic.unique()) > 1
    for source in (str(path), array, np.asfortranarray(array), Image.fromarray(array)):
        assert_same(predictor.predict(source), wanted)
    for source in ([path], (array,), tmp_path, str(tmp_path)):
        (found,) = predictor.predict(source)
        assert_same(found, wanted)


def test_a_folder_gives_its_images_by_name(predictor, folder):
    found = predictor.predict(folder)
    assert [p.meta.file_name for p in found] == ["a.JPG", "b.png", "c.jpeg", "d.bmp", "e.webp", "f.tiff"]
    assert [p.meta.image_id for p in found] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_batch_size_changes_nothing(predictor, folder, batch_size):
    sources = [
        make_picture(height, width, seed) for seed, (height, width) in enumerate([(70, 80)] * 4 + [(90, 80)] * 2)
    ]
    for source in (folder, sources):
        single, together = predictor.predict(source), predictor.predict(source, batch_size=batch_size)
        assert len(single) == len(together) == 6
        for one, other in zip(single, together, strict=True):
            assert one.meta == other.meta
            assert_same(other, one, exact=False)


def test_batches_hold_images_of_one_size(predictor):
    sizes = []

    class Watched(TorchPredictor):
        def outputs(self, inputs):
            sizes.append(tuple(inputs["images"].shape))
            return super().outputs(inputs)

    watched = Watched(*make_model())
    watched.predict(
        [make_picture(64, 64, 0), make_picture(64, 64, 1), make_picture(64, 96, 2), make_picture(64, 64, 3)], 2
    )
    assert sizes == [(2, 3, 64, 64), (1, 3, 64, 96), (1, 3, 64, 64)]


def test_a_batch_larger_than_the_runtime_takes_is_split():
    class Limited(TorchPredictor):
        def outputs(self, inputs):
            assert len(inputs["images"]) <= 2
            return super().outputs(inputs)

    model, header = make_model()
    limited, free = Limited(model, header), TorchPredictor(model, header)
    limited.max_batch = 2
    images = [torch.from_numpy(make_picture(64, 64, seed)).permute(2, 0, 1) for seed in range(5)]
    batch = make_batch(images, range(5), [str(n) for n in range(5)], header.spec.dataset.augmentation, (0.5, 0.5, 0.5))
    for found, wanted in zip(limited(batch), free(batch), strict=True):
        assert_same(found, wanted, exact=False)


@pytest.mark.parametrize("views", [ViewsSpec(), ViewsSpec(flip=True)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_refused_by_name(value, views):
    """Finite on the images of parity says nothing of the next one."""

    class Overflowing(TorchPredictor):
        def outputs(self, inputs):
            found = super().outputs(inputs)
            for image, masks in zip(inputs["images"], found["pred_masks"], strict=True):
                if image.max() == 1:
                    masks[0, 0, 0] = value
            return found

    dark, bright = np.full((64, 64, 3), 40, np.uint8), np.full((64, 64, 3), 255, np.uint8)
    predictor = with_views(Overflowing(*make_model("semantic")), views)
    predictor.predict([dark, dark], 2)
    with pytest.raises(
        UserError, match=r"^image_000002\.png: torch fp32 gives values of pred_masks that are not finite"
    ):
        predictor.predict([dark, bright], 2)


def test_exif_orientation_decides_the_size(predictor, tmp_path):
    upright = make_picture(60, 90, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    Image.fromarray(np.rot90(upright)).save(path, exif=exif)
    found = predictor.predict(path)
    assert found.meta.original_size == (60, 90) == tuple(found.semantic.shape) == tuple(found.panoptic.ids.shape)
    assert_same(found, predictor.predict(upright))
    with Image.open(path) as picture:
        assert_same(predictor.predict(picture), found)


def test_a_stretched_split_is_stretched_in_inference_too():
    model, header = make_model(dataset={"test": {"target_size": [32, 96]}, "augmentation": {"test_min_size": 32}})
    found = TorchPredictor(model, header).predict(make_picture(90, 90, 0))
    assert found.meta.resized_size == (32, 96) and found.semantic.shape == (90, 90)


def test_thresholds_of_the_caller_replace_the_headers():
    model, header = make_model(postprocess={"object_mask_threshold": 1.0})
    assert TorchPredictor(model, header).predict(make_picture(64, 64, 1)).panoptic.segments == []


@pytest.mark.parametrize(
    ("case", "source", "message"),
    [
        ("missing", "nowhere.png", "nowhere.png: no such file"),
        ("gray array", np.zeros((4, 4), np.uint8), r"shape \(4, 4\) and type uint8"),
        ("channels first", np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\)"),
        ("floats", np.zeros((8, 8, 3), np.float32), "type float32"),
        ("empty", np.zeros((0, 8, 3), np.uint8), r"shape \(0, 8, 3\)"),
        ("number", 7, "is a int"),
        ("in a list", [np.zeros((4, 4, 3), np.uint8), None], "image 2: is a NoneType"),
    ],
)
def test_sources_of_another_kind_are_refused(predictor, case, source, message):
    with pytest.raises(UserError, match=message):
        predictor.predict(source)


def test_a_broken_image_and_an_empty_folder_are_named(predictor, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no image"):
        predictor.predict(tmp_path / "empty")
    path = save_picture(tmp_path / "cut.png", 60, 60, 0)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"cut\.png"):
        predictor.predict(path)
    with pytest.raises(UserError, match="is a folder inside a list"):
        predictor.predict([tmp_path])


def test_files_of_equal_name_keep_different_names(tmp_path):
    paths = [save_picture(tmp_path / folder / "x.png", 8, 8, 0) for folder in ("left", "right")]
    assert [source.file_name for source in open_source(paths)] == ["left/x.png", "right/x.png"]
    assert predictor_names([paths[0]]) == ["x.png"]


def predictor_names(source):
    return [item.file_name for item in open_source(source)]


def test_a_predictor_can_be_evaluated(predictor, tmp_path):
    pictures = [make_picture(64, 64, seed) for seed in range(3)]
    images = [torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures]
    spec = predictor.header.spec
    batch = make_batch(images, [4, 5, 6], ["a", "b", "c"], spec.dataset.augmentation, spec.model.pixel_mean)
    answers = predictor.predict(pictures)
    truths = []
    for answer in answers:
        masks = torch.stack([answer.panoptic.ids == s.id for s in answer.panoptic.segments])
        truths.append(make_target(torch.tensor([s.label for s in answer.panoptic.segments]), masks))
    batch = replace(batch, truths=truths)
    assert evaluate(predictor, [batch], CATALOG, "panoptic", False).metrics["PQ"] == 1.0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pth", None, "no such file"),
        ("model.txt", b"x", "ends in .pth, .onnx or .engine"),
        ("model.pth", b"not a checkpoint", r"model\.pth"),
        ("model.onnx", b"not a graph", r"model\.onnx"),
        ("model.onnx", b"", r"model\.onnx"),
    ],
)
def test_load_predictor_refuses_what_no_stage_wrote(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_predictor(tmp_path / name)


def test_image_reading_is_shared(tmp_path):
    path = save_picture(tmp_path / "one.png", 20, 30, 1)
    (source,) = open_source(path)
    assert torch.equal(source.read(), read_image(path))
