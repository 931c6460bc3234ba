from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import max_pool2d

from tessera.data.transforms import (
    augment,
    jitter_colors,
    order_generator,
    pad_target,
    resize_target,
    sample_generator,
    train_size,
)
from tessera.ops.masks import masks_to_boxes
from tessera.spec.schema import AugmentationSpec
from tessera.structures import IGNORE, Target

PLAIN = AugmentationSpec(
    train_min_size=[40], train_max_size=400, train_crop_size=(32, 48), flip=0.0, color_jitter=False
)


def coloured(labels: np.ndarray) -> tuple[torch.Tensor, Target]:
    """An image whose red channel says the label (label * 20), and the panoptic target of the same map."""
    semantic = torch.from_numpy(labels.astype(np.uint8))
    image = torch.stack([semantic * 20, torch.zeros_like(semantic), torch.full_like(semantic, 9)])
    present = [label for label in np.unique(labels).tolist() if label != IGNORE]
    masks = torch.stack([semantic == label for label in present])
    target = Target(
        labels=torch.tensor(present),
        masks=masks,
        boxes=masks_to_boxes(masks),
        iscrowd=torch.zeros(len(present), dtype=torch.bool),
        areas=masks.flatten(1).sum(1).double(),
        semantic=semantic,
    )
    return image, target


def blocks(height: int = 40, width: int = 80) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return rows // 20 * 4 + columns // 20


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("side", [20, 40, 80])
def test_masks_stay_on_their_pixels(flip: float, side: int) -> None:
    """Inside the blocks the image says which label belongs there; only at edges may the two resizings differ."""
    spec = PLAIN.model_copy(update={"flip": flip, "train_min_size": [side]})
    image, target = coloured(blocks())
    for index in range(6):
        cropped, found = augment(image, target, spec, None, sample_generator(0, 0, index))
        assert found.semantic is not None
        around = found.semantic.float()[None]
        pure = (max_pool2d(around, 5, 1, 2) == -max_pool2d(-around, 5, 1, 2))[0]
        assert pure.float().mean() > 0.2
        assert torch.equal(cropped[0][pure] // 20, found.semantic[pure])
        for label, mask in zip(found.labels.tolist(), found.masks, strict=True):
            assert torch.equal(mask, found.semantic == label) and mask.any()
        assert set(found.labels.tolist()) == set(found.semantic.unique().tolist())
        assert torch.equal(found.boxes, masks_to_boxes(found.masks))


def test_flip_mirrors_the_whole_image() -> None:
    image, target = coloured(blocks())
    spec = PLAIN.model_copy(update={"flip": 1.0, "train_min_size": [40], "train_crop_size": (400, 400)})
    flipped, found = augment(image, target, spec, None, sample_generator(0, 0, 0))
    assert torch.equal(flipped, image.flip(-1))
    assert found.semantic is not None and target.semantic is not None
    assert torch.equal(found.semantic, target.semantic.flip(-1))
    assert torch.equal(found.masks, target.masks.flip(-1))


def test_crowd_and_vanished_objects_are_dropped_and_areas_stay() -> None:
    image, target = coloured(blocks())
    target = replace(target, iscrowd=torch.tensor([True] + [False] * 7), areas=torch.arange(8).double() + 0.5)
    _, found = augment(image, target, PLAIN, None, sample_generator(0, 0, 3))
    assert 0 not in found.labels and len(found.labels) < 7
    assert not found.iscrowd.any()
    assert found.areas.tolist() == [label + 0.5 for label in found.labels.tolist()]


def test_empty_targets_stay_empty() -> None:
    image, target = coloured(np.full((40, 80), 3))
    empty = replace(
        target,
        labels=target.labels[:0],
        masks=target.masks[:0],
        boxes=target.boxes[:0],
        iscrowd=target.iscrowd[:0],
        areas=target.areas[:0],
        semantic=None,
    )
    _, found = augment(image, empty, PLAIN, None, sample_generator(0, 0, 0))
    assert found.masks.shape == (0, 32, 48) and found.semantic is None


def test_target_size_comes_first() -> None:
    image, target = coloured(blocks())
    spec = PLAIN.model_copy(update={"train_min_size": [100], "train_crop_size": (512, 512)})
    stretched, found = augment(image, target, spec, (50, 50), sample_generator(0, 0, 0))
    assert stretched.shape == (3, 100, 100) and found.masks.shape[1:] == (100, 100)


def test_sizes_are_drawn_from_the_list_and_capped() -> None:
    spec = PLAIN.model_copy(update={"train_min_size": [32, 64], "train_max_size": 100})
    drawn = {train_size(40, 80, spec, sample_generator(0, 0, index)) for index in range(40)}
    assert drawn == {(32, 64), (50, 100)}
    single = {train_size(40, 80, PLAIN, sample_generator(0, 0, index)) for index in range(10)}
    assert single == {(40, 80)}


def test_large_scale_jitter_is_relative_to_the_crop() -> None:
    spec = PLAIN.model_copy(update={"train_scale": (0.5, 2.0), "train_crop_size": (64, 64)})
    sizes = [train_size(40, 80, spec, sample_generator(0, 0, index)) for index in range(300)]
    widths = [width for _, width in sizes]
    assert 32 <= min(widths) < 36 and 120 < max(widths) <= 128
    assert all(abs(width - 2 * height) <= 1 for height, width in sizes)


def test_crops_with_one_dominating_class_are_drawn_again() -> None:
    labels = np.zeros((40, 400), int)
    labels[:, 340:] = 1
    image, target = coloured(labels)
    free = PLAIN.model_copy(update={"train_min_size": [40], "train_crop_size": (40, 80)})
    held = free.model_copy(update={"single_class_max_area": 0.8})

    def both(spec: AugmentationSpec) -> int:
        crops = [augment(image, target, spec, None, sample_generator(0, 0, index))[1] for index in range(60)]
        return sum(len(crop.labels) == 2 for crop in crops)

    assert both(held) > 1.5 * both(free)


def test_color_jitter_changes_colours_within_bounds() -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(60, 190, (3, 16, 16), np.uint8))
    results = [jitter_colors(image, sample_generator(0, 0, index)) for index in range(64)]
    assert all(result.shape == image.shape and result.dtype == torch.uint8 for result in results)
    assert sum(torch.equal(result, image) for result in results) <= 16
    assert len({result.numpy().tobytes() for result in results}) > 40
    assert image.min() >= 60, "the original is not written to"
    gray = torch.full((3, 4, 4), 128, dtype=torch.uint8)
    for index in range(32):
        channels = jitter_colors(gray, sample_generator(1, 0, index))
        assert torch.equal(channels[0], channels[1]) and torch.equal(channels[1], channels[2]), "gray stays gray"
        assert abs(int(channels[0, 0, 0]) - 128) <= 0.5 * (128 + 32) + 32 + 1


def test_generators_are_independent() -> None:
    draws = [
        generator.random()
        for generator in (
            sample_generator(0, 0, 0),
            sample_generator(1, 0, 0),
            sample_generator(0, 1, 0),
            sample_generator(0, 0, 1),
            order_generator(0, 0),
        )
    ]
    assert len(set(draws)) == 5
    assert sample_generator(5, 6, 7).random(100).tolist() == sample_generator(5, 6, 7).random(100).tolist()


def test_padding_and_resizing_of_targets() -> None:
    _, target = coloured(blocks())
    doubled = resize_target(target, (80, 160))
    assert torch.equal(doubled.boxes, target.boxes * 2)
    padded = pad_target(target, (64, 96))
    assert padded.masks.shape == (8, 64, 96) and padded.semantic is not None and target.semantic is not None
    assert torch.equal(padded.masks[:, :40, :80], target.masks) and not padded.masks[:, 40:].any()
    assert torch.equal(padded.semantic[:40, :80], target.semantic)
    assert (padded.semantic[:, 80:] == IGNORE).all() and (padded.semantic[40:] == IGNORE).all()
