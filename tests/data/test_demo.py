import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessera.data.check import check_dataset
from tessera.data.demo import CATALOG, generate_scene, write_demo
from tessera.files import digest_file
from tessera.ops.rle import decode_masks
from tessera.spec.schema import DatasetSpec, DemoSpec, SplitSpec

SPEC = DemoSpec(train_images=6, val_images=2, test_images=3, height=64, width=96)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "demo"
    write_demo(folder, SPEC, progress=False)
    return folder


def dataset(kind: str) -> DatasetSpec:
    splits = {}
    for split in ("train", "val", "test"):
        name = {
            "coco_panoptic": f"panoptic_{split}.json",
            "coco": f"instances_{split}.json",
            "mask_pairs": f"{split}.jsonl",
        }[kind]
        panoptic = f"demo/panoptic/{split}" if kind == "coco_panoptic" else None
        splits[split] = SplitSpec(images=f"demo/images/{split}", annotations=f"demo/{name}", panoptic=panoptic)
    return DatasetSpec(name="demo", type=kind, label_map="demo/label_map.json", **splits)  # type: ignore[arg-type]  # one of the three


def test_byte_identical_for_a_seed(root: Path, tmp_path: Path) -> None:
    again = write_demo(tmp_path / "demo", SPEC, progress=False)
    assert (tmp_path / "demo/manifest.json").read_bytes() == (root / "manifest.json").read_bytes()
    names = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} - {"manifest.json"}
    assert again["files"].keys() == names and list(again["files"]) == sorted(names)
    for name in names:
        assert digest_file(root / name) == again["files"][name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"], "no temporary folder is left"


def test_scenes_depend_on_seed_split_and_index_alone() -> None:
    more = SPEC.model_copy(update={"train_images": 50, "val_images": 9})
    assert np.array_equal(generate_scene(SPEC, "val", 1).image, generate_scene(more, "val", 1).image)
    other = SPEC.model_copy(update={"seed": 1})
    images = [
        generate_scene(*key).image.tobytes()
        for key in ((SPEC, "val", 1), (SPEC, "val", 0), (SPEC, "train", 1), (other, "val", 1))
    ]
    assert len(set(images)) == 4


@pytest.mark.parametrize("kind", ["coco_panoptic", "coco", "mask_pairs"])
def test_every_format_passes_the_check(kind: str, root: Path) -> None:
    report = check_dataset(dataset(kind), str(root.parent), progress=False)
    assert {split: counts["images"] for split, counts in report["splits"].items()} == {"train": 6, "val": 2, "test": 3}


def test_the_formats_agree(root: Path) -> None:
    """Instance masks, panoptic segments and semantic masks describe the same pixels."""
    instances = json.loads((root / "instances_train.json").read_text())
    panoptic = json.loads((root / "panoptic_train.json").read_text())
    for image, annotation in zip(panoptic["images"], panoptic["annotations"], strict=True):
        colors = np.asarray(Image.open(root / "panoptic/train" / annotation["file_name"]), dtype=np.int64)
        ids = colors @ [1, 256, 65536]
        semantic = np.asarray(Image.open(root / "masks/train" / image["file_name"]))
        objects = [item for item in instances["annotations"] if item["image_id"] == image["id"]]
        things = [item for item in annotation["segments_info"] if item["category_id"] <= 4]
        assert len(objects) == len(things) >= 1
        for item, segment in zip(objects, things, strict=True):
            (mask,) = decode_masks([item["segmentation"]], ids.shape)
            assert np.array_equal(mask, ids == segment["id"])
            assert (semantic[mask] == item["category_id"]).all()
            assert item["area"] == segment["area"] == mask.sum()
        for segment in annotation["segments_info"]:
            assert (semantic[ids == segment["id"]] == segment["category_id"]).all()
        assert np.array_equal(ids == 0, semantic == 0)
        assert 0 < (semantic == 0).mean() < 0.05, "the horizon is unlabeled"


def test_kitti_rows_hold_the_same_boxes(root: Path) -> None:
    instances = json.loads((root / "instances_val.json").read_text())
    names = {category.id: category.name for category in CATALOG.categories}
    for image in instances["images"]:
        rows = [
            line.split()
            for line in (root / "labels/val" / image["file_name"]).with_suffix(".txt").read_text().splitlines()
        ]
        assert all(len(row) == 15 for row in rows)
        expected = []
        for item in instances["annotations"]:
            if item["image_id"] == image["id"]:
                x, y, width, height = item["bbox"]
                expected.append((names[item["category_id"]], x, y, x + width, y + height))
        assert [(row[0], *(float(value) for value in row[4:8])) for row in rows] == expected


def test_things_stay_visible_and_classes_have_their_colours() -> None:
    for index in range(20):
        scene = generate_scene(SPEC, "train", index)
        assert 1 <= len(scene.things) <= SPEC.max_objects
        for thing in scene.things:
            assert thing.visible.sum() >= 40
            mean = scene.image[thing.visible].mean(axis=0)
            distances = {
                category.id: np.linalg.norm(mean / mean.max() - np.array(category.color) / max(category.color))
                for category in CATALOG.categories
            }
            assert min(distances, key=distances.__getitem__) == thing.category
