import contextlib
import io

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tessera.metrics.evaluate import Evaluator
from tessera.metrics.formulas import by_class, evaluated
from tessera.ops.masks import masks_to_boxes
from tessera.ops.rle import encode_masks
from tessera.structures import Instances, Predictions, Target
from tests.metrics.scenes import NAMES, disturbed_instances, make_catalog, make_meta, make_target, random_target


def empty_instances(size):
    return Instances(
        torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), torch.zeros(0, *size, dtype=torch.bool)
    )


def reference(images, catalog, kind):
    """pycocotools, from dictionaries made here: twelve numbers, and AP per thing class."""
    truths, results, entries = [], [], []
    for image_id, (prediction, truth) in enumerate(images, 7):
        height, width = truth.masks.shape[1:]
        entries.append({"id": image_id, "height": height, "width": width})
        for index, label in enumerate(truth.labels.tolist()):
            x1, y1, x2, y2 = truth.boxes[index].tolist()
            truths.append(
                {
                    "id": len(truths) + 1,
                    "image_id": image_id,
                    "category_id": catalog.categories[label].id,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "segmentation": encode_masks(truth.masks[index : index + 1])[0],
                    "area": truth.areas[index].item(),
                    "iscrowd": int(truth.iscrowd[index]),
                }
            )
        for index, label in enumerate(prediction.labels.tolist()):
            x1, y1, x2, y2 = prediction.boxes[index].tolist()
            geometry = (
                {"segmentation": encode_masks(prediction.masks[index : index + 1])[0]}
                if kind == "segm"
                else {"bbox": [x1, y1, x2 - x1, y2 - y1]}
            )
            results.append(
                {
                    "image_id": image_id,
                    "category_id": catalog.categories[label].id,
                    "score": prediction.scores[index].item(),
                    **geometry,
                }
            )
    categories = [{"id": c.id, "name": c.name} for c in catalog.categories if c.isthing]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"info": {}, "images": entries, "annotations": truths, "categories": categories}
        coco.createIndex()
        found = COCO()
        found.dataset = {"images": entries, "annotations": [], "categories": categories}
        found.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(results) if results else found, kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    per_class = []
    for index in range(len(categories)):
        values = evaluator.eval["precision"][:, :, index, 0, -1]
        values = values[values > -1]
        per_class.append(values.mean() if values.size else None)
    return list(evaluator.stats), per_class


def measured(images, catalog, mode="instance"):
    evaluator = Evaluator(catalog, mode)
    for image_id, (prediction, truth) in enumerate(images, 7):
        meta = make_meta(image_id, tuple(truth.masks.shape[1:]))
        evaluator.add(Predictions(meta, instances=prediction), truth)
    statistics = evaluator.statistics()
    return evaluated(statistics), by_class(statistics)


def scenes(seed, catalog, size=(120, 110), counts=(0, 3, 9, 20)):
    generator = torch.Generator().manual_seed(seed)
    images = []
    for count in counts:
        truth = random_target(catalog, size, count, generator)
        # Areas as annotated need not be the mask's: they alone decide what is small.
        truth.areas = truth.areas * (0.5 + torch.rand(len(truth.areas), generator=generator).double())
        images.append((disturbed_instances(truth, catalog, generator), truth))
    return images


def assert_equal_to_reference(images, catalog):
    metrics, rows = measured(images, catalog)
    for kind, prefix in (("segm", ""), ("bbox", "box_")):
        stats, per_class = reference(images, catalog, kind)
        expected = {f"{prefix}{name}": value for name, value in zip(NAMES, stats, strict=True) if value > -1}
        found = {name: value for name, value in metrics.items() if name.startswith("box_") == (kind == "bbox")}
        assert found == pytest.approx(expected, abs=1e-9)
        assert [rows[label][f"{prefix}AP"] for label in catalog.thing_ids] == pytest.approx(per_class, abs=1e-9)
    return metrics, rows


@pytest.mark.parametrize("seed", range(6))
def test_equals_pycocotools(seed):
    catalog = make_catalog(3, 2)
    metrics, rows = assert_equal_to_reference(scenes(seed, catalog), catalog)
    assert 0 < metrics["AP"] < 1 and metrics["AP"] != metrics["box_AP"]
    assert all("AP" not in rows[label] for label in range(len(catalog)) if label not in catalog.thing_ids)


def test_equals_pycocotools_with_more_than_a_hundred_predictions():
    catalog = make_catalog(1, 0)
    generator = torch.Generator().manual_seed(0)
    (prediction, truth), *_ = scenes(2, catalog, counts=(12,))
    copies = prediction.masks.repeat(20, 1, 1)[:150]
    scores = torch.rand(len(copies), generator=generator).sort(descending=True).values
    crowded = Instances(scores, torch.zeros(len(copies), dtype=torch.int64), masks_to_boxes(copies), copies)
    assert len(copies) > 100
    assert_equal_to_reference([(crowded, truth)], catalog)


@pytest.mark.parametrize(
    ("case", "with_truth", "with_predictions", "ap"),
    [
        ("no predictions at all", True, False, 0.0),
        ("no truth at all", False, True, None),
        ("nothing at all", False, False, None),
    ],
)
def test_edges_equal_pycocotools(case, with_truth, with_predictions, ap):
    catalog = make_catalog(2, 1)
    size = (120, 110)
    nothing = make_target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, *size, dtype=torch.bool))
    images = [
        (prediction if with_predictions else empty_instances(size), truth if with_truth else nothing)
        for prediction, truth in scenes(1, catalog)
    ]
    metrics, _ = assert_equal_to_reference(images, catalog)
    assert metrics.get("AP") == ap, case


def square(top, left, side, size=(64, 64)):
    mask = torch.zeros(1, *size, dtype=torch.bool)
    mask[:, top : top + side, left : left + side] = True
    return mask


def one(mask, score=0.9):
    return Instances(torch.tensor([score]), torch.tensor([0]), masks_to_boxes(mask), mask)


def test_the_first_object_of_all_can_be_found():
    """An annotation with id 0 would count as unmatched."""
    mask = square(4, 4, 20)
    metrics, _ = measured([(one(mask), make_target(torch.tensor([0]), mask))], make_catalog(1, 0))
    assert metrics["AP"] == metrics["box_AP"] == 1.0


def test_pure_detectors_have_box_numbers_alone():
    mask = square(4, 4, 20)
    found = one(mask)
    truth = Target(
        torch.tensor([0]), mask, found.boxes, torch.tensor([False]), torch.tensor([400.0], dtype=torch.float64)
    )
    boxes = Instances(found.scores, found.labels, found.boxes, None)
    metrics, rows = measured([(boxes, truth)], make_catalog(1, 0), "detection")
    assert metrics["box_AP"] == 1.0 and "AP" not in metrics and "AP" not in rows[0]
