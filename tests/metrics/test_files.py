"""Every metric against the published evaluations *of the files*: what the reader makes of annotations, and what becomes of written predictions,
lies between. COCO's own code reads the JSON itself; the panoptic and semantic oracles below follow the published definitions."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tessera.data.catalog import load_catalog
from tessera.files import write_json
from tessera.inference.results import coco_results, panoptic_png, segments_info, semantic_png
from tessera.metrics.evaluate import Evaluator, Result
from tessera.metrics.formulas import evaluated
from tessera.metrics.statistics import Limits, read_statistics
from tessera.ops.masks import masks_to_boxes
from tessera.structures import ClassCatalog, ImageMeta, Instances, Panoptic, Predictions, Segment
from tests.data.files import opened, save, write_coco, write_pairs, write_panoptic
from tests.metrics.scenes import NAMES, read_predictions

THINGS = [{"id": 2, "name": "car"}, {"id": 7, "name": "bus"}, {"id": 90, "name": "cat"}]
CLASSES = [
    {"id": 2, "name": "sky", "isthing": 0},
    {"id": 7, "name": "car", "isthing": 1},
    {"id": 8, "name": "road", "isthing": 0},
    {"id": 90, "name": "cat", "isthing": 1},
]
SIZES = [(110, 130), (104, 100), (120, 120)]
SMALL_SIZES = [(14, 12), (10, 17), (9, 9)]

fast = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
ids = st.sampled_from([2, 7, 90])
scores = st.integers(1, 8).map(lambda eighths: eighths / 8)
"""Many are equal."""
areas = st.sampled_from([None, 1023.5, 1024, 1024.5, 9215.5, 9216, 9216.5])
"""None: the mask's own. The others lie about COCO's borders of small, medium and large."""


@st.composite
def spans(draw: Any, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a rectangle with at least a pixel; often as large as COCO's large objects."""
    left, top = (draw(st.integers(0, side - 1)) for side in (size[1], size[0]))
    right = draw(st.integers(left + 1, size[1]) | st.just(size[1]))
    bottom = draw(st.integers(top + 1, size[0]) | st.just(size[0]))
    return left, top, right, bottom


def rectangle(span: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    left, top, right, bottom = span
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


@st.composite
def annotations(draw: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Polygons of one and two parts with fractions of pixels, crowd regions, boxes that are not tight, masks without a pixel."""
    left, top, right, bottom = draw(spans(size))
    crowd = draw(st.integers(0, 5)) == 0
    kind = "rle" if crowd else draw(st.sampled_from(["polygon", "polygon", "parts", "rle", "outside"]))
    polygon = [left + 0.25, top, right, top + 0.5, right - 0.25, bottom, left, bottom]
    if kind == "rle":
        mask = rectangle((left, top, right, bottom), size)
        changes = np.flatnonzero(np.diff(np.concatenate([[0], mask.T.ravel(), [0]]).astype(int)))
        counts = np.diff([0, *changes.tolist(), mask.size]).tolist()
        segmentation: Any = {"size": list(size), "counts": counts}
    elif kind == "outside":
        segmentation = [[value - 900 for value in polygon]]
    else:
        segmentation = [polygon] + ([[0, 0, 9, 0, 9, 9, 0, 9.5]] if kind == "parts" else [])
    shift = [draw(st.integers(-6, 6)) / 4 for _ in range(4)]
    box = [left + shift[0], top + shift[1], max(0, right - left + shift[2]), max(0, bottom - top + shift[3])]
    rle = coco_mask.frPyObjects(segmentation, *size)
    pixels = int(coco_mask.area(coco_mask.merge(rle) if isinstance(rle, list) else rle))
    area = draw(areas)
    return {
        "category_id": draw(ids),
        "segmentation": segmentation,
        "bbox": box,
        "area": (pixels or 0.5) if area is None else area,  # The reader takes 0 for not given, with a warning.
        "iscrowd": int(crowd),
    }


@st.composite
def scene(draw: Any) -> tuple[list[dict[str, Any]], list[list[tuple[int, float, tuple[int, int, int, int]]]]]:
    """Annotations, and guesses (category, score, rectangle) by image; images without either and classes without objects included."""
    found, guesses = [], []
    for number, size in enumerate(SIZES, 1):
        items = draw(st.lists(annotations(size), max_size=4))
        found += [{"image_id": number, **item} for item in items]
        near = []
        for item in items:
            x, y, width, height = (int(value) for value in item["bbox"])
            left, top = min(max(x + draw(st.integers(-2, 2)), 0), size[1] - 1), min(max(y, 0), size[0] - 1)
            span = left, top, min(max(left + width, left + 1), size[1]), min(max(top + height, top + 1), size[0])
            near += [(item["category_id"], draw(scores), span)] * draw(st.integers(0, 2))
        far = draw(st.lists(st.tuples(ids, scores, spans(size)), max_size=3))
        guesses.append(near + far)
    return [{"id": number, **item} for number, item in enumerate(found, 1)], guesses


def instances_of(guesses: list[Any], size: tuple[int, int], catalog: ClassCatalog, with_masks: bool) -> Instances:
    ordered = sorted(guesses, key=lambda guess: -guess[1])
    masks = torch.from_numpy(np.stack([np.zeros(size, bool), *(rectangle(span, size) for _, _, span in ordered)]))[1:]
    boxes = [[left + 0.25, top, right, bottom - 0.25] for _, _, (left, top, right, bottom) in ordered]
    return Instances(
        torch.tensor([score for _, score, _ in ordered], dtype=torch.float32),
        torch.tensor([catalog.from_dataset_id[category] for category, _, _ in ordered], dtype=torch.int64),
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        masks if with_masks else None,
    )


def measured(dataset: Any, root: Path, mode: Any, table: dict[int, Predictions], limits: Limits = Limits()) -> Result:
    """The predictions are written, read again and then measured on what the reader makes of the annotations."""
    reader = opened(dataset, root, mode)
    catalog = load_catalog(dataset, str(root), mode)

    def evaluate(of: dict[int, Predictions]) -> Result:
        evaluator = Evaluator(catalog, mode, limits=limits)
        for index in range(len(reader)):
            sample = reader.read(index)
            evaluator.add(of[sample.image_id], sample.target)
        return evaluator.result()

    evaluate(table).write_predictions(root / "predictions.json.gz")
    saved = read_predictions(root / "predictions.json.gz")
    evaluation = evaluate(saved)
    evaluation.write_predictions(root / "again.json.gz")
    assert (root / "again.json.gz").read_bytes() == (root / "predictions.json.gz").read_bytes()
    evaluation.write_statistics(root / "statistics.json.gz")
    assert evaluated(read_statistics(root / "statistics.json.gz")) == evaluation.metrics
    return evaluation


def coco_oracle(
    truth: Path, results: Path, kind: str, limits: tuple[list[int], tuple[int, int]] | None = None
) -> tuple[dict[str, float], dict[int, tuple[Any, ...]]]:
    """COCO's twelve numbers, where they are not -1, and by category AP, AP50 and AR. ``limits``: other numbers of detections (two), and
    the sides that part the sizes."""
    records = json.loads(results.read_text())
    # Given a box, COCO takes its area for that of the mask.
    keep = {"image_id", "category_id", "score", "segmentation" if kind == "segm" else "bbox"}
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        if records:
            found = coco.loadRes([{key: item[key] for key in keep} for item in records])
        else:
            found = COCO()
            found.dataset = {**coco.dataset, "annotations": []}
            found.createIndex()
        evaluator = COCOeval(coco, found, kind)
        if limits is not None:
            few, (small, large) = limits
            evaluator.params.maxDets = few
            evaluator.params.areaRng = [[0, 1e10], [0, small**2], [small**2, large**2], [large**2, 1e10]]
        evaluator.evaluate()
        evaluator.accumulate()
        if limits is None:
            evaluator.summarize()

    def mean(values: np.ndarray) -> float | None:
        values = values[values > -1]
        return float(values.mean()) if values.size else None

    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]
    by_class = {
        category: (
            mean(precision[:, :, place, 0, -1]),
            mean(precision[0, :, place, 0, -1]),
            mean(recall[:, place, 0, -1]),
        )
        for place, category in enumerate(evaluator.params.catIds)
    }
    prefix = "" if kind == "segm" else "box_"
    if limits is None:
        named = dict(zip(NAMES, evaluator.stats, strict=True))
    else:
        (first, last), (small, large) = limits
        named = {
            f"AP@{last}": mean(precision[..., 0, -1]),
            f"AP50@{last}": mean(precision[0, ..., 0, -1]),
            f"AP75@{last}": mean(precision[5, ..., 0, -1]),
            f"AR{first}": mean(recall[..., 0, 0]),
            f"AR{last}": mean(recall[..., 0, 1]),
        }
        for place, size in enumerate("sml", 1):
            named[f"AP{size}@{last}@{small}-{large}"] = mean(precision[..., place, -1])
            named[f"AR{size}@{last}@{small}-{large}"] = mean(recall[..., place, -1])
    return {f"{prefix}{name}": value for name, value in named.items() if value is not None and value > -1}, by_class


lifted = st.tuples(st.sampled_from([[1, 2], [2, 3], [10, 1000]]), st.just((16, 64)))


@pytest.mark.parametrize("mode", ["instance", "detection"])
@fast
@given(drawn=scene(), limits=st.none() | lifted)
def test_average_precision_is_that_of_pycocotools(
    mode: Any, drawn: Any, limits: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With COCO's own limits, and with others, which the names carry."""
    listed, guesses = drawn
    if not any(not item["iscrowd"] for item in listed):
        return  # COCO gives -1 for everything.
    root = tmp_path_factory.mktemp("scene")
    dataset = write_coco(root, listed, SIZES, THINGS)
    catalog = load_catalog(dataset, str(root), mode)
    table = {}
    for number, size in enumerate(SIZES, 1):
        found = instances_of(guesses[number - 1], size, catalog, mode == "instance")
        table[number] = Predictions(ImageMeta(number, f"{number}.png", size, size), instances=found)
    results = [item for number in table for item in coco_results(table[number].instances, number, catalog)]
    write_json(root / "results.json", results)
    own = Limits() if limits is None else Limits(tuple(limits[0]), limits[1])
    evaluation = measured(dataset, root, mode, table, own)
    mark = "" if limits is None else f"@{limits[0][-1]}"
    kinds = ("segm", "bbox") if mode == "instance" else ("bbox",)
    expected: dict[str, float] = {}
    for kind in kinds:
        metrics, by_class = coco_oracle(root / "a.json", root / "results.json", kind, limits)
        expected |= metrics
        prefix = "" if kind == "segm" else "box_"
        for row in evaluation.per_class:
            of_class = tuple(row[f"{prefix}{name}{mark}"] for name in ("AP", "AP50", "AR"))
            assert of_class == pytest.approx(by_class[row["id"]], abs=1e-9)
    assert evaluation.metrics == pytest.approx(expected, abs=1e-9)


def test_the_official_boxes_are_perfect_predictions(tmp_path: Path) -> None:
    """They are not tight: with a truth made from the masks this was 0.25."""
    square = [[4, 4, 20, 4, 20, 20, 4, 20]]
    listed = [
        {"id": 1, "category_id": 7, "segmentation": square, "bbox": [3, 3.5, 18, 19.25], "area": 256, "iscrowd": 0},
        {"id": 2, "category_id": 90, "segmentation": square, "bbox": [4, 4, 9, 9], "area": 256, "iscrowd": 0},
        {
            "id": 3,
            "category_id": 90,
            "segmentation": [[900, 900, 910, 900, 910, 910]],
            "bbox": [50, 50, 1, 1],
            "area": 1,
        },
    ]
    size = SIZES[0]
    dataset = write_coco(tmp_path, [{"iscrowd": 0, **item} for item in listed], [size], THINGS)
    boxes = torch.tensor([item["bbox"] for item in listed])
    boxes[:, 2:] += boxes[:, :2]
    masks = torch.from_numpy(rectangle((4, 4, 20, 20), size))[None].repeat(3, 1, 1)
    found = Instances(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 2, 2]), boxes, masks)
    table = {1: Predictions(ImageMeta(1, "1.png", size, size), instances=found)}
    metrics = measured(dataset, tmp_path, "instance", table).metrics
    assert metrics["box_AP"] == metrics["box_AR100"] == 1.0
    assert metrics["AP"] < 1, "the third mask has no pixel, so nobody finds it"


@st.composite
def segments(draw: Any, size: tuple[int, int], crowds: bool) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """(H, W) ids with gaps and void, and what they are."""
    painted = np.zeros(size, np.int64)
    infos = []
    identity = 0
    for _ in range(draw(st.integers(0, 6))):
        identity += draw(st.sampled_from([1, 2, 300, 70_000]))
        painted[rectangle(draw(spans(size)), size)] = identity
        category = draw(st.sampled_from(CLASSES))
        crowd = int(crowds and category["isthing"] == 1 and draw(st.integers(0, 3)) == 0)
        infos.append({"id": identity, "category_id": category["id"], "iscrowd": crowd})
    return painted, infos


@st.composite
def panoptic_scene(draw: Any) -> list[tuple[Any, Any]]:
    found = []
    for size in SMALL_SIZES:
        truth, infos = draw(segments(size, crowds=True))
        guess, guessed = draw(segments(size, crowds=False))
        if draw(st.booleans()):
            # A good one: the truth a little to the side, some classes mistaken.
            guess = np.roll(truth, draw(st.integers(-1, 1)), draw(st.integers(0, 1)))
            guessed = [
                {**item, "category_id": draw(st.sampled_from([item["category_id"]] * 3 + [7]))} for item in infos
            ]
        found.append(((truth, infos), (guess, [item for item in guessed if (guess == item["id"]).any()])))
    return found


def read_ids(path: Path) -> np.ndarray:
    channels = np.array(Image.open(path)).astype(np.int64)
    return channels[..., 0] + 256 * channels[..., 1] + 65536 * channels[..., 2]


def panoptic_oracle(
    truth: Path, truth_folder: Path, found: Path, found_folder: Path
) -> tuple[dict[str, float], dict[int, Any]]:
    """Kirillov et al., Panoptic Segmentation, section 4; crowds as the COCO panoptic evaluation treats them. Pixel by pixel, from files alone."""
    sums = {category["id"]: np.zeros(4) for category in CLASSES}
    predictions = {item["image_id"]: item for item in json.loads(found.read_text())["annotations"]}
    for annotation in json.loads(truth.read_text())["annotations"]:
        prediction = predictions[annotation["image_id"]]
        true, guessed = (
            read_ids(truth_folder / annotation["file_name"]),
            read_ids(found_folder / prediction["file_name"]),
        )
        both = Counter(zip(true.ravel().tolist(), guessed.ravel().tolist(), strict=True))
        true_area, guessed_area = Counter(true.ravel().tolist()), Counter(guessed.ravel().tolist())
        matched_true, matched_guess = set(), set()
        for real in annotation["segments_info"]:
            for guess in prediction["segments_info"]:
                shared = both[real["id"], guess["id"]]
                union = true_area[real["id"]] + guessed_area[guess["id"]] - shared - both[0, guess["id"]]
                same = real["category_id"] == guess["category_id"] and not real["iscrowd"]
                if same and shared > 0.5 * union:
                    sums[real["category_id"]] += [shared / union, 1, 0, 0]
                    matched_true.add(real["id"])
                    matched_guess.add(guess["id"])
        crowds = {real["category_id"]: real["id"] for real in annotation["segments_info"] if real["iscrowd"]}
        for real in annotation["segments_info"]:
            if real["id"] not in matched_true and not real["iscrowd"]:
                sums[real["category_id"]] += [0, 0, 0, 1]
        for guess in prediction["segments_info"]:
            forgiven = both[0, guess["id"]] + both[crowds.get(guess["category_id"], -1), guess["id"]]
            if guess["id"] not in matched_guess and forgiven <= 0.5 * guessed_area[guess["id"]]:
                sums[guess["category_id"]] += [0, 0, 1, 0]
    by_class = {}
    for category, (iou, tp, fp, fn) in sums.items():
        if tp + fp + fn:
            sq, rq = (iou / tp if tp else 0.0), tp / (tp + 0.5 * fp + 0.5 * fn)
            by_class[category] = {"PQ": sq * rq, "SQ": sq, "RQ": rq}
    metrics = {}
    for suffix, kinds in (("", (0, 1)), ("_things", (1,)), ("_stuff", (0,))):
        rows = [by_class[c["id"]] for c in CLASSES if c["isthing"] in kinds and c["id"] in by_class]
        if rows:
            metrics |= {f"{name}{suffix}": float(np.mean([row[name] for row in rows])) for name in ("PQ", "SQ", "RQ")}
    return metrics, by_class


def semantic_oracle(pairs: list[tuple[np.ndarray, np.ndarray]], classes: list[int]) -> tuple[dict[str, float], Any]:
    """Of (truth, prediction) maps of dataset ids, in which 0 is unlabelled: sets of pixels, class by class."""
    true = np.concatenate([truth[truth > 0] for truth, _ in pairs])
    guessed = np.concatenate([guess[truth > 0] for truth, guess in pairs])
    rows = {}
    for category in classes:
        both, either = (
            ((true == category) & (guessed == category)).sum(),
            ((true == category) | (guessed == category)).sum(),
        )
        labelled = (true == category).sum()
        rows[category] = (both / either if either else None, both / labelled if labelled else None)
    if not true.size:
        return {}, rows
    return {
        "mIoU": float(np.mean([iou for iou, _ in rows.values() if iou is not None])),
        "mean_accuracy": float(np.mean([accuracy for _, accuracy in rows.values() if accuracy is not None])),
        "pixel_accuracy": float((true == guessed).mean()),
    }, rows


@fast
@given(drawn=panoptic_scene(), noise=st.integers(0, 2**32 - 1))
def test_panoptic_quality_is_that_of_the_published_definition(
    drawn: Any, noise: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if not any(infos for (_, infos), _ in drawn):
        return  # Nothing is annotated: refused.
    root = tmp_path_factory.mktemp("panoptic")
    truths, listed = [truth for (truth, _), _ in drawn], [infos for (_, infos), _ in drawn]
    dataset = write_panoptic(root, truths, listed, CLASSES)
    catalog = load_catalog(dataset, str(root), "panoptic")
    labels = catalog.from_dataset_id
    generator = np.random.default_rng(noise)
    table, pairs, records = {}, [], []
    for number, ((truth, infos), (guess, guessed)) in enumerate(drawn, 1):
        found = Panoptic(
            torch.from_numpy(np.where(np.isin(guess, [item["id"] for item in guessed]), guess, 0).astype(np.int32)),
            [Segment(item["id"], labels[item["category_id"]], 0.5) for item in guessed],
        )
        semantic = torch.from_numpy(generator.integers(0, len(CLASSES), truth.shape))
        things = [segment for segment in found.segments if catalog.categories[segment.label].isthing]
        masks = torch.stack([found.ids == -1, *(found.ids == segment.id for segment in things)])[1:]
        count = len(things)
        instances = Instances(
            torch.full((count,), 0.5), torch.tensor([s.label for s in things]).long(), masks_to_boxes(masks), masks
        )
        meta = ImageMeta(number, f"{number}.png", truth.shape, truth.shape)
        table[number] = Predictions(meta, semantic, instances, found)
        save(root / f"found/{number}.png", panoptic_png(found))
        records.append(
            {"image_id": number, "file_name": f"{number}.png", "segments_info": segments_info(found, catalog)}
        )
        save(root / f"semantic/{number}.png", semantic_png(semantic, catalog))
        classes = dict.fromkeys(np.unique(truth).tolist(), 0) | {item["id"]: item["category_id"] for item in infos}
        pairs.append((np.vectorize(classes.get)(truth), np.array(Image.open(root / f"semantic/{number}.png"))))
    write_json(root / "found.json", {"annotations": records})
    evaluation = measured(dataset, root, "panoptic", table)
    quality, by_class = panoptic_oracle(root / "a.json", root / "panoptic", root / "found.json", root / "found")
    accuracy, by_pixels = semantic_oracle(pairs, [category["id"] for category in CLASSES])
    own = {name: value for name, value in evaluation.metrics.items() if "A" not in name}
    assert own == pytest.approx(quality | {name: accuracy[name] for name in accuracy if "A" not in name}, abs=1e-9)
    for row in evaluation.per_class:
        wanted = by_class.get(row["id"], dict.fromkeys(("PQ", "SQ", "RQ")))
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, abs=1e-9)
        assert (row["IoU"], row["accuracy"]) == pytest.approx(by_pixels[row["id"]], abs=1e-9)


@fast
@given(noise=st.integers(0, 2**32 - 1), present=st.sets(st.sampled_from([0, 2, 7, 8, 90]), min_size=1))
def test_mean_iou_is_that_of_sets_of_pixels(
    noise: int, present: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Classes that are nowhere, predicted alone, or annotated alone; unlabelled pixels count in nothing."""
    if present == {0}:
        return  # Nothing is annotated: refused.
    root = tmp_path_factory.mktemp("pairs")
    generator = np.random.default_rng(noise)
    truths = [generator.choice(sorted(present), size) for size in SMALL_SIZES]
    truths[0][0, 0] = max(present)
    dataset = write_pairs(root, [truth.astype(np.uint8) for truth in truths], CLASSES)
    catalog = load_catalog(dataset, str(root), "semantic")
    guessable = generator.choice(len(CLASSES), int(generator.integers(1, len(CLASSES) + 1)), replace=False)
    table, pairs = {}, []
    reader = opened(dataset, root, "semantic")
    for number, truth in enumerate(truths, 1):
        semantic = torch.from_numpy(generator.choice(guessable, truth.shape))
        identity = reader.image_ids[number - 1]
        table[identity] = Predictions(ImageMeta(identity, f"images/{number}.png", truth.shape, truth.shape), semantic)
        save(root / f"semantic/{number}.png", semantic_png(semantic, catalog))
        pairs.append((truth, np.array(Image.open(root / f"semantic/{number}.png"))))
    evaluation = measured(dataset, root, "semantic", table)
    accuracy, rows = semantic_oracle(pairs, [category["id"] for category in CLASSES])
    assert evaluation.metrics == pytest.approx(accuracy, abs=1e-9)
    for row in evaluation.per_class:
        assert (row["IoU"], row["accuracy"]) == pytest.approx(rows[row["id"]], abs=1e-9)
