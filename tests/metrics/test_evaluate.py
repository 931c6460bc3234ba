import json

import pytest
import torch

from tessera.files import UserError
from tessera.metrics.evaluate import Evaluator, evaluate
from tessera.ops.masks import masks_to_boxes
from tessera.spec.schema import Spec
from tessera.structures import Batch, Instances, Panoptic, Predictions, Segment
from tests.metrics.scenes import (
    disturbed_instances,
    disturbed_panoptic,
    make_catalog,
    make_meta,
    make_target,
    random_target,
    read_predictions,
)

CATALOG = make_catalog(3, 2)
SIZES = [(40, 56), (33, 20), (64, 64), (48, 31), (40, 56)]


def make_truths(seed=0, crowd=True):
    generator = torch.Generator().manual_seed(seed)
    truths = [
        random_target(CATALOG, size, count, generator) for size, count in zip(SIZES, (5, 0, 9, 3, 7), strict=True)
    ]
    if not crowd:
        for truth in truths:
            truth.iscrowd[:] = False
    return truths


def make_batches(truths, batch_size=1, order=None):
    """Blank inputs: the predictions of these tests come from a table."""
    order = list(range(len(truths))) if order is None else order
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        metas = [make_meta(index + 1, tuple(truths[index].masks.shape[1:])) for index in part]
        images = torch.zeros(len(part), 3, 32, 32)
        yield Batch(images, images[:, 0] > 1, metas, None, [truths[index] for index in part])


def disturbed(truths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    table = {}
    for number, truth in enumerate(truths, 1):
        size = tuple(truth.masks.shape[1:])
        semantic = torch.where(truth.semantic == 255, 0, truth.semantic.long()).roll(1, 0)
        table[number] = Predictions(
            make_meta(number, size),
            semantic,
            disturbed_instances(truth, CATALOG, generator),
            disturbed_panoptic(truth, CATALOG, generator),
        )
    return table


def perfect(truths):
    table = {}
    for number, truth in enumerate(truths, 1):
        things = torch.isin(truth.labels, torch.tensor(CATALOG.thing_ids))
        masks = truth.masks[things]
        instances = Instances(torch.ones(len(masks)), truth.labels[things], masks_to_boxes(masks), masks)
        ids = torch.zeros(truth.masks.shape[1:], dtype=torch.int32)
        for index, mask in enumerate(truth.masks, 1):
            ids[mask] = index
        segments = [Segment(index, label, 1.0) for index, label in enumerate(truth.labels.tolist(), 1)]
        semantic = torch.where(truth.semantic == 255, 0, truth.semantic.long())
        meta = make_meta(number, tuple(truth.masks.shape[1:]))
        table[number] = Predictions(meta, semantic, instances, Panoptic(ids, segments))
    return table


def looked_up(table):
    return lambda batch: [table[meta.image_id] for meta in batch.metas]


@pytest.mark.parametrize(
    ("mode", "present", "absent"),
    [
        ("panoptic", {"PQ", "SQ", "RQ", "PQ_things", "PQ_stuff", "AP", "box_AP", "mIoU"}, set()),
        ("instance", {"AP", "AP50", "AR100", "box_AP50"}, {"PQ", "mIoU"}),
        ("semantic", {"mIoU", "mean_accuracy", "pixel_accuracy"}, {"PQ", "AP"}),
    ],
)
def test_the_mode_decides_what_is_measured(mode, present, absent):
    truths = make_truths(crowd=False)
    evaluation = evaluate(looked_up(perfect(truths)), make_batches(truths), CATALOG, mode, progress=False)
    assert evaluation.metrics.keys() >= present and not evaluation.metrics.keys() & absent
    assert {name: value for name, value in evaluation.metrics.items() if not name.startswith(("AR1", "box_AR1"))} == (
        pytest.approx({name: 1.0 for name in evaluation.metrics if not name.startswith(("AR1", "box_AR1"))})
    )
    assert evaluation.images == len(truths)
    assert [row["name"] for row in evaluation.per_class] == list(CATALOG.names)


@pytest.mark.parametrize("mode", ["panoptic", "instance", "semantic"])
def test_batches_and_order_change_nothing(mode):
    truths = make_truths()
    predict = looked_up(disturbed(truths))
    one = evaluate(predict, make_batches(truths), CATALOG, mode, progress=False)
    two = evaluate(predict, make_batches(truths, 2, order=[3, 1, 4, 0, 2]), CATALOG, mode, progress=False)
    assert one.metrics == two.metrics and one.per_class == two.per_class
    assert any(0 < value < 1 for value in one.metrics.values())


def test_processes_merge_to_the_same_numbers():
    truths, table = make_truths(), disturbed(make_truths())
    whole, first, second = (Evaluator(CATALOG, "panoptic") for _ in range(3))
    for number, truth in enumerate(truths, 1):
        whole.add(table[number], truth)
        (first if number % 2 else second).add(table[number], truth)
    first.merge(second)
    assert first.result().metrics == whole.result().metrics
    with pytest.raises(UserError, match="occurs twice"):
        whole.merge(second)


def test_predictions_survive_the_file(tmp_path):
    truths, table = make_truths(), disturbed(make_truths())
    evaluation = evaluate(looked_up(table), make_batches(truths), CATALOG, "panoptic", progress=False)
    path = tmp_path / "eval.predictions.json.gz"
    evaluation.write_predictions(path)
    saved = read_predictions(path)
    assert len(saved) == len(truths)
    for number in range(1, len(truths) + 1):
        found, wanted = saved[number], table[number]
        assert found.meta == wanted.meta
        assert torch.equal(found.semantic, wanted.semantic)
        assert torch.equal(found.panoptic.ids, wanted.panoptic.ids)
        assert found.panoptic.segments == wanted.panoptic.segments
        for name in ("scores", "labels", "boxes", "masks"):
            assert torch.equal(getattr(found.instances, name), getattr(wanted.instances, name)), name
    again = evaluate(looked_up(saved), make_batches(truths), CATALOG, "panoptic", progress=False)
    assert again.metrics == evaluation.metrics


def test_counts_of_the_images_add_up(tmp_path):
    truths, table = make_truths(), disturbed(make_truths())
    evaluation = evaluate(looked_up(table), make_batches(truths), CATALOG, "panoptic", progress=False)
    hits = sum(n for record in evaluation.predictions for t, p, n in record["semantic"]["confusion"] if t == p)
    pixels = sum(n for record in evaluation.predictions for _, _, n in record["semantic"]["confusion"])
    assert hits / pixels == pytest.approx(evaluation.metrics["pixel_accuracy"], abs=1e-12)
    for label, row in enumerate(evaluation.per_class):
        counts = [q[2:] for record in evaluation.predictions for q in record["panoptic"]["quality"] if q[0] == label]
        assert [sum(column) for column in zip(*counts, strict=True)] == [row["tp"], row["fp"], row["fn"]]


def test_the_predictions_file_is_the_same_every_time(tmp_path):
    truths, table = make_truths(), disturbed(make_truths())
    contents = []
    for name in ("one", "two"):
        evaluation = evaluate(looked_up(table), make_batches(truths), CATALOG, "panoptic", progress=False)
        evaluation.write_predictions(tmp_path / name)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]


def test_eval_json_has_one_schema_and_no_nan():
    truths = make_truths()
    parts = {"model": "m", "backbone": "b", "dataset": "d", "variants": [], "seed": 0}
    for mode in ("panoptic", "instance", "semantic"):
        evaluation = evaluate(looked_up(disturbed(truths)), make_batches(truths), CATALOG, mode, progress=False)
        document = evaluation.to_json("m_b", parts, Spec(), "onnx", "fp16", {"seed": 0})
        assert json.loads(json.dumps(document, allow_nan=False)) == document
        assert list(document) == [
            *(
                "experiment",
                "model",
                "backbone",
                "dataset",
                "variants",
                "seed",
                "mode",
                "split",
                "runtime",
                "precision",
                "testing",
            ),
            *("images", "metrics", "per_class", "input", "remarks", "seconds", "lineage", "facts"),
        ]
        assert "5 images" in evaluation.summary()


def test_no_image_is_an_error():
    with pytest.raises(UserError, match="no image was evaluated"):
        evaluate(lambda batch: [], [], CATALOG, "panoptic", progress=False)


def test_an_image_that_comes_twice_is_an_error():
    truths = make_truths()
    with pytest.raises(UserError, match="image id 1 occurs twice"):
        evaluate(looked_up(perfect(truths)), make_batches(truths, order=[0, 1, 0]), CATALOG, "panoptic", progress=False)


def test_images_without_any_truth_are_an_error():
    empty = make_target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 8, 8, dtype=torch.bool))
    with pytest.raises(UserError, match="no annotated object"):
        evaluate(looked_up(perfect([empty])), make_batches([empty]), CATALOG, "instance", progress=False)


def test_semantic_needs_a_class_for_every_pixel():
    truths = make_truths()
    table = perfect(truths)
    truths[0].semantic = None
    with pytest.raises(UserError, match="do not say the class of every pixel"):
        evaluate(looked_up(table), make_batches(truths), CATALOG, "semantic", progress=False)


def test_answers_out_of_order_are_refused():
    truths = make_truths()
    table = perfect(truths)
    with pytest.raises(ValueError, match="do not answer"):
        evaluate(
            lambda batch: [table[meta.image_id] for meta in batch.metas[::-1]],
            make_batches(truths, 2),
            CATALOG,
            "panoptic",
            progress=False,
        )


def test_progress_is_a_few_plain_lines_without_a_terminal(capsys):
    truths = make_truths()
    evaluate(looked_up(perfect(truths)), list(make_batches(truths)), CATALOG, "semantic")
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "evaluate: batch: 5 of 5" and captured.out == ""
