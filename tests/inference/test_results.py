import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from tessera.files import UserError
from tessera.inference.results import choose_images, infer, output_stems, write_results
from tessera.inference.sources import ImageSource, open_source
from tessera.inference.torch_runtime import TorchPredictor
from tessera.spec.schema import InferenceSpec
from tests.inference.tiny import CATALOG, make_catalog, make_model, make_picture, make_spec, save_picture


@pytest.fixture
def images(tmp_path):
    """Names that would collide without their suffix or their folder."""
    root = tmp_path / "images"
    names = ("a.png", "a.jpg", "left/b.png", "right/b.png", "right/c.d.JPEG")
    return [
        ImageSource(save_picture(root / name, 70 + 10 * number, 80, number), name, 40 + number)
        for number, name in enumerate(names)
    ]


def run(mode, images, folder, **inference):
    model, header = make_model(mode)
    predictor = TorchPredictor(model, header)
    spec = make_spec(mode, inference=inference)
    infer(predictor, spec, folder, images)
    predictions = {p.meta.image_id: p for _, p in predictor.stream(images)}
    return json.loads((folder / "index.json").read_text()), predictions


def on_disk(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("mode", "kinds"),
    [
        (
            "panoptic",
            {"overlays", "overlays_instance", "overlays_semantic", "semantic", "panoptic"}
            | {"panoptic.json", "instances.json", "index.json"},
        ),
        ("instance", {"overlays", "instances.json", "index.json"}),
        ("semantic", {"overlays", "semantic", "index.json"}),
    ],
)
def test_the_mode_decides_what_is_written_and_the_index_lists_all(images, tmp_path, mode, kinds):
    folder = tmp_path / "inference"
    index, _ = run(mode, images, folder)
    assert {path.name for path in folder.iterdir()} == kinds
    assert index["files"] == [*(name for name in on_disk(folder) if name != "index.json"), "index.json"]
    assert [entry["file_name"] for entry in index["images"]] == sorted(image.file_name for image in images)
    assert {entry["id"] for entry in index["images"]} == {40, 41, 42, 43, 44}
    assert index["mode"] == mode and index["runtime"] == "torch" and index["lineage"]["inference"]["opacity"] == 0.5
    assert str(tmp_path) not in json.dumps(index)
    for entry in index["images"]:
        with Image.open(folder / entry["overlay"]) as picture:
            assert picture.width % entry["width"] == 0 and picture.height % entry["height"] == 0


def test_coco_results_decode_to_the_masks(images, tmp_path):
    folder = tmp_path / "inference"
    index, predictions = run("instance", images, folder)
    results = json.loads((folder / "instances.json").read_text())
    catalog = make_catalog("instance")
    assert len(results) == sum(entry["instances"] for entry in index["images"]) > 0
    for image_id, prediction in predictions.items():
        found = [result for result in results if result["image_id"] == image_id]
        instances = prediction.instances
        assert [r["category_id"] for r in found] == [catalog.categories[label].id for label in instances.labels]
        assert [r["score"] for r in found] == instances.scores.tolist()
        for result, mask, box in zip(found, instances.masks, instances.boxes.tolist(), strict=True):
            assert np.array_equal(coco_mask.decode(result["segmentation"]), mask.numpy())
            x, y, width, height = result["bbox"]
            assert [x, y, x + width, y + height] == box


def test_panoptic_files_decode_to_the_segments(images, tmp_path):
    folder = tmp_path / "inference"
    index, predictions = run("panoptic", images, folder)
    document = json.loads((folder / "panoptic.json").read_text())
    assert document["categories"] == CATALOG.to_json() and len(document["annotations"]) == len(images)
    assert sum(entry["segments"] for entry in index["images"]) > 0
    for annotation in document["annotations"]:
        wanted = predictions[annotation["image_id"]].panoptic
        with Image.open(folder / "panoptic" / annotation["file_name"]) as picture:
            colors = np.asarray(picture).astype(np.int64)
        ids = colors[..., 0] + 256 * colors[..., 1] + 65536 * colors[..., 2]
        assert np.array_equal(ids, wanted.ids.numpy())
        for info, segment in zip(annotation["segments_info"], wanted.segments, strict=True):
            assert info["id"] == segment.id and info["area"] == (ids == segment.id).sum()
            assert info["category_id"] == CATALOG.categories[segment.label].id
            x, y, width, height = (int(value) for value in info["bbox"])
            inside = ids[y : y + height, x : x + width] == segment.id
            assert inside.sum() == info["area"]
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


def test_semantic_pngs_hold_the_datasets_ids(images, tmp_path):
    folder = tmp_path / "inference"
    index, predictions = run("semantic", images, folder)
    ids = np.array([category.id for category in CATALOG.categories])
    for entry in index["images"]:
        with Image.open(folder / entry["semantic"]) as picture:
            assert picture.mode == "I;16", "an id of 300 needs 16 bits"
            assert np.array_equal(np.asarray(picture), ids[predictions[entry["id"]].semantic.numpy()])


def test_a_second_run_replaces_the_folder_with_the_same_bytes(images, tmp_path):
    folder = tmp_path / "inference"
    run("panoptic", images[:2], folder)
    before = {name: (folder / name).read_bytes() for name in on_disk(folder)}
    (folder / "stale.png").write_bytes(b"")
    run("panoptic", images[:2], folder)
    assert {name: (folder / name).read_bytes() for name in on_disk(folder)} == before


def test_max_images_takes_the_first_by_name(images, tmp_path):
    index, _ = run("semantic", images[::-1], tmp_path / "inference", max_images=2)
    assert [entry["file_name"] for entry in index["images"]] == ["a.jpg", "a.png"]


def test_images_below_the_data_root_can_be_chosen(tmp_path):
    save_picture(tmp_path / "mine" / "y.png", 60, 60, 0)
    save_picture(tmp_path / "mine" / "x.png", 60, 60, 1)
    spec = make_spec("semantic", data_root=str(tmp_path), inference={"images": "mine"})
    assert [(s.file_name, s.image_id) for s in choose_images(spec)] == [("x.png", 1), ("y.png", 2)]
    spec = make_spec("semantic", data_root=str(tmp_path), inference={"images": "mine/y.png"})
    assert [s.file_name for s in choose_images(spec)] == ["y.png"]
    spec = make_spec("semantic", data_root=str(tmp_path), inference={"images": "yours"})
    with pytest.raises(UserError, match="yours: no such file or folder"):
        choose_images(spec)
    with pytest.raises(UserError, match="has no image"):
        choose_images(make_spec("semantic"))


def test_a_broken_image_leaves_no_folder_and_keeps_the_old_one(images, tmp_path):
    folder = tmp_path / "inference"
    run("semantic", images[:1], folder)
    before = on_disk(folder)
    images[-1].content.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"c\.d\.JPEG"):
        run("semantic", images, folder)
    assert on_disk(folder) == before and sorted(p.name for p in tmp_path.iterdir()) == ["images", "inference"]


def test_no_instance_anywhere_is_an_error(tmp_path):
    model, header = make_model("instance")
    image = torch.from_numpy(make_picture(64, 64, 0)).permute(2, 0, 1)
    prediction = TorchPredictor(model, header).predict(make_picture(64, 64, 0))
    nothing = prediction.instances
    for name in ("scores", "labels", "boxes", "masks"):
        setattr(nothing, name, getattr(nothing, name)[:0])
    with pytest.raises(UserError, match="no instance in any of the 1 images"):
        write_results([(image, prediction)], [prediction.meta.file_name], tmp_path / "out", header.catalog, "instance")
    assert not (tmp_path / "out").exists()


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no images were given"):
        write_results([], [], tmp_path / "out", CATALOG, "semantic", InferenceSpec())


@pytest.mark.parametrize(
    ("names", "stems"),
    [
        (["a.jpg", "b.png"], ["a", "b"]),
        (["x/a.jpg", "y/a.jpg"], ["x/a", "y/a"]),
        (["a.jpg", "a.png", "b.png"], ["a.jpg", "a.png", "b"]),
        (["A.jpg", "a.png"], ["A.jpg", "a.png"]),
        (["a.jpg", "a.png", "a.jpg.png"], ["a.jpg", "a.png", "a.jpg.png"]),
        (["a.b.jpg", "a.c.jpg"], ["a.b", "a.c"]),
    ],
)
def test_result_names_never_collide(names, stems):
    assert list(output_stems(names).values()) == stems


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "x/../../a.png", "..", "", "x\\a.png"])
def test_names_that_leave_their_folder_are_refused(name):
    with pytest.raises(UserError, match="expected a relative name"):
        output_stems([name])


def test_a_name_given_twice_is_refused():
    with pytest.raises(UserError, match=r"'a\.png' is given 2 times"):
        output_stems(["a.png", "b.png", "a.png"])


def test_results_of_a_list_keep_sub_folders(tmp_path):
    paths = [save_picture(tmp_path / side / "x.png", 60, 60, 0) for side in ("left", "right")]
    model, header = make_model("semantic")
    sources = open_source(paths)
    stream = TorchPredictor(model, header).stream(sources)
    write_results(stream, [s.file_name for s in sources], tmp_path / "out", header.catalog, "semantic")
    assert (tmp_path / "out/semantic/left/x.png").is_file() and (tmp_path / "out/overlays/right/x.png").is_file()
