"""From the parts in config/ to the validated spec of an experiment.

Order: schema defaults, model, backbone, dataset, variants, config/experiments/<name>.yaml, overrides. After each backbone, dataset
and variant file comes its companion for the model's family, ``<name>.<family>.yaml``, where there is one. Mappings are merged key
by key, lists are replaced. Names are built once from config/config.yaml and looked up; nothing ever parses one. This module is
imported while Snakemake plans: it opens each file once and needs no torch.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

from pydantic import Field, ValidationError

from tessera.files import UserError
from tessera.spec.checks import MODES
from tessera.spec.describe import closest
from tessera.spec.layers import Layer, override_layer, read_layer
from tessera.spec.lineage import differences, lineage
from tessera.spec.mistakes import OVERRIDE, Mistake, from_validation, refuse
from tessera.spec.parts import read_mapping, render_yaml
from tessera.spec.schema import SPECS, DatasetSpec, Spec
from tessera.spec.section import Section

DEFAULT = "default"
COMPANION = "companion"
SectionType = TypeVar("SectionType", bound=Section)


class Parts(TypedDict):
    """What an experiment's name stands for; plain JSON."""

    model: str
    backbone: str
    dataset: str
    variants: list[str]
    seed: int


class DefaultParts(Section):
    dataset: str = "demo"
    """Left out of names."""
    seed: int = Field(0, ge=0)
    """Left out of names."""


class Table(Section):
    experiments: list[str] | Literal["all"] = "all"
    """Rows: names of experiments, or all of the grid."""
    runtimes: list[Literal["torch", "onnx", "trt"]] = Field(["torch"])
    """What executed the networks."""
    precisions: list[Literal["fp32", "fp16"]] = Field(["fp32"])
    """Of the ONNX and TensorRT rows; PyTorch always runs in fp32."""
    metrics: list[str] = Field([])
    """Columns; left out, the main metrics that any of the evaluations has."""
    decimals: int = Field(1, ge=0, le=6)
    """Of the percentages in Markdown."""
    latex_decimals: int = Field(2, ge=0, le=6)
    """The same in LaTeX; the CSV has full precision."""
    parameters: bool = True
    """A column with the number of parameters."""
    intervals: bool = False
    """95 % bootstrap intervals over images, in brackets; of 20 images at least."""
    baseline: str | None = None
    """One of `experiments`: rows whose difference from its row is more than chance over images (p < 0.05) get a dagger."""
    resamples: int = Field(1000, ge=100, le=1_000_000)
    """Of the images, for intervals; and how often they are exchanged with the baseline's at random, to compare the two."""

    @property
    def resampled(self) -> bool:
        return self.intervals or self.baseline is not None


class GridFile(Section):
    """config/config.yaml."""

    data_root: str = "data"
    """Folder that the datasets' paths are relative to."""
    checkpoints: str = "checkpoints"
    """Folder of the resume state of unfinished trainings; scratch space will do."""
    defaults: DefaultParts = DefaultParts()
    models: list[str] = Field(min_length=1)
    """Files in config/models."""
    backbones: list[str] = Field(min_length=1)
    """Files in config/backbones."""
    datasets: list[str] = Field(min_length=1)
    """Files in config/datasets."""
    variants: list[str | list[str]] = Field([])
    """Files in config/variants; a list is a combination, applied in that order. The plain recipe is always there."""
    seeds: list[int] = Field([0], min_length=1)
    """Of every combination."""
    experiments: list[str] | Literal["all"] = Field([])
    """What plain `snakemake` builds."""
    tables: dict[str, Table] = Field({})
    """What `tessera compare` writes, by name."""


@dataclass(frozen=True)
class Resolved:
    name: str
    spec: Spec
    parts: Parts
    set_by: Mapping[str, str]

    @functools.cached_property
    def origins(self) -> dict[str, str]:
        """Dotted leaf key -> `default`, the file that set it, or `override`."""
        return {key: _nearest(self.set_by, key) for key, _ in _leaves(self.spec)}


class Grid:
    def __init__(self, root: Path, file: GridFile, data_root: str | None) -> None:
        self.root = root
        self.file = file
        self.data_root = file.data_root if data_root is None else data_root
        self._data_root_origin = self._path("config.yaml") if self.data_root == file.data_root else OVERRIDE
        self._files: dict[str, dict[str, Any]] = {}
        self._layers: dict[tuple[str, str], Layer] = {}
        self._resolved: dict[tuple[str, tuple[str, ...]], Resolved] = {}
        self._datasets: dict[str, DatasetSpec] = {}
        self._listed = {folder: _stems(root / "config" / folder) for folder in ("experiments", *_folders(file))}
        refuse(self._path("config.yaml"), self._missing_parts())
        self.parts = self._name_all()
        refuse(self._path("config.yaml"), self._unknown_names())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.parts)

    @property
    def experiments(self) -> tuple[str, ...]:
        """What plain `snakemake` builds."""
        return self.possible if self.file.experiments == "all" else tuple(self.file.experiments)

    @functools.cached_property
    def possible(self) -> tuple[str, ...]:
        """The names whose dataset has annotations that the model's family can learn from: what `all` stands for."""
        families = {model: self._family(model) for model in self.file.models}
        types = {dataset: self.dataset(dataset).type for dataset in self.file.datasets}
        taught = {
            (model, dataset): _taught_mode(families[model], types[dataset]) for model in families for dataset in types
        }
        return tuple(name for name, parts in self.parts.items() if taught[parts["model"], parts["dataset"]])

    @property
    def datasets(self) -> tuple[str, ...]:
        return tuple(self.file.datasets)

    @property
    def tables(self) -> dict[str, Table]:
        return self.file.tables

    def table_experiments(self, table: str) -> tuple[str, ...]:
        if table not in self.tables:
            raise UserError(f"{self._path('config.yaml')}: no table {table!r}; {_offer(table, list(self.tables))}")
        experiments = self.tables[table].experiments
        return self.possible if experiments == "all" else tuple(experiments)

    def dataset(self, name: str) -> DatasetSpec:
        """Schema defaults and the dataset's own file, nothing else: what the data stages work on."""
        if name not in self._datasets:
            self._datasets[name] = self._dataset(name)
        return self._datasets[name]

    def _dataset(self, name: str) -> DatasetSpec:
        if name not in self.file.datasets:
            raise UserError(f"no dataset {name!r} in {self._path('config.yaml')}; {_offer(name, self.file.datasets)}")
        layer = self._dataset_layer(name, next(iter(SPECS)))
        # What it says to models is judged where it meets one.
        refuse(f"dataset {name}", [mistake for mistake in layer.mistakes if not mistake.key.startswith("model")])
        prefix = "dataset."
        set_by = {key.removeprefix(prefix): who for key, who in layer.set_by.items() if key.startswith(prefix)}
        return _validate(DatasetSpec, f"dataset {name}", layer.values["dataset"], set_by)

    def resolve(self, name: str, overrides: Sequence[str] = ()) -> Resolved:
        """The validated spec. Raises UserError with every mistake at once."""
        wanted = (name, tuple(overrides))
        if wanted not in self._resolved:
            self._resolved[wanted] = self._resolve(*wanted)
        return self._resolved[wanted]

    def _resolve(self, name: str, overrides: tuple[str, ...]) -> Resolved:
        if name not in self.parts:
            raise UserError(f"no experiment {name!r} in {self._path('config.yaml')}; {_offer(name, self.names)}")
        parts = self.parts[name]
        config = self._path("config.yaml")
        family = self._family(parts["model"])
        layers = [
            Layer({"seed": parts["seed"]}, {"seed": config}),
            self._layer("models", parts["model"], family),
            self._layer("backbones", parts["backbone"], family),
            *self._companion("backbones", parts["backbone"], family),
            self._dataset_layer(parts["dataset"], family),
            *self._companion("datasets", parts["dataset"], family),
        ]
        for variant in parts["variants"]:
            layers += [self._layer("variants", variant, family), *self._companion("variants", variant, family)]
        if name in self._listed["experiments"]:
            layers.append(self._layer("experiments", name, family))
        layers += [override_layer(text, SPECS[family]) for text in overrides]
        layers.append(Layer({"data_root": self.data_root}, {"data_root": self._data_root_origin}))
        values: dict[str, Any] = {}
        set_by: dict[str, str] = {}
        for layer in layers:
            values = _merge(values, layer.values)
            set_by |= layer.set_by
        early = [mistake for layer in layers for mistake in layer.mistakes]
        if "mode" not in values.get("model", {}):
            mode = _taught_mode(family, values.get("dataset", {}).get("type", DatasetSpec().type))
            values = _merge(values, {"model": {"mode": mode}} if mode else {})
            set_by |= {"model.mode": "chosen by dataset.type"} if mode else {}
        return Resolved(name, _validate(SPECS[family], name, values, set_by, early), parts, set_by)

    def _layer(self, folder: str, name: str, family: str, owner: str | None = None) -> Layer:
        """``owner``: as what the file counts when it sets keys that belong to one folder; left out, its own."""
        origin = self._path(folder, f"{name}.yaml")
        if (origin, family) not in self._layers:
            self._layers[origin, family] = read_layer(self._read(origin), origin, owner or folder, SPECS[family])
        return self._layers[origin, family]

    def _read(self, origin: str) -> dict[str, Any]:
        if origin not in self._files:
            self._files[origin] = read_mapping(Path(origin))
        return self._files[origin]

    def _companion(self, folder: str, name: str, family: str) -> list[Layer]:
        """What the part says to this family alone."""
        stem = f"{name}.{family}"
        return [self._layer(folder, stem, family, COMPANION)] if stem in self._listed[folder] else []

    def _family(self, model: str) -> str:
        origin = self._path("models", f"{model}.yaml")
        section = self._read(origin).get("model")
        family = section.get("name", model) if isinstance(section, dict) else model
        if family not in SPECS:
            found = repr(family)
            text = f"expected the model family, one of {', '.join(SPECS)}, found {found}"
            refuse(f"model {model}", [Mistake((origin,), "model.name", text)])
        return str(family)

    def _dataset_layer(self, name: str, family: str) -> Layer:
        layer, origin = self._layer("datasets", name, family), self._path("datasets", f"{name}.yaml")
        found = layer.values.get("dataset", {}).get("name", name)
        mistakes = layer.mistakes
        if found != name:
            text = f"expected the file's own name, {name!r}, found {found!r}; remove the key or rename the file"
            mistakes += (Mistake((origin,), "dataset.name", text),)
        values = _merge(layer.values, {"dataset": {"name": name}})
        return Layer(values, {"dataset.name": origin, **layer.set_by}, mistakes)

    def _path(self, *pieces: str) -> str:
        return str(self.root.joinpath("config", *pieces))

    def _missing_parts(self) -> list[Mistake]:
        config = (self._path("config.yaml"),)
        found = []
        for folder, names in _folders(self.file).items():
            for name in names:
                if not re.fullmatch(r"[A-Za-z0-9_]+", name):
                    text = f"{name!r} is no name of a part: expected letters, digits and underscores only"
                    found.append(Mistake(config, folder, text))
                elif name not in self._listed[folder]:
                    advice = _offer(name, sorted(self._listed[folder]))
                    found.append(Mistake(config, folder, f"no file config/{folder}/{name}.yaml; {advice}"))
        for folder in _folders(self.file):
            for stem in sorted(stem for stem in self._listed[folder] if "." in stem):
                name, _, family = stem.rpartition(".")
                if name not in self._listed[folder] or family not in SPECS or folder == "models":
                    text = (
                        f"is no companion of a part: expected <name of a file in config/{folder}>.<family>.yaml with one of the families "
                        f"{', '.join(SPECS)}"
                    )
                    found.append(Mistake((self._path(folder, f"{stem}.yaml"),), "", text))
        if self.file.defaults.dataset not in self.file.datasets:
            found.append(Mistake(config, "defaults.dataset", f"{self.file.defaults.dataset!r} is not under `datasets`"))
        found += [
            Mistake(config, "seeds", f"expected 0 or above, found {seed}") for seed in self.file.seeds if seed < 0
        ]
        return found

    def _name_all(self) -> dict[str, Parts]:
        file = self.file
        variants = [[], *([entry] if isinstance(entry, str) else entry for entry in file.variants)]
        names: dict[str, Parts] = {}
        for model, backbone, dataset, combination, seed in itertools.product(
            file.models, file.backbones, file.datasets, variants, file.seeds
        ):
            pieces = [f"{model}_{backbone}"]
            pieces += [] if dataset == file.defaults.dataset else [dataset]
            pieces += combination
            pieces += [] if seed == file.defaults.seed else [f"seed{seed}"]
            name = "-".join(pieces)
            parts = Parts(model=model, backbone=backbone, dataset=dataset, variants=list(combination), seed=seed)
            if name in names:
                raise UserError(
                    f"{self._path('config.yaml')}: two combinations have the name {name!r}: {dict(names[name])} and {dict(parts)}; "
                    "rename a part, or remove what is listed twice"
                )
            names[name] = parts
        return names

    def _unknown_names(self) -> list[Mistake]:
        config = self._path("config.yaml")
        asked = [("experiments", name) for name in self.file.experiments if self.file.experiments != "all"]
        for table, content in self.tables.items():
            key = f"tables.{table}.experiments"
            asked += [(key, name) for name in content.experiments if content.experiments != "all"]
        found = [
            Mistake((config,), key, f"no experiment {name!r}; {_offer(name, self.names)}")
            for key, name in asked
            if name not in self.parts
        ]
        for table, content in self.tables.items():
            rows = list(self.parts) if content.experiments == "all" else content.experiments
            if content.baseline is not None and content.baseline not in rows:
                text = f"{content.baseline!r} is not among the table's experiments; {_offer(content.baseline, rows)}"
                found.append(Mistake((config,), f"tables.{table}.baseline", text))
        for table in self.tables:
            if not re.fullmatch(r"\w[\w-]*", table, re.ASCII):
                text = f"{table!r} is no name of a table: expected letters, digits, underscores and hyphens only"
                found.append(Mistake((config,), "tables", text))
        for name in sorted(self._listed["experiments"] - self.parts.keys()):
            origin = self._path("experiments", f"{name}.yaml")
            found.append(Mistake((origin,), "", f"the grid has no experiment {name!r}; {_offer(name, self.names)}"))
        return found


def load_grid(root: Path = Path(), data_root: str | None = None) -> Grid:
    """Reads config/config.yaml below ``root`` and names every experiment; part files are opened when an experiment needs them.

    ``data_root`` overrules the file's.
    """
    path = root / "config" / "config.yaml"
    values = read_mapping(path)
    set_by = {key: str(path) for key in values}
    missing = [
        Mistake((str(path),), key, f"required: the names of files in config/{key}, as a list")
        for key in ("models", "backbones", "datasets")
        if key not in values
    ]
    refuse(str(path), missing)
    return Grid(root, _validate(GridFile, str(path), values, set_by), data_root)


def render_spec(resolved: Resolved) -> str:
    """YAML that reads back as the same spec, with the origin of every value as a comment."""
    return render_yaml([(key, value, resolved.origins[key]) for key, value in _leaves(resolved.spec)])


def explain(
    found: dict[str, Any], resolved: Resolved, verb: str, runtime: str = "torch", precision: str = "fp32"
) -> str:
    """What differs between the lineage ``found`` in an output and the one that ``verb`` would have now, and who set each new value."""
    wanted = lineage(resolved.spec, verb, runtime, precision)
    changed = differences(found, wanted)
    if not changed:
        return f"{resolved.name}: {verb} was made from exactly this spec"
    lines = [f"{line}{_cause(line.partition(':')[0], resolved)}" for line in changed]
    return f"{resolved.name}: {verb} was made from another spec (then -> now):\n  " + "\n  ".join(lines)


def _cause(key: str, resolved: Resolved) -> str:
    if key.startswith("versions."):
        return "  # the stage's code changed"
    if key.startswith("data."):
        return "  # annotation files, label map or generated scenes changed"
    return f"  # {_nearest(resolved.set_by, key)}"


def _merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        merged[key] = _merge(old if isinstance(old, dict) else {}, value) if isinstance(value, dict) else value
    return merged


def _validate(
    section: type[SectionType],
    subject: str,
    values: dict[str, Any],
    set_by: Mapping[str, str],
    early: Sequence[Mistake] = (),
) -> SectionType:
    found = list(early)
    try:
        result = section.model_validate_json(json.dumps(values))
    except ValidationError as error:
        found += from_validation(error, section, values, set_by)
    refuse(subject, found)
    return result


def _taught_mode(family: str, dataset_type: str) -> str | None:
    """The first mode of the family that annotations of the type can teach."""
    modes = type(SPECS[family]().model).modes
    return next((mode for mode in modes if mode in MODES.get(dataset_type, ())), None)


def _folders(file: GridFile) -> dict[str, list[str]]:
    variants = [name for entry in file.variants for name in ([entry] if isinstance(entry, str) else entry)]
    return {
        "models": file.models,
        "backbones": file.backbones,
        "datasets": file.datasets,
        "variants": list(dict.fromkeys(variants)),
    }


def _stems(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.yaml")}


def _offer(name: str, names: Sequence[str]) -> str:
    near = closest(name, names)
    if near:
        return "did you mean " + " or ".join(near) + "?"
    listed = ", ".join(names[:10])
    return f"there are {listed}{' and more' if len(names) > 10 else ''}" if names else "there are none"


def _leaves(section: Section, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            found += _leaves(value, f"{prefix}{name}.")
        elif isinstance(value, dict) and any(isinstance(one, Section) for one in value.values()):
            for key, one in value.items():
                found += _leaves(one, f"{prefix}{name}.{key}.")
        else:
            found.append((prefix + name, value))
    return found


def _nearest(set_by: Mapping[str, str], key: str) -> str:
    """Who set the key, or the section that holds it as a whole."""
    while key:
        if key in set_by:
            return set_by[key]
        key = key.rpartition(".")[0]
    return DEFAULT
