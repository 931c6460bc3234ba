"""The configurations in config/datasets against the real files, where those are at hand."""

import contextlib
import io
import os
from pathlib import Path

import pytest
import torch
from pycocotools.coco import COCO

from tessera.data.catalog import load_catalog
from tessera.data.check import check_dataset
from tessera.data.datamodule import eval_loader, train_loader
from tessera.data.datasets import open_dataset
from tessera.data.opened import OpenedData
from tessera.metrics.evaluate import Evaluator
from tessera.spec.compose import load_grid
from tessera.spec.networks import DeformableDetrSpec, Mask2FormerSpec
from tessera.spec.schema import SPECS, DatasetSpec
from tessera.structures import ImageMeta, Instances, Predictions

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("TESSERA_TEST_DATA", ROOT / "../shared/data"))

pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"{DATA} is absent; set TESSERA_TEST_DATA to the folder of real datasets"
)


def configured(name: str) -> DatasetSpec:
    return load_grid(ROOT).dataset(name)


@pytest.mark.parametrize(
    ("name", "mode", "images"),
    [
        ("camvid", "semantic", (367, 101, 233)),
        ("camvid_panoptic", "panoptic", (367, 101, 233)),
        ("camvid_panoptic", "instance", (367, 101, 233)),
        ("nuclei", "panoptic", (140, 40, 40)),
        ("nuclei", "semantic", (140, 40, 40)),
        ("coco_tiny", "instance", (40, 10, 10)),
        ("coco_tiny", "detection", (40, 10, 10)),
        ("bccd", "detection", (205, 87, 72)),
        ("nuclei", "detection", (140, 40, 40)),
    ],
)
def test_every_split_opens_and_loads(name: str, mode, images: tuple[int, int, int]) -> None:
    dataset = configured(name)
    catalog = load_catalog(dataset, str(DATA), mode)
    opened = [open_dataset(dataset, split, catalog, mode, str(DATA)) for split in ("train", "val", "test")]
    assert tuple(len(reader) for reader in opened) == images
    changed = {
        split: getattr(dataset, split).model_copy(update={"num_workers": 0, "batch_size": 2})
        for split in ("train", "val", "test")
    }
    model = DeformableDetrSpec() if mode == "detection" else Mask2FormerSpec(mode=mode)
    family = SPECS[model.name]
    spec = family(data_root=str(DATA), dataset=dataset.model_copy(update=changed), model=model)
    data = OpenedData(spec, ("train", "val"))
    for batch in (next(iter(train_loader(spec, data, 0))), next(iter(eval_loader(spec, data, "val")))):
        assert batch.targets is not None
        assert batch.images.shape[-2] % 32 == 0 and batch.images.shape[-1] % 32 == 0
        assert batch.images.min() >= 0 and batch.images.max() <= 1
        labels = [label for target in batch.targets for label in target.labels.tolist()]
        assert labels and max(labels) < len(catalog)


def test_crowd_regions_and_large_ids_of_coco() -> None:
    report = check_dataset(configured("coco_tiny"), str(DATA), progress=False)
    train = report["splits"]["train"]
    assert (train["images"], train["objects"], train["crowd_regions"], train["images_without_objects"]) == (
        40,
        404,
        5,
        1,
    )
    assert (report["splits"]["val"]["images"], report["splits"]["val"]["objects"]) == (10, 61)


def test_boxes_of_bccd() -> None:
    report = check_dataset(configured("bccd"), str(DATA), progress=False)
    assert report["modes"] == ["detection"] and report["warnings"] == {}
    assert [report["splits"][split]["objects"] for split in ("train", "val", "test")] == [2804, 1137, 945]


@pytest.mark.parametrize("name", ["bccd", "coco_tiny"])
def test_truths_of_detection_are_what_pycocotools_reads(name: str) -> None:
    dataset = configured(name)
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(str(DATA / str(dataset.test.annotations)))
    catalog = load_catalog(dataset, str(DATA), "detection")
    reader = open_dataset(dataset, "test", catalog, "detection", str(DATA))
    for index, image_id in enumerate(reader.image_ids):
        target = reader.read(index).target
        wanted = reference.loadAnns(reference.getAnnIds(imgIds=[image_id]))
        found = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in target.boxes.tolist()]
        assert [catalog.categories[label].id for label in target.labels.tolist()] == [w["category_id"] for w in wanted]
        assert [side for box in found for side in box] == pytest.approx(
            [s for w in wanted for s in w["bbox"]], abs=1e-9
        )
        assert target.areas.tolist() == [w["area"] for w in wanted]
        assert target.iscrowd.tolist() == [bool(w["iscrowd"]) for w in wanted]


def test_frame_without_void_keeps_all_classes() -> None:
    """Code that drops the smallest value present loses a class in this one frame."""
    dataset = configured("camvid")
    reader = open_dataset(dataset, "test", load_catalog(dataset, str(DATA), "semantic"), "semantic", str(DATA))
    target = reader.read(reader.file_names.index("images/test/Seq05VD_f03750.jpg")).target
    assert target.masks.any(dim=0).all() and 0 in target.labels


@pytest.mark.parametrize("mode", ["instance", "detection"])
def test_the_official_boxes_score_one(mode) -> None:
    """Boxes made from the masks gave 0.979."""
    dataset = configured("coco_tiny")
    catalog = load_catalog(dataset, str(DATA), mode)
    reader = open_dataset(dataset, "val", catalog, mode, str(DATA))
    official = COCO(str(DATA / str(dataset.val.annotations)))
    evaluator = Evaluator(catalog, mode)
    for index in range(len(reader)):
        sample = reader.read(index)
        truth, size = sample.target, (sample.image.shape[1], sample.image.shape[2])
        items = official.loadAnns(official.getAnnIds(imgIds=sample.image_id, iscrowd=False))
        boxes = torch.tensor([item["bbox"] for item in items]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([catalog.from_dataset_id[item["category_id"]] for item in items], dtype=torch.int64)
        masks = None if truth.masks is None else truth.masks[~truth.iscrowd]
        found = Instances(torch.ones(len(items)), labels, boxes, masks)
        evaluator.add(Predictions(ImageMeta(sample.image_id, sample.file_name, size, size), instances=found), truth)
    metrics = evaluator.result().metrics
    assert metrics["box_AP"] == metrics["box_AP75"] == metrics["box_APs"] == 1.0
