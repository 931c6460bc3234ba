import pytest
import torch

from tessera.spec.schema import Spec, read_spec
from tessera.training.hardware import Hardware, is_out_of_memory, memory_advice

ONE_GPU = Hardware((0,), 1, 1, "fp32", False)
TWO_GPUS = Hardware((0, 1), 2, 1, "fp32", False)
CPU = Hardware((), 1, 1, "fp32", False)


def spec(**sections: object) -> Spec:
    return read_spec({"model": {"name": "mask2former", "mode": "semantic"}, **sections})


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("unable to mmap 64 bytes from file </torch_1>: Cannot allocate memory (12)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA out of memory"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_batch_of_one_is_not_halved() -> None:
    text = memory_advice(spec(dataset={"train": {"batch_size": 1, "num_workers": 0}}), ONE_GPU)
    assert "dataset.train.batch_size" not in text
    assert "num_workers" not in text
    for advice in (
        "train_crop_size (now [640, 640])",
        "smaller model.backbone.name (now swin_tiny)",
        "bf16",
        "the GPU's",
    ):
        assert advice in text


def test_without_a_crop_the_sizes_are_named() -> None:
    sizes = {
        "train_crop_size": None,
        "train_min_size": [480, 800],
        "train_max_size": 1333,
        "fixed_padding": [800, 1333],
    }
    text = memory_advice(spec(dataset={"augmentation": sizes, "train": {"num_workers": 8}}), CPU)
    assert (
        "train_min_size (now [480, 800]) and train_max_size (now 1333), with fixed_padding to match (now [800, 1333])"
        in text
    )
    assert "dataset.train.num_workers=4 (now 8)" in text
    assert "the machine's" in text
    assert "bf16" not in text


def test_several_gpus_may_share_the_parameters() -> None:
    assert "train.distributed_strategy=fsdp (now ddp)" in memory_advice(spec(), TWO_GPUS)
    assert "fsdp" not in memory_advice(spec(), ONE_GPU)
    assert "train.freeze" not in memory_advice(spec(train={"freeze": ["backbone"]}), TWO_GPUS)
