"""What a result was made from: the header that every artifact carries, and the check that a consumer was given the right artifact."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tessera.files import UserError, canonical_json, digest_file, digest_text, workflow_command
from tessera.spec.lineage import differences
from tessera.spec.schema import Spec, read_spec
from tessera.structures import ClassCatalog

FORMAT = 1
"""Raised when an older reader could misunderstand a newer artifact."""

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "pytorch-lightning",
    "onnx",
    "onnxruntime",
    "numpy",
    "pycocotools",
    "tensorrt",
)


class OtherSpecError(UserError):
    """An artifact was made from another spec than the one asked for; ``lines`` says what differs."""

    def __init__(self, path: Path, lines: str, data_root: str) -> None:
        self.path, self.lines = path, lines
        command = workflow_command(path, again=True, data_root=data_root)
        super().__init__(
            f"{path}: was made from another spec than the one asked for; make it again with `{command}`\n{lines}"
        )


@dataclass(frozen=True)
class Header:
    """Embedded in model.pth (key ``header``), in ONNX files (metadata property ``tessera``) and beside engines, as JSON."""

    stage: str
    """The verb that wrote the artifact: train, export, precision, engine."""
    experiment: str
    spec: Spec
    lineage: dict[str, Any]
    """Of ``stage``; see spec.lineage. Of what was not made in its place in the workflow also ``checkpoint``; see ``stand_in``."""
    catalog: ClassCatalog
    """The classes of the model's outputs (things only for an instance model)."""
    precision: str = "fp32"
    facts: dict[str, Any] = field(default_factory=lambda: collect())
    """Commit, versions and hardware: informative, never compared."""

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "stage": self.stage,
            "experiment": self.experiment,
            "precision": self.precision,
            "spec": self.spec.model_dump(mode="json"),
            "lineage": self.lineage,
            "catalog": self.catalog.to_json(),
            "facts": self.facts,
        }

    @classmethod
    def from_json(cls, value: Any, path: Path) -> Header:
        """Raises UserError naming ``path`` when ``value`` is no header, or one of a newer format."""
        if not isinstance(value, dict) or "format" not in value:
            raise UserError(f"{path}: carries no tessera header; expected a file that a tessera stage wrote")
        if value["format"] != FORMAT:
            raise UserError(
                f"{path}: has header format {value['format']}, this version reads {FORMAT}; make the file again"
            )
        try:
            if not isinstance(value["lineage"], dict):
                raise TypeError(f"lineage is {type(value['lineage']).__name__}, expected an object")
            return cls(
                stage=value["stage"],
                experiment=value["experiment"],
                spec=read_spec(value["spec"]),
                lineage=value["lineage"],
                catalog=ClassCatalog.from_json(value["catalog"]),
                precision=value["precision"],
                facts=value["facts"],
            )
        except (KeyError, TypeError, IndexError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                reason = f"spec.{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise UserError(f"{path}: its tessera header is damaged ({reason}); make the file again") from None

    def require(self, path: Path, stage: str, expected: dict[str, Any], data_root: str) -> None:
        """Raises UserError unless the artifact was made by ``stage`` from exactly the lineage ``expected``."""
        self._require_stage(path, stage)
        changed = differences(self.lineage, expected)
        if changed:
            raise OtherSpecError(path, "\n".join(f"  {line}" for line in changed[:20]), data_root)

    def stand_in(self, path: Path, stage: str, expected: dict[str, Any]) -> dict[str, Any]:
        """``{"checkpoint": ...}`` for the lineage of what is made from the artifact in place of an experiment's own: by it nobody takes the
        result for the experiment's. Says which file (``file``, ``sha256``), from which ``step`` and ``epoch`` where it is the checkpoint of a
        training, and what it was made from (``lineage``).

        Raises UserError unless it was made by ``stage`` for the network of the lineage ``expected``; settings of the training may differ.
        """
        self._require_stage(path, stage)
        changed = differences(self.lineage.get("model"), expected["model"], "model")
        if changed:
            lines = "\n  ".join(changed[:20])
            raise UserError(
                f"{path}: holds another network than the experiment's; name the experiment that it is of, or give its keys\n  {lines}"
            )
        position = self.lineage.get("checkpoint", {})
        return {
            "checkpoint": {
                "file": path.as_posix(),
                "sha256": digest_file(path),
                **{key: position[key] for key in ("step", "epoch") if key in position},
                "lineage": self.lineage,
            }
        }

    def _require_stage(self, path: Path, stage: str) -> None:
        if self.stage != stage:
            raise UserError(f"{path}: was written by the stage {self.stage}, expected one by {stage}")


def digests(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Sha256 of every file by its path relative to ``folder``, with forward slashes."""
    return {Path(os.path.relpath(path, folder)).as_posix(): digest_file(path) for path in paths}


def sealed(
    document: Mapping[str, Any], inputs: Mapping[str, str] | None = None, outputs: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The document that a stage leaves, such as eval.json, with what makes a swapped or edited file known: the ``digests`` of the files
    that it was made from (``inputs``) and of those that were written with it (``outputs``), and a ``seal`` over all of it.
    """
    if taken := document.keys() & {"inputs", "outputs", "seal"}:
        raise ValueError(f"the document has {', '.join(sorted(taken))} of its own, which the seal would replace")
    whole = {**document, "inputs": dict(inputs or {}), "outputs": dict(outputs or {})}
    return {**whole, "seal": _seal(whole)}


def seal_holds(document: Mapping[str, Any]) -> bool:
    """False as well where a number that is none was put in."""
    try:
        return bool(document.get("seal") == _seal({key: value for key, value in document.items() if key != "seal"}))
    except ValueError:
        return False


def _seal(document: Mapping[str, Any]) -> str:
    return digest_text(canonical_json(document))


def collect() -> dict[str, Any]:
    """Commit, package versions and hardware of this process. No host name, no path, no clock."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "packages": _versions(),
        "hardware": {"cpu": _cpu_name(), "cores": os.cpu_count(), "gpus": _gpus()},
    }


@functools.cache
def commit() -> str | None:
    """The checkout's commit, with ``-dirty`` when tracked files differ; None outside a checkout."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def _gpus() -> list[str]:
    """Empty without torch in memory: asking must not import it."""
    import sys

    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
