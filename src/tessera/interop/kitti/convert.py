"""KITTI folders to sharded COCO files. In memory are the names of all files, and the rows of one shard.

Names are listed and dealt to train, val, test or folds first. Then label files and image headers are read in pieces, by several processes
where asked. The result is the same for any number of processes.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from decimal import Context, Decimal, Inexact, InvalidOperation, Overflow, Underflow
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from rich.progress import Progress

from tessera.data.label_map import read_label_map
from tessera.files import (
    SHOWN,
    UserError,
    atomic_folder,
    digest_file,
    only_process,
    raise_all,
    read_text,
    reading_json,
    write_json,
)
from tessera.interop.kitti.listing import Listing
from tessera.ops.image_size import read_image_size
from tessera.spec.lineage import CONVERT_VERSION, GENERATED_ROOT
from tessera.spec.schema import ConvertSpec, DatasetSpec
from tessera.spec.sources import CONVERTED

COLUMNS = 15
"""type, truncated, occluded, alpha, box (left, top, right, bottom), seven 3-D columns."""

UNMAPPED, DEGENERATE, OUTSIDE = "unmapped class", "degenerate box", "box outside the image"
NO_IMAGE, NO_LABELS = "labels without an image", "image without a label file"

DIGITS = 64
"""More than these in a coordinate, or in a difference or product of two, are refused."""

_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_ROW = re.compile(r"[ \t]*(\S+)(?:[ \t]+\S+){3}" + rf"[ \t]+({_NUMBER})" * 4 + r"(?:[ \t]+\S+){7}[ \t]*\r?")
EXACT = Context(prec=DIGITS, Emax=307, traps=[Inexact, InvalidOperation, Overflow, Underflow])
"""Numbers of 1e308 and more are refused: as floats, which readers of the shards take them for, they may be infinite."""


@dataclass(frozen=True)
class Classes:
    categories: tuple[tuple[int, str], ...]
    """COCO id and name."""
    ids: dict[str, int]
    """Folded KITTI class -> COCO id."""


_CHUNK = 256
"""Images that a process reads at a time."""


@dataclass(frozen=True)
class _Chunk:
    first_id: int
    """Of the first image; the others follow."""
    pairs: list[tuple[str | None, str]]
    """Image and label file, relative to the root."""


@dataclass
class _Piece:
    images: list[str] = field(default_factory=list)
    """JSON."""
    annotations: list[str] = field(default_factory=list)
    """JSON behind the id, which the writer counts."""
    classes: Counter[int] = field(default_factory=Counter)
    dropped: list[tuple[str, int, str, str]] = field(default_factory=list)
    """Rows of the report: file, line, class, reason."""
    faults: list[str] = field(default_factory=list)


def convert_dataset(dataset: DatasetSpec, data_root: str, processes: int = 1, progress: bool = True) -> dict[str, Any]:
    """Writes data/<dataset>/converted/ whole or not at all, byte for byte the same each time, and returns its manifest.

    ``shards/<part>-<number>-of-<count>.json`` for the parts train, val, test or fold<n>; ``dropped.csv``, a row for every label that is in
    no shard; ``manifest.json`` with the counts and the sha256 of every file.

    Raises UserError with all malformed lines, unreadable images and ambiguous names at once (the first 50 in full), for a folder or
    file that is missing, for a class map that contradicts itself, and where no label is left.
    """
    convert = dataset.convert
    if convert is None:
        raise UserError(f"config/datasets/{dataset.name}.yaml: has no `convert`; only KITTI folders can be converted")
    root = Path(data_root)
    classes = _read_classes(dataset, root)
    home = Path(GENERATED_ROOT) / dataset.name
    busy = f"{home}: another `tessera convert {dataset.name}` is at work; wait for it, or stop it first"
    with only_process(home / ".convert.lock", busy), atomic_folder(home / CONVERTED) as folder:
        writer = _Writer(folder, classes)
        writer.run(root, convert, processes, progress, dataset.max_pixels)
        return writer.finish(dataset.name, convert, root)


def describe(manifest: dict[str, Any]) -> str:
    """A few lines: what is in the shards, and what is not."""
    lines = [
        f"{part}: {counts['images']} images, {counts['annotations']} boxes, {counts['shards']} shard(s)"
        for part, counts in manifest["counts"].items()
    ]
    lines += [f"left out, {reason}: {_some(names)}" for reason, names in manifest["dropped"].items()]
    return "\n".join(lines)


def _fold(name: str) -> str:
    """Classes are the same where only case differs, or white space and ``_``, which stands for it in KITTI files."""
    return "_".join(name.split()).casefold()


def _read_classes(dataset: DatasetSpec, root: Path) -> Classes:
    """The label map's classes, or those that the mapping file leads to, numbered from 1 in order of first appearance."""
    convert = dataset.convert
    label_map = None if dataset.label_map is None else root / dataset.label_map
    entries = () if label_map is None else read_label_map(label_map).categories
    known = {entry.name: entry.id for entry in entries}
    if len(known) < len(entries):
        name = Counter(entry.name for entry in entries).most_common(1)[0][0]
        raise UserError(
            f"{label_map}: several classes are called {name!r}; KITTI labels tell classes by their names, so rename all but one"
        )
    if convert is None or convert.mapping_path is None:
        path, pairs = label_map, [(name, name) for name in known]
    else:
        path = root / convert.mapping_path
        pairs = _read_mapping(path)
        if label_map is not None:
            for kitti, name in pairs:
                if name not in known:
                    raise UserError(
                        f"{path}: {kitti!r} leads to {name!r}, which is no class of {label_map}; correct one of them"
                    )
        else:
            known = {name: number for number, name in enumerate(dict.fromkeys(name for _, name in pairs), 1)}
    ids: dict[str, int] = {}
    first: dict[str, str] = {}
    for kitti, name in pairs:
        if ids.setdefault(_fold(kitti), known[name]) != known[name]:
            raise UserError(
                f"{path}: {first[_fold(kitti)]!r} and {kitti!r} are one class, because case does not count and '_' stands for white space, "
                "but lead to two; keep one of them"
            )
        first.setdefault(_fold(kitti), kitti)
    return Classes(tuple((number, name) for name, number in known.items()), ids)


def _read_mapping(path: Path) -> list[tuple[str, str]]:
    """In pairs, because a dictionary would keep the last of two equal keys."""
    with reading_json(path):
        pairs = json.loads(read_text(path), object_pairs_hook=tuple)
    if not isinstance(pairs, tuple) or not pairs:
        raise UserError(f'{path}: expected an object of KITTI class: class, such as {{"Van": "vehicle"}}')
    for kitti, name in pairs:
        if not isinstance(name, str) or not name.strip() or not kitti.strip():
            raise UserError(f"{path}: {kitti!r} leads to {name!r}, expected the name of a class")
    return list(pairs)


class _Writer:
    def __init__(self, folder: Path, classes: Classes) -> None:
        self.folder = folder
        self.classes = classes
        self.counts: dict[str, dict[str, Any]] = {}
        self.dropped: Counter[tuple[str, str]] = Counter()
        """By reason and class."""
        self.faults: list[str] = []
        self.fault_count = 0
        (folder / "shards").mkdir()

    def run(self, root: Path, convert: ConvertSpec, processes: int, progress: bool, max_pixels: int) -> None:
        with (
            (self.folder / "dropped.csv").open("w", encoding="utf-8", newline="") as report,
            Progress(disable=not progress, auto_refresh=False) as bar,
        ):
            self._report = csv.writer(report, lineterminator="\n")
            self._report.writerow(("file", "line", "class", "reason"))
            listing = Listing(root, convert)
            self._add_faults(listing.faults)
            self._drop((name, "", "", NO_LABELS) for name in listing.unlabeled)
            task = bar.add_task("convert", total=sum(map(len, listing.pairs.values())))
            reader = _Reader(root, self.classes, max_pixels)
            image_id = annotation_id = 1
            for part, pairs in listing.pairs.items():
                total = len(pairs)
                count = min(convert.num_shards, total)
                counts = self.counts[part] = {"images": total, "annotations": 0, "shards": count}
                found: Counter[int] = Counter()
                ends = [total * number // max(1, count) for number in range(count + 1)]
                chunks = [_chunks(pairs[start:end], image_id + start) for start, end in itertools.pairwise(ends)]
                pieces = _in_processes(reader, itertools.chain.from_iterable(chunks), processes)
                for shard, own in enumerate(chunks):
                    read = []
                    for piece in itertools.islice(pieces, len(own)):
                        self._take(piece)
                        found.update(piece.classes)
                        read.append(piece)
                        bar.update(task, advance=len(piece.images), refresh=True)
                    path = self.folder / "shards" / f"{part}-{shard:05d}-of-{count:05d}.json"
                    counts["annotations"] += (written := _write_shard(path, read, annotation_id, self.classes))
                    annotation_id += written
                counts["classes"] = {name: found[number] for number, name in self.classes.categories}
                image_id += total
            for chunk in _chunks([(None, label) for label in listing.orphans], 0):
                self._take(reader(chunk))

    def finish(self, name: str, convert: ConvertSpec, root: Path) -> dict[str, Any]:
        title = f"dataset {name} below {root}"
        raise_all(title, self.faults, self.fault_count)
        dropped: dict[str, dict[str, int]] = {}
        for (reason, kitti), count in sorted(self.dropped.items()):
            dropped.setdefault(reason, {})[kitti] = count
        for part, counts in self.counts.items():
            if not counts["images"]:
                raise UserError(f"{title}: no image with a label file is left for {part}; {_advice(part, convert)}")
        if not any(counts["annotations"] for counts in self.counts.values()):
            found = "; ".join(f"{reason}: {_some(names)}" for reason, names in dropped.items())
            raise UserError(
                f"{title}: no label is left ({found or 'all label files are empty'}); is the mapping right?"
            )
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        manifest = {
            "dataset": name,
            "convert": convert.model_dump(mode="json"),
            "version": CONVERT_VERSION,
            "categories": [{"id": number, "name": category} for number, category in self.classes.categories],
            "counts": self.counts,
            "dropped": dropped,
            "files": {path.relative_to(self.folder).as_posix(): digest_file(path) for path in paths},
        }
        write_json(self.folder / "manifest.json", manifest)
        return manifest

    def _take(self, piece: _Piece) -> None:
        self._add_faults(piece.faults)
        self._drop(piece.dropped)

    def _drop(self, rows: Iterable[tuple[str, int | str, str, str]]) -> None:
        for row in rows:
            self._report.writerow(row)
            self.dropped[row[3], row[2]] += 1

    def _add_faults(self, faults: list[str]) -> None:
        self.fault_count += len(faults)
        self.faults += faults[: SHOWN - len(self.faults)]


def _advice(part: str, convert: ConvertSpec) -> str:
    drawn = part in ("train", "val") and convert.val_split > 0
    key = f"{part}_source" if part in ("val", "test") and not drawn else "input_source"
    advice = f"look into the folders of convert.{key}"
    if part.startswith("fold"):
        return f"{advice}, or lower convert.num_partitions"
    return f"{advice}, or change convert.val_split or its seed" if drawn else advice


def _some(names: dict[str, int]) -> str:
    shown = ", ".join(f"{name or '-'} {count}" for name, count in itertools.islice(names.items(), 20))
    return shown + (", ..." if len(names) > 20 else "")


def _chunks(pairs: Sequence[tuple[str | None, str]], first_id: int) -> list[_Chunk]:
    return [_Chunk(first_id + start, list(pairs[start : start + _CHUNK])) for start in range(0, len(pairs), _CHUNK)]


def _write_shard(path: Path, pieces: list[_Piece], first_id: int, classes: Classes) -> int:
    """One COCO file; the number of its annotations."""
    images = ",\n".join(text for piece in pieces for text in piece.images)
    annotations = [text for piece in pieces for text in piece.annotations]
    rows = ",\n".join(f'{{"id": {number}, {text}' for number, text in enumerate(annotations, first_id))
    categories = [{"id": number, "name": name} for number, name in classes.categories]
    listed = json.dumps(categories, ensure_ascii=False)
    text = f'{{"images": [\n{images}\n],\n"annotations": [\n{rows}\n],\n"categories": {listed}\n}}\n'
    path.write_text(text, encoding="utf-8", newline="\n")
    return len(annotations)


@dataclass(frozen=True)
class _Reader:
    root: Path
    classes: Classes
    max_pixels: int

    def __call__(self, chunk: _Chunk) -> _Piece:
        piece = _Piece()
        for image_id, (image, label) in enumerate(chunk.pairs, chunk.first_id):
            size = None
            if image is not None:
                try:
                    size = read_image_size(self.root / image, self.max_pixels)
                except UserError as error:
                    piece.faults.append(str(error))
                    continue
                name = json.dumps(image, ensure_ascii=False)
                piece.images.append(
                    f'{{"id": {image_id}, "file_name": {name}, "height": {size[0]}, "width": {size[1]}}}'
                )
            self._read_labels(label, image_id, size, piece)
        return piece

    def _read_labels(self, label: str, image_id: int, size: tuple[int, int] | None, piece: _Piece) -> None:
        """``size``: (height, width) of the image, None where there is none."""
        try:
            text = read_text(self.root / label)
        except (OSError, UnicodeDecodeError) as error:
            piece.faults.append(f"{self.root / label}: cannot be read as text ({error}); expected KITTI labels")
            return
        for number, row in enumerate(text.split("\n"), 1):
            if not row or row.isspace():
                continue
            match = _ROW.fullmatch(row)
            if match is None:
                piece.faults.append(f"{self.root / label}, line {number}: {_fault(row)}")
                continue
            kitti, *corners = match.groups()
            category = self.classes.ids.get(kitti) or self.classes.ids.get(_fold(kitti))
            try:
                left, top, right, bottom = map(Decimal, corners)
                width, height = EXACT.subtract(right, left), EXACT.subtract(bottom, top)
                area = EXACT.multiply(width, height)
            except ArithmeticError:
                piece.faults.append(
                    f"{self.root / label}, line {number}: the box {' '.join(corners)} needs more than {DIGITS} digits or reaches 1e308"
                )
                continue
            if size is None:
                reason = NO_IMAGE
            elif category is None:
                reason = UNMAPPED
            elif width <= 0 or height <= 0:
                reason = DEGENERATE
            elif right <= 0 or bottom <= 0 or left >= size[1] or top >= size[0]:
                reason = OUTSIDE
            else:
                piece.classes[category] += 1
                piece.annotations.append(
                    f'"image_id": {image_id}, "category_id": {category}, "bbox": [{left}, {top}, {width}, {height}], "area": {area}, '
                    '"iscrowd": 0}'
                )
                continue
            piece.dropped.append((label, number, kitti, reason))


def _fault(row: str) -> str:
    columns = row.split()
    if len(columns) == COLUMNS + 1:
        return f"has {COLUMNS + 1} columns, as a detector's results with scores, expected the {COLUMNS} of ground truth"
    if len(columns) != COLUMNS:
        return f"has {len(columns)} column(s), expected {COLUMNS}: type, truncated, occluded, alpha, 4 of the box, 7 of 3-D"
    wrong = next((value for value in columns[4:8] if not re.fullmatch(_NUMBER, value)), None)
    if wrong is not None:
        return f"a side of the box is {wrong!r}, expected a number in decimal digits"
    return "columns are separated by something else than spaces and tabs"


def _in_processes(reader: _Reader, chunks: Iterator[_Chunk], processes: int) -> Iterator[_Piece]:
    """In order; a few chunks are under way at a time."""
    if processes == 1:
        yield from map(reader, chunks)
        return
    waiting: deque[Future[_Piece]] = deque()
    try:
        with ProcessPoolExecutor(processes, get_context("fork"), _end_with_parent) as pool:
            for chunk in chunks:
                waiting.append(pool.submit(reader, chunk))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"one of the {processes} processes that read labels was ended from outside; where memory ran out, convert with fewer (--processes)"
        ) from None


def _end_with_parent() -> None:
    """The processes of a pool would wait for ever after their parent was killed."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
