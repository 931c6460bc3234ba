"""From the parts in config/ to the validated spec of an experiment.

Order: schema defaults, model, backbone, dataset, variants, the experiment's own file, the way of testing, overrides. After each backbone,
dataset, variant and testing file comes its companion for the model's family, ``<name>.<family>.yaml``, where there is one. How layers
combine: ``layers``. Names are built once from config/config.yaml and looked up; nothing ever parses one. This module is imported while
Snakemake plans: it opens each file once and needs no torch.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

from pydantic import Field, ValidationError

from tessera.files import UserError
from tessera.spec.checks import MODES
from tessera.spec.describe import closest
from tessera.spec.layers import TESTING, Layer, compose, flat, make_layer, nested, override_layer
from tessera.spec.lineage import Lineages, dataset_root, differences, lineage, missing_data
from tessera.spec.mistakes import (
    COMPANION,
    OVERRIDE,
    Key,
    Mistake,
    Value,
    Values,
    dotted,
    from_validation,
    places_of,
    refuse,
)
from tessera.spec.parts import read_mapping, render_yaml
from tessera.spec.schema import SPECS, DatasetSpec, Spec
from tessera.spec.section import Section

DEFAULT = "default"
RESERVED = ("fp16", "int8", "predictions", "statistics")
"""Stand in the names of evaluation files already."""
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
    testing: list[str] = Field([""], min_length=1)
    """Ways of testing: names of files in config/testing, and "" for the experiment's own."""
    testing_as: Literal["columns", "rows"] = "columns"
    """Where they stand beside each other."""
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
    values: Values
    """What parts and overrides say, without the schema's defaults."""
    testing: str = ""
    """Name of the way of testing, a file in config/testing; empty where it is the experiment's own."""

    @functools.cached_property
    def origins(self) -> dict[str, str]:
        """Dotted leaf key -> `default`, who set it (a file, `override`), or everyone who set an entry of it."""
        return {dotted(key): self.origin(key) for key, _ in _leaves(self.spec)}

    def refuse(self, mistakes: Iterable[tuple[str, str]]) -> None:
        """Raises UserError with every (dotted key, text), saying who set the key."""
        refuse(self.name, [Mistake(places_of(tuple(key.split(".")), self.values), key, text) for key, text in mistakes])

    def origin(self, key: Key) -> str:
        below = [value.origin for path, value in self.values.items() if path[: len(key)] == key]
        above = (self.values[key[:count]].origin for count in range(len(key), 0, -1) if key[:count] in self.values)
        return ", ".join(dict.fromkeys(below)) or next(above, DEFAULT)


class Grid:
    def __init__(self, root: Path, content: Mapping[str, Any], data_root: str | None) -> None:
        """``content``: of config/config.yaml."""
        self.root = root
        self.content = content
        config = self._path("config.yaml")
        missing = [
            Mistake((config,), key, f"required: the names of files in config/{key}, as a list")
            for key in ("models", "backbones", "datasets")
            if key not in content
        ]
        refuse(config, missing)
        self.file = _validate(GridFile, config, dict(flat(content, config)))
        self.data_root = self.file.data_root if data_root is None else data_root
        self._read = functools.cache(lambda origin: read_mapping(Path(origin)))
        self._layer = functools.cache(self._make_layer)
        self._resolve = functools.cache(self._compose)
        self.dataset = functools.cache(self._dataset)
        self._listed = {
            folder: _stems(root / "config" / folder) for folder in ("experiments", TESTING, *_folders(self.file))
        }
        refuse(config, self._missing_parts())
        self.parts = self._name_all()
        refuse(config, self._unknown_names())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.parts)

    @property
    def experiments(self) -> tuple[str, ...]:
        """What plain `snakemake` builds."""
        return self._listed_or_all(self.file.experiments)

    def _listed_or_all(self, experiments: list[str] | Literal["all"]) -> tuple[str, ...]:
        return self.present if experiments == "all" else tuple(experiments)

    @functools.cached_property
    def possible(self) -> tuple[str, ...]:
        """The names whose dataset has annotations that the model's family can learn from."""
        untaught = {(model, dataset) for dataset in self.file.datasets for model in self._untaught(dataset)}
        return tuple(name for name, parts in self.parts.items() if (parts["model"], parts["dataset"]) not in untaught)

    def _untaught(self, dataset: str) -> list[str]:
        """Models that the dataset's annotations teach nothing."""
        type_ = self.dataset(dataset).type
        return [model for model in self.file.models if _taught_mode(self._family(model), type_) is None]

    @functools.cached_property
    def present(self) -> tuple[str, ...]:
        """The possible ones whose data are there: what `all` stands for."""
        absent = {name for name in self.file.datasets if self._missing_data(name)}
        return tuple(name for name in self.possible if self.parts[name]["dataset"] not in absent)

    @property
    def left_out(self) -> dict[str, str]:
        """What of the grid `all` does not stand for, and why."""
        found = {}
        for name in self.file.datasets:
            if missing := self._missing_data(name):
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                found[f"dataset {name}"] = f"{missing[0]}{more} not found under the data root {self.root_of(name)}"
            elif models := self._untaught(name):
                modes = " or ".join(MODES[self.dataset(name).type])
                found[f"dataset {name} with {', '.join(models)}"] = (
                    f"its annotations teach {modes}, which these do not learn"
                )
        return found

    def _missing_data(self, dataset: str) -> list[Path]:
        return missing_data(self.dataset(dataset), self.data_root)

    @property
    def datasets(self) -> tuple[str, ...]:
        return tuple(self.file.datasets)

    @property
    def tables(self) -> dict[str, Table]:
        return self.file.tables

    def table_experiments(self, table: str) -> tuple[str, ...]:
        if table not in self.tables:
            raise UserError(f"{self._path('config.yaml')}: no table {table!r}; {_offer(table, list(self.tables))}")
        return self._listed_or_all(self.tables[table].experiments)

    @property
    def testings(self) -> tuple[str, ...]:
        """Ways of testing: the files in config/testing."""
        return tuple(sorted(stem for stem in self._listed[TESTING] if "." not in stem))

    def _dataset(self, name: str) -> DatasetSpec:
        """Schema defaults and the dataset's own file, nothing else: what the data stages work on."""
        if name not in self.file.datasets:
            raise UserError(f"no dataset {name!r} in {self._path('config.yaml')}; {_offer(name, self.file.datasets)}")
        layer = self._layer("datasets", name, next(iter(SPECS)))
        # What it says to models is judged where it meets one.
        refuse(f"dataset {name}", [mistake for mistake in layer.mistakes if not mistake.key.startswith("model")])
        values = {key[1:]: value for key, value in layer.values.items() if key[0] == "dataset" and len(key) > 1}
        return _validate(DatasetSpec, f"dataset {name}", values)

    def root_of(self, dataset: str) -> str:
        """Folder that the dataset's paths are relative to."""
        return dataset_root(self.dataset(dataset), self.data_root)

    def resolve(self, name: str, overrides: Sequence[str] = (), testing: str = "") -> Resolved:
        """The validated spec, with the keys of a way of testing where one is named. Raises UserError with every mistake at once."""
        return self._resolve(name, tuple(overrides), testing)

    def _compose(self, name: str, overrides: tuple[str, ...], testing: str) -> Resolved:
        if name not in self.parts:
            raise UserError(f"no experiment {name!r} in {self._path('config.yaml')}; {_offer(name, self.names)}")
        parts = self.parts[name]
        family = self._family(parts["model"])
        config = self._path("config.yaml")
        root_origin = config if self.data_root == self.file.data_root else OVERRIDE
        own: Values = {("seed",): Value(parts["seed"], config), ("data_root",): Value(self.data_root, root_origin)}
        values, mistakes = compose(
            [
                Layer(own),
                self._layer("models", parts["model"], family),
                *self._with_companion("backbones", parts["backbone"], family),
                *self._with_companion("datasets", parts["dataset"], family),
                *(layer for name in parts["variants"] for layer in self._with_companion("variants", name, family)),
                *(self._layer("experiments", stem, family) for stem in self._own_files(parts)),
                *self.testing_layers(testing, family),
                *(override_layer(text, SPECS[family]) for text in overrides),
            ]
        )
        if ("model", "mode") not in values:
            type_ = values.get(("dataset", "type"), Value(DatasetSpec().type, DEFAULT)).value
            if mode := _taught_mode(family, type_):
                values["model", "mode"] = Value(mode, "chosen by dataset.type")
        subject = f"{name} tested as {testing}" if testing else name
        spec = _validate(SPECS[family], subject, values, mistakes)
        root = dataset_root(spec.dataset, self.data_root)
        if root != spec.data_root:
            spec = spec.model_copy(update={"data_root": root})
            values["data_root",] = Value(root, "where generated and fetched data lie")
        found = Resolved(name, spec, parts, values, testing)
        if testing:
            self._refuse_other_training(found, overrides)
        return found

    def testing_layers(self, name: str, family: str) -> list[Layer]:
        """Keys of a way of testing, none of one without a name. Raises UserError where there is no such."""
        if name and name not in self.testings:
            raise UserError(f"no way of testing {name!r} in {self._path(TESTING)}; {_offer(name, self.testings)}")
        return self._with_companion(TESTING, name, family) if name else []

    def _refuse_other_training(self, tested: Resolved, overrides: tuple[str, ...]) -> None:
        """Thresholds can decide which weights a training keeps."""
        trained = self.resolve(tested.name, overrides).spec
        # The data are the same: a way of testing names neither train nor val.
        before, after = (Lineages(spec, lambda _: "").of("train") for spec in (trained, tested.spec))
        changed = differences(before, after)
        if changed:
            raise UserError(
                f"{self._path(TESTING, f'{tested.testing}.yaml')}: would need another training of {tested.name} ({changed[0]}), because "
                "train.select is best and chose its weights by this; make it a variant"
            )

    def _with_companion(self, folder: str, name: str, family: str) -> list[Layer]:
        """The part, and what it says to this family alone."""
        stems = [name, f"{name}.{family}"]
        return [self._layer(folder, stem, family) for stem in stems if stem == name or stem in self._listed[folder]]

    def _make_layer(self, folder: str, stem: str, family: str) -> Layer:
        origin = self._path(folder, f"{stem}.yaml")
        content = dict(flat(self._read(origin), origin))
        owner = COMPANION if "." in stem and folder != TESTING else folder
        if owner == "datasets":
            found = content.setdefault(("dataset", "name"), Value(stem, origin))
            if found.value != stem:
                text = (
                    f"expected the file's own name, {stem!r}, found {found.value!r}; remove the key or rename the file"
                )
                return Layer(mistakes=(Mistake((found.place,), "dataset.name", text),))
        return make_layer(content.items(), owner, SPECS[family])

    def _own_files(self, parts: Parts) -> list[str]:
        """Of an experiment, in config/experiments: for all its seeds, and for this one."""
        stem = full_name(parts)
        return [name for name in (stem, f"{stem}-seed{parts['seed']}") if name in self._listed["experiments"]]

    def _family(self, model: str) -> str:
        origin = self._path("models", f"{model}.yaml")
        section = self._read(origin).get("model")
        family = section.get("name", model) if isinstance(section, dict) else model
        if not isinstance(family, str) or family not in SPECS:
            text = f"expected the model family, one of {', '.join(SPECS)}, found {family!r}"
            refuse(f"model {model}", [Mistake((origin,), "model.name", text)])
        return family

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
        for name in self.testings:
            if not re.fullmatch(r"[A-Za-z0-9_]+", name) or name in RESERVED:
                text = f"{name!r} cannot name a way of testing: expected letters, digits and underscores, and none of {', '.join(RESERVED)}"
                found.append(Mistake((self._path(TESTING, f"{name}.yaml"),), "", text))
        for folder in (TESTING, *_folders(self.file)):
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
            for name in content.testing:
                if name and name not in self.testings:
                    text = f"no way of testing {name!r} in config/{TESTING}; {_offer(name, self.testings)}"
                    found.append(Mistake((config,), f"tables.{table}.testing", text))
        for table in self.tables:
            if not re.fullmatch(r"\w[\w-]*", table, re.ASCII):
                text = f"{table!r} is no name of a table: expected letters, digits, underscores and hyphens only"
                found.append(Mistake((config,), "tables", text))
        files = {stem: None for parts in self.parts.values() for stem in (full_name(parts), full_name(parts, True))}
        for name in sorted(self._listed["experiments"] - files.keys()):
            near = [full_name(self.parts[name])] if name in self.parts else list(files)
            text = f"the grid has no experiment of this name, in which the dataset always stands; {_offer(name, near)}"
            found.append(Mistake((self._path("experiments", f"{name}.yaml"),), "", text))
        return found


def load_grid(root: Path = Path(), data_root: str | None = None) -> Grid:
    """Reads config/config.yaml below ``root`` and names every experiment; part files are opened when an experiment needs them.

    ``data_root`` overrules the file's.
    """
    return Grid(root, read_mapping(root / "config" / "config.yaml", twice_read=True), data_root)


def change(spec: Spec, subject: str, overrides: Sequence[str], layers: Sequence[Layer] = ()) -> Spec:
    """A spec that stands alone, such as that of a model file, with other layers above it, then overrides; raises UserError with every mistake at
    once."""
    root = type(spec)
    given = Layer(dict(flat(spec.model_dump(mode="json"), subject)))
    values, mistakes = compose([given, *layers, *(override_layer(text, root) for text in overrides)])
    return _validate(root, subject, values, mistakes)


def render_spec(resolved: Resolved) -> str:
    """YAML that reads back as the same spec, with the origin of every value as a comment."""
    return render_yaml([(dotted(key), value, resolved.origin(key)) for key, value in _leaves(resolved.spec)])


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
    return f"  # {resolved.origin(tuple(key.split('.')))}"


def _validate(section: type[SectionType], subject: str, values: Values, early: Iterable[Mistake] = ()) -> SectionType:
    found, content = list(early), nested(values)
    try:
        result = section.model_validate_json(json.dumps(content))
    except ValidationError as error:
        found += from_validation(error, section, content, values)
    refuse(subject, found)
    return result


def _taught_mode(family: str, dataset_type: object) -> str | None:
    """The first mode of the family that annotations of the type can teach."""
    modes = _modes(family)
    taught = MODES.get(dataset_type, ()) if isinstance(dataset_type, str) else ()
    return next((mode for mode in modes if mode in taught), None)


@functools.cache
def _modes(family: str) -> tuple[str, ...]:
    return type(SPECS[family]().model).modes


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


def full_name(parts: Parts, seed: bool = False) -> str:
    """Of the experiment's own file in config/experiments: whatever the defaults are, the same."""
    pieces = [f"{parts['model']}_{parts['backbone']}", parts["dataset"], *parts["variants"]]
    return "-".join([*pieces, f"seed{parts['seed']}"] if seed else pieces)


def _leaves(section: Section, prefix: Key = ()) -> list[tuple[Key, Any]]:
    found: list[tuple[Key, Any]] = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            found += _leaves(value, (*prefix, name))
        elif isinstance(value, dict) and any(isinstance(one, Section) for one in value.values()):
            for key, one in value.items():
                found += _leaves(one, (*prefix, name, key))
        else:
            found.append(((*prefix, name), value))
    return found
