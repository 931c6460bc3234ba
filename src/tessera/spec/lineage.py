"""What a stage's result depends on: everything the stage and its ancestors read, as one canonical JSON text.

Snakemake carries the text as a rule's param (so it knows, and says, what changed), every artifact embeds it, and every consumer
refuses an artifact of another one. This module is imported while Snakemake plans, so it needs neither torch nor pandas.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tessera.files import canonical_json, digest_file, digest_text
from tessera.spec.schema import DatasetSpec, Section, Spec, is_inert


@dataclass(frozen=True)
class Stage:
    sections: tuple[str, ...]
    """Sections of the spec that the stage itself reads."""
    version: int
    """Raised when a change of the stage's source changes its results; tests/spec/test_versions.py asks for the decision."""
    sources: tuple[str, ...]
    """Modules and packages below src/tessera whose source the version speaks for."""


STAGES: dict[str, Stage] = {
    "train": Stage(("seed", "model", "dataset", "train"), 1, ("training", "models", "ops", "data")),
    "export": Stage(("export",), 1, ("deploy/export.py",)),
    "precision": Stage(("precision",), 1, ("deploy/precision.py",)),
    "engine": Stage(("engine",), 1, ("deploy/engine.py",)),
    "parity": Stage(("parity", "evaluate"), 1, ("deploy/parity.py", "inference")),
    "evaluate": Stage(("postprocess", "evaluate"), 1, ("evaluation", "inference")),
    "infer": Stage(("postprocess", "evaluate", "inference"), 1, ("evaluation/draw.py", "inference")),
}

RUNTIMES = ("torch", "onnx", "trt")


def ancestry(verb: str, runtime: str = "torch", precision: str = "fp32") -> tuple[str, ...]:
    """The stage and all stages before it, in order: what a runtime executes is exported, maybe converted, maybe built, and verified."""
    chain = ["train"]
    if verb in ("export", "precision", "engine") or runtime != "torch":
        chain.append("export")
    if precision != "fp32":
        chain.append("precision")
    if verb == "engine" or runtime == "trt":
        chain.append("engine")
    if verb in ("evaluate", "infer") and runtime != "torch":
        chain.append("parity")
    return tuple(dict.fromkeys([*chain, verb]))


def lineage(spec: Spec, verb: str, runtime: str = "torch", precision: str = "fp32") -> dict[str, Any]:
    """Namespaced by section: ``{"data": ..., "versions": {stage: n}, "seed": ..., "model": {...}, ...}``, without inert keys."""
    stages = ancestry(verb, runtime, precision)
    found: dict[str, Any] = {
        "versions": {stage: STAGES[stage].version for stage in stages},
        "data": data_digest(spec.dataset, spec.data_root),
    }
    for stage in stages:
        for section in STAGES[stage].sections:
            value = getattr(spec, section)
            found[section] = _live_keys(value) if isinstance(value, BaseModel) else value
    return found


def lineage_text(spec: Spec, verb: str, runtime: str = "torch", precision: str = "fp32") -> str:
    return canonical_json(lineage(spec, verb, runtime, precision))


def lineage_digest(spec: Spec, verb: str, runtime: str = "torch", precision: str = "fp32") -> str:
    """First 12 hexadecimal digits of the sha256 of the lineage text."""
    return digest_text(lineage_text(spec, verb, runtime, precision))[:12]


def resume_digest(spec: Spec) -> str:
    """Names the folder of the resume state: the train lineage without what may change between two starts of one training.

    That is ``num_epochs`` (more epochs continue the same training) unless the schedule's curve depends on it, and the explicit
    checkpoint to resume from.
    """
    found = lineage(spec, "train")
    if spec.train.optim.lr_scheduler != "WarmupPoly":
        del found["train"]["num_epochs"]
    del found["train"]["resume_training_checkpoint_path"]
    return digest_text(canonical_json(found))[:12]


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Lines ``a.b: old -> new`` for every leaf that differs between two lineages or specs."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines: list[str] = []
        for key in sorted(old.keys() | new.keys()):
            lines += differences(
                old.get(key, "(absent)"), new.get(key, "(absent)"), f"{prefix}.{key}" if prefix else str(key)
            )
        return lines
    return [] if old == new else [f"{prefix}: {old} -> {new}"]


def data_files(dataset: DatasetSpec, data_root: str) -> list[Path]:
    """Annotation files and label map of a dataset, sorted: what its digest is made from and what rules wait for."""
    names = {dataset.label_map} | {split.annotations for split in (dataset.train, dataset.val, dataset.test)}
    return [Path(data_root) / name for name in sorted(name for name in names if name)]


def data_digest(dataset: DatasetSpec, data_root: str) -> str:
    """Digest of the annotation files and the label map; of the generator's keys for generated data, whose files may not exist yet.

    A file that does not exist counts as ``missing``: planning goes on and the check stage reports it.
    """
    if dataset.generator is not None:
        return digest_text(canonical_json(dataset.generator.model_dump(mode="json")))[:16]
    parts = {
        path.relative_to(data_root).as_posix(): _file_digest(path, *_stamp(path))
        for path in data_files(dataset, data_root)
    }
    return digest_text(canonical_json(parts))[:16]


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return (-1, -1)
    return (status.st_size, status.st_mtime_ns)


@functools.cache
def _file_digest(path: Path, size: int, _modified: int) -> str:
    return "missing" if size < 0 else digest_file(path)


def _live_keys(section: BaseModel) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in type(section).model_fields:
        if is_inert(type(section), key):
            continue
        value = getattr(section, key)
        found[key] = (
            _live_keys(value) if isinstance(value, Section) else section.model_dump(mode="json", include={key})[key]
        )
    return found
