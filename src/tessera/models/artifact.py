"""model.pth: tensors and the header they were made under, opened as weights only."""

from __future__ import annotations

import argparse
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera import models
from tessera.files import UserError, atomic_path, require_file
from tessera.models.base import Model
from tessera.provenance import Header
from tessera.spec.schema import PostprocessSpec


def save_model(path: Path, state: dict[str, Tensor], header: Header) -> None:
    """Writes the network's ``state_dict()`` whole or not at all. Tensors are stored on the CPU."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_weights(path, {"header": header.to_json(), "state": tensors})


def load_model(path: Path, postprocess: PostprocessSpec | None = None) -> tuple[Model, Header]:
    """The model rebuilt from its own header, in evaluation mode on the CPU.

    Of a training's checkpoint the weights of its step, which the header's lineage names as ``checkpoint``. ``postprocess`` replaces the
    thresholds of the header's spec. Raises UserError on anything that ``save_model`` or a training did not write.
    """
    content = read_weights(path)
    if isinstance(content, dict) and {"network", "optimizer"} <= content.keys():
        content = _of_checkpoint(content, path)
    if not isinstance(content, dict) or not {"header", "state"} <= content.keys():
        raise UserError(
            f"{path}: holds no `header` and `state`; expected the model.pth of a train stage (weights of other projects "
            "go into train.pretrained_model_path or model.backbone.pretrained)"
        )
    header = Header.from_json(content["header"], path)
    state = require_state(content["state"], path)
    model = models.build_model(
        header.spec.model, header.catalog, postprocess or header.spec.postprocess, load_pretrained=False
    )
    try:
        model.network.load_state_dict(state)
    except RuntimeError as error:
        _, *faults = (line.strip() for line in str(error).splitlines())
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise UserError(
            f"{path}: its tensors are not those of the {header.spec.model.name} in its header ({faults[0][:300]}{more}); train again"
        ) from None
    model.network.eval()
    return model, header


def _of_checkpoint(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """``header`` and ``state`` as model.pth would hold them."""
    try:
        header, step = content["header"], content["state"]["step"]
        position = {"step": step, "epoch": step // content["steps_per_epoch"]}
        lineage = {**header["lineage"], "checkpoint": position}
    except (KeyError, TypeError, ZeroDivisionError):
        raise UserError(
            f"{path}: is a checkpoint without what it is of (`header`, `state.step`, `steps_per_epoch`), as older versions wrote it; "
            "use the model.pth of its training, or one that this version wrote"
        ) from None
    return {"header": {**header, "lineage": lineage}, "state": content["network"]}


def write_weights(path: Path, content: dict[str, Any]) -> None:
    """``torch.save`` whole or not at all. Given a path, torch would write its temporary name into the file, and not say why a disk refuses."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:
            # Closing its archive fails in turn and covers the reason.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def read_weights(path: Path) -> Any:
    """``torch.load`` of tensors and plain values onto the CPU; no code in the file is ever executed.

    ``argparse.Namespace``, which holds plain values and does nothing, is let through: many published files keep their options in one.
    Checksums are compared, which torch itself does not do.
    Raises UserError when the file is missing, damaged, or a pickle of anything else.
    """
    require_file(path, "a file of weights")
    try:
        if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()) is not None:
            raise ValueError(f"checksum of {damaged} does not match")
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            # It warns of the pickle protocol of files that it then refuses.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file makes the unpickler raise anything
        raise UserError(
            f"{path}: is no file of tensors and plain values, or is damaged ({_reason(error)}); nothing in it was executed"
        ) from None


def _reason(error: Exception) -> str:
    """The sentence that says what is wrong; PyTorch wraps it into advice to open the file unsafely."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    return text.partition("\n")[0].partition(". ")[0][:200] or type(error).__name__


def require_state(value: Any, path: Path) -> dict[str, Tensor]:
    """``value`` as a state dictionary; raises UserError naming ``path`` when it is none."""
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path}: holds no named tensors; expected a state dictionary")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(
                f"{path}: entry {str(name)[:80]!r} is a {type(tensor).__name__}, expected a tensor; not a state dictionary"
            )
    return value
