"""The images of a split that a text file names, as the ImageSets of KITTI and Pascal VOC do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from tessera.data.columns import Texts
from tessera.data.reader import Findings, SegmentationDataset, View, brief, relative_name
from tessera.files import read_text, reading

_SHOWN = 5


class ListedImages(View):
    """Those images of ``whole`` that the lines of ``names`` name, in the order that they have there.

    A name is that of the file, with or without its ending and any of the folders in front: ``000007`` is ``training/image_2/000007.png``.
    """

    def __init__(self, whole: SegmentationDataset, names: Path, findings: Findings) -> None:
        """A name that no image has, that several have, or that comes twice is an error in ``findings``. Raises UserError where there is no list."""
        self.whole = whole
        self.source = names
        self.image_folder = whole.image_folder
        self.categories = whole.categories
        self.has_masks = whole.has_masks
        self.value_range, self.max_pixels = whole.value_range, whole.max_pixels
        found = Findings()
        self._places = listed_places(names, whole.file_names, found)
        findings.errors += [f"{names}: {error}" for error in found.errors]
        self.image_ids = np.asarray(whole.image_ids, np.int64)[self._places]
        self.file_names = Texts.of(whole.file_names[place] for place in self._places)

    def place(self, index: int) -> tuple[SegmentationDataset, int]:
        return self.whole, self._places[index]

    def nothing_to_learn(self) -> str | None:
        return self.whole.nothing_to_learn()


def listed_places(names: Path, images: Sequence[str], findings: Findings) -> list[int]:
    """Which of the ``images`` the lines of the file name, in their order; ``ListedImages`` says what is an error."""
    return sorted(_find(_read(names, findings), images, findings))


def _read(path: Path, findings: Findings) -> list[tuple[str, ...]]:
    """The parts of each name."""
    with reading(path, "a list of images, one name a line (split.names)"):
        lines = read_text(path).split("\n")
    found: dict[tuple[str, ...], None] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name = relative_name(line.strip(), findings, f"line {number}")
        parts = () if name is None else PurePosixPath(name).parts
        if parts in found:
            findings.errors.append(f"line {number}: {brief(line.strip())} comes a second time, expected once")
        elif parts:
            found[parts] = None
    return list(found)


def _find(names: Sequence[tuple[str, ...]], images: Sequence[str], findings: Findings) -> set[int]:
    """Places of the named images."""
    asked: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    for name in names:
        asked[len(name)].add(name)
    places: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for place, image in enumerate(images):
        path = PurePosixPath(image)
        for depth, wanted in asked.items():
            end = path.parts[-depth:]
            for form in {end, (*end[:-1], path.stem)}:
                if form in wanted:
                    places[form].append(place)
    missing = [name for name in names if name not in places]
    if missing:
        shown = ", ".join("/".join(name) for name in missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        findings.errors.append(f"{len(missing)} of {len(names)} names are no image of the annotations ({shown})")
    for name, found in places.items():
        if len(found) > 1:
            findings.errors.append(
                f"{'/'.join(name)} may be {images[found[0]]} or {images[found[1]]}; write as many of its folders as tell them apart"
            )
    chosen = [found[0] for found in places.values()]
    if len(set(chosen)) < len(chosen):
        findings.errors.append(
            "two of its names are one image, once with and once without its ending or folders; keep one"
        )
    return set(chosen)
