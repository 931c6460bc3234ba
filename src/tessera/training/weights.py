"""Which parameters start where and which stay as they are: fine-tuning with a report, and freezing by module name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tessera.files import UserError, digest_file
from tessera.models.artifact import read_weights, require_state

CONTAINERS = ("network", "state", "model", "state_dict")
"""Keys below which files keep their tensors: our checkpoints (whose `state` is something else), model.pth, and the habits of others."""


def start_from(network: nn.Module, path: str | None) -> dict[str, Any]:
    """Takes what ``path`` has for ``network``, and says what its weights then start from: ``network`` is the report of ``load_matching``,
    ``backbone`` what the backbone was built with (``models.backbone.Origin``). None stands for random numbers."""
    backbone = getattr(network, "backbone", None)
    return {
        "backbone": getattr(backbone, "origin", None),
        "network": None if path is None else load_matching(network, Path(path)),
    }


def describe_start(weights: dict[str, Any]) -> str:
    """What ``start_from`` found: one line, and behind it what of the file or the network was left."""
    backbone, network = weights.get("backbone"), weights.get("network")
    others = "from random numbers"
    if backbone is not None:
        others = f"of the backbone from {_named(backbone['name'], backbone)}, all others {others}"
    if network is None:
        return f"weights {others}" + "; no pretrained ones are named" * (backbone is None)
    left = len(network["other_shape"]) + len(network["missing"])
    found = f"weights from {_named(network['file'], network)}"
    if left:
        found += f" but for {left} of {left + network['loaded']} tensors: {others}"
    return "\n".join([found, *_rest(network)])


def _named(name: str, content: dict[str, Any]) -> str:
    return f"{name} (sha256 {content['sha256'][:12]})"


def load_matching(network: nn.Module, path: Path) -> dict[str, Any]:
    """Takes every tensor of ``path`` whose name and shape the network has, and says what became of the rest.

    The report has ``file`` (its name) and ``sha256``, ``loaded`` (a count) and the lists ``other_shape``, ``missing`` (the network's, left
    as initialised) and ``unused`` (the file's). Raises UserError when nothing matches.
    """
    found = _tensors(path)
    own = network.state_dict()
    other_shape = [
        f"{name}: {tuple(found[name].shape)} in the file, {tuple(own[name].shape)} here"
        for name in own
        if name in found and found[name].shape != own[name].shape
    ]
    matching = {name: found[name] for name in own if name in found and found[name].shape == own[name].shape}
    if not matching:
        raise UserError(
            f"{path}: none of its {len(found)} tensors has a name and shape of this model (train.pretrained_model_path); "
            f"the file has names like {next(iter(found))}, the model has {next(iter(own))}"
        )
    network.load_state_dict(matching, strict=False)
    return {
        "file": path.name,
        "sha256": digest_file(path),
        "loaded": len(matching),
        "other_shape": other_shape,
        "missing": [name for name in own if name not in found],
        "unused": [name for name in found if name not in own],
    }


def describe(report: dict[str, Any]) -> str:
    """The report of ``load_matching`` in a few lines."""
    return "\n".join([f"{report['file']}: {report['loaded']} tensors loaded", *_rest(report)])


def _rest(report: dict[str, Any]) -> list[str]:
    lines = []
    for key, meaning in (
        ("other_shape", "of another shape, start afresh"),
        ("missing", "not in the file, start afresh"),
        ("unused", "of the file unused"),
    ):
        names = report[key]
        if names:
            more = f", and {len(names) - 5} more" if len(names) > 5 else ""
            lines.append(f"  {len(names)} {meaning}: {', '.join(names[:5])}{more}")
    return lines


def freeze(network: nn.Module, names: list[str]) -> list[nn.Module]:
    """Turns off the gradients below the named modules and returns these; raises UserError for a name that is none."""
    modules = dict(network.named_modules())
    del modules[""]
    for name in names:
        if name not in modules:
            close = difflib.get_close_matches(name, modules, n=3) or sorted({key.partition(".")[0] for key in modules})
            raise UserError(f"train.freeze: the model has no module {name!r}; closest: {', '.join(close)}")
        modules[name].requires_grad_(False)
    return [modules[name] for name in names]


def count_parameters(network: nn.Module) -> dict[str, int]:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    return {"total": sum(size for size, _ in sizes), "trained": sum(size for size, trained in sizes if trained)}


def _tensors(path: Path) -> dict[str, Tensor]:
    content = read_weights(path)
    for key in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    state = require_state(content, path)
    prefix = "module."
    if all(name.startswith(prefix) for name in state):
        return {name.removeprefix(prefix): value for name, value in state.items()}
    return state
