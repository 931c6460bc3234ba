"""Files as the exporters of annotation tools write them: what is unambiguous is read (docs/add-a-dataset.md)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessera.data.catalog import load_catalog
from tessera.data.check import check_dataset
from tessera.data.datasets import index_dataset, open_dataset
from tessera.data.reader import Findings
from tessera.files import UserError
from tessera.spec.networks import Mode
from tessera.spec.schema import DatasetSpec, SplitSpec
from tests.data.files import photo, save

SQUARE = [[2, 2, 7, 2, 7, 7, 2, 7]]
Change = Callable[[dict[str, Any]], Any]


def export(**keys: Any) -> dict[str, Any]:
    """Two images, two classes, an object each."""
    return {
        "images": [
            {"id": 1, "file_name": "photos/a.png", "height": 10, "width": 16},
            {"id": 2, "file_name": "photos/b.png", "height": 10, "width": 16},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 5, 5], "area": 25, "segmentation": SQUARE},
            {"id": 2, "image_id": 2, "category_id": 2, "bbox": [2, 2, 5, 5], "area": 25, "segmentation": SQUARE},
        ],
        "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "cat"}],
    } | keys


def dataset(root: Path, content: Any, encode: Callable[[str], bytes] = str.encode) -> DatasetSpec:
    (root / "a.json").write_bytes(encode(json.dumps(content, ensure_ascii=False)))
    for name in "ab":
        save(root / f"images/photos/{name}.png", photo(10, 16))
    return DatasetSpec(name="tiny", type="coco", train=SplitSpec(images="images", annotations="a.json"))


def objects(spec: DatasetSpec, root: Path, mode: Mode = "instance") -> list[tuple[str, str, list[float], bool]]:
    """File name, class, box and crowd of every object."""
    catalog = load_catalog(spec, str(root), mode)
    reader = open_dataset(spec, "train", catalog, mode, str(root))
    found = []
    for sample in map(reader.read, range(len(reader))):
        target = sample.target
        for label, box, crowd in zip(target.labels, target.boxes, target.iscrowd, strict=True):
            found.append((sample.file_name, catalog.names[label], box.tolist(), bool(crowd)))
    return found


EXPECTED = [("photos/a.png", "car", [2, 2, 7, 7], False), ("photos/b.png", "cat", [2, 2, 7, 7], False)]


def renumbered(start: int) -> Change:
    """Categories and annotations from ``start``, as Label Studio (0), FiftyOne, labelme2coco and Roboflow number them."""

    def change(content: dict[str, Any]) -> None:
        for item in content["annotations"]:
            item["id"] += start - 1
            item["category_id"] += start - 1
        for item in content["categories"]:
            item["id"] += start - 1

    return change


def images_from_0(content: dict[str, Any]) -> None:
    for item in content["images"]:
        item["id"] -= 1
    for item in content["annotations"]:
        item["image_id"] -= 1


def roboflow(content: dict[str, Any]) -> None:
    """A category 0 that is the others' parent and that nothing uses."""
    content["categories"] = [
        {"id": 0, "name": "objects", "supercategory": "none"},
        *({**item, "supercategory": "objects"} for item in content["categories"]),
    ]


def pandas(content: dict[str, Any]) -> None:
    """Whole numbers of a column with gaps become floats, gaps become null."""
    for item in content["annotations"]:
        item |= {
            "id": float(item["id"]),
            "image_id": float(item["image_id"]),
            "category_id": float(item["category_id"]),
        }
        item |= {"iscrowd": 0.0, "area": 25.0, "attributes": None}
    content["annotations"][0] |= {"iscrowd": None, "area": None}
    for item in content["images"]:
        item |= {"id": float(item["id"]), "height": 10.0, "width": None}
    for item in content["categories"]:
        item["id"] = float(item["id"])


def cvat(content: dict[str, Any]) -> None:
    content |= {"licenses": [{"name": "", "id": 0, "url": ""}], "info": {"contributor": "", "year": ""}}
    for item in content["annotations"]:
        item |= {"iscrowd": False, "attributes": {"occluded": False}}
    for item in content["images"]:
        item |= {"license": 0, "flickr_url": "", "coco_url": "", "date_captured": 0}


def fiftyone(content: dict[str, Any]) -> None:
    renumbered(0)(content)
    for item in content["categories"]:
        item["supercategory"] = None
    for item in content["images"]:
        item["license"] = None


def lvis(content: dict[str, Any]) -> None:
    for item in content["images"]:
        name = item.pop("file_name")
        item |= {"coco_url": f"http://images.cocodataset.org/{name}", "neg_category_ids": [2]}
        item["not_exhaustive_category_ids"] = [1] if item["id"] == 1 else []


def windows(content: dict[str, Any]) -> None:
    for item in content["images"]:
        item["file_name"] = item["file_name"].replace("/", "\\")


EXPORTS: dict[str, Change] = {
    "as COCO": lambda content: None,
    "Label Studio": renumbered(0),
    "labelme2coco": lambda content: (renumbered(0)(content), images_from_0(content)),
    "Roboflow": roboflow,
    "pandas": pandas,
    "CVAT": cvat,
    "FiftyOne": fiftyone,
    "LVIS": lvis,
    "backslashes of Windows": windows,
}


@pytest.mark.parametrize("tool", EXPORTS)
@pytest.mark.parametrize("mode", ["instance", "detection"])
def test_an_export_is_read(tool: str, mode: Mode, tmp_path: Path) -> None:
    content = export()
    EXPORTS[tool](content)
    assert objects(dataset(tmp_path, content), tmp_path, mode) == EXPECTED


ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "UTF-8": str.encode,
    "UTF-8 with a mark": lambda text: text.encode("utf-8-sig"),
    "UTF-16 with a mark": lambda text: text.encode("utf-16"),
    "UTF-16 of the other order": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "UTF-16 without a mark": lambda text: text.encode("utf-16-le"),
    "line ends of Windows": lambda text: text.replace("}", "}\r\n").encode(),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_files_of_windows_editors_are_read(encoding: str, tmp_path: Path) -> None:
    content = export(info={"text": "\u00fc\u20ac\U0001f600" * 9})
    assert objects(dataset(tmp_path, content, ENCODINGS[encoding]), tmp_path) == EXPECTED


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_so_are_label_maps_and_lists_of_pairs(encoding: str, tmp_path: Path) -> None:
    encode = ENCODINGS[encoding]
    save(tmp_path / "images/ü/a.png", photo(4, 6))
    save(tmp_path / "masks/a.png", photo(4, 6)[..., 0] % 2 + 1)
    label_map = [{"id": 1, "name": "Bär"}, {"id": 2, "name": "car"}]
    (tmp_path / "map.json").write_bytes(encode(json.dumps(label_map, ensure_ascii=False)))
    line = json.dumps({"img": "images\\ü\\a.png", "segm": "masks\\a.png"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(encode(f"{line}\r\n\r\n"))
    spec = DatasetSpec(name="tiny", type="mask_pairs", label_map="map.json", train=SplitSpec(annotations="a.jsonl"))
    catalog = load_catalog(spec, str(tmp_path), "semantic")
    reader = open_dataset(spec, "train", catalog, "semantic", str(tmp_path))
    assert catalog.names == ("Bär", "car") and list(reader.file_names) == ["images/ü/a.png"]
    assert reader.read(0).target.labels.tolist() == [0, 1]


def test_a_category_that_nothing_uses_is_a_class_that_never_occurs(tmp_path: Path) -> None:
    content = export()
    roboflow(content)
    report = check_dataset(dataset(tmp_path, content), str(tmp_path), progress=False)
    assert report["warnings"] == {"train: class that never occurs (objects)": 1}


def test_what_lvis_leaves_open_is_told(tmp_path: Path) -> None:
    content, findings = export(), Findings()
    lvis(content)
    spec = dataset(tmp_path, content)
    catalog = load_catalog(spec, str(tmp_path), "instance")
    index_dataset(spec, "train", catalog, "instance", str(tmp_path), findings)
    assert findings.errors == []
    assert [(text[:46], count) for text, count in findings.warnings.items()] == [
        ("image in which not every object of a class is ", 1)
    ]


REFUSED: dict[str, tuple[Change, str]] = {
    "absolute path": (
        lambda content: content["images"][0].update(file_name="/home/me/a.png"),
        "images, entry 1: file_name is '/home/me/a.png', which is valid on one machine",
    ),
    "path of Windows": (
        lambda content: content["images"][0].update(file_name="C:\\data\\a.png"),
        "file_name is 'C:\\\\data\\\\a.png', which is valid on one machine",
    ),
    "ids of text": (
        lambda content: content["images"][0].update(id="1"),
        "images, entry 1 (photos/a.png): id is '1', expected a whole",
    ),
    "half an id": (lambda content: content["images"][0].update(id=1.5), "id is 1.5, expected a whole number"),
    "id beyond what floats tell apart": (
        lambda content: content["images"][0].update(id=1e17),
        "id is 1e+17, expected a whole number",
    ),
    "sizes of text": (lambda content: content["images"][0].update(height="10"), "height is '10', expected pixels"),
    "corners of text": (
        lambda content: content["annotations"][0].update(bbox=["2", "2", "5", "5"]),
        "bbox is ['2', '2', '5', '5'], expected [x, y, width, height], four finite numbers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_ambiguous_is_refused_with_what_it_is(name: str, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    content = export()
    change(content)
    with pytest.raises(UserError) as caught:
        objects(dataset(tmp_path, content), tmp_path, "detection")
    assert message in str(caught.value)
