"""Several annotation files, patterns and class maps, and what the lineage knows of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tessera.data.catalog import full_catalog, load_catalog
from tessera.data.datamodule import eval_loader
from tessera.data.datasets import open_dataset
from tessera.data.label_map import parse_label_map
from tessera.data.opened import OpenedData
from tessera.files import UserError
from tessera.spec.lineage import data_digest, data_files
from tessera.spec.networks import DeformableDetrSpec
from tessera.spec.schema import SPECS, DatasetSpec, SplitSpec
from tests.data.files import opened, photo, save, write

CLASSES = [{"id": 1, "name": "car"}, {"id": 4, "name": "cat"}]


def shard(root: Path, name: str, images: dict[int, str], categories: Any = CLASSES, folder: str = "images") -> None:
    """A COCO file with one box on each of its images."""
    for file_name in images.values():
        save(root / folder / file_name, photo(20, 30))
    entries = [{"id": number, "file_name": name, "height": 20, "width": 30} for number, name in images.items()]
    boxes = [
        {"id": place, "image_id": number, "category_id": 4, "bbox": [place, 1, 5, 5]}
        for place, number in enumerate(images, 1)
    ]
    write(root / name, {"images": entries, "annotations": boxes, "categories": categories})


def dataset_of(annotations: str | list[str], images: str | list[str] = "images", **keys: Any) -> DatasetSpec:
    return DatasetSpec(name="tiny", type="coco", train=SplitSpec(images=images, annotations=annotations), **keys)


def test_a_pattern_gives_its_files_by_name(tmp_path: Path) -> None:
    shard(tmp_path, "shards/b.json", {3: "3.png", 1: "1.png"})
    shard(tmp_path, "shards/a.json", {7: "7.png"})
    (tmp_path / "shards/notes.txt").write_text("no annotations")
    reader = opened(dataset_of("shards/*.json"), tmp_path, "detection")
    assert list(reader.file_names) == ["7.png", "1.png", "3.png"] and list(reader.image_ids) == [7, 1, 3]
    assert [reader.read(index).image_id for index in range(3)] == [7, 1, 3]
    assert [reader.read(index).target.boxes[0, 0].item() for index in range(3)] == [1, 2, 1]


def test_ids_that_meet_are_raised_file_by_file(tmp_path: Path) -> None:
    shard(tmp_path, "a.json", {0: "a0.png", 5: "a5.png"})
    shard(tmp_path, "b.json", {5: "b5.png", 9: "b9.png"})
    shard(tmp_path, "c.json", {20: "c20.png"})
    shard(tmp_path, "d.json", {0: "d0.png"})
    reader = opened(dataset_of(["a.json", "b.json", "c.json", "d.json"]), tmp_path, "detection")
    assert list(reader.image_ids) == [0, 5, 11, 15, 20, 21]
    samples = [reader.read(index) for index in range(6)]
    assert [sample.image_id for sample in samples] == list(reader.image_ids)
    assert [sample.file_name for sample in samples] == list(reader.file_names)


def test_every_entry_may_have_its_own_folder(tmp_path: Path) -> None:
    shard(tmp_path, "x/a.json", {1: "1.png"}, folder="x/photos")
    shard(tmp_path, "y/a.json", {1: "1.png"}, folder="y/photos")
    dataset = dataset_of(["x/*.json", "y/a.json"], ["x/photos", "y/photos"])
    reader = opened(dataset, tmp_path, "detection")
    assert list(reader.file_names) == ["x/photos/1.png", "y/photos/1.png"] and list(reader.image_ids) == [1, 3]
    assert [reader.image_path(index) for index in range(2)] == [tmp_path / name for name in reader.file_names]
    with pytest.raises(UserError, match=r"image file name '1\.png' occurs 2 times"):
        opened(dataset_of(["x/a.json", "y/a.json"], "x/photos"), tmp_path, "detection")
    with pytest.raises(ValueError, match=r"one for each of the 2 entries of train\.annotations, found 1"):
        dataset_of(["x/a.json", "y/a.json"], ["x/photos"])


def test_errors_name_their_file(tmp_path: Path) -> None:
    shard(tmp_path, "a.json", {1: "1.png"})
    shard(tmp_path, "b.json", {2: "2.png"})
    content = json.loads((tmp_path / "b.json").read_text())
    content["annotations"][0]["category_id"] = 9
    write(tmp_path / "b.json", content)
    with pytest.raises(UserError, match=r"b\.json: category_id 9 in 1 record"):
        opened(dataset_of(["a.json", "b.json"]), tmp_path, "detection")


def test_categories_are_merged_and_must_agree(tmp_path: Path) -> None:
    shard(tmp_path, "a.json", {1: "1.png"}, [{"id": 4, "name": "cat"}])
    shard(tmp_path, "b.json", {2: "2.png"}, [{"id": 2, "name": "dog"}, {"id": 4, "name": "cat"}])
    assert full_catalog(dataset_of(["a.json", "b.json"]), str(tmp_path)).names == ("cat", "dog")
    shard(tmp_path, "c.json", {3: "3.png"}, [{"id": 4, "name": "bear"}])
    with pytest.raises(UserError, match=r"category 4 is 'cat' in .*a\.json and 'bear' in .*c\.json"):
        full_catalog(dataset_of(["a.json", "c.json"]), str(tmp_path))
    (tmp_path / "map.txt").write_text("one\ntwo\nthree\nfour\n")
    with pytest.raises(UserError, match=r"category 4 is 'four' in .*map\.txt and 'bear' in .*c\.json"):
        opened(dataset_of(["a.json", "c.json"], label_map="map.txt"), tmp_path, "detection")


def test_names_of_one_id_agree_in_all_files_but_for_case_and_white_space(tmp_path: Path) -> None:
    shard(tmp_path, "train.json", {1: "1.png"}, [{"id": 1, "name": "disk"}, {"id": 4, "name": "traffic light"}])
    shard(tmp_path, "val.json", {2: "2.png"}, [{"id": 4, "name": " Traffic  Light"}, {"id": 1, "name": "Disk"}])
    dataset = dataset_of("train.json", val=SplitSpec(images="images", annotations="val.json"))
    catalog = load_catalog(dataset, str(tmp_path), "detection")
    assert len(open_dataset(dataset, "val", catalog, "detection", str(tmp_path))) == 1
    shard(tmp_path, "val.json", {2: "2.png"}, [{"id": 4, "name": "disk"}, {"id": 1, "name": "traffic light"}])
    with pytest.raises(UserError) as caught:
        open_dataset(dataset, "val", catalog, "detection", str(tmp_path))
    for number, here, there in ((1, "disk", "traffic light"), (4, "traffic light", "disk")):
        assert f"category {number} is {here!r} in {tmp_path}/train.json and {there!r} in {tmp_path}/val.json" in str(
            caught.value
        )
    model = parse_label_map([{"id": 1, "name": "Disk"}, {"id": 4, "name": "bus"}], tmp_path / "other.json")
    with pytest.raises(UserError, match=r"category 4 is 'traffic light' in .*train\.json and 'bus' in the model"):
        open_dataset(dataset, "train", model, "detection", str(tmp_path))
    padded = dataset.model_copy(update={"label_map": "map.json", "contiguous_id": False, "num_classes": 4})
    write(tmp_path / "map.json", [{"id": 4, "name": "traffic light"}])
    assert len(opened(padded, tmp_path, "detection")) == 1, "an id that the map leaves out has no name to differ from"


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ("shards/*.json", r"shards/\*\.json: no file matches this pattern \(dataset.train.annotations of tiny\)"),
        (["a.json", "shards/*.json"], "no file matches this pattern"),
        (["a.json", "[ab].json"], r"leads to a\.json 2 times, expected once"),
        (["a.json", "b.json"], r"b\.json: no such file"),
    ],
)
@pytest.mark.parametrize("label_map", [None, "map.txt"])
def test_names_that_lead_nowhere_or_twice(
    annotations: Any, message: str, label_map: str | None, tmp_path: Path
) -> None:
    shard(tmp_path, "a.json", {1: "1.png"})
    (tmp_path / "map.txt").write_text("one\ntwo\nthree\nfour")
    with pytest.raises(UserError, match=message):
        opened(dataset_of(annotations, label_map=label_map), tmp_path, "detection")


def test_the_lineage_covers_every_matched_file(tmp_path: Path) -> None:
    shard(tmp_path, "shards/a.json", {1: "1.png"})
    shard(tmp_path, "shards/b.json", {2: "2.png"})
    dataset = dataset_of("shards/*.json", label_map="map.txt")
    assert data_files(dataset, str(tmp_path)) == [tmp_path / f for f in ("map.txt", "shards/a.json", "shards/b.json")]
    digests = [data_digest(dataset, str(tmp_path))]
    shard(tmp_path, "shards/b.json", {2: "2.png", 3: "3.png"})
    digests.append(data_digest(dataset, str(tmp_path)))
    shard(tmp_path, "shards/c.json", {4: "4.png"})
    digests.append(data_digest(dataset, str(tmp_path)))
    assert len(set(digests)) == 3
    assert data_files(dataset_of("none/*.json"), str(tmp_path)) == [tmp_path / "none/*.json"], "reported as missing"


def test_new_files_are_seen_by_the_next_run(tmp_path: Path) -> None:
    shard(tmp_path, "shards/a.json", {1: "1.png"})
    dataset = dataset_of("shards/*.json")
    dataset = dataset.model_copy(update={"val": dataset.train.model_copy(update={"num_workers": 0})})
    spec = SPECS["deformable_detr"](data_root=str(tmp_path), dataset=dataset, model=DeformableDetrSpec())

    def seen(data: OpenedData) -> list[int]:
        return [meta.image_id for batch in eval_loader(spec, data, "val") for meta in batch.metas]

    data = OpenedData(spec, ("val",))
    assert seen(data) == [1]
    shard(tmp_path, "shards/b.json", {1: "2.png"})
    data.require_unchanged()
    assert seen(data) == [1]
    assert seen(OpenedData(spec, ("val",))) == [1, 3]


def test_class_maps(tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_text("person\n traffic light \nbag\n")
    catalog = full_catalog(dataset_of("a.json", label_map="map.txt"), str(tmp_path))
    assert [(c.id, c.name, c.isthing) for c in catalog.categories] == [
        (1, "person", True),
        (2, "traffic light", True),
        (3, "bag", True),
    ]
    for text, message in (
        ("a\n\nb\n", "line 2 is empty"),
        ("", "found an empty list"),
    ):
        (tmp_path / "map.txt").write_text(text)
        with pytest.raises(UserError, match=message):
            full_catalog(dataset_of("a.json", label_map="map.txt"), str(tmp_path))
