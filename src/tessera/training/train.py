"""The train stage: from a spec to model.pth, metrics.csv and train.json."""

from __future__ import annotations

import contextlib
import math
import signal
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tessera.data.opened import OpenedData
from tessera.files import UserError, write_json, write_text
from tessera.models import build_model
from tessera.models.artifact import save_model
from tessera.models.base import Model
from tessera.provenance import Header, digests, sealed
from tessera.spec.lineage import DECIDING, Lineages
from tessera.spec.schema import PostprocessSpec, Spec
from tessera.structures import Batch
from tessera.training.checkpoint import say
from tessera.training.fit import fit, resume
from tessera.training.hardware import choose, deterministic
from tessera.training.interrupt import TrainingStopped
from tessera.training.launch import external_rank, launch
from tessera.training.module import to_device
from tessera.training.plan import Plan, find_checkpoint
from tessera.training.progress import describe as describe_row
from tessera.training.state import METRIC, State, metrics_csv
from tessera.training.validation import Validation
from tessera.training.weights import count_parameters, describe, describe_start, freeze, start_from


def train(spec: Spec, experiment: str, results: Path, checkpoints: Path, lineages: Lineages | None = None) -> None:
    """Trains, or continues below ``checkpoints``, and at the end writes three files into ``results``, the experiment's folder.

    Where the training is already finished, or ``train.num_epochs`` is 0, only the files are written. After Ctrl-C, SIGTERM or
    SIGHUP the state is saved and SystemExit 130, 143 or 129 leaves. ``lineages``: see ``OpenedData``. Raises UserError for what the user can mend.
    """
    _require_statistics(spec)
    hardware = choose(spec.train)
    rank = external_rank(hardware.world_size)
    if spec.train.num_epochs == 0:
        if not rank:
            _take_over(spec, experiment, results, lineages)
        return
    if hardware.nodes > 1 and rank is None:
        raise UserError(
            f"train.num_nodes={hardware.nodes}: `snakemake --workflow-profile profiles/slurm` starts one process per GPU on every machine; by "
            f"hand it is `srun --nodes={hardware.nodes} --ntasks-per-node={hardware.processes}` or `torchrun --nnodes={hardware.nodes} "
            f"--nproc-per-node={hardware.processes}`. Or set train.num_nodes=1"
        )
    plan = Plan.of(spec, experiment, checkpoints, hardware.world_size, lineages)
    with contextlib.nullcontext() if rank else plan.folder.lock():
        try:
            finished = _finished(spec, plan)
            if finished is None:
                if hardware.world_size > 1 and rank is None:
                    launch(spec, experiment, checkpoints, hardware.processes, plan.data.lineages.of("train"))
                else:
                    fit(spec, experiment, plan, rank or 0)
        except TrainingStopped as stopped:
            if not rank:
                say(f"{signal.Signals(stopped.signum).name}: {stopped}")
            raise SystemExit(128 + stopped.signum) from None
        if not rank:
            finished = finished or _finished(spec, plan)
            if finished is None:
                raise RuntimeError(f"{plan.folder.path}: holds no checkpoint of step {plan.total} after training")
            _export(spec, experiment, results, plan, *finished)


def _finished(spec: Spec, plan: Plan) -> tuple[Model, dict[str, Any]] | None:
    """The last step's checkpoint, and its model with the weights; None where the training has to go on."""
    if plan.folder.is_empty() and spec.train.resume_training_checkpoint_path is None:
        return None
    model = build_model(spec.model, plan.data.catalog, PostprocessSpec(), load_pretrained=False)
    checkpoint = find_checkpoint(spec, plan, quiet=True, network=model.network)
    if checkpoint is None or checkpoint["state"]["step"] < plan.total:
        return None
    model.network.load_state_dict(checkpoint["network"])
    return model, checkpoint


def _require_statistics(spec: Spec) -> None:
    """Holds what spec/checks.py leaves: `tessera import` builds such a network to make the very weights that training then starts from."""
    backbone, train = spec.model.backbone, spec.train
    sources = (backbone.pretrained, train.pretrained_model_path, train.resume_training_checkpoint_path)
    if backbone.norm == "frozen" and not any(sources):
        raise UserError(
            f"model.backbone.norm is frozen, but nothing gives the batch norms of {backbone.name} statistics to keep; set "
            "model.backbone.pretrained or train.pretrained_model_path, or model.backbone.norm=batch"
        )


def _take_over(spec: Spec, experiment: str, results: Path, lineages: Lineages | None) -> None:
    """The pretrained weights as they are. Raises UserError where one of the network's tensors is not among them."""
    data = OpenedData(spec, lineages=lineages)
    model = build_model(spec.model, data.catalog, PostprocessSpec(), load_pretrained=False)
    assert spec.train.pretrained_model_path is not None  # held by spec/checks.py
    path = spec.train.pretrained_model_path
    weights = start_from(model.network, path)
    report = weights["network"]
    if report["missing"] or report["other_shape"]:
        raise UserError(
            f"{path}: does not hold all weights of {spec.model.name}, which train.num_epochs=0 takes as they are; train, or import a file "
            f"that fits (tessera import)\n{describe(report)}"
        )
    say(describe_start(weights))
    freeze(model.network, spec.train.freeze)
    _write(spec, experiment, results, data, State(weights=weights), model.network, model.network.state_dict())


def _export(
    spec: Spec,
    experiment: str,
    results: Path,
    plan: Plan,
    model: Model,
    checkpoint: dict[str, Any],
) -> None:
    """Takes the last checkpoint alone, so that a resumed and an uninterrupted training write the same."""
    state = resume(checkpoint, spec)
    model.network.eval()
    freeze(model.network, spec.train.freeze)
    metric = METRIC[spec.model.mode]
    weights = checkpoint["network"]
    if spec.train.select == "best" and checkpoint["best"] is not None:
        weights = checkpoint["best"]
    if plan.validates and "val_loss" not in state.rows[-1]:
        row = _validate(spec, Validation(spec, plan.data, model, state.postprocess))
        say(f"after the last epoch: {describe_row(row, metric)}")
        state.record(row)
        if state.consider(f"val_{metric}", row, spec.train.num_epochs):
            weights = checkpoint["network"]
    if plan.validates and state.best is None:
        say(
            f"warning: no validation gave a {metric}"
            + "; model.pth has the last weights" * (spec.train.select == "best")
        )
    elif state.best is not None and state.best["value"] == 0:
        say(
            f"warning: the best {metric} of all validations is 0, so that none can be told from another; train for longer"
            + "".join(
                f", or see whether postprocess.{key}={state.postprocess[key]} is too strict"
                for key in DECIDING[spec.model.mode][:1]
            )
        )
    _write(spec, experiment, results, plan.data, state, model.network, weights)


def _write(
    spec: Spec,
    experiment: str,
    results: Path,
    data: OpenedData,
    state: State,
    network: nn.Module,
    weights: dict[str, torch.Tensor],
) -> None:
    data.require_unchanged()
    header = Header("train", experiment, spec, data.lineages.of("train"), data.catalog)
    last = state.rows[-1] if state.rows else {}
    report: dict[str, Any] = {
        "experiment": experiment,
        "epochs": spec.train.num_epochs,
        "steps": state.step,
        "starts": state.starts,
        "seconds": round(state.seconds, 1),
        "best": state.best,
        "weights": "last" if state.best is None else spec.train.select,
        "postprocess": state.postprocess or None,
        "parameters": count_parameters(network),
        "initial_weights": state.weights,
        "last": {name: value for name, value in last.items() if math.isfinite(value)},
        "facts": header.facts,
        "lineage": header.lineage,
    }
    outputs = [results / "metrics.csv", results / "model.pth"]
    write_text(outputs[0], metrics_csv(state.rows))
    save_model(outputs[1], weights, header)
    write_json(results / "train.json", sealed(report, outputs=digests(results, outputs)))
    say(f"wrote {results / 'model.pth'}, metrics.csv and train.json ({state.step} steps, {state.seconds:.0f} s)")


def _validate(spec: Spec, validation: Validation) -> dict[str, float]:
    """The last epoch always ends with a validation; where the interval does not give one, it is made here."""
    hardware = choose(spec.train)
    device = torch.device(f"cuda:{hardware.gpus[0]}" if hardware.gpus else "cpu")
    network = validation.model.network.to(device)

    def forward(batch: Batch) -> dict[str, torch.Tensor]:
        batch = to_device(batch, device)
        outputs: dict[str, torch.Tensor] = network(**network.inputs(batch))
        return outputs

    with deterministic(hardware, spec.train.threads):
        return validation(forward)
