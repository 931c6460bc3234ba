import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tessera.data.reader import Findings
from tessera.files import UserError
from tessera.ops.masks import masks_to_boxes
from tests.data.files import opened, write_panoptic

CAR, CAT, SKY, FAR = 7001, 300, 5, 70_000 + 65536 * 200
"""Segment ids that need one, two and three bytes."""


def scene() -> np.ndarray:
    ids = np.full((8, 12), SKY)
    ids[4:, :4] = CAR
    ids[4:, 4:6] = CAT
    ids[:2, 10:] = FAR
    ids[7, 11] = 0
    return ids


INFOS = [
    {"id": SKY, "category_id": 2, "area": 70, "iscrowd": 0},
    {"id": CAR, "category_id": 7, "area": 15, "iscrowd": 0},
    {"id": CAT, "category_id": 90, "iscrowd": 0},
    {"id": FAR, "category_id": 7, "area": 4, "iscrowd": 1},
]


def test_panoptic_mode(tmp_path: Path) -> None:
    target = opened(write_panoptic(tmp_path, [scene()], [INFOS]), tmp_path, "panoptic").read(0).target
    assert target.labels.tolist() == [0, 1, 2, 1]
    for mask, info in zip(target.masks, INFOS, strict=True):
        assert np.array_equal(mask.numpy(), scene() == info["id"])
    assert target.areas.tolist() == [70, 15, 8, 4]
    assert target.iscrowd.tolist() == [False, False, False, True]
    table = {0: 255, SKY: 0, CAR: 1, CAT: 2, FAR: 1}
    assert target.semantic is not None
    assert np.array_equal(target.semantic.numpy(), np.vectorize(table.get)(scene()))


def test_an_annotated_box_is_kept_and_a_missing_one_is_tight(tmp_path: Path) -> None:
    infos = [INFOS[0], {**INFOS[1], "bbox": [2.5, 1, 3.25, 4]}]
    target = opened(write_panoptic(tmp_path, [scene()], [infos]), tmp_path, "panoptic").read(0).target
    assert target.boxes.tolist() == [*masks_to_boxes(target.masks[:1]).tolist(), [2.5, 1, 5.75, 5]]


def test_instance_mode_keeps_things_alone(tmp_path: Path) -> None:
    target = opened(write_panoptic(tmp_path, [scene()], [INFOS]), tmp_path, "instance").read(0).target
    assert target.labels.tolist() == [0, 1, 0]
    assert target.semantic is None
    assert np.array_equal(target.masks[0].numpy(), scene() == CAR)


def test_semantic_mode_has_a_mask_per_class(tmp_path: Path) -> None:
    target = opened(write_panoptic(tmp_path, [scene()], [INFOS]), tmp_path, "semantic").read(0).target
    assert target.labels.tolist() == [0, 1, 2]
    assert np.array_equal(target.masks[1].numpy(), (scene() == CAR) | (scene() == FAR))
    assert target.semantic is not None
    for label, mask in enumerate(target.masks):
        assert torch.equal(mask, target.semantic == label)


def test_segments_in_one_place_only(tmp_path: Path) -> None:
    infos = [*INFOS[:2], {"id": 12345, "category_id": 7}]
    reader = opened(write_panoptic(tmp_path, [scene()], [infos]), tmp_path, "panoptic")
    findings = Findings()
    target = reader.target(0, (8, 12), findings)
    assert target.labels.tolist() == [0, 1, 1] and not target.masks[2].any()
    assert target.semantic is not None and (target.semantic[4:7, 4:6] == 255).all()
    assert not findings.errors
    assert sorted(findings.warnings.values()) == [1, 2]


def test_image_without_annotation_is_void(tmp_path: Path) -> None:
    reader = opened(write_panoptic(tmp_path, [scene(), scene()], [INFOS]), tmp_path, "panoptic")
    target = reader.read(1).target
    assert not len(target.labels)
    assert target.semantic is not None and (target.semantic == 255).all()


@pytest.mark.parametrize(
    ("infos", "message"),
    [
        ([{"id": 0, "category_id": 7}], "1.png: a segment has id 0, expected a whole number above 0"),
        ([{"id": SKY, "category_id": 2}, {"id": SKY, "category_id": 2}], f"segment id {SKY} occurs more than once"),
        ([{"id": SKY, "category_id": 3}], "category_id 3 in 1 record(s)"),
        ("text", "1.png: segments_info is 'text', expected a list"),
    ],
)
def test_faulty_segments_are_refused(infos: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        opened(write_panoptic(tmp_path, [scene()], [infos]), tmp_path, "panoptic")  # type: ignore[list-item]  # faulty on purpose
    assert message in str(caught.value)


def test_unknown_categories_are_counted_also_in_instance_mode(tmp_path: Path) -> None:
    infos = [{"id": 1, "category_id": 3}, {"id": 2, "category_id": 3}, {"id": 4, "category_id": 2}]
    with pytest.raises(UserError, match=r"category_id 3 in 2 record") as caught:
        opened(write_panoptic(tmp_path, [scene()], [infos]), tmp_path, "instance")
    assert "category_id 2 " not in str(caught.value), "stuff is known, though no class of an instance model"


def test_hostile_names_and_double_annotations(tmp_path: Path) -> None:
    dataset = write_panoptic(tmp_path, [scene()], [INFOS])
    content = json.loads((tmp_path / "a.json").read_text())
    content["annotations"][0]["file_name"] = "../../1.png"
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"without '..'"):
        opened(dataset, tmp_path, "panoptic")
    content["annotations"] = [{**content["annotations"][0], "file_name": "1.png"}] * 2
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="2 panoptic annotations"):
        opened(dataset, tmp_path, "panoptic")


def test_wrong_png(tmp_path: Path) -> None:
    reader = opened(write_panoptic(tmp_path, [scene()], [INFOS]), tmp_path, "panoptic")
    Image.new("L", (12, 8)).save(tmp_path / "panoptic/1.png")
    with pytest.raises(UserError, match="pixel format L; expected RGB"):
        reader.read(0)
    Image.new("RGB", (12, 9)).save(tmp_path / "panoptic/1.png")
    with pytest.raises(UserError, match="is 12x9"):
        reader.read(0)


def test_an_instance_file_gets_advice(tmp_path: Path) -> None:
    dataset = write_panoptic(tmp_path, [scene()], [INFOS])
    content = json.loads((tmp_path / "a.json").read_text())
    content["annotations"] = [{"id": 1, "image_id": 1, "category_id": 7, "segmentation": []}]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"Set dataset.type to coco and model.mode to instance"):
        opened(dataset, tmp_path, "panoptic")
