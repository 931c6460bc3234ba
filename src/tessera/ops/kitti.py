"""How classes and boxes are written in KITTI label files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tessera.files import UserError
from tessera.structures import ClassCatalog


def kitti_names(catalog: ClassCatalog) -> tuple[str, ...]:
    """The catalogue's keys. KITTI's columns are separated by spaces, so white space becomes ``_``. Raises UserError where two classes become
    one by that."""
    names = tuple("_".join(key.split()) for key in catalog.keys)
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(
                f"{count} classes would be called {name!r} in KITTI label files, where '_' stands for white space; rename one in the label map"
            )
    return names


def kitti_row(name: str, corners: Sequence[str], score: str = "") -> str:
    """A line: type, truncated, occluded, alpha, box (left, top, right, bottom), seven 3-D columns that are zero, and the score if any."""
    return f"{name} 0.00 0 0.00 {' '.join(corners)}{' 0.00' * 7}{' ' * bool(score)}{score}\n"
