"""What a training will do before it does it: its folder, its steps, and the checkpoint that it continues from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tessera.data.datamodule import TrainBatches, require_objects
from tessera.data.opened import OpenedData
from tessera.files import UserError, digest_file, missing
from tessera.spec.checks import lacks_validation
from tessera.spec.lineage import Lineages, differences, resume_digest
from tessera.spec.schema import Spec
from tessera.training.checkpoint import Folder, read_checkpoint, require_fit, say

FREE = (
    "postprocess: ",  # Comes and goes with train.select.
    "train.clip_grad",
    "train.distributed_strategy",
    "train.num_epochs",
    "train.precision",
    "train.processes",
    "train.resume_training_checkpoint_path",
    "train.select",
    "train.validation_interval",
    "versions.",
)
"""Keys that may differ between a checkpoint named by hand and the training that continues from it; the log says so."""


@dataclass(frozen=True)
class Plan:
    data: OpenedData
    """Splits train and, where the training validates, val."""
    folder: Folder
    steps_per_epoch: int
    total: int
    """Steps of all epochs."""
    validates: bool

    @classmethod
    def of(
        cls, spec: Spec, experiment: str, checkpoints: Path, world_size: int, lineages: Lineages | None = None
    ) -> Plan:
        """Raises UserError where the train split cannot feed one step or train or val hold nothing to be found, or a key needs a val split
        that is not there. ``lineages``: see ``OpenedData``."""
        dataset, train = spec.dataset, spec.train
        validates = dataset.val.annotations is not None
        for key, reason in lacks_validation(spec):
            raise UserError(f"{key}: {reason}")
        # The faults of the annotations of both are told now, not after the first epochs.
        data = OpenedData(spec, ("train", "val") if validates else ("train",), None, lineages)
        for split in data.splits:
            require_objects(data, split)
        images, batch = len(data.split("train")), dataset.train.batch_size
        steps = len(TrainBatches(images, batch, spec.seed, 0, train.iters_per_epoch, world_size=world_size))
        path = checkpoints / experiment / resume_digest(data.lineages)
        return cls(
            data,
            Folder(path, spec.model.name, steps, train.keep_checkpoints, train.shared_checkpoints),
            steps,
            steps * train.num_epochs,
            validates,
        )


def find_checkpoint(
    spec: Spec, plan: Plan, quiet: bool = False, network: nn.Module | None = None
) -> dict[str, Any] | None:
    """The newest valid one of the folder that fits ``network``, or the one that ``train.resume_training_checkpoint_path`` names until the
    folder has some that continued from it. Raises UserError where it belongs to another training."""
    named = spec.train.resume_training_checkpoint_path
    if named is None:
        found = plan.folder.newest(plan.total, None, quiet, network)
        source = plan.folder.path
    else:
        source = Path(named)
        if not source.is_file():
            raise UserError(f"train.resume_training_checkpoint_path: {missing(source)}")
        origin = digest_file(source)
        found = plan.folder.newest(plan.total, origin, quiet, network)
        if found is None:
            found = read_checkpoint(source)
            found["state"]["origin"] = origin
    if found is not None:
        _require_same(found, source, spec, plan, quiet)
        if network is not None:
            require_fit(found, network, source)
    return found


def _require_same(checkpoint: dict[str, Any], source: Path, spec: Spec, plan: Plan, quiet: bool) -> None:
    changed = differences(checkpoint["lineage"], plan.data.lineages.of("train"))
    bent = spec.train.optim.lr_scheduler == "WarmupPoly"
    refused = [line for line in changed if not line.startswith(FREE) or (bent and line.startswith("train.num_epochs"))]
    if refused:
        lines = "\n  ".join(refused)
        raise UserError(
            f"{source}: belongs to a training with other settings, so continuing from it would mix two experiments:\n  {lines}\n"
            "Take these settings back, or start from its weights alone with train.pretrained_model_path"
        )
    if checkpoint["steps_per_epoch"] != plan.steps_per_epoch:
        raise UserError(
            f"{source}: its epochs have {checkpoint['steps_per_epoch']} steps, this training's have {plan.steps_per_epoch}; the number "
            "of processes changed: set train.num_gpus and train.num_nodes as they were"
        )
    step = checkpoint["state"]["step"]
    if step > plan.total:
        raise UserError(
            f"{source}: is after step {step}, but train.num_epochs={spec.train.num_epochs} ends at step {plan.total}; raise "
            "train.num_epochs or name an earlier checkpoint"
        )
    if changed and not quiet:
        say("continuing with other settings than the checkpoint's: " + "; ".join(changed))
