"""The folder of a training's resume state: checkpoints that are whole or recognised as damaged, and one writer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tessera.files import UserError, atomic_path, writing
from tessera.models.artifact import read_weights, write_weights

FORMAT = 1
NAME = re.compile(r"model_epoch_(\d+)(?:_step_(\d+))?\.pth")


def say(message: str) -> None:
    """One line for people, on the stream that carries progress; a lost terminal stops nobody."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


class Folder:
    """``model_epoch_004.pth`` after four epochs, ``model_epoch_004_step_00012.pth`` after twelve steps where steps are the unit, and
    ``<model>_latest.pth``, which is one of these or what an interrupted start saved."""

    def __init__(self, path: Path, model: str, steps_per_epoch: int, keep: int | None = None) -> None:
        self.path = path
        self.latest = path / f"{model}_latest.pth"
        self.steps_per_epoch = steps_per_epoch
        self.keep = keep

    def save(self, content: dict[str, Any], name: str | None) -> Path:
        """Writes the latest checkpoint and, given a ``name``, keeps it under that as well without using the space twice."""
        write_weights(self.latest, {"format": FORMAT, **content})
        if name is None:
            return self.latest
        with atomic_path(self.path / name) as temporary:
            temporary.unlink()
            try:
                os.link(self.latest, temporary)
            except OSError:
                shutil.copyfile(self.latest, temporary)
        if self.keep is not None:
            for path in self._named()[self.keep :]:
                path.unlink()
        return self.path / name

    def newest(self, last_step: int, origin: str | None = None, quiet: bool = False) -> dict[str, Any] | None:
        """The valid checkpoint of the most steps, at most ``last_step``; None where there is none.

        With ``origin`` only those of the training that continued from the file of that digest. Says which damaged ones it passed over.
        """
        best: dict[str, Any] | None = None
        skipped: list[str] = []
        if self.latest.exists():
            best = self._usable(self.latest, last_step, origin, skipped)
        for path in self._named():
            step = self._step(path)
            if step > last_step or (best is not None and step <= best["state"]["step"]):
                continue
            if (found := self._usable(path, last_step, origin, skipped)) is not None:
                best = found
                break
        for message in () if quiet else skipped:
            instead = f"continuing from step {best['state']['step']}" if best else "starting afresh"
            say(f"skipped a checkpoint: {message}; {instead}")
        return best

    def name(self, step: int, unit: str) -> str:
        epoch = step // self.steps_per_epoch
        return f"model_epoch_{epoch:03d}.pth" if unit == "epoch" else f"model_epoch_{epoch:03d}_step_{step:05d}.pth"

    def _usable(self, path: Path, last_step: int, origin: str | None, skipped: list[str]) -> dict[str, Any] | None:
        try:
            content = read_checkpoint(path)
        except UserError as error:
            skipped.append(str(error))
            return None
        state = content["state"]
        return content if state["step"] <= last_step and (origin is None or state["origin"] == origin) else None

    def _named(self) -> list[Path]:
        """Newest first."""
        paths = [path for path in self.path.glob("model_epoch_*.pth") if NAME.fullmatch(path.name)]
        return sorted(paths, key=self._step, reverse=True)

    def _step(self, path: Path) -> int:
        match = NAME.fullmatch(path.name)
        assert match is not None
        return int(match[2]) if match[2] else int(match[1]) * self.steps_per_epoch

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held by one process; freed by the kernel when it ends, however it ends.

        A record lock (not ``flock``): loader processes do not inherit it, so that the orphans of a killed start do not keep it.
        What a killed start was writing is removed.
        """
        lock = self.path / "lock"
        with writing(lock):
            self.path.mkdir(parents=True, exist_ok=True)
            opened = lock.open("a+")
        with opened as stream:
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                raise UserError(
                    f"{self.path}: another training writes here ({stream.read().strip() or 'unknown process'}); wait for it or stop it. "
                    f"If its machine is gone for good, delete {lock}"
                ) from None
            except OSError as error:
                raise UserError(
                    f"{lock}: cannot be locked ({error.strerror}), so that two trainings could write here; set `checkpoints` in "
                    "config/config.yaml to a folder on another disk, or have this one mounted with locks (Lustre: option flock; NFS: lockd)"
                ) from None
            stream.truncate(0)
            job = os.environ.get("SLURM_JOB_ID")
            stream.write(f"pid {os.getpid()} on {os.uname().nodename}" + (f", SLURM job {job}" if job else "") + "\n")
            stream.flush()
            for path in self.path.glob(".*.pth"):
                path.unlink()
            yield


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Raises UserError on anything that ``Folder.save`` did not write whole."""
    content = read_weights(path)
    if not isinstance(content, dict) or not {"format", "state", "network", "optimizer"} <= content.keys():
        hint = "; its weights go into train.pretrained_model_path" if isinstance(content, dict) and content else ""
        raise UserError(f"{path}: is no training checkpoint, expected one that a train stage wrote{hint}")
    if content["format"] != FORMAT:
        raise UserError(f"{path}: is of format {content['format']}, this version reads {FORMAT}; train again")
    return content
