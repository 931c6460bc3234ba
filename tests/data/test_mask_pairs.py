import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessera.files import UserError
from tessera.spec.schema import DatasetSpec, SplitSpec
from tests.data.files import LABEL_MAP, opened, photo, save, write, write_pairs

IDS = np.array([[0, 2, 2, 7], [7, 90, 255, 0], [2, 2, 2, 2]], np.uint8)
LABELS = np.array([[255, 0, 0, 1], [1, 2, 255, 255], [0, 0, 0, 0]], np.uint8)


def semantic(dataset: DatasetSpec, root: Path, index: int = 0) -> np.ndarray:
    found = opened(dataset, root, "semantic").read(index).target.semantic
    assert found is not None
    return found.numpy()


def test_ids_become_contiguous_and_both_void_values_are_ignored(tmp_path: Path) -> None:
    dataset = write_pairs(tmp_path, [IDS])
    target = opened(dataset, tmp_path, "semantic").read(0).target
    assert target.semantic is not None and np.array_equal(target.semantic.numpy(), LABELS)
    assert target.labels.tolist() == [0, 1, 2]
    for label, mask, area in zip(target.labels, target.masks, target.areas, strict=True):
        assert np.array_equal(mask.numpy(), label.item() == LABELS)
        assert area == (label.item() == LABELS).sum()


def test_palette_masks_keep_their_indices(tmp_path: Path) -> None:
    palette = Image.fromarray(IDS, "L").convert("P")
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    palette.putdata(IDS.ravel().tolist())
    dataset = write_pairs(tmp_path, [palette])
    with Image.open(tmp_path / "masks/1.png") as stored:
        assert stored.mode == "P" and not np.array_equal(np.array(stored.convert("L")), IDS)
    assert np.array_equal(semantic(dataset, tmp_path), LABELS)


def test_sixteen_bit_masks(tmp_path: Path) -> None:
    deep = np.where(IDS == 90, np.uint16(1000), IDS)
    label_map = [*LABEL_MAP[:2], {"id": 1000, "name": "cat"}]
    dataset = write_pairs(tmp_path, [deep], label_map)
    assert np.array_equal(semantic(dataset, tmp_path), LABELS)


def test_255_is_a_class_where_the_label_map_says_so(tmp_path: Path) -> None:
    dataset = write_pairs(tmp_path, [IDS], [*LABEL_MAP, {"id": 255, "name": "last"}])
    assert semantic(dataset, tmp_path)[1, 2] == 3


def test_other_unlabeled_value(tmp_path: Path) -> None:
    dataset = write_pairs(tmp_path, [np.where(IDS == 0, 200, IDS).astype(np.uint8)], ignore_id=200)
    assert np.array_equal(semantic(dataset, tmp_path), LABELS)


@pytest.mark.parametrize("other", [1, 255])
def test_0_is_a_class_where_nothing_else_is_unlabeled(other: int, tmp_path: Path) -> None:
    """Background 0 and object 1 or 255, and with 255 ignored the form of 0..C-1."""
    ids = np.array([[0, 0, other], [0, other, 255]], np.uint8)
    label_map = [{"id": 0, "name": "background"}, {"id": other, "name": "polyp"}]
    found = semantic(write_pairs(tmp_path, [ids], label_map, ignore_id=None), tmp_path)
    assert found.tolist() == [[0, 0, 1], [0, 1, 1 if other == 255 else 255]]


def test_a_mask_saved_as_jpeg_is_refused_whatever_its_name(tmp_path: Path) -> None:
    dataset = write_pairs(tmp_path, [IDS])
    Image.fromarray(IDS).save(tmp_path / "masks/1.png", "JPEG", quality=100)
    with pytest.raises(UserError, match=r"masks/1.png: is a JPEG, whose compression changes the numbers"):
        semantic(dataset, tmp_path)


def test_image_of_classes_alone_keeps_every_class(tmp_path: Path) -> None:
    """Without a pixel of 0, dropping the smallest value would lose a class."""
    ids = np.array([[2, 2, 7], [90, 90, 7]], np.uint8)
    target = opened(write_pairs(tmp_path, [ids]), tmp_path, "semantic").read(0).target
    assert target.labels.tolist() == [0, 1, 2] and target.masks.any(0).all()


def test_void_image_has_an_empty_target(tmp_path: Path) -> None:
    target = opened(write_pairs(tmp_path, [np.zeros((4, 5), np.uint8)]), tmp_path, "semantic").read(0).target
    assert target.labels.shape == (0,) and target.masks.shape == (0, 4, 5)


def test_unknown_values_are_counted(tmp_path: Path) -> None:
    ids = IDS.copy()
    ids[2] = [3, 3, 3, 4]
    with pytest.raises(UserError, match=r"1.png: holds value\(s\) 3 \(3 pixels\), 4 \(1 pixels\)"):
        semantic(write_pairs(tmp_path, [ids]), tmp_path)


def test_coloured_masks_and_other_sizes_are_refused(tmp_path: Path) -> None:
    dataset = write_pairs(tmp_path, [IDS])
    Image.new("RGB", (4, 3)).save(tmp_path / "masks/1.png")
    with pytest.raises(UserError, match="pixel format RGB; expected one channel"):
        semantic(dataset, tmp_path)
    Image.new("L", (3, 4)).save(tmp_path / "masks/1.png")
    with pytest.raises(UserError, match=r"the mask is 3x4 .* its image images/1.png is 4x3"):
        semantic(dataset, tmp_path)


def test_rotated_photo_fits_its_mask_as_displayed(tmp_path: Path) -> None:
    dataset = write_pairs(tmp_path, [IDS])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo(4, 3)).save(tmp_path / "images/1.png", exif=exif)
    assert opened(dataset, tmp_path, "semantic").size(0) == (3, 4)
    assert np.array_equal(semantic(dataset, tmp_path), LABELS)


def test_names_are_relative_to_images_where_the_file_is_there(tmp_path: Path) -> None:
    save(tmp_path / "root/x.png", photo(3, 4))
    save(tmp_path / "lists/own/y.png", IDS)
    write(tmp_path / "map.json", LABEL_MAP)
    (tmp_path / "lists/a.jsonl").write_text(json.dumps({"img": "x.png", "segm": "own/y.png"}))
    split = SplitSpec(images="root", annotations="lists/a.jsonl")
    dataset = DatasetSpec(type="mask_pairs", label_map="map.json", train=split, val=split, test=split)
    assert np.array_equal(semantic(dataset, tmp_path), LABELS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"img": "a.png"}', "line 1: expected an object with the keys `img` and `segm`"),
        ('{"img": "../a.png", "segm": "b.png"}', "line 1: img is '../a.png'"),
        ('{"img": "a.png", "segm": "/b.png"}', "line 1: segm is '/b.png'"),
        ('{"images": [', "needs type coco"),
        ("\n", "lists no image"),
        ('{"img": "a.png", "segm": "b.png"}\n{"img": "./a.png", "segm": "b.png"}', "img 'a.png' occurs 2 times"),
    ],
)
def test_faulty_lists_are_refused(text: str, message: str, tmp_path: Path) -> None:
    dataset = write_pairs(tmp_path, [IDS])
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError) as caught:
        opened(dataset, tmp_path, "semantic")
    assert message in str(caught.value) and "a.jsonl" in str(caught.value)


def test_unused_ids_without_contiguous_id(tmp_path: Path) -> None:
    dataset = write_pairs(tmp_path, [IDS], contiguous_id=False, num_classes=100)
    assert semantic(dataset, tmp_path).max() == 255
    assert np.array_equal(np.unique(semantic(dataset, tmp_path)), [1, 6, 89, 255])
