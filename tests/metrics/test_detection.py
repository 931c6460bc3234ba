"""Detections against pycocotools, which reads the annotation file itself: nothing between the file and the numbers may change them."""

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tessera.data.catalog import load_catalog
from tessera.files import UserError
from tessera.inference.results import coco_results
from tessera.metrics.evaluate import Evaluator, evaluate
from tessera.metrics.statistics import Limits
from tessera.spec.schema import DeformableDetrExperiment
from tessera.structures import Batch, ClassCatalog, ImageMeta, Instances, Predictions
from tests.data.files import opened, write_coco
from tests.metrics.scenes import NAMES, make_catalog, make_meta, read_predictions
from tests.metrics.test_evaluate import CATALOG, disturbed, looked_up, make_batches, make_truths

LABEL_MAP = [{"id": 2, "name": "car"}, {"id": 7, "name": "bus"}, {"id": 90, "name": "cat"}]
SIZES = [(240, 320), (260, 180), (200, 200), (180, 280), (300, 300)]


def scene(generator, number, images=SIZES):
    """Annotations with fractions of pixels: crowd regions, boxes that leave the image or have no area, images without any."""
    annotations = []
    for image_id, (height, width) in enumerate(images, 1):
        for _ in range(0 if image_id == 3 else number):
            x, y = generator.uniform(-5, width - 4), generator.uniform(-5, height - 4)
            w, h = generator.uniform(4, 0.7 * width), generator.uniform(4, 0.7 * height)
            if generator.random() < 0.1:
                w = 0.0
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(generator.choice([2, 7, 90])),
                    "bbox": [x, y, w, h],
                    "area": w * h * generator.uniform(0.6, 1.0),
                    "iscrowd": int(generator.random() < 0.15),
                }
            )
    return annotations


def guesses(generator, annotations, image_id, empty):
    """Shifted copies of the true boxes, some twice, and inventions; scores of eight values, so that many are equal."""
    boxes, labels = [], []
    for item in annotations if not empty else []:
        if item["image_id"] != image_id:
            continue
        for _ in range(int(generator.integers(0, 3))):
            x, y, w, h = np.array(item["bbox"]) + generator.normal(0, 2, 4)
            boxes.append([x, y, x + max(w, 0), y + max(h, 0)])
            labels.append([2, 7, 90].index(item["category_id"]) if generator.random() < 0.85 else 0)
    for _ in range(0 if empty else 3):
        x, y = generator.uniform(0, 60, 2)
        boxes.append([x, y, x + generator.uniform(1, 40), y + generator.uniform(1, 40)])
        labels.append(int(generator.integers(3)))
    scores = torch.from_numpy(generator.integers(1, 9, len(boxes)) / 8).float()
    order = scores.argsort(descending=True, stable=True)
    return Instances(
        scores[order],
        torch.tensor(labels, dtype=torch.int64)[order],
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)[order],
        None,
    )


def measured(dataset, root, table, classes=None, limits=Limits()):
    reader = opened(dataset, root, "detection")
    catalog = reader_catalog(dataset, root)
    evaluator = Evaluator(catalog, "detection", classes, limits)
    for index in range(len(reader)):
        sample = reader.read(index)
        size = tuple(sample.image.shape[1:])
        meta = ImageMeta(sample.image_id, sample.file_name, size, size)
        evaluator.add(Predictions(meta, instances=table[sample.image_id]), sample.target)
    return evaluator.result()


def reader_catalog(dataset, root):
    return load_catalog(dataset, str(root), "detection")


def reference(root, table, catalog, category_ids=None):
    """Twelve numbers, and AP and AR per class, of the file as it stands and of the results as infer writes them."""
    results = [item for image_id, found in table.items() for item in coco_results(found, image_id, catalog)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(root / "a.json"))
        if results:
            found = truth.loadRes(json.loads(json.dumps(results)))
        else:
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        evaluator = COCOeval(truth, found, "bbox")
        if category_ids:
            evaluator.params.catIds = category_ids
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()

    def mean(values):
        values = values[values > -1]
        return values.mean() if values.size else None

    classes = range(len(evaluator.params.catIds))
    precision = [mean(evaluator.eval["precision"][:, :, index, 0, -1]) for index in classes]
    recall = [mean(evaluator.eval["recall"][:, index, 0, -1]) for index in classes]
    return list(evaluator.stats), precision, recall


def assert_equal(evaluation, expected):
    stats, precision, recall = expected
    wanted = {f"box_{name}": value for name, value in zip(NAMES, stats, strict=True) if value > -1}
    assert evaluation.metrics == pytest.approx(wanted, abs=1e-9)
    assert [row["box_AP"] for row in evaluation.per_class] == pytest.approx(precision, abs=1e-9)
    assert [row["box_AR"] for row in evaluation.per_class] == pytest.approx(recall, abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_twelve_numbers_equal_pycocotools(seed, tmp_path):
    generator = np.random.default_rng(seed)
    annotations = scene(generator, 9)
    dataset = write_coco(tmp_path, annotations, SIZES, LABEL_MAP)
    table = {number: guesses(generator, annotations, number, empty=number == 2) for number in range(1, 6)}
    evaluation = measured(dataset, tmp_path, table)
    assert len(evaluation.metrics) == 12 and 0.05 < evaluation.metrics["box_AP"] < 0.9
    catalog = reader_catalog(dataset, tmp_path)
    assert_equal(evaluation, reference(tmp_path, table, catalog))
    some = measured(dataset, tmp_path, table, ["cat", "car"])
    assert [row["name"] for row in some.per_class] == ["car", "cat"]
    assert_equal(some, reference(tmp_path, table, catalog, [2, 90]))
    assert some.metrics["box_AP"] != evaluation.metrics["box_AP"]


def test_results_stay_with_their_images_when_the_first_have_none(tmp_path):
    """W11 of reference/tao.md: a threshold that empties the first image shifted everything after it by one."""
    generator = np.random.default_rng(0)
    annotations = scene(generator, 6)
    dataset = write_coco(tmp_path, annotations, SIZES, LABEL_MAP)
    table = {number: guesses(generator, annotations, number, empty=number in (1, 3, 5)) for number in range(1, 6)}
    evaluation = measured(dataset, tmp_path, table)
    assert evaluation.metrics["box_AP"] > 0.05
    assert_equal(evaluation, reference(tmp_path, table, reader_catalog(dataset, tmp_path)))
    nothing = {number: guesses(generator, annotations, number, empty=True) for number in range(1, 6)}
    evaluation = measured(dataset, tmp_path, nothing)
    assert evaluation.metrics["box_AP"] == evaluation.metrics["box_AR100"] == 0
    assert_equal(evaluation, reference(tmp_path, nothing, reader_catalog(dataset, tmp_path)))


def test_what_falls_into_a_crowd_region_is_no_mistake(tmp_path):
    boxes = [
        {"id": 1, "category_id": 2, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0},
        {"id": 2, "category_id": 2, "bbox": [50, 10, 60, 60], "area": 3600, "iscrowd": 1},
    ]
    dataset = write_coco(tmp_path, boxes, [(120, 160)], LABEL_MAP)
    found = torch.tensor([[55.0, 15, 75, 35], [10, 10, 30, 30], [80, 40, 100, 60]])
    table = {1: Instances(torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.int64), found, None)}
    evaluation = measured(dataset, tmp_path, table)
    assert evaluation.metrics["box_AP"] == 1.0
    assert_equal(evaluation, reference(tmp_path, table, reader_catalog(dataset, tmp_path)))


def test_predictions_of_detectors_are_written_and_read_again(tmp_path):
    generator = np.random.default_rng(4)
    annotations = scene(generator, 4)
    dataset = write_coco(tmp_path, annotations, SIZES, LABEL_MAP)
    table = {number: guesses(generator, annotations, number, empty=number == 1) for number in range(1, 6)}
    evaluation = measured(dataset, tmp_path, table)
    evaluation.write_predictions(tmp_path / "p.json.gz")
    again = read_predictions(tmp_path / "p.json.gz")
    for number in range(1, 6):
        instances = again[number].instances
        assert instances.masks is None
        for name in ("scores", "labels", "boxes"):
            assert torch.equal(getattr(instances, name), getattr(table[number], name))
    document = evaluation.summary()
    assert "box_AP " in document and "box_AR100" in document


def test_an_image_with_more_objects_than_count_is_named_and_the_limit_can_be_lifted(tmp_path):
    boxes = [[5 * (number % 40), 5 * (number // 40), 4, 4] for number in range(120)]
    listed = [{"id": n, "category_id": 2, "bbox": box, "area": 16, "iscrowd": 0} for n, box in enumerate(boxes, 1)]
    crowd = {"id": 121, "category_id": 7, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 1}
    dataset = write_coco(tmp_path, [*listed, crowd], [(120, 240), (120, 160)], LABEL_MAP)
    corners = torch.tensor(boxes, dtype=torch.float32)
    corners[:, 2:] += corners[:, :2]
    labels = torch.zeros(120, dtype=torch.int64)
    none = Instances(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), None)
    table = {1: Instances(torch.linspace(0.9, 0.1, 120), labels, corners, None), 2: none}
    spec = DeformableDetrExperiment(postprocess={"num_select": 110}, model={"num_queries": 120})
    evaluation = measured(dataset, tmp_path, table)
    assert evaluation.metrics["box_AR100"] == pytest.approx(100 / 120) and evaluation.metrics["box_AP"] < 0.9
    told = "1 of 2 images hold more objects "
    end = "(the most: 120 in 1.png), so that no model finds all"
    assert evaluation.remarks(spec) == [
        f"{told}of one class than the 100 of evaluate.max_detections {end}",
        f"{told}than the 110 of postprocess.num_select {end}",
    ]
    lifted = DeformableDetrExperiment(evaluate={"max_detections": [1, 10, 120]}, postprocess={"num_select": 120})
    evaluation = measured(dataset, tmp_path, table, limits=Limits.of(lifted.evaluate))
    assert evaluation.metrics["box_AP@120"] == evaluation.metrics["box_AR120"] == 1
    assert evaluation.per_class[0]["box_AP50@120"] == 1
    assert "box_AP" not in evaluation.metrics and evaluation.remarks(lifted) == []


@pytest.mark.parametrize(("mode", "names"), [("instance", {"AP", "box_AP"}), ("semantic", {"mIoU", "pixel_accuracy"})])
def test_one_task_can_be_measured_on_panoptic_truths(mode, names):
    truths = make_truths()
    table = disturbed(truths)
    alone = evaluate(looked_up(table), make_batches(truths), CATALOG, mode, progress=False)
    together = evaluate(looked_up(table), make_batches(truths), CATALOG, "panoptic", progress=False)
    assert names <= alone.metrics.keys() and "PQ" not in alone.metrics
    assert alone.metrics == {name: together.metrics[name] for name in alone.metrics}
    assert [row["name"] for row in alone.per_class] == list(CATALOG.names)


def test_metrics_of_chosen_classes():
    truths = make_truths()
    table = disturbed(truths)
    every = evaluate(looked_up(table), make_batches(truths), CATALOG, "panoptic", progress=False)
    names = [CATALOG.names[0], CATALOG.names[3]]
    some = evaluate(looked_up(table), make_batches(truths), CATALOG, "panoptic", progress=False, classes=names)
    assert [row["name"] for row in some.per_class] == names
    rows = [row for row in every.per_class if row["name"] in names]
    assert [row["PQ"] for row in some.per_class] == [row["PQ"] for row in rows]
    assert some.metrics["PQ"] == pytest.approx(np.mean([row["PQ"] for row in rows]))
    assert some.metrics["mIoU"] == pytest.approx(np.mean([row["IoU"] for row in rows]))
    assert some.metrics["AP"] == pytest.approx(np.mean([row["AP"] for row in rows if row["isthing"]]))
    with pytest.raises(UserError, match=r"evaluate\.classes: the model has no class 'clas_0'; did you mean 'class_0'"):
        Evaluator(CATALOG, "panoptic", ["clas_0"])


def test_classes_of_one_name_are_chosen_and_written_with_their_ids():
    truths = make_truths()
    first, second, *others = CATALOG.categories
    twins = ClassCatalog((replace(first, name="screen"), replace(second, name="screen"), *others))
    names = [f"screen ({second.id})"]
    found = evaluate(
        looked_up(disturbed(truths)), make_batches(truths), twins, "panoptic", progress=False, classes=names
    )
    assert [(row["id"], row["name"]) for row in found.per_class] == [
        (second.id, "screen")
    ] and found.statistics.counted == [1]
    assert found.statistics.classes[:2] == [f"screen ({first.id})", f"screen ({second.id})"]
    message = rf"evaluate\.classes: 2 classes are called 'screen'; name one of them, 'screen \({first.id}\)' or 'screen"
    with pytest.raises(UserError, match=message):
        Evaluator(twins, "panoptic", ["screen"])


def test_truth_of_another_size_is_refused():
    catalog = make_catalog(1, 0)
    (batch,) = make_batches(make_truths()[:1])
    assert isinstance(batch, Batch) and batch.truths is not None
    truth = batch.truths[0]
    truth.masks, truth.size = None, (9, 9)
    nothing = Instances(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), None)
    with pytest.raises(ValueError, match=r"truth has size \(9, 9\)"):
        Evaluator(catalog, "detection").add(Predictions(make_meta(1, (40, 56)), instances=nothing), truth)
