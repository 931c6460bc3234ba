"""Mode detection: what is read, what training sees of it, what metrics see of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tessera.data import coco
from tessera.data.catalog import load_catalog
from tessera.data.check import check_dataset
from tessera.data.datamodule import eval_loader, train_loader
from tessera.data.demo import write_demo
from tessera.data.opened import OpenedData
from tessera.data.reader import Findings, box_target
from tessera.data.transforms import augment, resize_target, sample_generator, train_size
from tessera.files import UserError
from tessera.ops.masks import masks_to_boxes
from tessera.spec.networks import DeformableDetrSpec
from tessera.spec.schema import SPECS, AugmentationSpec, DatasetSpec, DemoSpec, Spec
from tessera.structures import Batch, Target
from tests.data.files import opened, write_coco, write_panoptic

BOXES: list[dict[str, Any]] = [
    {"id": 1, "category_id": 90, "bbox": [2.25, 1.5, 5.5, 4.25], "area": 11.5, "segmentation": []},
    {"id": 2, "category_id": 7, "bbox": [-3, -2, 8, 6]},
    {"id": 3, "category_id": 7, "bbox": [12, 4, 10, 10], "iscrowd": 1},
    {"id": 4, "category_id": 7, "bbox": [3, 3, 0, 4]},
    {"id": 5, "category_id": 90, "bbox": [16, 2, 4, 4]},
    {"id": 6, "category_id": 2, "bbox": [0, 0, 16, 10]},
]
"""On an image of 16x10: a plain one, one that leaves the image, a crowd, one without area, one outside, and stuff."""


def detection_spec(root: Path, dataset: DatasetSpec, augmentation: AugmentationSpec, **split: int) -> Spec:
    splits = {
        name: getattr(dataset, name).model_copy(update={"num_workers": 0, **split}) for name in ("train", "val", "test")
    }
    changed = dataset.model_copy(update={"augmentation": augmentation, **splits})
    return SPECS["deformable_detr"](data_root=str(root), dataset=changed, model=DeformableDetrSpec())


def test_truths_are_the_boxes_as_annotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("mode detection decodes no mask")

    monkeypatch.setattr(coco, "parse_segmentation", forbidden)
    target = opened(write_coco(tmp_path, BOXES), tmp_path, "detection").read(0).target
    assert target.masks is None and target.semantic is None and target.size == (10, 16)
    assert target.labels.tolist() == [1, 0, 0, 0, 1], "the things alone: stuff is left out"
    assert target.boxes.tolist() == [
        [2.25, 1.5, 7.75, 5.75],
        [-3, -2, 5, 4],
        [12, 4, 22, 14],
        [3, 3, 3, 7],
        [16, 2, 20, 6],
    ]
    assert target.iscrowd.tolist() == [False, False, True, False, False]
    assert target.areas.tolist() == [11.5, 48, 100, 0, 16], "its own, else the box's"


def test_training_sees_clipped_boxes_with_area_and_no_crowd(tmp_path: Path) -> None:
    dataset = write_coco(tmp_path, BOXES)
    augmentation = AugmentationSpec(test_min_size=32, test_max_size=40)
    spec = detection_spec(tmp_path, dataset, augmentation)
    (batch,) = eval_loader(spec, OpenedData(spec, ("val",)), "val")
    (target,), (truth,) = batch.targets, batch.truths
    height, width = batch.metas[0].resized_size
    assert (height, width) == (25, 40) and batch.images.shape[-2:] == (32, 64)
    assert target.size == (25, 40) and target.masks is None and target.boxes.dtype == torch.float32
    assert target.labels.tolist() == [1, 0] and not target.iscrowd.any()
    x, y = 40 / 16, 25 / 10
    expected = [[2.25 * x, 1.5 * y, 7.75 * x, 5.75 * y], [0, 0, 5 * x, 4 * y]]
    torch.testing.assert_close(target.boxes, torch.tensor(expected))
    assert len(truth.labels) == 5 and truth.boxes.dtype == torch.float64


def test_check_counts_what_training_leaves_out(tmp_path: Path) -> None:
    report = check_dataset(write_coco(tmp_path, [{**box, "segmentation": []} for box in BOXES]), str(tmp_path), False)
    assert report["modes"] == ["detection"]
    train = report["splits"]["train"]
    assert (train["objects"], train["crowd_regions"], train["images_without_objects"]) == (2, 1, 0)
    for text in ("box without area", "box outside its image"):
        assert report["warnings"][f"train: {text}"] == 1
    assert report["warnings"]["train: box that reaches out of the image"] == 2


def test_a_model_of_masks_cannot_learn_from_boxes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of its annotations has a mask .* they serve a model of mode detection"):
        opened(write_coco(tmp_path, [{**box, "segmentation": []} for box in BOXES]), tmp_path, "instance")


@pytest.mark.parametrize(
    ("bbox", "message"),
    [
        ([1, 2, 3], "bbox is [1, 2, 3], expected [x, y, width, height]"),
        (None, "bbox is None"),
        ([1, 2, float("nan"), 3], "bbox is [1, 2, nan, 3]"),
        ([1, 2, "3", 3], "bbox is [1, 2, '3', 3]"),
        ([5, 5, -2, 3], "width and height are 0 or more"),
    ],
)
@pytest.mark.parametrize("kind", ["coco", "coco_panoptic"])
def test_malformed_boxes_are_told_before_any_image_is_read(
    kind: str, bbox: object, message: str, tmp_path: Path
) -> None:
    if kind == "coco":
        dataset = write_coco(tmp_path, [{"id": 9, "category_id": 7, "bbox": bbox}])
    else:
        segment = {"id": 9, "category_id": 7, "bbox": bbox}
        dataset = write_panoptic(tmp_path, [np.full((10, 16), 9)], [[segment]])
    with pytest.raises(UserError) as caught:
        opened(dataset, tmp_path, "detection")
    assert message in str(caught.value) and "a.json" in str(caught.value) and "1.png" in str(caught.value)
    assert " 9: bbox" in str(caught.value)


def test_panoptic_files_give_the_boxes_of_their_things(tmp_path: Path) -> None:
    segments = [
        {"id": 1, "category_id": 2, "bbox": [0, 0, 16, 10]},
        {"id": 2, "category_id": 90, "bbox": [1, 2, 3, 4], "area": 9},
        {"id": 3, "category_id": 7, "bbox": [5, 5, 2, 2], "iscrowd": 1},
    ]
    dataset = write_panoptic(tmp_path, [np.ones((10, 16), int)] * 2, [segments, []])
    for path in (tmp_path / "panoptic").iterdir():
        path.unlink()
    reader = opened(dataset, tmp_path, "detection")
    target = reader.read(0).target
    assert target.masks is None and target.semantic is None
    assert target.labels.tolist() == [1, 0] and target.iscrowd.tolist() == [False, True]
    assert target.boxes.tolist() == [[1, 2, 4, 6], [5, 5, 7, 7]] and target.areas.tolist() == [9, 4]
    assert len(reader.read(1).target.labels) == 0 and reader.mask_path(0) is None


def rectangles() -> tuple[torch.Tensor, Target, Target]:
    """An image of 60x40, and the same objects as masks and as boxes alone."""
    boxes = torch.tensor([[4, 6, 20, 18], [30, 0, 60, 40], [50, 30, 56, 38], [0, 0, 8, 4]])
    masks = torch.zeros(len(boxes), 40, 60, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 60), np.uint8))
    objects = [
        {"category_id": number, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": None, "iscrowd": 0}
        for number, (x1, y1, x2, y2) in enumerate(boxes.tolist(), 1)
    ]
    alone = box_target(objects, {number: number - 1 for number in range(1, 5)}, (40, 60), Findings())
    masked = Target(alone.labels, masks, masks_to_boxes(masks), alone.iscrowd, alone.areas, size=(40, 60))
    return image, masked, alone


POLICIES = {
    "crop": AugmentationSpec(train_min_size=[32, 47, 64], train_max_size=400, train_crop_size=(32, 48)),
    "jitter": AugmentationSpec(train_scale=(0.5, 2.0), train_max_size=400, train_crop_size=(48, 48)),
    "detr": AugmentationSpec(
        train_min_size=[48, 96],
        train_max_size=120,
        train_crop_size=None,
        train_random_resize=[40, 56],
        train_random_crop=(32, 50),
    ),
    "padded": AugmentationSpec(
        train_min_size=[48, 64], train_max_size=120, train_crop_size=None, fixed_padding=(48, 80)
    ),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("target_size", [None, (64, 64)])
def test_boxes_go_where_their_pixels_go(name: str, target_size: tuple[int, int] | None) -> None:
    """Masks are looked up at pixel centres: each resizing leaves half a pixel, which the next ones enlarge up to threefold."""
    image, masked, alone = rectangles()
    flips = 0
    for index in range(40):
        pixels, by_mask = augment(image, masked, POLICIES[name], target_size, sample_generator(3, 0, index))
        same, by_box = augment(image, alone, POLICIES[name], target_size, sample_generator(3, 0, index))
        assert torch.equal(pixels, same) and by_box.size == pixels.shape[-2:]
        assert by_box.masks is None and by_box.boxes.dtype == torch.float32
        height, width = pixels.shape[-2:]
        x1, y1, x2, y2 = by_box.boxes.unbind(-1)
        assert (x1 >= 0).all() and (y1 >= 0).all() and (x2 <= width).all() and (y2 <= height).all()
        assert ((x2 > x1) & (y2 > y1)).all()
        found = dict(zip(by_box.labels.tolist(), by_box.boxes, strict=True))
        for label, box in zip(by_mask.labels.tolist(), by_mask.boxes, strict=True):
            assert (found.pop(label) - box).abs().max() < 3
        for box in found.values():
            assert (box[2:] - box[:2]).min() < 3, "only slivers have a box and no pixel"
        flips += bool(by_box.labels.tolist() and 3 in by_box.labels)
    assert flips


def test_whole_factors_are_exact() -> None:
    image, _, alone = rectangles()
    spec = AugmentationSpec(train_min_size=[80], train_max_size=400, train_crop_size=None, flip=1.0, color_jitter=False)
    pixels, target = augment(image, alone, spec, None, sample_generator(0, 0, 0))
    assert pixels.shape == (3, 80, 120)
    mirrored = [[120 - 2 * x2, 2 * y1, 120 - 2 * x1, 2 * y2] for x1, y1, x2, y2 in alone.boxes.tolist()]
    assert target.boxes.tolist() == mirrored
    third = resize_target(alone, (13, 20))
    assert third.boxes[0].tolist() == pytest.approx([4 / 3, 6 * 13 / 40, 20 / 3, 18 * 13 / 40], abs=1e-6)


def test_detr_crops_half_of_the_images_to_windows_of_the_range() -> None:
    image = torch.zeros(3, 80, 120, dtype=torch.uint8)
    _, _, alone = rectangles()
    spec = POLICIES["detr"]
    plain = {train_size(80, 120, spec, sample_generator(0, 0, index)) for index in range(40)}
    sizes = [
        tuple(augment(image, alone, spec, None, sample_generator(0, 0, index))[0].shape[1:]) for index in range(400)
    ]
    cropped = [size for size in sizes if size not in plain]
    assert 150 < len(cropped) < 250
    assert all(min(size) in (48, 96) or max(size) == 120 for size in sizes), "every image ends at a training size"
    ratios = {round(width / height, 2) for height, width in cropped}
    assert len(ratios) > 20 and max(ratios) <= 1.6 and min(ratios) >= 0.6


def test_batches_are_as_large_as_their_largest_image_or_padded_to_a_fixed_size(tmp_path: Path) -> None:
    boxes = [{"id": n, "image_id": n, "category_id": 7, "bbox": [2, 2, 20, 20]} for n in range(1, 7)]
    sizes = [(40, 60), (60, 40), (41, 60), (40, 90), (64, 128), (50, 50)]
    dataset = write_coco(tmp_path, boxes, sizes)

    def batches(policy: str, workers: int) -> list[Batch]:
        spec = detection_spec(tmp_path, dataset, POLICIES[policy], batch_size=2, num_workers=workers)
        data = OpenedData(spec, ("train",))
        return [batch for epoch in range(2) for batch in train_loader(spec, data, epoch)]

    free = batches("detr", 0)
    assert len({batch.images.shape for batch in free}) > 2
    for batch in free:
        largest = [max(side) for side in zip(*(meta.resized_size for meta in batch.metas), strict=True)]
        assert list(batch.images.shape[-2:]) == [-(-side // 32) * 32 for side in largest]
        assert batch.targets is not None
        for padding, meta, target in zip(batch.padding, batch.metas, batch.targets, strict=True):
            height, width = meta.resized_size
            assert not padding[:height, :width].any() and padding.sum() == padding.numel() - height * width
            assert target.size == meta.resized_size
            if len(target.boxes):
                assert target.boxes[:, 2].max() <= width and target.boxes[:, 3].max() <= height
    again = batches("detr", 2)
    for one, other in zip(free, again, strict=True):
        assert torch.equal(one.images, other.images) and one.metas == other.metas
        assert one.targets is not None and other.targets is not None
        assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(one.targets, other.targets, strict=True))
    fixed = batches("padded", 0)
    assert {tuple(batch.images.shape[-2:]) for batch in fixed} == {(64, 96)}
    assert all(meta.resized_size[0] <= 48 and meta.resized_size[1] <= 80 for batch in fixed for meta in batch.metas)


def test_the_demo_serves_detection(tmp_path: Path) -> None:
    write_demo(tmp_path / "demo", DemoSpec(train_images=3, val_images=2, test_images=1, height=64, width=64), False)
    content = json.loads((tmp_path / "demo/panoptic_train.json").read_text())
    split = {
        "images": "demo/images/train",
        "annotations": "demo/panoptic_train.json",
        "panoptic": "demo/panoptic/train",
    }
    dataset = DatasetSpec.model_validate({"label_map": "demo/label_map.json", "train": split})
    catalog = load_catalog(dataset, str(tmp_path), "detection")
    things = {category.id for category in catalog.categories}
    assert len(catalog) == 4
    reader = opened(dataset, tmp_path, "detection")
    for index, annotation in enumerate(content["annotations"]):
        wanted = [item["bbox"] for item in annotation["segments_info"] if item["category_id"] in things]
        boxes = reader.read(index).target.boxes
        assert torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist() == wanted != []
