"""One process's part of a training: from the newest checkpoint to the last step."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

from tessera.data.datamodule import train_loader
from tessera.data.loader import require_room
from tessera.files import UserError
from tessera.models import build_model
from tessera.models.base import Model
from tessera.provenance import Header
from tessera.spec.lineage import differences
from tessera.spec.schema import PostprocessSpec, Spec
from tessera.structures import Batch
from tessera.training.checkpoint import say
from tessera.training.hardware import PRECISIONS, Hardware, choose, deterministic, is_out_of_memory, memory_advice
from tessera.training.interrupt import StopRequest
from tessera.training.loop import Loop
from tessera.training.module import TrainModule
from tessera.training.optim import Schedule
from tessera.training.plan import Plan, find_checkpoint
from tessera.training.progress import Progress
from tessera.training.state import METRIC, State, counter_seed
from tessera.training.stream import Stream
from tessera.training.validation import Validation
from tessera.training.weights import describe_start, freeze, start_from

SHARD_PARAMETERS = 1_000_000
"""FSDP: modules of at least so many parameters are sharded as one piece."""


def fit(spec: Spec, experiment: str, plan: Plan, rank: int = 0) -> None:
    """Leaves the checkpoint of the last step in the resume folder, whose lock the caller holds.

    Raises TrainingStopped after a signal, UserError for what the user can mend: data, a loss that is not finite, memory.
    """
    hardware = choose(spec.train)
    try:
        with deterministic(hardware, spec.train.threads):
            _fit(spec, experiment, plan, rank, hardware)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise UserError(memory_advice(spec, hardware)) from None
        raise


def _fit(spec: Spec, experiment: str, plan: Plan, rank: int, hardware: Hardware) -> None:
    train, first = spec.train, rank == 0
    data, lineage = plan.data, plan.data.lineages.of("train")
    # Training's and validation's are there at the same time; what is too low for them is told now, not after an epoch.
    require_room({f"dataset.{split}": getattr(spec.dataset, split).num_workers for split in data.splits})

    def build(load_pretrained: bool) -> Model:
        torch.manual_seed(counter_seed(spec.seed, "initial weights"))
        return build_model(
            spec.model, data.catalog, PostprocessSpec(), train.activation_checkpoint, load_pretrained=load_pretrained
        )

    afresh = plan.folder.is_empty() and train.resume_training_checkpoint_path is None
    model = build(load_pretrained=afresh)
    restored = find_checkpoint(spec, plan, not first, model.network)
    if restored is None and not afresh:
        model = build(load_pretrained=True)
    state = resume(restored, spec)
    state.starts.append({"step": state.step, "epoch": state.step // plan.steps_per_epoch})
    if restored is not None:
        model.network.load_state_dict(restored["network"])
    else:
        state.weights = start_from(model.network, train.pretrained_model_path)
    frozen = freeze(model.network, train.freeze)

    def load(epoch: int, start_batch: int) -> Iterable[Batch]:
        data.require_unchanged()
        return stop.attend(train_loader(spec, data, epoch, start_batch, rank, hardware.world_size))

    if first:
        _announce(spec, plan, state, hardware)
    schedule = Schedule(train.optim, plan.steps_per_epoch, train.num_epochs)
    progress = Progress(
        plan.folder.path, plan.steps_per_epoch, train.num_epochs, METRIC[spec.model.mode], train.verbose, active=first
    )
    stop = StopRequest(silent=not first)
    loop = Loop(
        train,
        spec.model.mode,
        state,
        restored,
        plan.folder,
        {
            "header": Header("train", experiment, spec, lineage, data.catalog).to_json(),
            "lineage": lineage,
            "steps_per_epoch": plan.steps_per_epoch,
        },
        Validation(spec, data, model, state.postprocess, rank, hardware.world_size, hardware.sharded, stop)
        if plan.validates
        else None,
        progress,
        stop,
    )
    stop.install()
    try:
        with _quiet():
            trainer = _trainer(hardware, plan.folder.path, loop, train.distributed_strategy)
            trainer.fit(
                TrainModule(model.network, model.criterion, train, schedule, spec.seed, frozen),
                Stream(load, plan.steps_per_epoch, state.step, plan.total, len(data.catalog)),
            )
    finally:
        progress.close()
        stop.remove()


def resume(restored: dict[str, Any] | None, spec: Spec) -> State:
    """What ``restored`` was saved with; the beginning without. Validations keep the post-processing that they began with, so that the rows
    of metrics.csv can be compared, and the best weights are those among the ones that the checkpoint still has."""
    present = spec.postprocess.model_dump(mode="json")
    if restored is None:
        return State(postprocess=present)
    state = State.from_plain(restored["state"])
    if spec.train.select == "best" and restored["best"] is None:
        state.best, state.postprocess = None, present
    return state


def _announce(spec: Spec, plan: Plan, state: State, hardware: Hardware) -> None:
    weights = describe_start(state.weights)
    say(weights.partition("\n")[0] if state.step else weights)
    where = f"GPU {', '.join(map(str, hardware.gpus))}" if hardware.gpus else f"CPU, {spec.train.threads} thread(s)"
    if hardware.world_size > 1:
        where += f", {hardware.world_size} processes"
    begin = f"continuing from step {state.step}" if state.step else "starting"
    say(
        f"{begin}: {spec.train.num_epochs} epochs of {plan.steps_per_epoch} steps, {where}, {hardware.precision}; resume state in "
        f"{plan.folder.path}"
    )
    say(f"curves and pictures: `tensorboard --logdir {plan.folder.path / 'tensorboard'}`")
    changed = differences(state.postprocess, spec.postprocess.model_dump(mode="json"), "postprocess")
    if plan.validates and changed:
        say(f"validations go on with the post-processing that they began with ({'; '.join(changed)})")
    if not plan.validates:
        say("no val split in the dataset: training without validation")


def _trainer(hardware: Hardware, folder: Path, loop: Loop, strategy: str) -> Trainer:
    environment = _environment()
    arguments: dict[str, Any] = {}
    if hardware.world_size == 1:
        arguments = {"plugins": [environment]}
    elif hardware.sharded:
        arguments["strategy"] = FSDPStrategy(
            cluster_environment=environment,
            auto_wrap_policy=partial(size_based_auto_wrap_policy, min_num_params=SHARD_PARAMETERS),
        )
    else:
        arguments["strategy"] = DDPStrategy(cluster_environment=environment)
    return Trainer(
        accelerator="gpu" if hardware.gpus else "cpu",
        devices=list(hardware.gpus) or hardware.processes,
        num_nodes=hardware.nodes,
        precision=PRECISIONS[hardware.precision],  # type: ignore[arg-type]  # one of Lightning's literals
        max_epochs=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[loop],
        **arguments,
    )


def _environment() -> ClusterEnvironment:
    """Names it, because Lightning would take any SLURM allocation for one that started our processes."""
    if "LOCAL_RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return SLURMEnvironment(auto_requeue=False)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return TorchElasticEnvironment()
    return LightningEnvironment()


class _quiet(warnings.catch_warnings):  # noqa: N801  # used like the context manager it extends
    """Lightning's tips and warnings about things that are chosen here on purpose."""

    def __enter__(self) -> None:
        super().__enter__()
        for name in ("pytorch_lightning", "lightning_fabric", "lightning"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric)\.")
        warnings.filterwarnings("ignore", message=r".*(find_unused_parameters|num_workers|pin_memory).*")
