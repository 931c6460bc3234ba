"""Files of weights as others write them, and their strict loading."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tessera.files import UserError
from tessera.interop.published.pickles import read_pickle
from tessera.models.artifact import read_weights, require_state

_WRAPPERS = ("model", "state_dict", "state_dict_ema", "model_state")
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
