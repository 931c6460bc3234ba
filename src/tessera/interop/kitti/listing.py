"""The images and label files of KITTI folders, sorted by name and dealt to train, val, test or folds, in scratch files."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tessera.files import UserError
from tessera.ops.image_size import IMAGE_SUFFIXES
from tessera.spec.schema import ConvertSpec
from tessera.spec.sources import kitti_sources, source_folder

_RUN = 50_000
"""Names that are sorted in memory at a time."""
_CHUNK = 256
"""Images that a process reads at a time."""


@dataclass(frozen=True)
class Chunk:
    shard: int
    first_id: int
    """Of the first image; the others follow."""
    lines: list[str]
    """Image and label file, relative to the root, separated and ended by NUL; the image is empty where there is none."""


class Listing:
    """Every image with its label file, sorted by source, then by name, dealt to the parts; kept in scratch files."""

    def __init__(self, root: Path, convert: ConvertSpec, scratch: Path) -> None:
        self.faults: list[str] = []
        self.sizes: Counter[str] = Counter()
        self._root, self._convert, self._scratch = root, convert, scratch
        folds = convert.num_partitions
        self.parts = ["train"] if folds == 1 else [f"fold{number}" for number in range(folds)]
        self.parts += ["val"] if convert.val_split or convert.val_source else []
        self.parts += ["test"] if convert.test_source else []
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(self._path(name).open("w", encoding="utf-8", newline="\n"))
                for name in (*self.parts, "orphans", "unlabeled")
            }
            for split, listed in kitti_sources(convert).items():
                for source in listed:
                    images = source_folder(source, convert.image_dir_name)
                    labels = source_folder(source, convert.label_dir_name)
                    for stem, image, label in self._pairs(source, images, labels):
                        if image is None:
                            files["orphans"].write(f"\0{labels}/{label}\0\n")
                        elif label is None:
                            files["unlabeled"].write(f"{images}/{image}\n")
                        else:
                            part = self._part(split, f"{source}/{stem}")
                            files[part].write(f"{images}/{image}\0{labels}/{label}\0\n")
                            self.sizes[part] += 1

    def chunks(self, part: str, sizes: list[int], first_id: int) -> Iterator[Chunk]:
        """No chunk reaches over the end of a shard."""
        with self._path(part).open(encoding="utf-8", newline="\n") as lines:
            for shard, size in enumerate(sizes):
                for start in range(0, size, _CHUNK):
                    taken = list(itertools.islice(lines, min(_CHUNK, size - start)))
                    yield Chunk(shard, first_id, taken)
                    first_id += len(taken)

    def orphans(self) -> Iterator[Chunk]:
        """Label files without an image."""
        with self._path("orphans").open(encoding="utf-8", newline="\n") as lines:
            while taken := list(itertools.islice(lines, _CHUNK)):
                yield Chunk(0, 0, taken)

    def unlabeled(self) -> Iterator[str]:
        """Images without labels."""
        with self._path("unlabeled").open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                yield line.removesuffix("\n")

    def _path(self, name: str) -> Path:
        return self._scratch / f"{name}.list"

    def _part(self, split: str, name: str) -> str:
        """Depends on the name and the seed alone: more images move none from part to part."""
        if split != "train" or (self._convert.num_partitions == 1 and not self._convert.val_split):
            return split
        number = hashlib.blake2b(f"{self._convert.seed}\0{name}".encode(), digest_size=8).digest()
        share = int.from_bytes(number, "big") / 2**64
        if self._convert.num_partitions > 1:
            return f"fold{min(int(share * self._convert.num_partitions), self._convert.num_partitions - 1)}"
        return "val" if share < self._convert.val_split / 100 else "train"

    def _pairs(self, source: str, images: str, labels: str) -> Iterator[tuple[str, str | None, str | None]]:
        """By stem: the stem, the names of its image and of its label file, None where there is none."""
        grouped = itertools.groupby(
            heapq.merge(
                ((stem, 0, stem + suffix) for stem, suffix in self._sorted(images, IMAGE_SUFFIXES)),
                ((stem, 1, stem + suffix) for stem, suffix in self._sorted(labels, frozenset({".txt"}))),
            ),
            key=lambda entry: entry[0],
        )
        for stem, entries in grouped:
            found: tuple[list[str], list[str]] = ([], [])
            for _, kind, name in entries:
                found[kind].append(name)
            for names in found:
                if len(names) > 1:
                    self.faults.append(
                        f"{source}: {' and '.join(names)} belong to one image; rename or remove one of them"
                    )
            yield stem, next(iter(found[0]), None), next(iter(found[1]), None)

    def _sorted(self, place: str, suffixes: frozenset[str]) -> Iterator[tuple[str, str]]:
        """(stem, suffix) of the files of a folder that have one of the suffixes; hidden ones are left out."""
        lines = sorted_lines(self._names(place, suffixes), self._scratch)
        for line in lines:
            stem, suffix, _ = line.split("\0")
            yield stem, suffix

    def _names(self, place: str, suffixes: frozenset[str]) -> Iterator[str]:
        folder = self._root / place
        try:
            entries = os.scandir(folder)
        except FileNotFoundError:
            raise UserError(
                f"{folder}: no such folder; expected one of the source's (convert.input_source, image_dir_name, label_dir_name)"
            ) from None
        except OSError as error:
            raise UserError(f"{folder}: cannot be read as a folder ({error.strerror})") from None
        with entries:
            for entry in entries:
                stem, dot, ending = entry.name.rpartition(".")
                suffix = dot + ending
                if suffix.lower() not in suffixes or entry.name.startswith(".") or entry.is_dir():
                    continue
                if not entry.is_file():
                    self.faults.append(
                        f"{place}/{entry.name!r}: is no file (a link that leads nowhere, or a FIFO); remove it"
                    )
                    continue
                if not _is_plain(entry.name):
                    self.faults.append(
                        f"{place}/{entry.name!r}: expected a name of UTF-8 text without line breaks and backslashes; rename it"
                    )
                    continue
                yield f"{stem}\0{suffix}\0\n"


def _is_plain(name: str) -> bool:
    if "\n" in name or "\r" in name or "\\" in name:
        return False
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def sorted_lines(lines: Iterable[str], scratch: Path) -> Iterator[str]:
    """In the order of code points. Only a run of lines is in memory; sorted runs wait in scratch files to be merged."""
    remaining = iter(lines)
    with ExitStack() as stack:
        runs = []
        while run := sorted(itertools.islice(remaining, _RUN)):
            file = stack.enter_context(tempfile.TemporaryFile("w+", dir=scratch, encoding="utf-8", newline="\n"))
            file.writelines(run)
            file.seek(0)
            runs.append(file)
        yield from heapq.merge(*runs)
