"""A text file of names, such as KITTI's and Pascal VOC's ImageSets, says which images a split has."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from tessera.data.catalog import load_catalog
from tessera.data.check import check_dataset
from tessera.data.datasets import open_dataset, unannotated_images
from tessera.files import UserError
from tessera.interop.kitti import convert_dataset
from tessera.ops.kitti import kitti_row
from tessera.spec.lineage import data_digest, data_files
from tessera.spec.schema import ConvertSpec, DatasetSpec, SplitSpec
from tests.data.files import opened, photo, save, write, write_pairs

NAMES = ["a/000001.png", "a/000002.png", "b/000001.png", "b/000003.jpg", "b/000003.png"]


def listed(root: Path, *lines: str, encoding: str = "utf-8") -> DatasetSpec:
    """One file of five images with a box each, whose number is its left side."""
    images = [{"id": n, "file_name": name, "height": 10, "width": 16} for n, name in enumerate(NAMES, 1)]
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [n, 0, 2, 2]} for n in range(1, 6)]
    write(root / "a.json", {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "car"}]})
    for name in NAMES:
        save(root / "images" / name, photo(10, 16))
    (root / "list.txt").write_text("".join(lines), encoding)
    split = SplitSpec(images="images", annotations="a.json", names="list.txt")
    return DatasetSpec(name="tiny", type="coco", train=split)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["b/000001.png\n", "a/000002.png\n"], [2, 3]),
        (["000002\n", "b/000001\n"], [2, 3]),
        (["000003.jpg\r\n", "\r\n", "  a\\000001  \r\n"], [1, 4]),
        (["./a/000001.png"], [1]),
    ],
)
def test_the_split_has_the_named_images_alone(lines: list[str], expected: list[int], tmp_path: Path) -> None:
    reader = opened(listed(tmp_path, *lines), tmp_path, "detection")
    for one in (reader, pickle.loads(pickle.dumps(reader))):
        assert list(one.image_ids) == expected and list(one.file_names) == [NAMES[number - 1] for number in expected]
        samples = [one.read(index) for index in range(len(one))]
        assert [int(sample.target.boxes[0, 0]) for sample in samples] == expected
        assert [sample.file_name for sample in samples] == list(one.file_names)
        assert one.size(0) == (10, 16) and one.image_path(0) == tmp_path / "images" / one.file_names[0]


def test_a_list_of_a_windows_editor_is_read(tmp_path: Path) -> None:
    assert opened(listed(tmp_path, "000002\r\n", encoding="utf-16"), tmp_path, "detection").image_ids.tolist() == [2]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["000002\n", "000009\n", "c/000002\n"],
            r"list\.txt: 2 of 3 names are no image of the annotations \(000009, c/000002\)",
        ),
        (["000001\n"], r"list\.txt: 000001 may be a/000001\.png or b/000001\.png; write as many of its folders"),
        (["b/000003\n"], r"b/000003 may be b/000003\.jpg or b/000003\.png"),
        (["000002\n", "000002\n"], r"line 2: '000002' comes a second time, expected once"),
        (["000002\n", "a/000002.png\n"], r"two of its names are one image"),
        (["000002 1\n"], r"1 of 1 names are no image of the annotations \(000002 1\)"),
        (["/data/a/000001.png\n"], r"line 1 is '/data/a/000001\.png', which is valid on one machine"),
        ([], r"list\.txt: lists no image"),
    ],
)
def test_what_a_list_leaves_open_is_refused(lines: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        opened(listed(tmp_path, *lines), tmp_path, "detection")


def test_a_list_that_is_missing_is_named(tmp_path: Path) -> None:
    spec = listed(tmp_path)
    (tmp_path / "list.txt").unlink()
    with pytest.raises(UserError, match=r"list\.txt: no such file; expected a list of images, one name a line"):
        opened(spec, tmp_path, "detection")


def test_faults_are_told_of_the_file_that_has_them(tmp_path: Path) -> None:
    spec = listed(tmp_path, "000002\n")
    content = json.loads((tmp_path / "a.json").read_text())
    content["annotations"][0]["area"] = "9"
    write(tmp_path / "a.json", content)
    with pytest.raises(UserError, match=r"a\.json: a/000001\.png, annotation 1: area is '9'"):
        opened(spec, tmp_path, "detection")


def test_a_list_is_part_of_the_data(tmp_path: Path) -> None:
    spec = listed(tmp_path, "000002\n")
    before = data_digest(spec, str(tmp_path), ("train",))
    assert data_files(spec, str(tmp_path), ("train",)) == [tmp_path / "a.json", tmp_path / "list.txt"]
    (tmp_path / "list.txt").write_text("b/000001\n")
    assert data_digest(spec, str(tmp_path), ("train",)) != before


def test_pairs_of_image_and_mask(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path, [np.full((4, 4), value, np.uint8) for value in (2, 7, 90)])
    (tmp_path / "list.txt").write_text("2\n3\n")
    split = SplitSpec(annotations="a.jsonl", names="list.txt")
    report = check_dataset(pairs.model_copy(update={"train": split}), str(tmp_path), progress=False)
    assert report["splits"]["train"]["images"] == 2 and report["splits"]["val"]["images"] == 3
    assert [report["splits"]["train"]["classes"][name]["images"] for name in ("sky", "car", "cat")] == [0, 1, 1]


def test_kitti_with_its_image_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One folder with labels, two lists of stems: converted once, divided by the lists."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "raw"
    for number in range(6):
        save(root / f"training/image_2/{number:06d}.png", photo(30, 40))
        path = root / f"training/label_2/{number:06d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(kitti_row("Car", ["1", "2", str(10 + number), "20"]))
    (root / "ImageSets").mkdir()
    (root / "ImageSets/train.txt").write_text("000000\n000002\n000003\n000005\n")
    (root / "ImageSets/val.txt").write_text("000001\n000004\n")
    write(root / "mapping.json", {"Car": "car"})
    shards = {"annotations": "cars/converted/shards/train-*.json", "images": "."}
    spec = DatasetSpec(
        name="cars",
        type="coco",
        convert=ConvertSpec(
            input_source=["training"], image_dir_name="image_2", label_dir_name="label_2", mapping_path="mapping.json"
        ),
        train=SplitSpec(**shards, names="ImageSets/train.txt"),
        val=SplitSpec(**shards, names="ImageSets/val.txt"),
    )
    convert_dataset(spec, "raw", progress=False)
    catalog = load_catalog(spec, "raw", "detection")
    found = {}
    for split in ("train", "val"):
        reader = open_dataset(spec, split, catalog, "detection", "raw")
        found[split] = [int(reader.read(index).target.boxes[0, 2]) - 10 for index in range(len(reader))]
    assert found == {"train": [0, 2, 3, 5], "val": [1, 4]}
    before = data_digest(spec, "raw", ("val",))
    (root / "ImageSets/val.txt").write_text("000004\n")
    assert data_digest(spec, "raw", ("val",)) != before


def test_a_test_split_without_annotations(tmp_path: Path) -> None:
    spec = listed(tmp_path, "000002\n")
    content = json.loads((tmp_path / "a.json").read_text())
    write(tmp_path / "test.json", {"images": content["images"], "categories": content["categories"]})
    test = SplitSpec(images="images", annotations="test.json", names="list.txt")
    found = unannotated_images(spec.model_copy(update={"test": test}), "test", str(tmp_path))
    assert found == [(tmp_path / "images/a/000002.png", "a/000002.png", 2)]
