import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from tessera import files
from tessera.files import UserError, write_json
from tessera.inference.results import choose_images, infer, output_stems, predict_to, recolored, write_results
from tessera.inference.sources import ImageSource, gather, open_source
from tessera.inference.torch_runtime import TorchPredictor
from tessera.spec.schema import InferenceSpec, read_spec
from tessera.structures import Category, ClassCatalog, ImageMeta, Instances, Predictions
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
    assert on_disk(folder) == sorted([*index["outputs"], "index.json"])
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


def test_no_instance_anywhere_gives_empty_results_and_a_warning(tmp_path, capsys):
    model, header = make_model("instance")
    image = torch.from_numpy(make_picture(64, 64, 0)).permute(2, 0, 1)
    prediction = TorchPredictor(model, header).predict(make_picture(64, 64, 0))
    nothing = prediction.instances
    for name in ("scores", "labels", "boxes", "masks"):
        setattr(nothing, name, getattr(nothing, name)[:0])
    folder = tmp_path / "out"
    written = write_results([(image, prediction)], [prediction.meta.file_name], folder, header.catalog, "instance")
    assert (written.images, written.found, written.broken) == (1, 0, ())
    assert json.loads((folder / "instances.json").read_text()) == []
    assert "warning: the model found no instance in any of the 1 images" in capsys.readouterr().err


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


def test_a_name_that_is_not_utf_8_is_refused():
    with pytest.raises(UserError, match=r"'stra\\udcdfe\.png': is not UTF-8"):
        output_stems([os.fsdecode(b"stra\xdfe.png")])


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


CELLS = ClassCatalog(
    (
        Category(1, "red cell", (220, 40, 60), True),
        Category(4, "platelet", (40, 90, 200), True),
    )
)


def detected(file_name, scores, labels, boxes, image_id=1, size=(120, 160)):
    instances = Instances(torch.tensor(scores), torch.tensor(labels), torch.tensor(boxes).reshape(-1, 4), None)
    image = torch.full((3, *size), 128, dtype=torch.uint8)
    return image, Predictions(ImageMeta(image_id, file_name, size, size), instances=instances)


def write_detections(folder, stream, **settings):
    names = [prediction.meta.file_name for _, prediction in stream]
    write_results(stream, names, folder, CELLS, "detection", InferenceSpec(**settings))
    return json.loads((folder / "index.json").read_text())


def test_detections_become_boxes_json_and_kitti_labels(tmp_path):
    stream = [
        detected("a/1.png", [], torch.zeros(0, dtype=torch.int64).tolist(), []),
        detected("a/2.png", [0.75, 0.5, 0.25], [1, 0, 0], [[10.5, 20, 60, 80.25], [90, 30, 150, 110], [0, 0, 9, 9]], 2),
    ]
    folder = tmp_path / "inference"
    index = write_detections(folder, stream)
    assert on_disk(folder) == sorted([*index["outputs"], "index.json"])
    assert {path.name for path in folder.iterdir()} == {"overlays", "labels", "instances.json", "index.json"}
    results = json.loads((folder / "instances.json").read_text())
    assert [(r["image_id"], r["category_id"], r["score"]) for r in results] == [(2, 4, 0.75), (2, 1, 0.5), (2, 1, 0.25)]
    assert results[0]["bbox"] == [10.5, 20.0, 49.5, 60.25] and "segmentation" not in results[0]
    assert (folder / "labels/a/1.txt").read_text() == "", "every image has its file"
    zeros = "0.00 0.00 0.00 0.00 0.00 0.00 0.00"
    assert (folder / "labels/a/2.txt").read_text() == (
        f"platelet 0.00 0 0.00 10.50 20.00 60.00 80.25 {zeros} 0.7500\n"
        f"red_cell 0.00 0 0.00 90.00 30.00 150.00 110.00 {zeros} 0.5000\n"
    )
    assert [len(line.split()) for line in (folder / "labels/a/2.txt").read_text().splitlines()] == [16, 16]
    entry = index["images"][1]
    assert (entry["labels"], entry["instances"], entry["instances_drawn"]) == ("labels/a/2.txt", 3, 2)
    write_detections(folder, stream, score_threshold=0.0)
    assert len((folder / "labels/a/2.txt").read_text().splitlines()) == 3


def test_colours_and_outlines_can_be_chosen(tmp_path):
    stream = [detected("1.png", [0.9, 0.8], [0, 1], [[10.0, 10, 60, 100], [100, 30, 150, 110]], size=(500, 500))]

    def drawn(name, **settings):
        write_detections(tmp_path / name, stream, **settings)
        with Image.open(tmp_path / name / "overlays/1.png") as picture:
            return np.asarray(picture.convert("RGB"))

    plain = drawn("plain")
    assert tuple(plain[60, 10]) == (220, 40, 60) and tuple(plain[70, 149]) == (40, 90, 200)
    assert tuple(plain[60, 14]) == (128, 128, 128)
    changed = drawn("changed", color_map={"red cell": (1, 250, 3)}, outline_width=6)
    assert tuple(changed[60, 10]) == tuple(changed[60, 14]) == (1, 250, 3)
    assert tuple(changed[70, 149]) == (40, 90, 200), "a class that is not named keeps the label map's colour"
    for name, hint in (("cell", "did you mean 'red cell'"), ("xyz", "its classes are red cell")):
        with pytest.raises(UserError, match=rf"inference\.color_map: the model has no class '{name}'; {hint}"):
            drawn("wrong", color_map={name: (1, 2, 3)})
    assert not (tmp_path / "wrong").exists()


def test_classes_of_one_name_are_coloured_by_their_ids():
    twins = ClassCatalog(tuple(Category(number, "screen", (0, 0, number), True) for number in (24, 131)))
    found = recolored(twins, {"screen (131)": (9, 9, 9)})
    assert [category.color for category in found.categories] == [(0, 0, 24), (9, 9, 9)]
    with pytest.raises(
        UserError, match=r"2 classes are called 'screen'; name one of them, 'screen \(24\)' or 'screen \(131\)'"
    ):
        recolored(twins, {"screen": (9, 9, 9)})


def test_class_names_that_kitti_cannot_tell_apart_are_refused(tmp_path):
    twins = ClassCatalog((Category(1, "red cell", (1, 2, 3), True), Category(2, "red_cell", (3, 2, 1), True)))
    with pytest.raises(UserError, match="2 classes would be called 'red_cell'"):
        write_results([detected("1.png", [0.9], [0], [[1.0, 1, 5, 5]])], ["1.png"], tmp_path / "x", twins, "detection")


def test_ids_beyond_16_bits_are_written_as_colours(tmp_path):
    far = ClassCatalog((Category(3, "cell", (1, 2, 3), True), Category(70000, "ground", (3, 2, 1), False)))
    semantic = torch.tensor([[0, 1], [1, 0]])
    prediction = Predictions(ImageMeta(1, "1.png", (2, 2), (2, 2)), semantic=semantic)
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    write_results([(image, prediction)], ["1.png"], tmp_path / "x", far, "semantic")
    with Image.open(tmp_path / "x/semantic/1.png") as picture:
        colours = np.asarray(picture).astype(int)
    assert (colours @ [1, 256, 65536]).tolist() == [[3, 70000], [70000, 3]]


@pytest.mark.parametrize("mode", ["semantic", "panoptic"])
def test_ids_beyond_24_bits_are_refused_before_anything_is_predicted(tmp_path, mode):
    far = ClassCatalog((Category(2**24, "cell", (1, 2, 3), True),))
    with pytest.raises(UserError, match=r"the class 'cell' has the id 16777216.*up to 16777215"):
        write_results(iter(()), ["1.png"], tmp_path / "x", far, mode)
    assert not (tmp_path / "x").exists()


def test_labels_are_written_as_plainly_as_pictures(tmp_path, monkeypatch):
    """Their folder is temporary as a whole; each written by itself looked through all before it."""
    scanned = []
    monkeypatch.setattr(files, "remove_abandoned", lambda folder: scanned.append(folder.name))
    write_detections(tmp_path / "x", [detected("1.png", [], [], [])])
    assert scanned and "labels" not in scanned


def test_no_detection_anywhere_gives_empty_results_and_a_warning(tmp_path, capsys):
    index = write_detections(tmp_path / "x", [detected("1.png", [], [], [])])
    assert index["images"][0]["instances"] == 0 and (tmp_path / "x/labels/1.txt").read_text() == ""
    assert json.loads((tmp_path / "x/instances.json").read_text()) == []
    assert "found no instance in any of the 1 images (postprocess.conf_threshold drops" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("draw", "pictures"),
    [
        ("off", set()),
        ("one", {"overlay"}),
        ("all", {"overlay", "overlay_instance", "overlay_semantic"}),
    ],
)
def test_what_is_drawn_can_be_chosen(images, tmp_path, draw, pictures):
    index, _ = run("panoptic", images[:1], tmp_path / "out", draw=draw)
    assert {key for key in index["images"][0] if key.startswith("overlay")} == pictures
    assert {path.name for path in (tmp_path / "out").glob("overlays*")} == {
        {"overlay": "overlays"}.get(key, key.replace("overlay", "overlays")) for key in pictures
    }


def test_a_limit_is_said(images, tmp_path, capsys):
    run("semantic", images, tmp_path / "out", max_images=2)
    assert "infer: 2 of 5 images; inference.max_images=null for all\n" in capsys.readouterr().err


def test_named_images_have_no_limit_unless_one_is_set():
    assert make_spec(inference={"images": "mine"}).inference.max_images is None
    assert make_spec(inference={"images": "mine", "max_images": 3}).inference.max_images == 3
    assert make_spec(inference={}).inference.max_images == 16
    spec = make_spec(inference={"images": "mine"})
    assert read_spec(spec.model_dump(mode="json")) == spec


def test_files_of_other_kinds_are_counted(tmp_path, capsys):
    for name in ("a.png", "deeper/b.jpg"):
        save_picture(tmp_path / "mine" / name, 60, 60, 0)
    for name in ("a.heic", "deeper/b.HEIC", "c.jp2", "notes", ".hidden.png", ".git/x.png"):
        path = tmp_path / "mine" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "mine/link").symlink_to(tmp_path)
    spec = make_spec("semantic", data_root=str(tmp_path), inference={"images": "mine"})
    assert [source.file_name for source in choose_images(spec)] == ["a.png", "deeper/b.jpg"]
    assert (
        "mine: 7 other entries are not read (2 .heic, 1 .jp2, 2 hidden, 1 linked folder, 1 without an ending)"
        in capsys.readouterr().err
    )


def test_only_results_are_replaced(tmp_path):
    predictor = TorchPredictor(*make_model("semantic"))
    picture, folder = save_picture(tmp_path / "a.png", 60, 60, 0), tmp_path / "out"
    predict_to(predictor, picture, folder)
    predict_to(predictor, picture, folder)
    (folder / "mine").mkdir()
    (folder / "mine/thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds mine/thesis\.tex, which no inference wrote"):
        predict_to(predictor, picture, folder)
    with pytest.raises(UserError, match=r"holds a\.png, which no inference wrote"):
        predict_to(predictor, picture, tmp_path)
    assert picture.exists() and (folder / "mine/thesis.tex").exists()


def test_a_list_for_a_test_server_keeps_its_ids_and_names(tmp_path):
    """COCO's form without annotations; the panoptic results need no folder of truth."""
    names = ("b/2.png", "a/1.png")
    for name in names:
        save_picture(tmp_path / "test" / name, 60, 60, 0)
    listed = [{"id": 10**9 + number, "file_name": name} for number, name in enumerate(names)]
    write_json(tmp_path / "image_info.json", {"images": listed, "categories": []})
    sources, _ = gather([str(tmp_path / "image_info.json")], tmp_path / "test")
    predict_to(TorchPredictor(*make_model("panoptic")), sources, tmp_path / "out")
    results = json.loads((tmp_path / "out/instances.json").read_text())
    assert {result["image_id"] for result in results} <= {10**9, 10**9 + 1} and results
    panoptic = json.loads((tmp_path / "out/panoptic.json").read_text())
    assert [(a["image_id"], a["file_name"]) for a in panoptic["annotations"]] == [
        (10**9, "b/2.png"),
        (10**9 + 1, "a/1.png"),
    ]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "expected a COCO file with a list `images`"),
        ([{"id": "1", "file_name": "a.png"}], r"entry 1 \(a\.png\): id is '1', expected a whole number"),
        ([{"id": True, "file_name": "a.png"}], "entry 1 .*id is True"),
        ([{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}], "image id 1 occurs 2 times"),
        ([{"id": 1, "file_name": "../a.png"}], "without '..'"),
        ([7], "entry 1: is 7, expected an object"),
    ],
)
def test_a_list_of_something_else_is_refused(tmp_path, images, message):
    write_json(tmp_path / "list.json", {"images": images})
    with pytest.raises(UserError, match=message):
        gather([str(tmp_path / "list.json")])


def test_three_lines_of_python_write_pictures_and_label_maps(tmp_path):
    save_picture(tmp_path / "photos/a.png", 60, 60, 0)
    model, header = make_model("semantic")
    predict_to(TorchPredictor(model, header), tmp_path / "photos", tmp_path / "out", InferenceSpec(opacity=1.0))
    assert on_disk(tmp_path / "out") == ["index.json", "overlays/a.png", "semantic/a.png"]
