import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tessera.data.datamodule import TrainBatches, eval_loader, group_batches, train_loader
from tessera.data.demo import write_demo
from tessera.data.opened import OpenedData
from tessera.files import UserError
from tessera.ops.rle import encode_masks
from tessera.spec.networks import Mask2FormerSpec
from tessera.spec.schema import AugmentationSpec, DatasetSpec, DemoSpec, Spec, SplitSpec, TrainSpec
from tessera.structures import Batch
from tests.data.files import write_coco

AUGMENTATION = AugmentationSpec(
    train_min_size=[32, 48], train_max_size=96, train_crop_size=(32, 40), test_min_size=32, test_max_size=64
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_demo(root / "demo", DemoSpec(train_images=7, val_images=5, test_images=1, height=32, width=48), False)
    return root


def make_spec(root: Path, workers: int = 0, batch_size: int = 2, iters: int | None = None) -> Spec:
    splits = {
        split: SplitSpec(
            images=f"demo/images/{split}",
            annotations=f"demo/panoptic_{split}.json",
            panoptic=f"demo/panoptic/{split}",
            batch_size=batch_size,
            num_workers=workers,
        )
        for split in ("train", "val", "test")
    }
    return Spec(
        data_root=str(root),
        dataset=DatasetSpec(label_map="demo/label_map.json", augmentation=AUGMENTATION, **splits),
        train=TrainSpec(iters_per_epoch=iters),
    )


def batches(spec: Spec, epoch: int, start: int = 0, **keys: int) -> list[Batch]:
    return list(train_loader(spec, OpenedData(spec, ("train",)), epoch, start, **keys))


def blob(batch: Batch) -> bytes:
    """Every bit of a batch."""
    assert batch.targets is not None
    tensors = [batch.images, batch.padding]
    for target in batch.targets:
        assert target.semantic is not None
        tensors += [target.labels, target.masks, target.boxes, target.iscrowd, target.areas, target.semantic]
    return b"".join(tensor.numpy().tobytes() for tensor in tensors) + repr(batch.metas).encode()


@pytest.fixture(scope="module")
def reference(demo: Path) -> list[list[bytes]]:
    return [[blob(batch) for batch in batches(make_spec(demo), epoch)] for epoch in range(2)]


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_count_changes_no_bit(workers: int, demo: Path, reference: list[list[bytes]]) -> None:
    assert [blob(batch) for batch in batches(make_spec(demo, workers), 1)] == reference[1]


def test_the_threads_of_training_change_no_bit(tmp_path: Path) -> None:
    """Loader processes have one; without any, images of this size are shared out among those of the training."""
    write_demo(tmp_path / "demo", DemoSpec(train_images=4, val_images=1, test_images=1, height=512, width=512), False)
    spec = make_spec(tmp_path)
    large = AugmentationSpec(train_min_size=[512], train_crop_size=(512, 512))
    spec = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"augmentation": large})})
    before = torch.get_num_threads()
    found = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found[threads] = [blob(batch) for batch in batches(spec, 0)]
    torch.set_num_threads(before)
    assert found[1] == found[2]


@pytest.mark.parametrize("start", [1, 2, 3])
def test_a_start_in_the_middle_of_an_epoch_goes_on(start: int, demo: Path, reference: list[list[bytes]]) -> None:
    assert [blob(batch) for batch in batches(make_spec(demo, workers=start % 2), 1, start)] == reference[1][start:]


def test_epochs_differ_in_order_and_augmentation(reference: list[list[bytes]]) -> None:
    assert not set(reference[0]) & set(reference[1])


def test_the_loader_leaves_the_global_generators_alone(demo: Path) -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]  # a tuple in the legacy form
    batches(make_spec(demo), 0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # type: ignore[index]


def test_train_batches_are_padded_to_the_crop_and_whole(demo: Path) -> None:
    spec = make_spec(demo)
    loader = train_loader(spec, OpenedData(spec, ("train",)), 0)
    assert len(loader) == 3
    for batch in loader:
        assert batch.images.shape == (2, 3, 32, 64) and batch.truths is None
        assert batch.targets is not None
        for index, target in enumerate(batch.targets):
            assert target.masks.shape[1:] == (32, 64)
            assert not (target.masks & batch.padding[index]).any()
            assert batch.metas[index].original_size == (32, 48)
            height, width = batch.metas[index].resized_size
            assert not batch.padding[index, :height, :width].any()
            assert batch.padding[index].sum() == 32 * 64 - height * width


def test_ranks_share_every_step_without_overlap() -> None:
    for epoch in range(3):
        alone = list(TrainBatches(11, 4, 0, epoch))
        shared = [list(TrainBatches(11, 2, 0, epoch, rank=rank, world_size=2)) for rank in range(2)]
        assert [first + second for first, second in zip(*shared, strict=True)] == alone


def test_iters_per_epoch_goes_through_further_passes() -> None:
    per_pass = 11 // 2
    endless = [batch for epoch in range(4) for batch in TrainBatches(11, 2, 0, epoch)]
    cut = [batch for epoch in range(2) for batch in TrainBatches(11, 2, 0, epoch, 8)]
    assert cut == endless[:16]
    assert len(TrainBatches(11, 2, 0, 0, 8, start_batch=5)) == 8
    assert list(TrainBatches(11, 2, 0, 1, 8, start_batch=5)) == endless[13:16]
    for passage in range(3):
        seen = [index for batch in endless[passage * per_pass : (passage + 1) * per_pass] for _, index in batch]
        assert len(set(seen)) == 10


def test_too_few_images_for_one_step() -> None:
    with pytest.raises(UserError, match=r"3 image\(s\), fewer than one step takes"):
        TrainBatches(3, 2, 0, 0, world_size=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_process_tells_its_error_alone(workers: int, demo: Path, tmp_path: Path) -> None:
    shutil.copytree(demo, tmp_path, dirs_exist_ok=True)
    for image in (tmp_path / "demo/images/train").iterdir():
        image.unlink()
    with pytest.raises(UserError) as caught:
        batches(make_spec(tmp_path, workers), 0)
    assert str(caught.value).startswith(str(tmp_path)) and "no such file" in str(caught.value)
    assert "\n" not in str(caught.value)


def evaluated(spec: Spec, **keys: Any) -> list[Batch]:
    return list(eval_loader(spec, OpenedData(spec, ("val",)), "val", **keys))


def by_image(loaded: list[Batch]) -> dict[str, bytes]:
    found = {}
    for batch in loaded:
        assert batch.targets is not None and batch.truths is not None
        for index, meta in enumerate(batch.metas):
            target, truth = batch.targets[index], batch.truths[index]
            assert meta.file_name not in found
            parts = (batch.images[index], batch.padding[index], target.masks, target.labels, truth.masks, truth.labels)
            found[meta.file_name] = b"".join(part.numpy().tobytes() for part in parts)
    return found


def test_every_image_once_and_the_same_for_any_batch_size(demo: Path) -> None:
    single = by_image(evaluated(make_spec(demo, batch_size=1)))
    assert len(single) == 5
    for batch_size in (2, 3, 8):
        loaded = evaluated(make_spec(demo, batch_size=batch_size))
        assert max(len(batch.metas) for batch in loaded) == min(batch_size, 5)
        assert by_image(loaded) == single
    assert by_image(evaluated(make_spec(demo, batch_size=3), max_batch=2)) == single
    split = [by_image(evaluated(make_spec(demo), rank=rank, world_size=2)) for rank in range(2)]
    assert split[0].keys() | split[1].keys() == single.keys() and not split[0].keys() & split[1].keys()
    assert list(by_image(evaluated(make_spec(demo), limit=3))) == sorted(single)[:3]


def test_images_of_different_sizes(tmp_path: Path) -> None:
    sizes = [(40, 60), (60, 40), (41, 60), (40, 60), (64, 128)]
    mask = np.zeros((40, 60), bool)
    mask[:20, :30] = True
    crowd = np.zeros((40, 60), bool)
    crowd[30:, :] = True
    annotations = [
        {"id": 1, "category_id": 7, "segmentation": encode_masks(mask[None])[0]},
        {"id": 2, "category_id": 7, "segmentation": encode_masks(crowd[None])[0], "iscrowd": 1},
    ]
    dataset = write_coco(tmp_path, annotations, sizes)
    dataset = dataset.model_copy(
        update={
            "augmentation": AUGMENTATION,
            "val": dataset.val.model_copy(update={"batch_size": 3, "num_workers": 0}),
        }
    )
    spec = Spec(data_root=str(tmp_path), dataset=dataset, model=Mask2FormerSpec(mode="instance"))
    data = OpenedData(spec, ("val",))
    loaded = list(eval_loader(spec, data, "val"))
    assert [[meta.image_id for meta in batch.metas] for batch in loaded] == [[1, 3, 4], [5], [2]]
    first = loaded[0]
    assert first.images.shape == (3, 3, 32, 64) and first.targets is not None and first.truths is not None
    assert first.truths[0].masks.shape == (2, 40, 60) and first.truths[0].iscrowd.tolist() == [False, True]
    assert first.targets[0].boxes.tolist() == [[0, 0, 24, 16]], "without the crowd region, at input size"
    fixed = list(eval_loader(spec, data, "val", fixed_size=(32, 32)))
    assert {batch.images.shape[-2:] for batch in fixed} == {(32, 32)}
    assert Counter(meta.image_id for batch in fixed for meta in batch.metas) == Counter(range(1, 6))


def test_groups_hold_one_size_each() -> None:
    assert group_batches([(2, 2), (1, 1), (2, 2), (2, 2), (1, 1)], 2) == [[1, 4], [0, 2], [3]]
    assert group_batches([], 2) == []


def test_loaders_can_be_sent_to_spawned_workers(demo: Path) -> None:
    spec = make_spec(demo)
    data = OpenedData(spec, ("train", "val"))
    for loader in (train_loader(spec, data, 0), eval_loader(spec, data, "val")):
        copy = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn, loader.batch_sampler)))
        keys = next(iter(copy[2]))
        assert copy[1]([copy[0][key] for key in keys]).images.shape[0] == 2
