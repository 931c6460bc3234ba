import copy
import http.server
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tessera.files import UserError
from tessera.inference import load_predictor, sources
from tessera.inference.sources import open_source
from tessera.inference.testing import with_views
from tessera.inference.torch_runtime import TorchPredictor
from tessera.metrics.evaluate import evaluate
from tessera.ops.images import make_batch, read_image
from tessera.spec.schema import ViewsSpec
from tests.inference.tiny import CATALOG, assert_same, make_model, make_picture, save_picture
from tests.metrics.scenes import make_target


@pytest.fixture(scope="module")
def predictor():
    return TorchPredictor(*make_model())


@pytest.fixture
def folder(tmp_path):
    """Every kind of image, two sizes, one in a sub-folder, one hidden file, one that is no image."""
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
    assert [p.meta.file_name for p in found] == [
        "a.JPG",
        "b.png",
        "c.jpeg",
        "d.bmp",
        "deeper/g.png",
        "e.webp",
        "f.tiff",
    ]
    assert [p.meta.image_id for p in found] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_batch_size_changes_nothing(predictor, folder, batch_size):
    sources = [
        make_picture(height, width, seed) for seed, (height, width) in enumerate([(70, 80)] * 4 + [(90, 80)] * 2)
    ]
    for source in (folder, sources):
        single, together = predictor.predict(source), predictor.predict(source, batch_size=batch_size)
        assert len(single) == len(together) == (7 if source is folder else 6)
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
        ("channels first", np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\), expected .*\(height, width, 3\)"),
        ("channels last", torch.zeros(8, 8, 3), r"shape \(8, 8, 3\), expected .*\(3, height, width\)"),
        ("alpha", np.zeros((8, 8, 4), np.uint8), r"shape \(8, 8, 4\)"),
        ("a batch", torch.zeros(1, 3, 8, 8), r"shape \(1, 3, 8, 8\)"),
        ("empty", np.zeros((0, 8, 3), np.uint8), r"shape \(0, 8, 3\)"),
        ("floats of bytes", np.full((8, 8, 3), 200.0), r"values from 200 to 200, expected 0\.\.1 .* divide it"),
        ("negative floats", torch.full((3, 8, 8), -0.5), r"values from -0\.5 to -0\.5, expected 0\.\.1"),
        ("not a number", np.full((8, 8), np.nan), r"values from nan to nan, expected 0\.\.1"),
        ("bytes in 16 bits", np.full((8, 8), 255, np.uint16), "uint16 but holds nothing above 255; convert it"),
        ("whole numbers", np.zeros((8, 8), np.int64), "of type int64, which does not tell the range"),
        ("true and false", np.zeros((8, 8), bool), "of type bool, which does not tell the range"),
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


def test_gray_deep_and_floating_arrays_and_tensors_are_the_image_in_bytes():
    """uint8 in 0..255, uint16 in 0..65535 as files of 16 bits, floating point in 0..1; gray in all channels."""
    gray = np.array([[0, 1, 128], [200, 254, 255]], np.uint8)
    wanted = torch.from_numpy(gray).expand(3, 2, 3)
    deep, floats = gray.astype(np.uint16) * 257, gray / 255
    forms = [
        gray,
        gray[..., None],
        np.stack([gray] * 3, -1),
        deep,
        floats,
        floats.astype(np.float32)[..., None],
        torch.from_numpy(gray),
        torch.from_numpy(gray)[None],
        torch.from_numpy(floats).float().expand(3, -1, -1),
        torch.from_numpy(floats).bfloat16()[None] * 0 + torch.from_numpy(floats).half()[None].float(),
        torch.from_numpy(deep),
        Image.fromarray(gray),
        Image.fromarray(deep),
        Image.fromarray(deep.astype(np.int32)),
        Image.fromarray(floats.astype(np.float32)),
    ]
    for source in open_source(forms):
        assert torch.equal(source.read(), wanted), source.image_id


def test_a_deep_array_is_what_its_file_is(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (20, 30), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for span in ((0, 65535), (100.5, 4095)):
        forms = [tmp_path / "deep.png", deep, Image.fromarray(deep), torch.from_numpy(deep.astype(np.float32))]
        of_file, *of_arrays = (source.read(span) for source in open_source(forms, span))
        assert of_file.unique().numel() > 40
        assert all(torch.equal(of_file, of_array) for of_array in of_arrays)


def test_a_model_of_deep_images_predicts_on_them(predictor, tmp_path):
    """With the range that it was trained with; another model refuses them, rather than see black."""
    values = make_picture(75, 100, 1)[..., 0].astype(np.uint16) * 16
    Image.fromarray(values).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match=r"deep\.png: has more than 8 bits per channel.*set dataset\.value_range"):
        predictor.predict(tmp_path / "deep.png")
    spec = predictor.header.spec
    dataset = spec.dataset.model_copy(update={"value_range": (0.0, 4080.0)})
    header = replace(predictor.header, spec=spec.model_copy(update={"dataset": dataset}))
    deep = copy.copy(predictor)
    deep.header = header
    wanted = predictor.predict((values // 16).astype(np.uint8))
    assert_same(deep.predict(tmp_path / "deep.png"), wanted)
    assert_same(deep.predict(values), wanted)


@pytest.fixture
def server(tmp_path):
    """Address of a server that gives out a picture, and what no picture is."""
    save_picture(tmp_path / "www/a/one.png", 75, 100, 1)
    save_picture(tmp_path / "www/b/one.png", 75, 100, 2)
    (tmp_path / "www/page.png").write_text("<html>")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path / "www"))

        def do_GET(self):  # so the library calls it
            if self.path == "/cut.png":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"x" * 10)
            elif self.path == "/endless.png":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"x" * 5000)
            else:
                super().do_GET()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_an_address_is_an_image(predictor, server):
    wanted = predictor.predict(make_picture(75, 100, 1))
    found = predictor.predict(f"{server}/a/one.png?size=full")
    assert found.meta.file_name == "one.png"
    assert_same(found, wanted)
    several = predictor.predict([f"{server}/a/one.png", f"{server}/b/one.png", make_picture(75, 100, 1)])
    assert [p.meta.file_name for p in several] == ["000001_one.png", "000002_one.png", "image_000003.png"]
    assert_same(several[2], several[0])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/none.png", r"/none\.png: the server answers 404 \(File not found\), expected an image"),
        ("/page.png", r"^http://127\.0\.0\.1:\d+/page\.png: is not a readable image"),
        ("/cut.png", r"/cut\.png: .*(ends after 10 of 1000 bytes|cannot be fetched)"),
        ("/endless.png", r"/endless\.png: has more than 0 MiB, which is the limit of an image from an address"),
        ("/a/one.png", r"/a/one\.png: has more than 0 MiB"),
    ],
)
def test_an_address_without_an_image_is_refused(predictor, server, monkeypatch, path, message):
    if "more than" in message:
        monkeypatch.setattr(sources, "LARGEST_DOWNLOAD", 4000)
    with pytest.raises(UserError, match=message):
        predictor.predict(server + path)


def test_a_server_that_does_not_answer_is_named(predictor):
    with pytest.raises(UserError, match=r"^http://127\.0\.0\.1:9/x\.png: cannot be fetched \(.*refused\)"):
        predictor.predict("http://127.0.0.1:9/x.png")
    with pytest.raises(UserError, match=r"^http://\[: is no address"):
        predictor.predict("http://[")
