"""Files of weights as others write them, and their strict loading."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tessera.files import UserError
from tessera.interop.published.pickles import read_pickle
from tessera.models.artifact import read_weights, require_state

_WRAPPERS = ("model", "state_dict", "state_dict_ema", "model_state")
_SHOWN = 5


FILES = ("model.safetensors", "pytorch_model.bin")
"""What the transformers library writes into a folder beside config.json."""


def read_state(path: Path) -> dict[str, Tensor]:
    """Named tensors of a ``.safetensors`` file, a detectron2 ``.pkl``, a torch checkpoint, or a folder of the transformers library; wrappers
    such as ``model`` are taken off. Nothing in a file is executed.

    Raises UserError on anything else.
    """
    path = weights_file(path)
    if path.suffix == ".pkl" and not zipfile.is_zipfile(path):
        return read_pickle(path)
    if path.suffix == ".safetensors" and path.is_file():
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error}); is it cut off?") from None
    content: Any = read_weights(path)
    while isinstance(content, Mapping) and (
        inner := [key for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
    ):
        content = content[inner[0]]
    return require_state(dict(content) if isinstance(content, Mapping) else content, path)


def weights_file(path: Path) -> Path:
    """``path`` itself, or the file of weights in it where it is a folder; raises UserError where there is none."""
    if not path.is_dir():
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path}: is a folder without {' or '.join(FILES)}; name the file of weights itself")


def load_strictly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    may_miss: Callable[[str], bool] = lambda name: False,
    may_add: Callable[[str], bool] = lambda name: False,
) -> None:
    """Copies ``state`` into ``module``. Raises UserError naming tensors that are missing, left over or of another shape, except
    those that ``may_miss`` and ``may_add`` allow."""
    own = module.state_dict()
    missing = [name for name in own if name not in state and not may_miss(name)]
    left_over = [name for name in state if name not in own and not may_add(name)]
    shapes = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if missing or left_over or shapes:
        lines = [
            f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
            for what, names in (("missing", missing), ("unknown", left_over), ("of another shape", shapes))
            if names
        ]
        raise UserError(f"{source}: these weights do not fit\n  " + "\n  ".join(lines))
    module.load_state_dict({name: value for name, value in state.items() if name in own}, strict=False)


def split_packed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The packed projection of ``nn.MultiheadAttention`` to our three."""
    split: dict[str, Tensor] = {}
    for name, value in state.items():
        found = re.fullmatch(r"(.*)\.in_proj_(weight|bias)", name)
        if found is None:
            split[name] = value
            continue
        for part, piece in zip("qkv", value.chunk(3), strict=True):
            split[f"{found[1]}.{part}_proj.{found[2]}"] = piece
    return split
