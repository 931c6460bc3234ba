"""What the files of a dataset tell against a spec, told while Snakemake plans or before a training begins: not by the stage that stumbles over
it, a night later."""

from __future__ import annotations

import functools
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from tessera.data.label_map import parse_label_map, read_label_map
from tessera.files import UserError, missing, open_input, read_text
from tessera.spec.lineage import GENERATED_ROOT, dataset_root
from tessera.spec.schema import DatasetSpec, Spec
from tessera.spec.sources import sources
from tessera.structures import ClassCatalog, unknown_class

_SMALL = 1 << 24
"""Bytes of an annotation file that planning reads to the end for its classes; of a larger one the training tells them."""


def data_mistakes(spec: Spec, verb: str) -> Iterator[tuple[str, str]]:
    """(key, what is wrong and what to do) for what the stage ``verb`` would refuse, as far as the files are there and no rule makes them."""
    dataset, root = spec.dataset, dataset_root(spec.dataset, spec.data_root)
    made = bool(dataset.generator is not None or dataset.fetch or dataset.convert)
    if verb == "infer" and spec.inference.images is not None:
        path = Path(root, spec.inference.images)
        if not path.exists() and not (made and path.is_relative_to(Path(GENERATED_ROOT, dataset.name))):
            yield (
                "inference.images",
                f"{missing(path, 'file or folder')}; expected images below the data root {root}, or nothing (null) for those of the "
                "evaluated split",
            )
    if made:
        return
    split = getattr(dataset, spec.evaluate.split)
    files = [] if dataset.type == "mask_pairs" else sources(split, root)
    if verb == "evaluate" and len(files) == 1:
        path = Path(root, files[0].annotations)
        lack = _lack(path)
        if lack is not None:
            yield (
                "evaluate.split",
                f"is {spec.evaluate.split}, and {path} {lack}, so its images can be inferred on, not evaluated; set evaluate.split to a split "
                f"that is annotated, or dataset.{spec.evaluate.split}.annotations to a file that has them",
            )
    if (spec.evaluate.classes or spec.inference.color_map) and (catalog := _classes(dataset, root)) is not None:
        yield from class_mistakes(spec, catalog.things() if spec.model.mode in ("instance", "detection") else catalog)


def class_mistakes(spec: Spec, catalog: ClassCatalog) -> Iterator[tuple[str, str]]:
    """The same for names of classes that the model, whose classes ``catalog`` are, does not have."""
    keys = catalog.keys
    for key, names in (
        ("evaluate.classes", spec.evaluate.classes or ()),
        ("inference.color_map", spec.inference.color_map),
    ):
        yield from ((key, unknown_class(name, catalog)) for name in names if name not in keys)


def _lack(path: Path) -> str | None:
    """What an annotation file lacks; None of one that has annotations, or is none, which the check reports."""
    try:
        status = path.stat()
        return _found_lack(path, status.st_size, status.st_mtime_ns) if status.st_size else None
    except OSError:
        return None


@functools.cache
def _found_lack(path: Path, size: int, modified: int) -> str | None:
    with open_input(path) as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = re.search(rb'"annotations"\s*:\s*(\[\s*\])?', content)
        if found is not None:
            return "has an empty list `annotations`" if found[1] else None
        return "has no list `annotations`" if content.find(b'"images"') >= 0 else None


class _Categories(msgspec.Struct):
    categories: Any = None


def _classes(dataset: DatasetSpec, root: str) -> ClassCatalog | None:
    """All classes; None where they cannot be told, or the check reports why."""
    try:
        if dataset.label_map is not None:
            return read_label_map(Path(root, dataset.label_map), dataset.contiguous_id, dataset.num_classes)
        files = [Path(root, source.annotations) for source in sources(dataset.train, root)]
        if len(files) != 1 or files[0].stat().st_size > _SMALL:
            return None
        listed = msgspec.json.decode(read_text(files[0]), type=_Categories).categories
        return parse_label_map(listed, files[0], dataset.contiguous_id, dataset.num_classes)
    except (OSError, UserError, ValueError, RecursionError, msgspec.MsgspecError):
        return None
