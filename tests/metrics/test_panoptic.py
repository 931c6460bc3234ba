import pytest
import torch

from tessera.metrics.formulas import by_class, evaluated
from tessera.metrics.panoptic import panoptic_counts
from tessera.metrics.statistics import Statistics, as_columns
from tessera.structures import Panoptic, Segment
from tests.metrics.scenes import disturbed_panoptic, make_catalog, make_target, random_target


def slow_counts(prediction, truth, num_classes):
    """The definition, with sets of pixels and a loop over all pairs."""
    pixels = {(y, x) for y in range(prediction.ids.shape[0]) for x in range(prediction.ids.shape[1])}
    true_sets = [{tuple(p) for p in mask.nonzero().tolist()} for mask in truth.masks]
    predicted_sets = [{tuple(p) for p in (prediction.ids == s.id).nonzero().tolist()} for s in prediction.segments]
    void = pixels.difference(*true_sets) if true_sets else pixels
    iou_sum, tp, fp, fn = [0.0] * num_classes, [0] * num_classes, [0] * num_classes, [0] * num_classes
    matched_true, matched_predicted = set(), set()
    for t, true_set in enumerate(true_sets):
        for p, predicted_set in enumerate(predicted_sets):
            label = truth.labels[t].item()
            if truth.iscrowd[t] or label != prediction.segments[p].label:
                continue
            iou = len(true_set & predicted_set) / len((true_set | predicted_set) - (predicted_set & void))
            if iou > 0.5:
                tp[label] += 1
                iou_sum[label] += iou
                matched_true.add(t)
                matched_predicted.add(p)
    crowd = {}
    for t, label in enumerate(truth.labels.tolist()):
        if truth.iscrowd[t]:
            crowd[label] = true_sets[t]
        elif t not in matched_true:
            fn[label] += 1
    for p, segment in enumerate(prediction.segments):
        if p in matched_predicted:
            continue
        forgiven = predicted_sets[p] & (void | crowd.get(segment.label, set()))
        if len(forgiven) / len(predicted_sets[p]) <= 0.5:
            fp[segment.label] += 1
    return iou_sum, tp, fp, fn


def slow_metrics(images, catalog):
    total = [[0] * len(catalog) for _ in range(4)]
    for prediction, truth in images:
        for sums, found in zip(total, slow_counts(prediction, truth, len(catalog)), strict=True):
            for label, value in enumerate(found):
                sums[label] += value
    rows = []
    for iou, tp, fp, fn in zip(*total, strict=True):
        weight = tp + fp / 2 + fn / 2
        rows.append({"PQ": iou / weight, "SQ": iou / tp if tp else 0.0, "RQ": tp / weight} if weight else None)
    metrics = {}
    for suffix, wanted in (("", (True, False)), ("_things", (True,)), ("_stuff", (False,))):
        group = [row for row, c in zip(rows, catalog.categories, strict=True) if row and c.isthing in wanted]
        if group:
            metrics |= {f"{name}{suffix}": sum(row[name] for row in group) / len(group) for name in ("PQ", "SQ", "RQ")}
    return metrics, rows


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_slow_reference(seed):
    generator = torch.Generator().manual_seed(seed)
    catalog = make_catalog(3, 2)
    images = []
    for count in (0, 1, 5, 12, 12):
        truth = random_target(catalog, (24, 20), count, generator)
        images.append((disturbed_panoptic(truth, catalog, generator), truth))
    metrics, rows = measured(images, catalog)
    expected, expected_rows = slow_metrics(images, catalog)
    assert metrics == pytest.approx(expected, abs=1e-9)
    for row, wanted in zip(rows, expected_rows, strict=True):
        found = {name: row[name] for name in ("PQ", "SQ", "RQ")}
        assert found == pytest.approx(wanted, abs=1e-9) if wanted else set(found.values()) == {None}
    assert 0 < metrics["PQ"] < 1 and metrics["PQ"] < metrics["SQ"]


def measured(images, catalog):
    rows = [(number, *row) for number, image in enumerate(images) for row in panoptic_counts(*image)]
    every, things = list(range(len(catalog))), list(catalog.thing_ids)
    parts = {"panoptic": as_columns("panoptic", rows)}
    statistics = Statistics("panoptic", list(catalog.names), things, every, list(range(len(images))), parts)
    return evaluated(statistics), by_class(statistics)


def row_masks(*spans):
    """Masks of one row of ten pixels."""
    masks = torch.zeros(len(spans), 1, 10, dtype=torch.bool)
    for mask, (start, stop) in zip(masks, spans, strict=True):
        mask[0, start:stop] = True
    return masks


def row_panoptic(*spans):
    """(start, stop, label) segments with ids 1, 2, ..."""
    ids = torch.zeros(1, 10, dtype=torch.int32)
    for number, (start, stop, _) in enumerate(spans, 1):
        ids[0, start:stop] = number
    return Panoptic(ids, [Segment(number, label, 1.0) for number, (_, _, label) in enumerate(spans, 1)])


@pytest.mark.parametrize(
    ("case", "truth", "crowd", "prediction", "tp_fp_fn"),
    [
        ("perfect", [(0, 5, 0), (5, 10, 1)], [], [(0, 5, 0), (5, 10, 1)], (2, 0, 0)),
        ("an IoU of exactly one half does not match", [(0, 10, 0)], [], [(0, 5, 0)], (0, 1, 1)),
        ("wrong class", [(0, 10, 0)], [], [(0, 10, 1)], (0, 1, 1)),
        ("pixels on void do not lower the IoU", [(0, 4, 0)], [], [(1, 10, 0)], (1, 0, 0)),
        ("a prediction mostly on void is forgiven", [(0, 4, 0)], [], [(2, 10, 1)], (0, 0, 1)),
        ("half on void is not mostly", [(0, 5, 0)], [], [(2, 8, 1)], (0, 1, 1)),
        ("crowd is neither found nor missed", [(0, 10, 0)], [0], [(0, 10, 0)], (0, 0, 0)),
        ("crowd of another class forgives nothing", [(0, 10, 0)], [0], [(0, 10, 1)], (0, 1, 0)),
        ("void and crowd add up", [(0, 4, 0)], [0], [(2, 6, 0)], (0, 0, 0)),
        ("nothing predicted", [(0, 5, 0)], [], [], (0, 0, 1)),
        ("nothing annotated", [], [], [(0, 5, 0)], (0, 0, 0)),
    ],
)
def test_rules(case, truth, crowd, prediction, tp_fp_fn):
    target = make_target(
        torch.tensor([label for _, _, label in truth], dtype=torch.int64),
        row_masks(*[span[:2] for span in truth]),
        torch.tensor([index in crowd for index in range(len(truth))], dtype=torch.bool),
    )
    counts = panoptic_counts(row_panoptic(*prediction), target)
    assert tuple(sum(row[place] for row in counts) for place in (2, 3, 4)) == tp_fp_fn, case


def test_nothing_anywhere_gives_no_metric():
    nothing = make_target(torch.zeros(0, dtype=torch.int64), row_masks())
    metrics, rows = measured([(row_panoptic(), nothing)], make_catalog(1, 1))
    assert metrics == {} and all(row["PQ"] is None for row in rows)


@pytest.mark.parametrize(
    ("ids", "segments", "message"),
    [
        ([1, 2], [1], r"ids \[2\] only in the map"),
        ([1, 0], [1, 2], r"\[2\] only in the list"),
        ([1, 1], [1, 1], "unique"),
        ([0, 0], [0], "above 0"),
    ],
)
def test_refuses_a_map_that_does_not_fit_its_segments(ids, segments, message):
    prediction = Panoptic(torch.tensor([ids], dtype=torch.int32), [Segment(number, 0, 1.0) for number in segments])
    target = make_target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=message):
        panoptic_counts(prediction, target)


def test_refuses_overlapping_truth():
    target = make_target(torch.tensor([0, 1]), row_masks((0, 5), (4, 8)))
    with pytest.raises(ValueError, match="overlap"):
        panoptic_counts(row_panoptic((0, 3, 0)), target)
