"""KITTI folders to COCO shards and back."""

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tessera.data.catalog import load_catalog
from tessera.data.check import check_dataset
from tessera.data.datasets import open_dataset
from tessera.data.demo import write_demo
from tessera.files import UserError, digest_file
from tessera.interop.kitti import convert_dataset, describe, export_kitti
from tessera.spec.schema import ConvertSpec, DatasetSpec, DemoSpec, SplitSpec

OUT = Path("data/cars/converted")
MAPPING = {"Car": "vehicle", "van": "vehicle", "Traffic Light": "light"}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def row(kitti: str, *box: object) -> str:
    return f"{kitti} 0.00 0 -1.57 {' '.join(map(str, box))} 1.5 1.6 3.9 -0.7 1.8 12.3 -1.6\n"


def picture(name: str, size: tuple[int, int] = (40, 30), **options: Any) -> None:
    path = Path("raw") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size).save(path, **options)


def labels(name: str, *rows: str) -> None:
    path = Path("raw") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(rows))


def images(count: int, source: str = "a") -> None:
    for number in range(count):
        picture(f"{source}/images/{number:03d}.png")
        labels(f"{source}/labels/{number:03d}.txt", row("Car", 1, 2, 3 + number % 7, 9))


def dataset(**keys: Any) -> DatasetSpec:
    Path("raw").mkdir(exist_ok=True)
    Path("raw/map.json").write_text(json.dumps(MAPPING))
    options = {"input_source": ["a"], "mapping_path": "map.json", **keys}
    train, val = (
        SplitSpec(images=".", annotations=f"cars/converted/shards/{name}-*.json") for name in ("train", "val")
    )
    return DatasetSpec(name="cars", type="coco", convert=ConvertSpec(**options), train=train, val=val)


def convert(**keys: Any) -> dict[str, Any]:
    return convert_dataset(dataset(**keys), "raw", progress=False)


def shards(pattern: str = "*") -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((OUT / "shards").glob(f"{pattern}.json"))]


def dropped() -> list[dict[str, str]]:
    with (OUT / "dropped.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def content() -> dict[str, bytes]:
    return {path.relative_to(OUT).as_posix(): path.read_bytes() for path in OUT.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("count", "wanted"), [(1, 8), (3, 8), (7, 3), (8, 8), (600, 2)])
def test_every_image_is_in_exactly_one_shard(count: int, wanted: int) -> None:
    images(count)
    manifest = convert(num_shards=wanted)
    found = shards("train-*")
    assert len(found) == min(count, wanted) == manifest["counts"]["train"]["shards"]
    assert all(shard["images"] for shard in found)
    listed = [image for shard in found for image in shard["images"]]
    assert [image["file_name"] for image in listed] == [f"a/images/{number:03d}.png" for number in range(count)]
    assert [image["id"] for image in listed] == list(range(1, count + 1))
    boxes = [item for shard in found for item in shard["annotations"]]
    assert [item["id"] for item in boxes] == list(range(1, count + 1))
    for shard in found:
        assert {item["image_id"] for item in shard["annotations"]} == {image["id"] for image in shard["images"]}


def test_classes_boxes_and_sizes() -> None:
    picture("a/images/x.jpg", (40, 30), exif=_turned())
    labels(
        "a/labels/x.txt",
        row("CAR", "1.50", "2", "11.75", "8"),
        "\n",
        row("traffic_LIGHT", 0, 0, 5, 5).replace("\n", "\r\n"),
        row("vAn", -3, 1, 4, 2).replace(" ", "\t"),
    )
    manifest = convert()
    (shard,) = shards()
    assert shard["images"] == [{"id": 1, "file_name": "a/images/x.jpg", "height": 40, "width": 30}]
    assert shard["categories"] == [{"id": 1, "name": "vehicle"}, {"id": 2, "name": "light"}]
    assert [(item["category_id"], item["bbox"], item["area"]) for item in shard["annotations"]] == [
        (1, [1.5, 2, 10.25, 6], 61.5),
        (2, [0, 0, 5, 5], 25),
        (1, [-3, 1, 7, 1], 7),
    ]
    assert manifest["counts"]["train"]["classes"] == {"vehicle": 2, "light": 1}


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_every_dropped_label_is_reported_by_class_and_reason() -> None:
    picture("a/images/1.png")
    labels(
        "a/labels/1.txt",
        row("Car", 1, 1, 9, 9),
        row("Tram", 1, 1, 9, 9),
        row("Car", 5, 5, 5, 9),
        row("van", 9, 9, 8, 10),
        row("DontCare", 1, 1, 9, 9),
        row("Car", 40, 0, 50, 9),
        row("Car", -9, 0, 0, 9),
    )
    labels("a/labels/2.txt", row("Car", 1, 1, 9, 9), row("Tram", 1, 1, 9, 9))
    picture("a/images/3.png")
    manifest = convert()
    assert [tuple(entry.values()) for entry in dropped()] == [
        ("a/images/3.png", "", "", "image without a label file"),
        ("a/labels/1.txt", "2", "Tram", "unmapped class"),
        ("a/labels/1.txt", "3", "Car", "degenerate box"),
        ("a/labels/1.txt", "4", "van", "degenerate box"),
        ("a/labels/1.txt", "5", "DontCare", "unmapped class"),
        ("a/labels/1.txt", "6", "Car", "box outside the image"),
        ("a/labels/1.txt", "7", "Car", "box outside the image"),
        ("a/labels/2.txt", "1", "Car", "labels without an image"),
        ("a/labels/2.txt", "2", "Tram", "labels without an image"),
    ]
    counted: Counter[tuple[str, str]] = Counter((entry["reason"], entry["class"]) for entry in dropped())
    assert {
        (reason, name): count for reason, names in manifest["dropped"].items() for name, count in names.items()
    } == counted
    assert manifest["counts"]["train"]["images"] == 1
    assert "left out, degenerate box: Car 1, van 1" in describe(manifest)


def test_a_second_run_and_more_processes_give_the_same_bytes() -> None:
    images(300)
    convert(num_shards=3, val_split=30)
    first = content()
    made = (OUT / "manifest.json").stat().st_ino
    convert_dataset(dataset(num_shards=3, val_split=30), "raw", processes=2, progress=False)
    assert content() == first
    assert (OUT / "manifest.json").stat().st_ino != made, "made again"
    manifest = json.loads(first["manifest.json"])
    assert manifest["files"] == {name: digest_file(OUT / name) for name in sorted(first) if name != "manifest.json"}
    assert sorted(path.name for path in Path("data/cars").iterdir()) == [".convert.lock", "converted"]


def test_the_split_depends_on_name_and_seed_alone() -> None:
    def members(part: str) -> set[str]:
        return {image["file_name"] for shard in shards(f"{part}-*") for image in shard["images"]}

    images(200)
    convert(val_split=25)
    train, val = members("train"), members("val")
    assert len(train | val) == 200 and not train & val and 30 <= len(val) <= 70
    images(260)
    images(20, "b")
    convert(input_source=["b", "a"], val_split=25, num_shards=5)
    assert val == {name for name in members("val") if name in train | val}
    convert(val_split=25, seed=1)
    assert members("val") != val
    convert(num_partitions=3)
    folds = [members(f"fold{number}") for number in range(3)]
    assert sum(map(len, folds)) == len(set().union(*folds)) == 260
    assert all(60 <= len(fold) <= 115 for fold in folds)


MALFORMED = {
    "columns": ("Car 0 0 0 1 2 3\n", r"line 1: has 7 column\(s\), expected 15"),
    "scores": (row("Car", 1, 2, 3, 4).rstrip() + " 0.9\n", "line 1: has 16 columns, as a detector's results"),
    "text for a side": (row("Car", 1, "two", 3, 4), "line 1: a side of the box is 'two'"),
    "nan": (row("Car", 1, 2, "nan", 4), "a side of the box is 'nan'"),
    "other digits": (row("Car", 1, 2, "１", 4), "a side of the box is '１'"),
    "underscore": (row("Car", 1, 2, "1_0", 4), "a side of the box is '1_0'"),
    "too many digits": (row("Car", "1e40", 2, "2e-40", 4), "needs more than 64 digits"),
    "too large": (row("Car", 1, 2, "9e999999", 4), "needs more than 64 digits"),
    "infinite as a float": (row("Car", 0, 2, "1e400", 4), "reaches 1e308"),
    "area that is": (row("Car", 0, 0, "1e200", "1e200"), "reaches 1e308"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_line_is_an_error_that_names_it(name: str) -> None:
    text, message = MALFORMED[name]
    images(2)
    labels("a/labels/001.txt", text)
    with pytest.raises(UserError, match=f"a/labels/001.txt, .*{message}"):
        convert()
    assert not OUT.exists() and [path.name for path in Path("data/cars").iterdir()] == [".convert.lock"]


def test_all_faults_come_at_once_and_nothing_is_replaced() -> None:
    images(4)
    convert()
    before = content()
    labels("a/labels/000.txt", "Car\n", "Car 1\n")
    Path("raw/a/labels/001.txt").write_bytes(b"\xff\xff")
    picture("a/images/002.jpg")
    Path("raw/a/images/003.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"below raw: 5 problem\(s\)") as caught:
        convert()
    for words in (
        "labels/000.txt, line 1: has 1 column(s)",
        "labels/000.txt, line 2: has 2 column(s)",
        "labels/001.txt: cannot be read as text",
        "002.png': belongs to one image with a/images/002.jpg",
        "images/003.png: is not a readable image",
    ):
        assert words in str(caught.value)
    assert content() == before


CONTRADICTIONS: dict[str, tuple[Any, str]] = {
    "case": ({"car": "a", "CAR": "b"}, "'car' and 'CAR' are one class"),
    "white space": ({"a b": "a", "a_b": "b"}, "'a b' and 'a_b' are one class"),
    "number": ({"car": 1}, "'car' leads to 1"),
    "list": (["car"], "expected an object"),
    "empty": ({}, "expected an object"),
    "repeated key": ('{"Car": "a", "Car": "b"}', "'Car' and 'Car' are one class"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_mapping_that_contradicts_itself(name: str) -> None:
    images(1)
    mapping, message = CONTRADICTIONS[name]
    asked = dataset()
    Path("raw/map.json").write_text(mapping if isinstance(mapping, str) else json.dumps(mapping))
    with pytest.raises(UserError, match=rf"raw/map\.json: {message}"):
        convert_dataset(asked, "raw", progress=False)


def test_what_leaves_nothing_to_train_on_fails() -> None:
    with pytest.raises(UserError, match="raw/a/images: no such folder"):
        convert()
    picture("a/images/1.png")
    Path("raw/a/labels").mkdir()
    with pytest.raises(UserError, match="no image with a label file is left for train"):
        convert()
    labels("a/labels/1.txt", row("Tram", 1, 1, 2, 2))
    with pytest.raises(UserError, match=r"no label is left \(unmapped class: Tram 1"):
        convert()


EMPTY: dict[str, tuple[dict[str, Any], str]] = {
    "val of its own": ({"val_source": ["none"]}, "for val; look into the folders of convert.val_source$"),
    "test": ({"test_source": ["none"]}, "for test; look into the folders of convert.test_source$"),
    "train": ({"input_source": ["none"]}, "for train; look into the folders of convert.input_source$"),
    "val that is drawn": ({"val_split": 0.001}, "for val; .*input_source, or change convert.val_split or its seed$"),
    "fold": ({"num_partitions": 50}, r"for fold\d+; .*input_source, or lower convert.num_partitions$"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_part_without_images_says_where_to_look(name: str) -> None:
    keys, message = EMPTY[name]
    images(3)
    for kind in ("images", "labels"):
        Path("raw/none", kind).mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        convert(**keys)
    assert not OUT.exists()


def test_a_byte_order_mark_is_no_part_of_a_class() -> None:
    images(1)
    labels("a/labels/000.txt", "\ufeff", row("Car", 1, 2, 3, 4), row("van", 1, 2, 3, 4))
    Path("raw/classes.txt").write_text("\ufeffCar\nvan\n")
    asked = dataset().model_copy(update={"label_map": "classes.txt", "convert": ConvertSpec(input_source=["a"])})
    assert convert_dataset(asked, "raw", progress=False)["counts"]["train"]["classes"] == {"Car": 1, "van": 1}


def test_a_shard_without_objects_does_not_make_boxes_into_masks() -> None:
    images(3)
    labels("a/labels/001.txt", "")
    convert(num_shards=3)
    asked = dataset(num_shards=3).model_copy(update={"val": SplitSpec()})
    report = check_dataset(asked, "raw", progress=False)
    train = report["splits"]["train"]
    assert report["modes"] == ["detection"]
    assert (train["images"], train["images_without_objects"], train["objects"]) == (3, 1, 2)
    with pytest.raises(UserError, match="none of its annotations has a mask"):
        open_dataset(asked, "train", load_catalog(asked, "raw", "instance"), "instance", "raw")


def test_a_process_that_is_ended_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    images(2)
    monkeypatch.setattr(
        "tessera.interop.kitti.convert._Reader.__call__", lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    )
    with pytest.raises(UserError, match=r"was ended from outside; .* convert with fewer \(--processes\)"):
        convert_dataset(dataset(), "raw", 2, progress=False)
    assert not OUT.exists()


def test_images_of_shards_lie_below_the_data_root() -> None:
    split = SplitSpec(images="a/images", annotations="cars/converted/shards/train-*.json")
    with pytest.raises(ValueError, match=r"train.images: expected \., .* found 'a/images'"):
        DatasetSpec(name="cars", type="coco", convert=ConvertSpec(input_source=["a"]), label_map="m.txt", train=split)


def test_label_map_names_and_ids() -> None:
    images(1)
    Path("raw/classes.txt").write_text("light\nvehicle\n")
    asked = dataset().model_copy(update={"label_map": "classes.txt"})
    assert convert_dataset(asked, "raw", progress=False)["categories"] == [
        {"id": 1, "name": "light"},
        {"id": 2, "name": "vehicle"},
    ]
    assert {item["category_id"] for shard in shards() for item in shard["annotations"]} == {2}
    Path("raw/classes.txt").write_text("light\n")
    with pytest.raises(UserError, match=r"'Car' leads to 'vehicle', which is no class of raw/classes\.txt"):
        convert_dataset(asked, "raw", progress=False)
    Path("raw/classes.txt").write_text("light\nvehicle\nlight\n")
    with pytest.raises(UserError, match=r"raw/classes\.txt: several classes are called 'light'; KITTI labels tell"):
        convert_dataset(asked, "raw", progress=False)


NUMBERS = st.integers(0, 20).flatmap(
    lambda places: st.integers(-50 * 10**places, 90 * 10**places).map(lambda digits: Decimal(digits).scaleb(-places))
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["vehicle", "light"]), *[NUMBERS] * 4), max_size=6))
def test_there_and_back_without_loss(boxes: list[tuple[str, Decimal, Decimal, Decimal, Decimal]]) -> None:
    ordered = [(name, min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)) for name, x1, y1, x2, y2 in boxes]
    kept = [box for box in ordered if box[1] < box[3] and box[2] < box[4] and _meets_the_image(*box[1:])]
    kept.append(("vehicle", Decimal("1.10"), Decimal("0.7"), Decimal("3.33"), Decimal("9")))
    picture("a/images/x.png")
    labels("a/labels/x.txt", *(row(*box) for box in kept))
    asked = dataset().model_copy(update={"label_map": "classes.txt", "val": SplitSpec()})
    Path("raw/classes.txt").write_text("vehicle\nlight\n")
    asked = asked.model_copy(update={"convert": ConvertSpec(input_source=["a"])})
    convert_dataset(asked, "raw", progress=False)
    out = Path("back") / f"{time.monotonic_ns()}"
    assert export_kitti(asked, "raw", out) == {"train": (1, len(kept))}
    lines = [line.split() for line in (out / "train/a/images/x.txt").read_text().splitlines()]
    assert [(line[0], *map(Decimal, line[4:8])) for line in lines] == kept
    assert all(len(line) == 15 for line in lines)


def _meets_the_image(left: Decimal, top: Decimal, right: Decimal, bottom: Decimal) -> bool:
    return right > 0 and bottom > 0 and left < 40 and top < 30


def test_the_way_back_refuses_what_it_cannot_write() -> None:
    images(2)
    convert(val_split=0)
    asked = dataset().model_copy(update={"val": SplitSpec()})
    Path("there").mkdir()
    with pytest.raises(UserError, match="there: exists already"):
        export_kitti(asked, "raw", Path("there"))
    with pytest.raises(UserError, match="its type is mask_pairs"):
        export_kitti(DatasetSpec(name="x", type="mask_pairs"), "raw", Path("out"))
    assert not Path("out").exists()


def demo(name: str) -> DatasetSpec:
    place = f"{name}/converted/shards"
    return DatasetSpec(
        name=name,
        type="coco",
        generator=DemoSpec(train_images=20, val_images=3, test_images=4, height=64, width=96),
        label_map=f"{name}/label_map.json",
        convert=ConvertSpec(
            input_source=["train"],
            val_source=["val"],
            test_source=["test"],
            image_dir_name=f"{name}/images/{{source}}",
            label_dir_name=f"{name}/labels/{{source}}",
            num_shards=3,
        ),
        train=SplitSpec(images=".", annotations=f"{place}/train-*.json"),
        val=SplitSpec(images=".", annotations=f"{place}/val-*.json"),
        test=SplitSpec(images=".", annotations=f"{place}/test-*.json"),
    )


def test_training_reads_what_the_demo_drew() -> None:
    """The shards of the demo's KITTI labels hold the boxes of its own COCO files."""
    asked = demo("scenes")
    assert asked.generator is not None
    write_demo(Path("data/scenes"), asked.generator, progress=False)
    convert_dataset(asked, "data", progress=False)
    report = check_dataset(asked, "data", progress=False)
    assert report["modes"] == ["detection"]
    catalog = load_catalog(asked, "data", "detection")
    for split in ("train", "val", "test"):
        own = SplitSpec(images=f"scenes/images/{split}", annotations=f"scenes/instances_{split}.json")
        plain = asked.model_copy(update={"convert": None, split: own})
        ours = open_dataset(asked, split, catalog, "detection", "data")
        theirs = open_dataset(plain, split, catalog, "detection", "data")
        assert len(ours) == len(theirs) == report["splits"][split]["images"]
        for index in range(len(ours)):
            one, two = ours.read(index), theirs.read(index)
            assert Path(one.file_name).name == Path(two.file_name).name
            assert one.image.equal(two.image)
            assert one.target.labels.equal(two.target.labels) and one.target.boxes.equal(two.target.boxes)


FAULTS: dict[str, tuple[Any, str]] = {
    "annotation of no image": (
        lambda value: value["annotations"][0].update(image_id=9),
        "images that are not listed (image_id 9)",
    ),
    "unknown class": (
        lambda value: value["annotations"][0].update(category_id=9),
        "category_id 9 in 1 record(s) is not among the 2",
    ),
    "corners": (lambda value: value["annotations"][0].update(bbox=[5, 5, -1, 1]), "width and height are 0 or more"),
    "repeated id": (lambda value: value["images"][1].update(id=1), "image id 1 occurs 2 times"),
    "repeated name": (
        lambda value: value["images"][1].update(file_name="a/images/000.jpg"),
        "a/images/000.jpg: another image has the label file 000.txt",
    ),
    "too many digits": (
        lambda value: value["annotations"][0].update(bbox=[1e40, 0, 2e-40, 1]),
        "corners of 64 digits at most",
    ),
    "crowd of text": (lambda value: value["annotations"][0].update(iscrowd="0"), "iscrowd is '0', expected 0 or 1"),
    "name that leaves": (lambda value: value["images"][1].update(file_name="../x.png"), "without '..'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_way_back_names_every_fault_and_writes_nothing(name: str) -> None:
    break_it, message = FAULTS[name]
    Path("raw").mkdir()
    annotations = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}]
    listed = [{"id": number + 1, "file_name": f"a/images/{number:03d}.png"} for number in range(2)]
    value = {"images": listed, "annotations": annotations}
    break_it(value)
    Path("raw/a.json").write_text(json.dumps(value))
    Path("raw/classes.txt").write_text("vehicle\nlight\n")
    split = SplitSpec(images=".", annotations="a.json")
    with pytest.raises(UserError, match=re.escape(message)):
        export_kitti(DatasetSpec(name="x", type="coco", label_map="classes.txt", train=split), "raw", Path("out"))
    assert not Path("out").exists()


def test_from_coco_and_back() -> None:
    """Class and box stay; what KITTI does not hold, or convert leaves out, is lost."""
    listed = [{"id": number + 7, "file_name": f"{number}.png", "height": 30, "width": 40} for number in range(2)]
    kept: list[dict[str, Any]] = [
        {"image_id": 7, "category_id": 2, "bbox": [0.1, 0.2, 10.3, 4.05]},
        {"image_id": 7, "category_id": 1, "bbox": [-3, 2.5, 7, 90]},
        {"image_id": 8, "category_id": 2, "bbox": [1e-20, 7, 1, 1e-7]},
    ]
    lost = [
        {"image_id": 7, "category_id": 1, "bbox": [1, 1, 5, 5], "iscrowd": 1},
        {"image_id": 7, "category_id": 1, "bbox": [1, 1, 0, 5]},
        {"image_id": 8, "category_id": 1, "bbox": [40, 1, 2, 5]},
    ]
    annotations = [{"id": number, "area": 1, **item} for number, item in enumerate(lost + kept, 1)]
    for number in range(2):
        picture(f"images/train/{number}.png")
    Path("raw/a.json").write_text(json.dumps({"images": listed, "annotations": annotations}))
    Path("raw/classes.txt").write_text("vehicle\ntraffic light\n")
    split = SplitSpec(images="images/train", annotations="a.json")
    asked = DatasetSpec(name="plain", type="coco", label_map="classes.txt", train=split)
    assert export_kitti(asked, "raw", Path("raw/labels")) == {"train": (2, 6)}
    again = ConvertSpec(input_source=["train"], image_dir_name="images/{source}", label_dir_name="labels/{source}")
    convert_dataset(
        DatasetSpec(name="cars", type="coco", label_map="classes.txt", convert=again), "raw", progress=False
    )
    found = [item for shard in shards() for item in shard["annotations"]]
    names = {image["id"]: image["file_name"] for shard in shards() for image in shard["images"]}
    assert [(names[item["image_id"]], item["category_id"], item["bbox"]) for item in found] == [
        (f"images/train/{item['image_id'] - 7}.png", item["category_id"], item["bbox"]) for item in kept
    ]
    assert sorted(entry["reason"] for entry in dropped()) == [
        "box outside the image",
        "degenerate box",
        "unmapped class",
    ]


def test_shards_that_are_not_as_they_were_made_are_refused() -> None:
    images(4)
    convert(num_shards=2)
    asked = dataset(num_shards=2).model_copy(update={"val": SplitSpec()})
    path = OUT / "shards/train-00001-of-00002.json"
    text = path.read_text()
    path.write_text(text.replace("002.png", "003.png"))
    with pytest.raises(
        UserError, match=r"train-00001-of-00002\.json: differs from what convert wrote; remove data/cars"
    ):
        check_dataset(asked, "raw", progress=False)
    path.unlink()
    with pytest.raises(UserError, match=r"train-00001-of-00002\.json: is missing; remove data/cars/converted"):
        load_catalog(asked, "raw", "detection")
    path.write_text(text)
    (OUT / "shards/train-00009-of-00002.json").write_text("{}")
    with pytest.raises(UserError, match="is none of the converted files"):
        load_catalog(asked, "raw", "detection")
    (OUT / "shards/train-00009-of-00002.json").rename(OUT / "shards/.DS_Store")
    check_dataset(asked, "raw", progress=False)
    (OUT / "manifest.json").write_text("{")
    with pytest.raises(
        UserError, match=r"manifest\.json, line 1.*; remove data/cars/converted and convert again: snakem"
    ):
        load_catalog(asked, "raw", "detection")
    (OUT / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"the last `tessera convert` failed: snakemake --cores 2 data/cars"):
        load_catalog(asked, "raw", "detection")


SLOW = """
import sys, time
from pathlib import Path
import tessera.interop.kitti.convert as kitti
from tessera.spec.schema import DatasetSpec
read = kitti._Reader.__call__
def slow(self, chunk):
    Path(f"at{chunk.first_id}").touch()
    if chunk.first_id > 1:
        time.sleep(600)
    return read(self, chunk)
kitti._Reader.__call__ = slow
kitti.convert_dataset(DatasetSpec.model_validate_json(sys.argv[1]), "raw", int(sys.argv[2]), progress=False)
"""


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_killed_conversion_leaves_nothing_and_the_next_one_finishes(processes: str) -> None:
    images(40)
    convert(num_shards=4)
    whole = content()
    text = dataset(num_shards=4).model_dump_json()
    killed = subprocess.Popen([sys.executable, "-c", SLOW, text, processes], start_new_session=True)
    deadline = time.monotonic() + 120
    while not Path("at11").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(UserError, match="another `tessera convert cars` is at work"):
        convert_dataset(dataset(num_shards=4), "raw", progress=False)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert content() == whole, "what was there before stays"
    assert any(Path("data/cars").glob(".converted.*")), "it was killed half-way"
    while _alive(killed.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(killed.pid), "its processes ended with it"
    convert(num_shards=4)
    assert content() == whole
    assert sorted(path.name for path in Path("data/cars").iterdir()) == [".convert.lock", "converted"]


def _alive(group: int) -> list[str]:
    """Processes of a group that have not ended, whether or not somebody has noticed their end."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                found.append(path.parent.name)
    return found
