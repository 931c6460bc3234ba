import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessera.data.check import check_dataset
from tessera.files import UserError
from tessera.ops.rle import encode_masks
from tessera.spec.schema import DatasetSpec, SplitSpec
from tests.data.files import opened, write_coco, write_pairs
from tests.data.test_panoptic import INFOS, scene, write_panoptic

IDS = np.array([[0, 2, 2, 7], [7, 90, 90, 0]], np.uint8)


def only_train(dataset: DatasetSpec) -> DatasetSpec:
    return dataset.model_copy(update={"val": SplitSpec(), "test": SplitSpec()})


def test_counts(tmp_path: Path) -> None:
    report = check_dataset(only_train(write_panoptic(tmp_path, [scene()], [INFOS])), str(tmp_path), progress=False)
    train = report["splits"]["train"]
    assert (train["images"], train["objects"], train["crowd_regions"]) == (1, 3, 1)
    assert train["classes"]["car"] == {"objects": 1, "images": 1, "pixels": 16}
    assert report["warnings"] == {}
    assert list(report["splits"]) == ["train"]


def test_everything_wrong_is_listed_at_once(tmp_path: Path) -> None:
    masks = [IDS, IDS, IDS, np.full((2, 4), 5, np.uint8), IDS, IDS]
    dataset = only_train(write_pairs(tmp_path, masks))
    (tmp_path / "images/1.png").unlink()
    content = (tmp_path / "images/2.png").read_bytes()
    (tmp_path / "images/2.png").write_bytes(content[: len(content) // 2])
    Image.new("L", (9, 9)).save(tmp_path / "masks/3.png")
    (tmp_path / "masks/5.png").write_text("no image")
    (tmp_path / "masks/1.png").unlink()
    with pytest.raises(UserError, match=r"dataset tiny .* 6 problem\(s\)") as caught:
        check_dataset(dataset, str(tmp_path), progress=False)
    text = str(caught.value)
    for expected in (
        "images/1.png: no such file",
        "masks/1.png: no such file",
        "images/2.png: cannot be decoded",
        "masks/3.png: the mask is 9x9",
        "masks/4.png: holds value(s) 5 (8 pixels)",
        "masks/5.png: is not a readable image",
    ):
        assert expected in text
    assert "6.png" not in text


def test_the_list_is_cut_after_fifty(tmp_path: Path) -> None:
    dataset = only_train(write_pairs(tmp_path, [np.full((2, 2), 5, np.uint8)] * 60))
    with pytest.raises(UserError, match="60 problem") as caught:
        check_dataset(dataset, str(tmp_path), progress=False)
    assert str(caught.value).count("holds value(s)") == 50 and "and 10 more" in str(caught.value)


def test_dirt_is_a_warning_with_a_count(tmp_path: Path) -> None:
    (good,) = encode_masks(np.eye(10, 16, dtype=bool)[None])
    dataset = write_coco(
        tmp_path,
        [
            {"id": 1, "category_id": 7, "segmentation": good, "bbox": [0, 0, 10, 10]},
            {"id": 2, "category_id": 7, "segmentation": [[1, 1, 2, 2]], "bbox": [0, 0, 30, 10]},
            {"id": 3, "category_id": 7, "segmentation": [], "bbox": [0, 0, 0, 10]},
        ],
        [(10, 16), (10, 16)],
    )
    report = check_dataset(dataset, str(tmp_path), progress=False)
    warnings = report["warnings"]
    assert report["splits"]["train"]["objects"] == 1
    assert report["splits"]["train"]["images_without_objects"] == 1
    for text in (
        "train: polygon with fewer than three points, left out",
        "train: annotation without a mask, left out",
        "train: box that reaches out of the image",
        "val: box without area",
        "train: class that never occurs (cat)",
    ):
        assert warnings[text] == 1
    assert [count for text, count in warnings.items() if text.startswith("train and val: image of the same")] == [2]


def test_boxes_alone_do_not_train_a_segmentation_model(tmp_path: Path) -> None:
    dataset = only_train(write_coco(tmp_path, [{"id": 1, "category_id": 7, "bbox": [0, 0, 3, 3], "segmentation": []}]))
    report = check_dataset(dataset, str(tmp_path), progress=False)
    assert report["modes"] == ["detection"] and report["splits"]["train"]["objects"] == 1
    assert "pixels" not in report["splits"]["train"]["classes"]["car"]
    with pytest.raises(UserError, match="segmentation needs masks"):
        opened(dataset, tmp_path, "instance")


@pytest.mark.parametrize("missing", ["file", "key", "images"])
def test_missing_splits(missing: str, tmp_path: Path) -> None:
    dataset = write_coco(tmp_path, [{"id": 1, "category_id": 7, "segmentation": [[0, 0, 5, 0, 5, 5]]}])
    if missing == "file":
        changed = dataset.model_copy(update={"val": SplitSpec(images="images", annotations="nowhere.json")})
        message = "val: .*nowhere.json: no such file"
    elif missing == "key":
        changed = dataset.model_copy(update={"train": SplitSpec()})
        message = "dataset.train.annotations is not set"
    else:
        (tmp_path / "empty.json").write_text(json.dumps({"images": [], "annotations": []}))
        changed = dataset.model_copy(update={"test": SplitSpec(images="images", annotations="empty.json")})
        message = "test: .*empty.json lists no usable image"
    with pytest.raises(UserError, match=message):
        check_dataset(changed, str(tmp_path), progress=False)
