"""The folder of a training's resume state: checkpoints that are whole or recognised as damaged, and one writer at a time."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tessera.files import UserError, link_file, only_process, remove_abandoned, writing
from tessera.models.artifact import read_weights, write_weights
from tessera.training.state import State

FORMAT = 1
PARTS = {"state": dict, "network": dict, "optimizer": dict, "lineage": dict, "steps_per_epoch": int}
"""What every checkpoint holds at least."""
NAME = re.compile(r"model_epoch_(\d+)(?:_step_(\d+))?\.pth")


def say(message: str) -> None:
    """One line for people, on the stream that carries progress; a lost terminal stops nobody."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


class Folder:
    """``model_epoch_004.pth`` after four epochs, ``model_epoch_004_step_00012.pth`` after twelve steps where steps are the unit,
    ``<model>_latest.pth``, which is one of these or what an interrupted start saved, and ``<model>_best.pth``, that of the best validation."""

    def __init__(
        self, path: Path, model: str, steps_per_epoch: int, keep: int | None = None, shared: bool = False
    ) -> None:
        """``keep``: how many of the numbered ones; None keeps all. ``shared``: whether other users may write in the folder."""
        self.path = path
        self.latest = path / f"{model}_latest.pth"
        self.best = path / f"{model}_best.pth"
        self.steps_per_epoch = steps_per_epoch
        self.keep = keep
        self.shared = shared

    def save(self, content: dict[str, Any], name: str | None, best: bool = False) -> None:
        """Writes the latest checkpoint and, given a ``name`` or as the ``best``, keeps it as that as well without using the space twice.

        The best first: a start from the checkpoint before then comes to the same one again. Of too many numbered ones those of later steps
        go first: they are damaged, or a longer training left them, else this one would have started from them.
        """
        paths = [self.latest]
        if best:
            paths.insert(0, self.best)
        if name is not None:
            paths.append(self.path / name)
        first, *others = paths
        write_weights(first, {"format": FORMAT, **content})
        for other in others:
            link_file(first, other)
        if self.keep is not None:
            step = content["state"]["step"]
            for path in sorted(self.named(), key=lambda path: self._step(path) > step)[self.keep :]:
                path.unlink()

    def is_empty(self) -> bool:
        """Whether no checkpoint, whole or not, is there to continue from."""
        return not (os.path.lexists(self.latest) or os.path.lexists(self.best) or self.named())

    def newest(
        self, last_step: int, origin: str | None = None, quiet: bool = False, network: nn.Module | None = None
    ) -> dict[str, Any] | None:
        """The valid checkpoint of the most steps, at most ``last_step``; None where there is none.

        With ``origin`` only those of the training that continued from the file of that digest, with ``network`` only those that fit it. Says
        which damaged ones it passed over.
        """
        newest: dict[str, Any] | None = None
        skipped: list[str] = []
        numbered = self.named()
        # Where the latest serves, the best is read in vain: it was saved with it, or before.
        for path in (self.latest, self.best, *numbered):
            if path not in numbered:
                if newest is not None or not os.path.lexists(path):  # a link to nowhere is told
                    continue
            elif (step := self._step(path)) > last_step or (newest is not None and step <= newest["state"]["step"]):
                continue
            try:
                found = read_checkpoint(path)
                if network is not None:
                    require_fit(found, network, path)
            except UserError as error:
                skipped.append(str(error))
                continue
            state = found["state"]
            if state["step"] <= last_step and (origin is None or state["origin"] == origin):
                newest = found
                if path in numbered:
                    break
        for message in () if quiet else skipped:
            instead = f"continuing from step {newest['state']['step']}" if newest else "starting afresh"
            say(f"skipped a checkpoint: {message}; {instead}")
        return newest

    def name(self, step: int, unit: str) -> str:
        epoch = step // self.steps_per_epoch
        return f"model_epoch_{epoch:03d}.pth" if unit == "epoch" else f"model_epoch_{epoch:03d}_step_{step:05d}.pth"

    def named(self) -> list[Path]:
        """The numbered ones, newest first."""
        paths = [path for path in self.path.glob("model_epoch_*.pth") if NAME.fullmatch(path.name)]
        return sorted(paths, key=self._step, reverse=True)

    def _step(self, path: Path) -> int:
        match = NAME.fullmatch(path.name)
        assert match is not None
        return int(match[2]) if match[2] else int(match[1]) * self.steps_per_epoch

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock of one process. What a killed start was writing is removed."""
        lock = self.path / "lock"
        with writing(lock):
            self.path.mkdir(mode=0o777 if self.shared else 0o755, parents=True, exist_ok=True)
        if not self.shared:
            require_own(self.path)
        with only_process(
            lock,
            f"{self.path}: another training writes here ({{holder}}); wait for it or stop it. If its machine is gone for good, delete {lock}",
            "set `checkpoints` in config/config.yaml to a folder on another disk, so that no two trainings can write here",
        ):
            remove_abandoned(self.path, alone=True)
            yield


def require_own(folder: Path) -> None:
    """Raises UserError where another user than this one and root could put a checkpoint into ``folder``."""
    found = folder.stat()
    owner = found.st_uid
    if owner not in (0, os.geteuid()):
        reason = f"belongs to another user (uid {owner})"
    elif found.st_mode & stat.S_IWOTH:
        reason = "may be written by everybody"
    elif found.st_mode & stat.S_IWGRP and not _is_private(found.st_gid):
        reason = f"may be written by a group (gid {found.st_gid})"
    else:
        return
    raise UserError(
        f"{folder}: {reason}, so that a checkpoint in it may be anybody's; take it over (`chown`, `chmod go-w {folder}`), or set "
        "train.shared_checkpoints=true if these users are trusted"
    )


def _is_private(group: int) -> bool:
    """Whether it is what many systems give every user, a group of the same name without other members."""
    try:
        name, found = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return found.gr_name == name and set(found.gr_mem) <= {name}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Raises UserError on anything that ``Folder.save`` did not write whole."""
    content = read_weights(path)
    if not isinstance(content, dict) or not {"format", "state", "network", "optimizer"} <= content.keys():
        hint = "; its weights go into train.pretrained_model_path" if isinstance(content, dict) and content else ""
        raise UserError(f"{path}: is no training checkpoint, expected one that a train stage wrote{hint}")
    if content["format"] != FORMAT:
        raise UserError(f"{path}: is of format {content['format']}, this version reads {FORMAT}; train again")
    try:
        for name, kind in PARTS.items():
            if not isinstance(content.get(name), kind):
                raise TypeError(f"its `{name}` is no {kind.__name__}")
        State.from_plain(content["state"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: is a damaged checkpoint ({error})") from None
    return content


def require_fit(content: dict[str, Any], network: nn.Module, path: Path) -> None:
    """Raises UserError where names or shapes in the checkpoint ``path`` are not those of ``network``."""
    own = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    for part in ("network", "best"):
        values = content.get(part)
        if values is None:
            continue
        found = {name: tuple(value.shape) if isinstance(value, Tensor) else None for name, value in values.items()}
        for name in sorted(own.keys() | found.keys()):
            if own.get(name) != found.get(name):
                raise UserError(
                    f"{path}: is a damaged checkpoint (its {name} is of shape {found.get(name)}, the model's of {own.get(name)})"
                )
    shapes = {(), *own.values()}
    for number, slots in content["optimizer"].get("state", {}).items():
        for name, value in slots.items():
            if isinstance(value, Tensor) and tuple(value.shape) not in shapes:
                raise UserError(
                    f"{path}: is a damaged checkpoint (the optimiser's {name} of parameter {number} is of shape {tuple(value.shape)}, "
                    "and no parameter is)"
                )
