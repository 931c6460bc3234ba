"""Which task a training image is shown with, and what there is to find then."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from tessera.data.catalog import load_catalog
from tessera.data.datamodule import eval_loader, train_loader
from tessera.data.demo import write_demo
from tessera.data.opened import OpenedData
from tessera.data.tasks import Task, Tasks
from tessera.spec.networks import Mask2FormerSpec, OneFormerSpec, TaskProbabilitySpec
from tessera.spec.schema import SPECS, AugmentationSpec, DatasetSpec, DemoSpec, Spec, SplitSpec
from tessera.structures import Batch, Category, ClassCatalog, Target

CATALOG = ClassCatalog(tuple(Category(i + 1, name, (0, 0, 0), i < 2) for i, name in enumerate(["cat", "dog", "sky"])))
TASKS = ("semantic", "instance", "panoptic")


def tasks(**probability: float) -> Tasks:
    found = Tasks.of(OneFormerSpec(task_probability=TaskProbabilitySpec(**probability)), CATALOG)
    assert found is not None
    return found


@pytest.mark.parametrize("odds", [(1.0, 1.0, 1.0), (0.2, 0.5, 0.3), (0.0, 1.0, 3.0), (2.0, 0.0, 0.0)])
def test_tasks_come_in_their_proportions(odds: tuple[float, float, float]) -> None:
    sampler = tasks(**dict(zip(TASKS, odds, strict=True)))
    count = 3000
    found = Counter(sampler.draw(7, passage, index) for passage in range(3) for index in range(count // 3))
    for task, share in zip(TASKS, odds, strict=True):
        expected = share / sum(odds)
        error = 4 * (expected * (1 - expected) / count) ** 0.5
        assert abs(found[task] / count - expected) <= error, (task, found)


def test_a_task_depends_on_seed_pass_and_index_alone() -> None:
    sampler = tasks()
    drawn = [sampler.draw(1, 0, index) for index in range(50)]
    assert drawn == [sampler.draw(1, 0, index) for index in range(50)]
    assert drawn[10:] == [sampler.draw(1, 0, index) for index in range(10, 50)]
    assert drawn != [sampler.draw(2, 0, index) for index in range(50)]
    assert drawn != [sampler.draw(1, 1, index) for index in range(50)]


@pytest.mark.parametrize("mode", ["semantic", "instance"])
def test_a_mode_of_one_task_has_no_other(mode: str) -> None:
    sampler = Tasks.of(OneFormerSpec.model_validate({"mode": mode}), CATALOG)
    assert sampler is not None
    assert {sampler.draw(0, 0, index) for index in range(20)} == {mode}


def test_other_families_have_no_tasks() -> None:
    assert Tasks.of(Mask2FormerSpec(), CATALOG) is None


def segments() -> Target:
    """Two dogs and the sky in three columns, and a crowd of cats in the fourth."""
    masks = torch.zeros(4, 2, 4, dtype=torch.bool)
    for column in range(4):
        masks[column, :, column] = True
    return Target(
        labels=torch.tensor([1, 2, 1, 0]),
        masks=masks,
        boxes=torch.tensor([[column, 0.0, column + 1, 2] for column in range(4)]),
        iscrowd=torch.tensor([False, False, False, True]),
        areas=torch.tensor([2.0, 4.0, 6.0, 8.0], dtype=torch.float64),
        size=(2, 4),
    )


def test_each_task_has_its_own_targets() -> None:
    sampler, whole = tasks(), segments()
    assert sampler.target(whole, "panoptic") is whole

    semantic = sampler.target(whole, "semantic")
    assert semantic.labels.tolist() == [1, 2]
    assert semantic.masks is not None and semantic.masks[:, 0].int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0]]
    assert semantic.boxes.tolist() == [[0, 0, 3, 2], [1, 0, 2, 2]]
    assert semantic.areas.tolist() == [8, 4] and not semantic.iscrowd.any()

    instance = sampler.target(whole, "instance")
    assert instance.labels.tolist() == [1, 1, 0]
    assert instance.masks is not None and len(instance.masks) == 3


@pytest.mark.parametrize("task", TASKS)
def test_there_may_be_nothing_to_find(task: Task) -> None:
    whole = segments()
    sky = Target(whole.labels[1:2], whole.required_masks()[1:2], whole.boxes[1:2], whole.iscrowd[1:2], whole.areas[1:2])
    nothing = Target(*(value[:0] for value in (sky.labels, sky.required_masks(), sky.boxes, sky.iscrowd, sky.areas)))
    for target, expected in ((sky, 0 if task == "instance" else 1), (nothing, 0)):
        found = tasks().target(target, task)
        assert found.required_masks().shape == (expected, 2, 4) and found.boxes.shape == (expected, 4)


def make_spec(root: Path, family: str, workers: int = 0) -> Spec:
    splits = {
        split: SplitSpec(
            images=f"demo/images/{split}",
            annotations=f"demo/panoptic_{split}.json",
            panoptic=f"demo/panoptic/{split}",
            batch_size=2,
            num_workers=workers,
        )
        for split in ("train", "val", "test")
    }
    augmentation = AugmentationSpec(
        train_min_size=[32, 48], train_max_size=96, train_crop_size=(32, 40), test_min_size=32, test_max_size=64
    )
    dataset = DatasetSpec(label_map="demo/label_map.json", augmentation=augmentation, **splits)
    return SPECS[family](data_root=str(root), dataset=dataset)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_demo(root / "demo", DemoSpec(train_images=12, val_images=2, test_images=1, height=32, width=48), False)
    return root


def read(spec: Spec, start: int = 0) -> list[Batch]:
    return list(train_loader(spec, OpenedData(spec, ("train",)), 0, start))


def test_batches_name_their_tasks_and_hold_their_targets(demo: Path) -> None:
    spec = make_spec(demo, "oneformer")
    things = load_catalog(spec.dataset, str(demo), "panoptic").thing_ids
    seen: Counter[str] = Counter()
    for batch in read(spec):
        assert batch.tasks is not None and batch.targets is not None and len(batch.tasks) == 2
        seen.update(batch.tasks)
        for task, target in zip(batch.tasks, batch.targets, strict=True):
            assert target.required_masks().shape[1:] == batch.images.shape[2:]
            if task == "semantic":
                assert len(target.labels.unique()) == len(target.labels)
            if task == "instance":
                assert set(target.labels.tolist()) <= set(things)
    assert set(seen) == set(TASKS)


def test_tasks_neither_shift_the_augmentation_nor_depend_on_workers(demo: Path) -> None:
    plain, asked = read(make_spec(demo, "mask2former")), read(make_spec(demo, "oneformer"))
    worked, resumed = read(make_spec(demo, "oneformer", workers=2)), read(make_spec(demo, "oneformer"), start=2)
    assert all(batch.tasks is None for batch in plain)
    for place, (one, two, three) in enumerate(zip(plain, asked, worked, strict=True)):
        assert torch.equal(one.images, two.images) and torch.equal(two.images, three.images)
        assert two.tasks == three.tasks
        if place >= 2:
            assert resumed[place - 2].tasks == two.tasks


def test_evaluation_is_asked_by_others(demo: Path) -> None:
    spec = make_spec(demo, "oneformer")
    batches = list(eval_loader(spec, OpenedData(spec, ("val",)), "val"))
    assert all(batch.tasks is None for batch in batches)
