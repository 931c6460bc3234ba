import numpy as np
import pytest
import torch

from tessera.ops.masks import masks_to_boxes
from tessera.pictures.canvas import Canvas, shade, text_color
from tessera.pictures.overlays import draw_predictions, draw_truth
from tessera.structures import Category, ClassCatalog, Instances, Panoptic, Predictions, Segment
from tests.metrics.scenes import make_meta, make_target

RED, BLUE = (200, 0, 0), (0, 0, 220)
CATALOG = ClassCatalog((Category(1, "thing", RED, True), Category(2, "stuff", BLUE, False)))
SIZE = (600, 1000)
GRAY = torch.full((3, *SIZE), 128, dtype=torch.uint8)


def drawn(image, opacity=0.5, **part):
    """One part of a prediction."""
    mode = {"instances": "instance"}.get(*part, *part)
    return draw_predictions(image, Predictions(make_meta(1, tuple(image.shape[1:])), **part), CATALOG, mode, opacity)


def rectangle(top, left, bottom, right):
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def pixel(picture, y, x):
    return tuple(np.asarray(picture)[y, x].tolist())


def blended(color, opacity):
    return tuple(round(128 * (1 - opacity) + value * opacity) for value in color)


@pytest.mark.parametrize("opacity", [0.0, 0.5, 1.0])
def test_semantic_uses_the_label_maps_colours_and_leaves_ignored_pixels(opacity):
    semantic = torch.full(SIZE, 255)
    semantic[:, :500] = 1
    semantic[:100, :] = 0
    picture = drawn(GRAY, opacity, semantic=semantic)
    assert picture.size == (1000, 600) and picture.mode == "RGB"
    assert pixel(picture, 590, 20) == pytest.approx(blended(BLUE, opacity), abs=1)
    assert pixel(picture, 20, 20) == pytest.approx(blended(RED, opacity), abs=1)
    assert pixel(picture, 300, 700) == (128, 128, 128)
    assert pixel(picture, 599, 250) == BLUE, "the contour is opaque"


def test_small_masks_stay_visible_inside_large_ones():
    masks = torch.stack([rectangle(250, 450, 350, 550), rectangle(0, 0, 600, 1000)])
    instances = Instances(torch.tensor([0.9, 0.8]), torch.tensor([0, 0]), masks_to_boxes(masks), masks)
    picture = drawn(GRAY, 1.0, instances=instances)
    assert pixel(picture, 300, 500) == RED
    assert pixel(picture, 500, 500) == shade(RED, 1) != RED, "objects of one class differ in shade"


def test_instances_below_the_threshold_are_not_drawn():
    masks = torch.stack([rectangle(100, 100, 200, 200), rectangle(400, 600, 500, 700)])
    instances = Instances(torch.tensor([0.9, 0.4]), torch.tensor([0, 0]), masks_to_boxes(masks), masks)
    picture = drawn(GRAY, instances=instances)
    assert pixel(picture, 150, 150) != (128, 128, 128)
    assert np.array_equal(np.asarray(picture)[380:520, 560:720], np.full((140, 160, 3), 128))


def test_boxes_are_drawn_without_masks():
    instances = Instances(torch.tensor([0.9]), torch.tensor([0]), torch.tensor([[300.0, 200.0, 500.0, 400.0]]), None)
    picture = drawn(GRAY, instances=instances)
    assert (
        pixel(picture, 200, 450)
        == pixel(picture, 399, 450)
        == pixel(picture, 300, 300)
        == pixel(picture, 300, 499)
        == RED
    )
    assert pixel(picture, 300, 400) == (128, 128, 128)


def test_panoptic_draws_things_and_stuff_and_leaves_void():
    ids = torch.zeros(SIZE, dtype=torch.int32)
    ids[300:] = 4
    ids[350:550, 100:300] = 9
    panoptic = Panoptic(ids, [Segment(4, 1, 0.7), Segment(9, 0, 0.9)])
    picture = drawn(GRAY, 1.0, panoptic=panoptic)
    assert pixel(picture, 590, 900) == BLUE and pixel(picture, 500, 200) == RED
    assert pixel(picture, 20, 500) == (128,) * 3
    predictions = Predictions(make_meta(1, SIZE), panoptic=panoptic)
    with pytest.raises(ValueError, match="no semantic part"):
        draw_predictions(GRAY, predictions, CATALOG, "semantic")


@pytest.mark.parametrize("mode", ["panoptic", "instance", "semantic"])
def test_truth_is_drawn_and_nothing_at_all_can_be(mode):
    masks = torch.stack([rectangle(100, 100, 200, 200), rectangle(300, 0, 600, 1000)])
    truth = make_target(torch.tensor([0, 1]), masks, torch.tensor([True, False]))
    assert pixel(draw_truth(GRAY, truth, CATALOG, mode, 1.0), 190, 110) == RED
    empty = make_target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, *SIZE, dtype=torch.bool))
    assert np.asarray(draw_truth(GRAY, empty, CATALOG, mode)).std() == 0


def test_small_images_are_enlarged_by_a_whole_factor():
    semantic = torch.zeros(32, 60, dtype=torch.int64)
    semantic[:, 30:] = 1
    picture = drawn(torch.zeros(3, 32, 60, dtype=torch.uint8), 1.0, semantic=semantic)
    assert picture.size == (60 * 15, 32 * 15)
    assert pixel(picture, 470, 440) == RED and pixel(picture, 470, 460) == BLUE


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (2000, 3)])
def test_extreme_sizes_can_be_drawn(size):
    mask = torch.ones(1, *size, dtype=torch.bool)
    instances = Instances(torch.tensor([0.9]), torch.tensor([0]), masks_to_boxes(mask), mask)
    picture = drawn(torch.zeros(3, *size, dtype=torch.uint8), 1.0, instances=instances)
    assert picture.width % size[1] == 0 and picture.height % size[0] == 0


def test_labels_stay_inside_and_do_not_cover_each_other():
    canvas = Canvas(GRAY)
    for left in (-5.0, 500.0, 505.0, 995.0):
        canvas.label_box([left, 2.0, left + 20, 30.0], "a name 0.50", RED)
    picture = np.asarray(canvas.finish())
    red = (picture == RED).all(-1)
    assert red.any() and pixel(canvas.finish(), 300, 300) == (128, 128, 128)
    assert red.sum() > 3 * 0.5 * canvas._measure("a name 0.50")[0] * canvas._measure("a name 0.50")[1]


@pytest.mark.parametrize(
    ("background", "expected"), [((255, 255, 255), 17), ((255, 255, 0), 17), ((0, 0, 0), 255), ((128, 0, 0), 255)]
)
def test_text_contrasts_with_its_background(background, expected):
    assert text_color(background)[0] == expected
