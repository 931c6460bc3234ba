"""What a training runs on: devices, processes, precision; and advice when the memory does not suffice."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tessera.files import UserError
from tessera.gpus import choose as choose_gpus
from tessera.spec.schema import Spec, TrainSpec

PRECISIONS = {"fp32": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}
"""Ours and Lightning's names."""


@dataclass(frozen=True)
class Hardware:
    gpus: tuple[int, ...]
    """Numbers of the GPUs on this machine; none without one."""
    processes: int
    """Number on this machine."""
    nodes: int
    precision: str
    sharded: bool

    @property
    def world_size(self) -> int:
        return self.processes * self.nodes


def choose(train: TrainSpec) -> Hardware:
    """Raises UserError where the spec asks for what this machine does not have."""
    wanted = train.processes
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ids: tuple[int, ...] = ()
    if available:
        ids = tuple(choose_gpus(wanted, train.gpu_ids, available))
        if wanted > available or max(ids) >= available:
            raise UserError(
                f"train.num_gpus {train.num_gpus} and train.gpu_ids {train.gpu_ids} ask for GPUs {list(ids)}, but there are "
                f"{available} (0..{available - 1}); set train.num_gpus={available} train.gpu_ids=[0]"
            )
    else:
        if train.precision == "fp16":
            raise UserError(
                "train.precision=fp16 needs a GPU and there is none; use train.precision=fp32, or bf16, which a CPU can do"
            )
        if wanted > (os.cpu_count() or 1):
            raise UserError(
                f"train.num_gpus {train.num_gpus} and train.gpu_ids {train.gpu_ids} ask for {wanted} processes; without a GPU "
                f"they would share {os.cpu_count()} processors; set train.num_gpus=1 train.gpu_ids=[0]"
            )
        if train.distributed_strategy == "fsdp" and train.world_size > 1:
            raise UserError(
                "train.distributed_strategy=fsdp needs GPUs and there is none; use train.distributed_strategy=ddp"
            )
    sharded = train.distributed_strategy == "fsdp" and train.world_size > 1
    return Hardware(ids, wanted, train.num_nodes, train.precision, sharded)


@contextlib.contextmanager
def deterministic(hardware: Hardware, threads: int) -> Iterator[None]:
    """A fixed number of threads, because it decides the order of sums; and on the CPU only algorithms that give the same bits every time.

    A GPU keeps its fast algorithms: the backward passes of resizing and grid sampling have no deterministic ones there.
    """
    memory: Any = torch.utils.deterministic  # its attributes are properties, unknown to type checkers
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    threads_before = torch.get_num_threads()
    if not hardware.gpus:
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]
        torch.set_num_threads(threads_before)


OUT_OF_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "not enough memory",
    "CUDA out of memory",
)
"""Parts of PyTorch's messages. Loader processes that the system ends when memory is used up: data/datamodule.py."""


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def memory_advice(spec: Spec, hardware: Hardware) -> str:
    """What to change, with key names and present values, the least harmful first."""
    train, dataset = spec.train, spec.dataset
    advice = []
    if not train.activation_checkpoint:
        advice.append("train.activation_checkpoint=true (now false): the same numbers, about a third slower")
    if train.precision == "fp32" and hardware.gpus:
        advice.append("train.precision=bf16 (now fp32)")
    if dataset.train.batch_size > 1:
        advice.append(f"dataset.train.batch_size={dataset.train.batch_size // 2} (now {dataset.train.batch_size})")
    sizes = dataset.augmentation
    if sizes.train_crop_size is None:
        advice.append(
            f"smaller dataset.augmentation.train_min_size (now {sizes.train_min_size}) and train_max_size (now {sizes.train_max_size})"
            + (f", with fixed_padding to match (now {list(sizes.fixed_padding)})" if sizes.fixed_padding else "")
        )
    else:
        advice.append(
            f"a smaller dataset.augmentation.train_crop_size (now {list(sizes.train_crop_size)}), with train_min_size to match (now "
            f"{sizes.train_min_size})"
        )
    advice.append(
        f"validation: smaller dataset.val.batch_size (now {dataset.val.batch_size}) or dataset.augmentation.test_min_size "
        f"(now {dataset.augmentation.test_min_size})"
    )
    if dataset.train.num_workers:
        advice.append(
            f"dataset.train.num_workers={dataset.train.num_workers // 2} (now {dataset.train.num_workers}), where the machine's own memory is "
            "short: every loader process needs some"
        )
    advice.append(f"a smaller model.backbone.name (now {spec.model.backbone.name})")
    if "backbone" not in train.freeze:
        advice.append("train.freeze=[backbone], with pretrained weights")
    if hardware.world_size > 1 and hardware.gpus and train.distributed_strategy == "ddp":
        advice.append("train.distributed_strategy=fsdp (now ddp): parameters and optimiser are shared out")
    where = "the GPU's" if hardware.gpus else "the machine's"
    return f"out of memory: this training needs more than {where}. Try, in this order:\n  " + "\n  ".join(advice)
