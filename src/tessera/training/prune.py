"""Which checkpoints can go: those that no experiment of the grid can continue from, and of finished trainings all but the last and the best."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tessera.files import TEMPORARY, UserError, missing, only_process, read_json
from tessera.spec.compose import Grid
from tessera.spec.lineage import Lineages, differences, lineage, missing_data, resume_digest
from tessera.spec.planning import record_file
from tessera.spec.schema import Spec
from tessera.training.checkpoint import NAME

STATE = re.compile(r"[0-9a-f]{12}")
"""Name of a folder of resume state, as ``resume_digest`` gives it."""


@dataclass(frozen=True)
class Item:
    verdict: Literal["remove", "keep"]
    path: Path
    size: int
    """Bytes; of other names of a file that stays, or is counted already, none."""
    reason: str

    def __str__(self) -> str:
        return f"{self.verdict:<6}  {describe_size(self.size):>9}  {self.path}: {self.reason}"


def describe_size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def prune(grid: Grid, root: Path, results: Path, dry_run: bool) -> Iterator[Item]:
    """Goes through the folders ``<root>/<experiment>/<digest>`` and says of each, or of each file in it, what became of it. Links are never
    followed, a folder whose lock is held and files that the configuration names stay, as does what no training writes.

    An experiment whose digest cannot be told, because of a mistake in its configuration or because its data are not here, keeps all.
    Raises UserError where ``root`` is no folder.
    """
    if not root.is_dir():
        raise UserError(
            f"{missing(root, 'folder')}; expected the root of the checkpoints, as `checkpoints` in config/config.yaml"
        )
    named = "\n".join(
        path.read_text(encoding="utf-8", errors="replace") for path in sorted((grid.root / "config").rglob("*.yaml"))
    )
    for experiment in sorted(root.iterdir()):
        if experiment.is_symlink() or not experiment.is_dir():
            yield Item("keep", experiment, 0, "is no folder of an experiment")
            continue
        spec, doubt = None, None
        if experiment.name in grid.parts:
            try:
                spec = grid.resolve(experiment.name).spec
                doubt = _missing_sources(spec)
            except UserError as error:
                doubt = str(error).partition("\n")[0]
        for state in sorted(experiment.iterdir()):
            if state.is_symlink() or not state.is_dir() or not STATE.fullmatch(state.name):
                yield Item("keep", state, 0, "is no folder of resume state")
            elif doubt is not None:
                yield Item("keep", state, _size([state]), f"what continues from it cannot be told: {doubt}")
            else:
                yield from _prune_state(state, spec, results / experiment.name, named, dry_run)
        if not dry_run and not any(experiment.iterdir()):
            experiment.rmdir()


def _prune_state(state: Path, spec: Spec | None, results: Path, named: str, dry_run: bool) -> Iterator[Item]:
    lock = state / "lock"
    try:
        with only_process(lock, "is in use ({holder})") if os.path.lexists(lock) else contextlib.nullcontext():
            yield from _decide(state, spec, results, named, dry_run)
    except UserError as error:
        yield Item("keep", state, _size([state]), str(error).removeprefix(f"{lock}: "))


def _decide(state: Path, spec: Spec | None, results: Path, named: str, dry_run: bool) -> Iterator[Item]:
    checkpoints = sorted(path for path in state.glob("*.pth") if _is_checkpoint(path))
    wanted = [path for path in checkpoints if str(path) in named or str(path.resolve()) in named]
    if spec is None or resume_digest(Lineages(spec)) != state.name:
        reason = "no experiment of this name" if spec is None else "made from other settings than the experiment's"
        gone = [path for path in checkpoints if path not in wanted]
        if not wanted:
            ours = [
                path
                for path in state.iterdir()
                if path.name in ("lock", "tensorboard") or TEMPORARY.fullmatch(path.name)
            ]
            others = sorted(set(state.iterdir()) - {*checkpoints, *ours})
            yield Item("remove", state, _freed([*gone, *ours]), reason)
            if not dry_run:
                for path in [*gone, *ours]:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                if not others:
                    state.rmdir()
            for path in others:
                yield Item("keep", path, _size([path]), "is nothing that a training writes")
            return
    elif _is_finished(spec, results):
        reason = "the training is finished, and this is neither its last nor its best"
        linked = [path for path in checkpoints if path.name.endswith(("_latest.pth", "_best.pth"))]
        numbered = sorted((path for path in checkpoints if NAME.fullmatch(path.name)), key=_order)
        kept = linked or numbered[-1:]
        gone = [path for path in checkpoints if path not in wanted and not any(path.samefile(one) for one in kept)]
    else:
        yield Item("keep", state, _size([state]), "the experiment continues from it")
        return
    for path in checkpoints:
        if path in gone:
            yield Item("remove", path, _freed([path], gone), reason)
        else:
            yield Item(
                "keep", path, _size([path]), "the configuration names it" if path in wanted else "the last or the best"
            )
    if not dry_run:
        for path in gone:
            path.unlink()


def _is_checkpoint(path: Path) -> bool:
    return (
        not path.is_symlink()
        and path.is_file()
        and bool(NAME.fullmatch(path.name) or re.search(r"[^.]_(latest|best)\.pth$", path.name))
    )


def _order(path: Path) -> tuple[int, ...]:
    """Epochs, then steps, of a numbered checkpoint."""
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)


def _is_finished(spec: Spec, results: Path) -> bool:
    """The stage has left its record, made from this very spec."""
    try:
        document = read_json(results / record_file("train"))
    except UserError:
        return False
    return isinstance(document, dict) and not differences(document.get("lineage"), lineage(spec, "train"))


def _missing_sources(spec: Spec) -> str | None:
    """Names the first that is not here: without it the digest is another one, and everything looks abandoned."""
    weights = (spec.train.pretrained_model_path, spec.model.backbone.pretrained)
    paths = [Path(path) for path in weights if path not in (None, "timm")]
    absent = [*missing_data(spec.dataset, spec.data_root), *(path for path in paths if not path.exists())]
    return missing(absent[0]) if absent else None


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            yield from (one for one in path.rglob("*") if one.is_symlink() or one.is_file())
        else:
            yield path


def _size(paths: Sequence[Path]) -> int:
    """Bytes on the disk: a file of several names counts once."""
    return sum({(found.st_dev, found.st_ino): found.st_size for found in map(os.lstat, _files(paths))}.values())


def _freed(paths: Sequence[Path], gone: Sequence[Path] = ()) -> int:
    """What removing ``paths``, of all that ``gone`` has, makes free: a file is with the last of its names, and counts with the first."""
    names: dict[int, list[Path]] = {}
    for path in _files(gone or paths):
        names.setdefault(os.lstat(path).st_ino, []).append(path)
    status = {path: os.lstat(path) for path in _files(paths)}
    return sum(
        found.st_size
        for path, found in status.items()
        if names[found.st_ino][0] == path and len(names[found.st_ino]) == found.st_nlink
    )
