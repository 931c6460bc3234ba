"""The vocabulary that data, models, evaluation and inference share, and the conventions that hold everywhere.

- Class ids run 0..C-1 in the order of the catalogue; dataset ids live at the border only. Ignored pixels are 255.
- Boxes are (x1, y1, x2, y2) in absolute pixels, the far edge exclusive, outside the networks.
- Images are RGB; in a batch they are float32 in [0, 1], padded at the bottom and right with the pixel mean, which the
  network's own normalisation turns into exact zeros.
- Metrics are computed at the original image size.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_PIXEL_ID = 256**3 - 1
"""Largest class id that a picture of classes can hold, written as RGB."""

IGNORE = 255
"""Label of pixels that count neither in a loss nor in a metric."""


@dataclass(frozen=True)
class Category:
    id: int
    """Id in the dataset's files, at least 0; only readers and writers of those files use it."""
    name: str
    """As the dataset has it; another class may have the same."""
    color: tuple[int, int, int]
    """RGB, 0..255 each."""
    isthing: bool


@dataclass(frozen=True)
class ClassCatalog:
    """The classes of a dataset; a class's index in ``categories`` is its id everywhere inside."""

    categories: tuple[Category, ...]

    def __len__(self) -> int:
        return len(self.categories)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(category.name for category in self.categories)

    @property
    def keys(self) -> tuple[str, ...]:
        """``names`` where one class alone has the name, otherwise with the dataset's id, such as ``screen (131)``: no two are equal."""
        return told_apart(self.names, [category.id for category in self.categories])

    @property
    def thing_ids(self) -> tuple[int, ...]:
        """Contiguous ids of the countable classes."""
        return tuple(index for index, category in enumerate(self.categories) if category.isthing)

    @property
    def from_dataset_id(self) -> dict[int, int]:
        """Dataset id -> contiguous id."""
        return {category.id: index for index, category in enumerate(self.categories)}

    def things(self) -> ClassCatalog:
        """The countable classes alone, renumbered; the catalogue of an instance model."""
        return ClassCatalog(tuple(category for category in self.categories if category.isthing))

    def to_json(self) -> list[dict[str, Any]]:
        """The label_map form: ``id``, ``name``, ``color``, ``isthing`` (0 or 1)."""
        return [
            {"id": c.id, "name": c.name, "color": list(c.color), "isthing": int(c.isthing)} for c in self.categories
        ]

    @classmethod
    def from_json(cls, value: Sequence[dict[str, Any]]) -> ClassCatalog:
        """Trusts its input: label maps from users go through ``data.label_map.read_label_map``."""
        return cls(
            tuple(
                Category(
                    int(c["id"]), str(c["name"]), (c["color"][0], c["color"][1], c["color"][2]), bool(c["isthing"])
                )
                for c in value
            )
        )


def unknown_class(name: str, catalog: ClassCatalog) -> str:
    """What to say of a name that is no key of the catalogue."""
    ids = [str(category.id) for category in catalog.categories if category.name == name]
    if ids:
        return f"{len(ids)} classes are called {name!r}; name one of them, " + " or ".join(
            f"'{name} ({number})'" for number in ids
        )
    near = difflib.get_close_matches(name, catalog.keys, n=1)
    listed = ", ".join(catalog.keys[:20]) + (", ..." if len(catalog) > 20 else "")
    return f"the model has no class {name!r}; " + (
        f"did you mean {near[0]!r}?" if near else f"its classes are {listed}"
    )


def told_apart(names: Sequence[str], ids: Sequence[int]) -> tuple[str, ...]:
    """Names that occur more than once get their id, which is unique, in brackets; all do where another name looks like that already."""
    counts = Counter(names)
    numbered = [f"{name} ({number})" for name, number in zip(names, ids, strict=True)]
    keys = [key if counts[name] > 1 else name for name, key in zip(names, numbered, strict=True)]
    return tuple(keys if len(set(keys)) == len(keys) else numbered)


@dataclass
class Target:
    """What is to be found in one image. N objects or segments; H x W is whatever size the image has at that point."""

    labels: Tensor
    """(N,) int64, contiguous ids."""
    masks: Tensor | None
    """(N, H, W) bool. Instance masks may overlap; panoptic segments do not. None where boxes alone are to be found."""
    boxes: Tensor
    """(N, 4). What losses see is float32 and tight around the mask, or clipped to the image where there are no masks. Truths have float64:
    the annotated box, which box metrics compare with, and a tight one only where none is annotated."""
    iscrowd: Tensor
    """(N,) bool. Crowd regions are never training targets; metrics ignore what falls into them."""
    areas: Tensor
    """(N,) float64, pixels at original size: the annotation's own ``area``, which decides COCO's small/medium/large."""
    semantic: Tensor | None = None
    """(H, W) uint8, contiguous ids and IGNORE; None where the annotations do not say the class of every pixel."""
    size: tuple[int, int] | None = None
    """(height, width) of the image without its padding, by which boxes are normalised. Readers and loaders set it."""

    def required_masks(self) -> Tensor:
        """For whoever cannot do without."""
        if self.masks is None:
            raise ValueError("the target has boxes alone; expected masks, which every mode but detection reads")
        return self.masks


@dataclass(frozen=True)
class ImageMeta:
    """Where an image came from and what preprocessing did to it; post-processing undoes the latter."""

    image_id: int
    file_name: str
    """Relative to the split's image folder, with forward slashes; unique within a split."""
    original_size: tuple[int, int]
    """(height, width) after EXIF orientation."""
    resized_size: tuple[int, int]
    """(height, width) of the image inside its padded batch."""


@dataclass
class Sample:
    """One image as read: not resized, EXIF orientation applied, gray and alpha turned into RGB."""

    image: Tensor
    """(3, H, W) uint8."""
    target: Target
    image_id: int
    file_name: str
    stamp: int = 0
    """Of the sizes and times of the files that it was read from: another one means that a file has changed."""


@dataclass
class Batch:
    images: Tensor
    """(B, 3, H, W) float32 in [0, 1]; padding holds the pixel mean."""
    padding: Tensor
    """(B, H, W) bool, True where padded."""
    metas: list[ImageMeta]
    targets: list[Target] | None
    """At the size of ``images`` (padded: masks False, semantic IGNORE); None at inference."""
    truths: list[Target] | None
    """At original size, crowd included, for metrics; None in training and at inference."""
    tasks: list[str] | None = None
    """What the network is asked for each image, of families that take a task: panoptic, instance or semantic."""
    stamps: list[int] | None = None
    """``Sample.stamp`` of each image; None where nobody asked."""


@dataclass
class Instances:
    """Sorted by descending score."""

    scores: Tensor
    """(N,) float32 in [0, 1]."""
    labels: Tensor
    """(N,) int64."""
    boxes: Tensor
    """(N, 4) float32, absolute pixels of the original image."""
    masks: Tensor | None
    """(N, H, W) bool at original size; None from pure detectors."""


@dataclass(frozen=True)
class Segment:
    id: int
    """Value in the panoptic map, from 1."""
    label: int
    score: float


@dataclass
class Panoptic:
    ids: Tensor
    """(H, W) int32; 0 is void."""
    segments: list[Segment]


@dataclass
class Predictions:
    """What post-processing yields for one image at its original size, whatever the model and the runtime.

    A panoptic model fills all three parts, the others the one of their mode.
    """

    meta: ImageMeta
    semantic: Tensor | None = None
    """(H, W) int64, a class for every pixel."""
    instances: Instances | None = None
    panoptic: Panoptic | None = None


def merge_parts(answers: Sequence[Predictions]) -> Predictions:
    """One image's predictions from the answers to several tasks, each of which fills another part."""
    first = answers[0]
    if len(answers) == 1:
        return first
    found = Predictions(first.meta)
    for answer in answers:
        found.semantic = answer.semantic if found.semantic is None else found.semantic
        found.instances = answer.instances if found.instances is None else found.instances
        found.panoptic = answer.panoptic if found.panoptic is None else found.panoptic
    return found
