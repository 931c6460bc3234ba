"""What a stage's result depends on: everything the stage and its ancestors read, as one canonical JSON text.

Snakemake carries the text as a rule's param (so it knows, and says, what changed), every artifact embeds it, and every consumer
refuses an artifact of another one. This module is imported while Snakemake plans, so it needs neither torch nor pandas.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel

from tessera.files import canonical_json, digest_text
from tessera.spec.digests import UNREADABLE, file_digest, folder_digest, names_digest
from tessera.spec.dvc import raw_digest
from tessera.spec.networks import Mode
from tessera.spec.schema import ConvertSpec, DatasetSpec, Spec, SplitSpec
from tessera.spec.section import Section, inert_keys, is_inert
from tessera.spec.sources import kitti_sources, source_folder, sources


@dataclass(frozen=True)
class Stage:
    sections: tuple[str, ...]
    """Sections of the spec that the stage itself reads."""
    version: int
    """Raised when a change of the stage's source changes its results; tests/spec/test_versions.py asks for the decision."""
    sources: tuple[str, ...]
    """Modules and packages below src/tessera whose source the version speaks for."""
    reads_split: bool = False
    """Reads the images of `evaluate.split`; the train stage reads train and val only."""


STAGES: dict[str, Stage] = {
    "train": Stage(
        ("seed", "model", "dataset", "train"), 2, ("training", "models", "interop/published", "ops", "data")
    ),
    "export": Stage(("export",), 2, ("deploy/export.py", "deploy/graph.py")),
    "precision": Stage(("precision",), 2, ("deploy/precision.py", "deploy/graph.py")),
    "engine": Stage(("engine",), 1, ("deploy/engine.py", "deploy/graph.py")),
    "parity": Stage(
        ("parity", "postprocess", "evaluate", "testing"), 5, ("deploy/parity.py", "inference"), reads_split=True
    ),
    "evaluate": Stage(("postprocess", "evaluate", "testing"), 2, ("metrics", "inference"), reads_split=True),
    "infer": Stage(
        ("postprocess", "evaluate", "testing", "inference"),
        4,
        ("pictures/overlays.py", "pictures/canvas.py", "inference"),
        reads_split=True,
    ),
}

DECIDING: dict[Mode, tuple[str, ...]] = {
    "panoptic": ("object_mask_threshold", "overlap_threshold"),
    "instance": ("test_topk_per_image",),
    "detection": ("num_select", "conf_threshold"),
    "semantic": (),
}
"""By mode, the keys of `postprocess` that the metric of `train.select: best` depends on: with it they decide which weights are kept."""

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


class Lineages:
    """All lineages of one spec. What its stages share is made once: a workflow of thousands of experiments asks for every stage of each."""

    def __init__(self, spec: Spec, data: Callable[[tuple[str, ...]], str] | None = None) -> None:
        """``data`` answers the digest of the data of some splits; left out, ``data_digest`` does."""
        self.spec = spec
        self._data = functools.cache(data or (lambda splits: data_digest(spec.dataset, spec.data_root, splits)))
        self._live = functools.cache(self._section)
        self._live_text = functools.cache(lambda name, tested: canonical_json(self._live(name, tested)))
        self.text = functools.cache(self._text)

    def of(self, verb: str, runtime: str = "torch", precision: str = "fp32") -> dict[str, Any]:
        """Namespaced by section, without inert keys: ``{"versions": {stage: n}, "data": {split: digest}, "seed": ..., "model": {...}, ...}``,
        and ``"weights": {key: digest}`` where the spec names files of weights to start from.

        Of `postprocess`, training has what ``DECIDING`` names, where the best weights are asked for.
        Training reads the train and val splits; the test split is part of the lineage of stages that read it only. The sections are
        shared by all answers.
        """
        stages = ancestry(verb, runtime, precision)
        tested = self.spec.evaluate.split == "test" and any(STAGES[stage].reads_split for stage in stages)
        found: dict[str, Any] = {
            "versions": {stage: STAGES[stage].version for stage in stages},
            "data": {"train": self._data(("train", "val"))},
        }
        if tested:
            found["data"]["test"] = self._data(("test",))
        if self._weights:
            found["weights"] = self._weights
        if self._deciding:
            found["postprocess"] = self._deciding
        for section in dict.fromkeys(section for stage in stages for section in STAGES[stage].sections):
            found[section] = self._live(section, tested or section != "dataset")
        return found

    def _text(self, verb: str, runtime: str = "torch", precision: str = "fp32") -> str:
        """``canonical_json`` of the lineage, put together from the texts of its sections."""
        found = self.of(verb, runtime, precision)
        tested = "test" in found["data"]
        texts = {
            name: self._live_text(name, tested or name != "dataset")
            if name in Spec.model_fields and value is not self._deciding
            else canonical_json(value)
            for name, value in found.items()
        }
        return "{" + ",".join(f'"{name}":{texts[name]}' for name in sorted(texts)) + "}"

    def digest(self, verb: str, runtime: str = "torch", precision: str = "fp32") -> str:
        """First 12 hexadecimal digits of the sha256 of the lineage text."""
        return digest_text(self.text(verb, runtime, precision))[:12]

    @functools.cached_property
    def _weights(self) -> dict[str, str]:
        return _weights(self.spec)

    @functools.cached_property
    def _deciding(self) -> dict[str, Any]:
        """Keys of `postprocess` that choose the weights."""
        keys = DECIDING[self.spec.model.mode] if self.spec.train.select == "best" else ()
        return {key: getattr(self.spec.postprocess, key) for key in keys}

    def _section(self, name: str, tested: bool) -> Any:
        """Where not ``tested``, the dataset is without its test split."""
        value = getattr(self.spec, name)
        live = _live_keys(value) if isinstance(value, BaseModel) else value
        if name == "dataset":
            del live["fetch"], live["convert"]  # Part of the data's digest.
        if name == "train":
            # Which GPUs and machines the processes run on changes no result, and one process has nothing to distribute.
            for key in ("num_gpus", "gpu_ids", "num_nodes"):
                del live[key]
            live["processes"] = value.world_size
            if value.world_size == 1:
                del live["distributed_strategy"]
        if not tested:
            del live["test"]
            if live["generator"] is not None:
                del live["generator"]["test_images"]
        return live


def lineage(spec: Spec, verb: str, runtime: str = "torch", precision: str = "fp32") -> dict[str, Any]:
    return Lineages(spec).of(verb, runtime, precision)


def lineage_text(spec: Spec, verb: str, runtime: str = "torch", precision: str = "fp32") -> str:
    return Lineages(spec).text(verb, runtime, precision)


def lineage_digest(spec: Spec, verb: str, runtime: str = "torch", precision: str = "fp32") -> str:
    return Lineages(spec).digest(verb, runtime, precision)


def resume_digest(lineages: Lineages) -> str:
    """Names the folder of the resume state: the train lineage without what may change between two starts of one training.

    That is ``num_epochs`` (more epochs continue the same training) unless the schedule's curve depends on it, and the explicit
    checkpoint to resume from.
    """
    spec, found = lineages.spec, lineages.of("train")
    found |= {"train": dict(found["train"])}  # the sections are shared by all answers
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


def _weights(spec: Spec) -> dict[str, str]:
    """Digests of the files of weights that training starts from; ``missing`` and ``unreadable`` ones are reported by training."""
    paths = {"train.pretrained_model_path": spec.train.pretrained_model_path}
    if spec.model.backbone.pretrained != "timm":
        paths["model.backbone.pretrained"] = spec.model.backbone.pretrained
    return {key: _content_digest(Path(path)) for key, path in paths.items() if path is not None}


def _content_digest(path: Path) -> str:
    """Of a file, or of the files of a folder."""
    try:
        if not path.is_dir():
            return file_digest(path)
        files = {file.name: file_digest(file) for file in sorted(path.iterdir()) if file.is_file()}
    except PermissionError:
        return UNREADABLE
    return digest_text(canonical_json(files))


SPLITS = ("train", "val", "test")

GENERATED_ROOT = "data"
"""Datasets that a rule makes lie in the project even when the data root is elsewhere, because that may be read-only."""

GENERATOR_VERSION = 2
"""Raised when a change of src/tessera/data/demo.py changes the scenes; tests/spec/test_versions.py asks for the decision, as for the next."""

CONVERT_VERSION = 2
"""Raised when a change of src/tessera/interop/kitti changes the shards."""


def annotation_root(dataset: DatasetSpec, data_root: str) -> str:
    """Folder that the annotation files are relative to: converted ones lie in the project, wherever their images are."""
    return GENERATED_ROOT if dataset.convert is not None else data_root


def data_files(dataset: DatasetSpec, data_root: str, splits: Sequence[str] = SPLITS) -> list[Path]:
    """Label map, annotation files and lists of names of the splits, sorted: what their digest is made from and what rules wait for."""
    root = annotation_root(dataset, data_root)
    beside = _listed(dataset, splits)
    return [Path(data_root if name in beside else root) / name for name in _data_names(dataset, root, splits)]


def data_digest(dataset: DatasetSpec, data_root: str, splits: Sequence[str] = SPLITS) -> str:
    """Digest of the label map and the annotation files of the splits, and of what DVC recorded of their folders; of the generator's
    keys for generated data, whose files may not exist yet; for converted data of what the shards are made from.

    A file that does not exist counts as ``missing``: planning goes on and the check stage reports it.
    """
    if dataset.convert is not None:
        return _converted_digest(dataset, dataset.convert, data_root, splits)
    if dataset.generator is not None:
        keys = dataset.generator.model_dump(mode="json")
        for split in SPLITS:
            if split not in splits:
                del keys[f"{split}_images"]
        return digest_text(canonical_json(keys | {"version": GENERATOR_VERSION}))[:16]
    if dataset.fetch:
        return _fetched_digest(dataset, splits)
    parts = {}
    for name in _data_names(dataset, data_root, splits):
        path = Path(data_root) / name
        parts[name] = file_digest(path)
    parts |= recorded_by_dvc(dataset, data_root, splits)
    return digest_text(canonical_json(parts))[:16]


def recorded_by_dvc(dataset: DatasetSpec, data_root: str, splits: Sequence[str] = SPLITS) -> dict[str, str]:
    """`.dvc` file -> its digest, for every path of the splits and every folder above it: so images count that nobody else digests."""
    named: set[str | None] = {*_listed(dataset, splits)}
    for split in splits:
        for source in sources(getattr(dataset, split), data_root):
            named |= {source.annotations, source.images, source.panoptic}
            if source.images is None or dataset.type == "mask_pairs":
                # Pictures or masks that no key names lie anywhere beside the annotations.
                folder = PurePosixPath(source.annotations).parent
                named |= {str(folder / file.stem) for file in (Path(data_root) / folder).glob("*.dvc")}
    if dataset.convert is not None:
        listed = kitti_sources(dataset.convert)
        folders = (dataset.convert.image_dir_name, dataset.convert.label_dir_name)
        named |= {source_folder(source, folder) for split in splits for source in listed[split] for folder in folders}
    places = {place for name in named if name for place in (PurePosixPath(name), *PurePosixPath(name).parents)}
    found = {f"{place}.dvc": raw_digest(Path(data_root) / place) for place in places}
    return {name: digest for name, digest in found.items() if digest is not None}


def own_files(dataset: DatasetSpec, splits: Sequence[str] = SPLITS) -> list[Path]:
    """Of a dataset with archives, the label map and annotation files that none of them brings."""
    folders = [Path(GENERATED_ROOT) / dataset.name / folder for folder in dataset.fetch]
    files = data_files(dataset, GENERATED_ROOT, splits)
    return [path for path in files if not any(folder in path.parents for folder in folders)]


def _fetched_digest(dataset: DatasetSpec, splits: Sequence[str]) -> str:
    """Of the declared digests, since nothing may be there yet, and of the files that lie beside what is fetched."""
    declared = {folder: archive.sha256 for folder, archive in dataset.fetch.items()}
    beside = {str(path): file_digest(path) for path in own_files(dataset, splits)}
    return digest_text(canonical_json({"fetch": declared, "files": beside}))[:16]


def before_conversion(dataset: DatasetSpec) -> DatasetSpec:
    """What is there without the shards: at most a generator or archives, and a label map."""
    return dataset.model_copy(update={"convert": None} | {split: SplitSpec() for split in SPLITS})


def dataset_root(dataset: DatasetSpec, data_root: str) -> str:
    """Folder that the dataset's paths are relative to."""
    return GENERATED_ROOT if dataset.generator is not None or dataset.fetch else data_root


def missing_data(dataset: DatasetSpec, data_root: str) -> list[Path]:
    """Files and folders that a user has to put there before anything of the dataset can be made."""
    if dataset.generator is not None:
        return []
    root = Path(dataset_root(dataset, data_root))
    given, files, folders = dataset, set[str](), set[str]()
    if (convert := dataset.convert) is not None:
        given = before_conversion(dataset)
        files = {*_mapping(convert), *_listed(dataset, SPLITS)} - {dataset.label_map}
        listed = itertools.chain.from_iterable(kitti_sources(convert).values())
        keys = (convert.image_dir_name, convert.label_dir_name)
        folders = {source_folder(source, key) for source in listed for key in keys}
    before = own_files(given) if dataset.fetch else data_files(given, str(root))
    return [
        *(path for path in before if not path.is_file()),
        *(root / name for name in _own(dataset, sorted(files)) if not (root / name).is_file()),
        *(root / name for name in _own(dataset, sorted(folders)) if not (root / name).is_dir()),
    ]


def _own(dataset: DatasetSpec, names: Iterable[str]) -> list[str]:
    """Those that neither the generator nor an archive brings."""
    if dataset.generator is not None:
        return []
    brought = {PurePosixPath(dataset.name, folder) for folder in dataset.fetch}
    return [name for name in names if brought.isdisjoint(PurePosixPath(name, "file").parents)]


def _mapping(convert: ConvertSpec) -> list[str]:
    return [] if convert.mapping_path is None else [convert.mapping_path]


def _converted_digest(dataset: DatasetSpec, convert: ConvertSpec, data_root: str, splits: Sequence[str]) -> str:
    """Of the keys of `convert`, the mapping file, the label files, the names of the images, and what the dataset is before its conversion:
    of what a generator or an archive brings, the digest is part of that."""
    listed = kitti_sources(convert)
    root = Path(GENERATED_ROOT if dataset.fetch else data_root)

    def folders(key: str) -> list[str]:
        return _own(dataset, {source_folder(source, key) for split in splits for source in listed[split]})

    content = {
        "convert": convert.model_dump(mode="json", exclude={"input_source", "val_source", "test_source"}),
        "sources": {split: listed[split] for split in splits},
        "version": CONVERT_VERSION,
        "mapping": {name: file_digest(root / name) for name in _own(dataset, _mapping(convert))},
        "names": {
            name: file_digest(root / name)
            for name in _own(dataset, sorted(_listed(dataset, splits) - {dataset.label_map}))
        },
        "labels": {
            name: _recorded(root, name) or folder_digest(root / name) for name in folders(convert.label_dir_name)
        },
        "images": {
            name: _recorded(root, name) or names_digest(root / name) for name in folders(convert.image_dir_name)
        },
        "before": data_digest(before_conversion(dataset), data_root, splits),
        "recorded": {} if dataset.generator is not None else recorded_by_dvc(dataset, str(root), splits),
    }
    return digest_text(canonical_json(content))[:16]


def _recorded(root: Path, name: str) -> str | None:
    """What DVC recorded of a folder or of one above it."""
    recorded = (raw_digest(root / place) for place in (PurePosixPath(name), *PurePosixPath(name).parents))
    return next((digest for digest in recorded if digest is not None), None)


def _data_names(dataset: DatasetSpec, data_root: str, splits: Sequence[str]) -> list[str]:
    names = {source.annotations for split in splits for source in sources(getattr(dataset, split), data_root)}
    return sorted(names | _listed(dataset, splits))


def _listed(dataset: DatasetSpec, splits: Sequence[str]) -> set[str]:
    """Label map and lists of names, which nobody converts."""
    named = (dataset.label_map, *(getattr(dataset, split).names for split in splits))
    return {name for name in named if name is not None}


def _live_keys(section: BaseModel) -> dict[str, Any]:
    return _without_inert(section, section.model_dump(mode="json"), frozenset())


def _without_inert(section: BaseModel, values: dict[str, Any], inert_here: frozenset[str]) -> dict[str, Any]:
    inert, inert_below = _inert(type(section))
    found = {key: value for key, value in values.items() if key not in inert and key not in inert_here}
    for key, value in found.items():
        if isinstance(value, dict):
            below = getattr(section, key)
            if isinstance(below, Section):
                found[key] = _without_inert(below, value, inert_below[key])
    return found


@functools.cache
def _inert(section: type[BaseModel]) -> tuple[frozenset[str], dict[str, frozenset[str]]]:
    """Inert keys of a section, and for each key those that are inert below it."""
    names = section.model_fields
    return frozenset(name for name in names if is_inert(section, name)), {
        name: inert_keys(section, name) for name in names
    }
