import json
from pathlib import Path
from typing import Any

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


def test_a_damaged_test_split_ends_no_check(tmp_path: Path) -> None:
    dataset = write_coco(tmp_path, [{"id": 1, "category_id": 7, "segmentation": [[0, 0, 5, 0, 5, 5]]}])
    (tmp_path / "damaged.json").write_text('{"images": [')
    damaged = SplitSpec(images="images", annotations="damaged.json")
    missing = SplitSpec(images="images", annotations="nowhere.json")
    with pytest.raises(UserError, match=r"2 problem\(s\)") as caught:
        check_dataset(dataset.model_copy(update={"val": missing, "test": damaged}), str(tmp_path), progress=False)
    assert "val: " in str(caught.value) and "test: " in str(caught.value)


def test_the_list_is_cut_after_fifty(tmp_path: Path) -> None:
    dataset = only_train(write_pairs(tmp_path, [np.full((2, 2), 5, np.uint8)] * 60))
    with pytest.raises(UserError, match="60 problem") as caught:
        check_dataset(dataset, str(tmp_path), progress=False)
    assert str(caught.value).count("holds value(s)") == 50 and "and 10 more" in str(caught.value)


def test_dirt_is_a_warning_with_a_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert "warning: train: polygon with fewer than three points, left out: 1 (1.png)\n" in capsys.readouterr().out
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


def checked(dataset: DatasetSpec, root: Path) -> tuple[list[str], str]:
    """The lines of a check that fails, and its message."""
    lines: list[str] = []
    with pytest.raises(UserError) as caught:
        check_dataset(dataset, str(root), progress=False, say=lines.append)
    return lines, str(caught.value)


def test_a_warning_names_three_images_and_a_failing_check_tells_its_warnings_too(tmp_path: Path) -> None:
    infos = [[*INFOS, {"id": 12345, "category_id": 7}]] * 5
    dataset = only_train(write_panoptic(tmp_path, [scene()] * 5, infos))
    (tmp_path / "images/5.png").unlink()
    lines, message = checked(dataset, tmp_path)
    assert message.count("images/5.png: no such file") == 1
    assert lines == [
        "warning: train: segment without a pixel in the panoptic PNG, which nothing can match: 5 (1.png, 2.png, 3.png, ...)",
    ]


def test_ignored_pixels_have_a_share_and_much_of_them_a_line(tmp_path: Path) -> None:
    few = check_dataset(only_train(write_pairs(tmp_path / "few", [IDS])), str(tmp_path / "few"), progress=False)
    assert few["splits"]["train"]["ignored_pixels"] == 0.25 and not few["warnings"]
    mask = IDS.copy()
    mask[0] = 0
    much = check_dataset(only_train(write_pairs(tmp_path / "much", [mask])), str(tmp_path / "much"), progress=False)
    assert much["splits"]["train"]["ignored_pixels"] == 0.625
    assert [text for text in much["warnings"] if "62.5% are ignored" in text]


@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_of_ignored_pixels_alone_teach_nothing(split: str, tmp_path: Path) -> None:
    dataset = write_pairs(tmp_path, [IDS])
    void = write_pairs(tmp_path / "void", [np.array([[0, 255]], np.uint8)])
    section = SplitSpec(images="void", annotations="void/a.jsonl")
    changed = dataset.model_copy(update={"test": SplitSpec(), "val": SplitSpec(), split: section})
    _, message = checked(changed, tmp_path)
    assert f"{split}: {tmp_path}/void/a.jsonl: none of its 1 images has a pixel that is not ignored" in message
    assert void.name == dataset.name


def test_masks_of_one_class_alone_teach_nothing(tmp_path: Path) -> None:
    """Background 0, which is ignored unless told otherwise, and object 2."""
    _, message = checked(only_train(write_pairs(tmp_path, [np.array([[0, 0, 0, 2]], np.uint8)])), tmp_path)
    assert "every pixel that is not ignored (75.0% are) is 'sky'" in message and "ignore_id: null" in message


SQUARE = [[0, 0, 5, 0, 5, 5, 0, 5]]


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([], "it lists no annotation, so no image has an object"),
        ([{"id": 1, "category_id": 2, "segmentation": SQUARE}], "lists no annotation of any of the classes"),
        (
            [{"id": n, "category_id": 7, "iscrowd": 1, "segmentation": SQUARE} for n in (1, 2)],
            "all 2 annotations are crowd (iscrowd 1",
        ),
        ([{"id": 1, "category_id": 7, "segmentation": [[1, 1, 2, 2]]}], "none of its 1 images has an object"),
    ],
)
def test_annotations_that_teach_nothing(annotations: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    dataset = write_coco(tmp_path, annotations)
    _, text = checked(dataset, tmp_path)
    assert [line.split(":")[0].strip() for line in text.splitlines()[1:]] == ["train", "val"]
    assert text.count(message) == 2
    reason = opened(dataset, tmp_path, "instance").nothing_to_learn()
    assert reason is None if "none of its" in message else (reason is not None and message in reason)


def test_a_test_split_may_have_nothing_to_be_found(tmp_path: Path) -> None:
    write_coco(tmp_path / "empty", [])
    dataset = write_coco(tmp_path, [{"id": 1, "category_id": 7, "segmentation": SQUARE}])
    empty = SplitSpec(images="empty/images", annotations="empty/a.json")
    report = check_dataset(only_train(dataset).model_copy(update={"test": empty}), str(tmp_path), progress=False)
    assert (
        report["warnings"]["test: images in none of which anything is to be found: no metric is defined on them"] == 1
    )


@pytest.mark.parametrize("fault", ["black", "mixed up", "other ids"])
def test_png_and_json_that_do_not_belong_together(fault: str, tmp_path: Path) -> None:
    """Each image has a small and a large segment, and the ids of all images are the same."""
    maps = [np.where(np.arange(12) < width, 1, 2)[None].repeat(8, 0) for width in (2, 10)]
    infos = [[{"id": n, "category_id": 7, "area": int((ids == n).sum()), "iscrowd": 0} for n in (1, 2)] for ids in maps]
    dataset = only_train(write_panoptic(tmp_path, maps, infos))
    assert check_dataset(dataset, str(tmp_path), progress=False)["splits"]["train"]["objects"] == 4
    wrong = {"black": [ids * 0 for ids in maps], "mixed up": maps[::-1], "other ids": [ids + 5 for ids in maps]}[fault]
    write_panoptic(tmp_path, wrong, infos)
    _, message = checked(dataset, tmp_path)
    count = "8 segments in it and its PNG files 8" if fault == "other ids" else "4 segments in it and its PNG files 4"
    assert f"a.json: of the {count} do not meet in id and area" in message


def test_panoptic_png_saved_as_jpeg(tmp_path: Path) -> None:
    dataset = only_train(write_panoptic(tmp_path, [scene()], [INFOS]))
    with Image.open(tmp_path / "panoptic/1.png") as image:
        image.convert("RGB").save(tmp_path / "panoptic/1.png", "JPEG")
    _, message = checked(dataset, tmp_path)
    assert "panoptic/1.png: is a JPEG, whose compression changes the numbers" in message
    with Image.open(tmp_path / "panoptic/1.png") as image:
        image.load()
        image.save(tmp_path / "panoptic/1.png", "PNG")
    lines, message = checked(dataset, tmp_path)
    assert "do not meet in id and area" in message and "once saved as JPEG" in message
    assert any("that the JSON does not list" in line for line in lines)


def test_classes_of_one_name_are_told_of_and_apart(tmp_path: Path) -> None:
    label_map = [{"id": 2, "name": "screen"}, {"id": 7, "name": "screen"}, {"id": 90, "name": "Screen "}]
    report = check_dataset(only_train(write_pairs(tmp_path, [IDS], label_map)), str(tmp_path), progress=False)
    assert list(report["splits"]["train"]["classes"]) == ["screen (2)", "screen (7)", "Screen "]
    text = "classes of one name, told apart by their ids: screen (2), screen (7), Screen  (90)"
    assert report["warnings"] == {text: 3}


def test_deep_images_need_a_range_and_large_ones_a_limit(tmp_path: Path) -> None:
    dataset = only_train(write_pairs(tmp_path, [IDS, IDS]))
    deep = np.full(IDS.shape, 4095, np.uint16)
    for number in (1, 2):
        Image.fromarray(deep).save(tmp_path / f"images/{number}.png")
    with pytest.raises(UserError, match=r"2 problem\(s\)\n.*1\.png: has more than 8 bits.*set dataset\.value_range"):
        check_dataset(dataset, str(tmp_path), progress=False)
    ranged = dataset.model_copy(update={"value_range": (0.0, 4095.0)})
    assert check_dataset(ranged, str(tmp_path), progress=False)["splits"]["train"]["images"] == 2
    assert opened(ranged, tmp_path, "semantic").read(1).image.unique().tolist() == [255]
    with pytest.raises(UserError, match=r"masks/2\.png: has 4x2 pixels, more than dataset\.max_pixels, which is 7"):
        check_dataset(ranged.model_copy(update={"max_pixels": 7}), str(tmp_path), progress=False)
