import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from tessera.data.catalog import load_catalog
from tessera.data.coco import _expand, parse_segmentation
from tessera.data.datasets import index_dataset
from tessera.data.reader import Findings
from tessera.data.transforms import augment
from tessera.files import UserError
from tessera.ops.rle import encode_masks
from tessera.spec.schema import AugmentationSpec
from tests.data.files import LABEL_MAP, opened, write_coco

SQUARE = [[2, 2, 8, 2, 8, 6, 2, 6]]


def rectangle(x1: int, y1: int, x2: int, y2: int, height: int = 10, width: int = 16) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[y1:y2, x1:x2] = True
    return mask


def test_overlapping_objects_survive(tmp_path: Path) -> None:
    masks = [rectangle(0, 0, 10, 10), rectangle(5, 2, 9, 8), rectangle(0, 0, 16, 10)]
    dataset = write_coco(
        tmp_path,
        [{"id": n, "category_id": 7, "segmentation": rle} for n, rle in enumerate(encode_masks(np.stack(masks)), 1)],
    )
    target = opened(dataset, tmp_path, "instance").read(0).target
    assert torch.equal(target.masks, torch.from_numpy(np.stack(masks)))
    assert target.boxes.tolist() == [[0, 0, 10, 10], [5, 2, 9, 8], [0, 0, 16, 10]]
    assert target.semantic is None


def test_sparse_categories_large_ids_areas_and_stuff(tmp_path: Path) -> None:
    dataset = write_coco(
        tmp_path,
        [
            {"id": 2**40, "category_id": 90, "segmentation": SQUARE, "area": 23.5, "iscrowd": 0},
            {"id": 2, "category_id": 7, "segmentation": SQUARE},
            {"id": 3, "category_id": 2, "segmentation": SQUARE},
        ],
    )
    target = opened(dataset, tmp_path, "instance").read(0).target
    assert target.labels.tolist() == [1, 0], "cat and car of the two things; the sky is none"
    assert target.areas.tolist() == [23.5, 24.0], "the annotation's own area, else the pixels"
    assert target.masks.flatten(1).sum(1).tolist() == [24, 24]


def test_polygons_of_several_parts_are_one_object(tmp_path: Path) -> None:
    parts = [[0, 0, 3, 0, 3, 3, 0, 3], [10, 5, 14, 5, 14, 9, 10, 9]]
    dataset = write_coco(tmp_path, [{"id": 1, "category_id": 7, "segmentation": parts}])
    target = opened(dataset, tmp_path, "instance").read(0).target
    assert torch.equal(target.masks[0], torch.from_numpy(rectangle(0, 0, 3, 3) | rectangle(10, 5, 14, 9)))


def test_crowd_with_plain_run_lengths(tmp_path: Path) -> None:
    mask = rectangle(3, 1, 5, 4)
    counts = [31, 3, 7, 3, 116]
    dataset = write_coco(
        tmp_path,
        [{"id": 1, "category_id": 7, "iscrowd": 1, "segmentation": {"size": [10, 16], "counts": counts}}],
    )
    target = opened(dataset, tmp_path, "instance").read(0).target
    assert target.iscrowd.tolist() == [True]
    assert torch.equal(target.masks[0], torch.from_numpy(mask))


def test_images_without_annotations_are_empty(tmp_path: Path) -> None:
    dataset = write_coco(tmp_path, [{"id": 1, "category_id": 7, "segmentation": SQUARE}], [(10, 16), (9, 8)])
    sample = opened(dataset, tmp_path, "instance").read(1)
    assert sample.target.labels.shape == (0,) and sample.target.masks.shape == (0, 9, 8)
    assert sample.target.boxes.shape == (0, 4) and sample.image_id == 2


@pytest.mark.parametrize(
    ("segmentation", "warning"),
    [
        ([], "without a mask"),
        (None, "without a mask"),
        ([[1, 1, 4, 4]], "fewer than three points"),
    ],
)
def test_degenerate_annotations_are_left_out(segmentation: object, warning: str) -> None:
    findings = Findings()
    assert parse_segmentation(segmentation, (10, 16), "here", findings) is None
    assert not findings.errors
    assert [text for text in findings.warnings if warning in text]


@pytest.mark.parametrize(
    "segmentation", [[[100, 100, 120, 100, 120, 120]], {"size": [10, 16], "counts": [160]}], ids=["outside", "empty"]
)
def test_a_mask_without_a_pixel_is_there_to_be_missed_and_taught_to_nobody(
    segmentation: object, tmp_path: Path
) -> None:
    """COCO's own evaluation counts it; see tests/metrics/test_files.py."""
    empty = {"id": 1, "category_id": 7, "segmentation": segmentation, "bbox": [3.5, 1, 4, 2.25], "area": 9}
    dataset = write_coco(tmp_path, [empty, {"id": 2, "category_id": 7, "segmentation": SQUARE}])
    findings = Findings()
    reader = opened(dataset, tmp_path, "instance")
    target = reader.target(0, (10, 16), findings)
    assert target.masks.flatten(1).sum(1).tolist() == [0, 24]
    assert target.boxes.tolist() == [[3.5, 1, 7.5, 3.25], [2, 2, 8, 6]]
    assert findings.warnings["annotation whose mask has no pixel, which no mask can match"] == 1
    generator = np.random.default_rng(0)
    augmentation = AugmentationSpec(train_min_size=[32], train_crop_size=None)
    _, trained = augment(torch.zeros(3, 10, 16, dtype=torch.uint8), target, augmentation, None, generator)
    assert len(trained.labels) == 1 and trained.boxes.dtype == torch.float32


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ("text", "segmentation is str"),
        ([[1, 2, 3, 4, 5]], "x, y pairs"),
        ([[1, 2, 3, 4, 5, float("nan")]], "finite"),
        ({"size": [16, 10], "counts": [160]}, "run lengths are for"),
        ({"size": [10, 16], "counts": [150]}, "cover 150 pixels"),
        ({"size": [10, 16], "counts": [-1, 161]}, "neither text nor"),
        ({"size": [10, 16], "counts": "\x01\x02"}, "damaged"),
        ({"size": [10, 16], "counts": encode_masks(np.ones((1, 10, 17), bool))[0]["counts"]}, "cover 170 pixels"),
        ({"size": [10, 16], "counts": "ooooooooooooooooooooo"}, "damaged"),
    ],
)
def test_malformed_masks_are_errors(segmentation: object, message: str) -> None:
    findings = Findings()
    assert parse_segmentation(segmentation, (10, 16), "image x, annotation 5", findings) is None
    assert len(findings.errors) == 1 and message in findings.errors[0] and "annotation 5" in findings.errors[0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=12))
def test_compressed_run_lengths_expand_as_pycocotools_writes_them(counts: list[int]) -> None:
    height, width = 1, sum(counts)
    encoded = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    assert _expand(encoded["counts"].decode()) == counts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 5}, "category_id 5 in 1 record(s) is not among the 3 classes"),
        ({"category_id": -1}, "expected a whole number of 0 or more"),
        ({"category_id": "7"}, "1.png, annotation 2: category_id is '7', expected a whole number"),
        ({"category_id": 0}, "category_id 0 in 1 record(s) is not among the 3 classes"),
        ({"category_id": None}, "category_id is None"),
        ({"id": -1}, "id is -1, expected a whole number"),
        ({"id": 2.5}, "id is 2.5, expected a whole number"),
        ({"id": 1}, "annotation id 1 occurs 2 times"),
        ({"id": 1.0}, "annotation id 1 occurs 2 times"),
        ({"image_id": 99}, "images that are not listed (image_id 99)"),
        ({"image_id": "1"}, "images that are not listed (image_id '1')"),
        ({"iscrowd": "0"}, "1.png, annotation 2: iscrowd is '0', expected 0 or 1"),
        ({"iscrowd": "false"}, "1.png, annotation 2: iscrowd is 'false', expected 0 or 1"),
        ({"iscrowd": 2}, "iscrowd is 2, expected 0 or 1"),
        ({"area": -4}, "1.png, annotation 2: area is -4, expected a finite number above 0"),
        ({"area": "25"}, "area is '25', expected a finite number"),
        ({"area": True}, "area is True, expected a finite number"),
        ({"area": float("nan")}, "area is nan, expected a finite number"),
    ],
)
def test_faulty_records_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    good = {"id": 1, "category_id": 7, "segmentation": SQUARE}
    dataset = write_coco(tmp_path, [good, {**good, "id": 2, **change}])
    with pytest.raises(UserError) as caught:
        opened(dataset, tmp_path, "instance")
    assert message in str(caught.value) and "a.json" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "/etc/passwd",
        "a/../../b.png",
        "..\\x.png",
        "C:\\x.png",
        "C:x.png",
        "\\\\host\\x.png",
        "https://host/x.png",
        "a\ud800.png",
        "..",
        "",
        ".",
    ],
)
def test_hostile_file_names_are_refused(name: str, tmp_path: Path) -> None:
    dataset = write_coco(tmp_path, [])
    content = json.loads((tmp_path / "a.json").read_text())
    content["images"][0]["file_name"] = name
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="file_name"):
        opened(dataset, tmp_path, "instance")


def test_repeated_images_are_refused(tmp_path: Path) -> None:
    dataset = write_coco(tmp_path, [], [(10, 16), (10, 16)])
    content = json.loads((tmp_path / "a.json").read_text())
    content["images"][1]["file_name"] = "./1.png"
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"image file name '1.png' occurs 2 times"):
        opened(dataset, tmp_path, "instance")


def test_size_mismatch_names_the_image(tmp_path: Path) -> None:
    dataset = write_coco(tmp_path, [])
    content = json.loads((tmp_path / "a.json").read_text())
    content["images"][0].update(height=16, width=10)
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"1.png: the image is 16x10 .* annotated as 10x16 .*EXIF"):
        opened(dataset, tmp_path, "instance").read(0)


def test_a_panoptic_file_gets_advice(tmp_path: Path) -> None:
    dataset = write_coco(tmp_path, [{"file_name": "1.png", "segments_info": []}], label_map=LABEL_MAP)
    with pytest.raises(UserError, match=r"Set dataset\.type to coco_panoptic"):
        opened(dataset, tmp_path, "instance")


def test_faults_of_one_field_are_counted_not_repeated(tmp_path: Path) -> None:
    items = [{"id": n, "category_id": 7, "segmentation": SQUARE, "iscrowd": "0", "area": -n} for n in range(1, 101)]
    with pytest.raises(UserError, match=r"2 problem\(s\)") as caught:
        opened(write_coco(tmp_path, items), tmp_path, "instance")
    assert "1.png, annotation 1: iscrowd is '0'" in str(caught.value)
    assert str(caught.value).count("so in 100 records, this being the first") == 2


def test_an_area_of_0_is_measured_and_told(tmp_path: Path) -> None:
    findings = Findings()
    dataset = write_coco(
        tmp_path,
        [
            {"id": 1, "category_id": 7, "segmentation": SQUARE, "area": 0},
            {"id": 2, "category_id": 7, "segmentation": SQUARE},
            {"id": 3, "category_id": 7, "segmentation": SQUARE, "area": 99.5, "iscrowd": True},
        ],
    )
    catalog = load_catalog(dataset, str(tmp_path), "instance")
    reader = index_dataset(dataset, "train", catalog, "instance", str(tmp_path), findings)
    target = reader.read(0).target
    assert target.areas.tolist() == [24, 24, 99.5] and target.iscrowd.tolist() == [False, False, True]
    assert findings.errors == [] and dict(findings.warnings) == {
        "annotation whose area is 0, taken as not given: it is measured": 1
    }
