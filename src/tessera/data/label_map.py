"""Label maps: the classes of a dataset as a user writes them down, in JSON or one name a line. Needs no torch."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tessera.files import UserError, is_text, raise_all, read_json, read_text, reading
from tessera.structures import Category, ClassCatalog


def read_label_map(path: Path, contiguous: bool = True, num_classes: int | None = None) -> ClassCatalog:
    """A JSON list of ``id`` (0 or more, each once), ``name``, ``color`` (optional), ``isthing`` (optional, 1), validated; all faults in one
    UserError. Of a ``.txt`` file each line is a name, and its number the id. Classes may share a name (``ClassCatalog.keys``).

    ``contiguous``: the classes are the entries in order. Otherwise they are the ids 1..``num_classes``, and ids that the map does
    not name become ``unused_<id>``.
    """
    value = _class_map(path) if path.suffix == ".txt" else read_json(path)
    return parse_label_map(value, path, contiguous, num_classes)


def _class_map(path: Path) -> list[dict[str, Any]]:
    with reading(path, "a class map with one name a line"):
        lines = read_text(path).splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UserError(
                f"{path}: line {number} is empty; expected a class name on every line, because the number of the line is the id"
            )
    return [{"id": number, "name": line.strip()} for number, line in enumerate(lines, 1)]


def parse_label_map(value: Any, path: Path, contiguous: bool = True, num_classes: int | None = None) -> ClassCatalog:
    """``read_label_map`` on content; ``path`` serves the messages."""
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise UserError(f"{path}: expected a non-empty list of classes (id, name, color, isthing), found {found}")
    faults: list[str] = []
    entries = [_entry(item, number, faults) for number, item in enumerate(value, 1)]
    first: dict[int, int] = {}
    for number, entry in enumerate(entries, 1):
        if entry["id"] is not None and first.setdefault(entry["id"], number) != number:
            faults.append(f"entry {number}: id {entry['id']} is that of entry {first[entry['id']]} already")
    raise_all(str(path), faults)
    colors = _palette([entry["color"] for entry in entries])
    categories = [
        Category(entry["id"], entry["name"], color, entry["isthing"])
        for entry, color in zip(entries, colors, strict=True)
    ]
    if contiguous:
        if num_classes is not None and num_classes != len(categories):
            raise UserError(
                f"{path}: names {len(categories)} classes, but dataset.num_classes is {num_classes}. "
                f"Set num_classes to {len(categories)} or leave it out; background and no-object are not counted."
            )
        return ClassCatalog(tuple(categories))
    return _pad(categories, path, num_classes)


def _entry(item: Any, number: int, faults: list[str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": None, "name": None, "color": None, "isthing": True}
    if not isinstance(item, dict):
        faults.append(f"entry {number}: is {type(item).__name__}, expected an object with id and name")
        return entry
    found = item.get("id")
    if isinstance(found, int) and not isinstance(found, bool) and found >= 0:
        entry["id"] = found
    else:
        faults.append(f"entry {number}: id is {found!r}, expected a whole number of 0 or more")
    found = item.get("name")
    if isinstance(found, str) and found.strip() and is_text(found):
        entry["name"] = found
    else:
        faults.append(f"entry {number}: name is {found!r}, expected text")
    found = item.get("color")
    if found is not None:
        if isinstance(found, list) and len(found) == 3 and all(_is_byte(channel) for channel in found):
            entry["color"] = tuple(found)
        else:
            faults.append(f"entry {number}: color is {found!r}, expected [red, green, blue], each 0..255")
    found = item.get("isthing", 1)
    if found in (0, 1):
        entry["isthing"] = bool(found)
    else:
        faults.append(f"entry {number}: isthing is {found!r}, expected 0 (stuff) or 1 (thing)")
    return entry


def _is_byte(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def _pad(categories: Sequence[Category], path: Path, num_classes: int | None) -> ClassCatalog:
    if num_classes is None:
        raise UserError(f"{path}: dataset.contiguous_id is false, so dataset.num_classes must be set (the largest id)")
    if any(category.id == 0 for category in categories):
        raise UserError(
            f"{path}: has a class with id 0, but with contiguous_id false the classes are the ids 1..num_classes; set contiguous_id to true"
        )
    largest = max(category.id for category in categories)
    if largest > num_classes:
        raise UserError(
            f"{path}: the largest id is {largest}, but dataset.num_classes is {num_classes}. With contiguous_id false the classes "
            f"are the ids 1..num_classes: set num_classes to at least {largest}, or contiguous_id to true."
        )
    named = {category.id: category for category in categories}
    taken = {category.name for category in categories}
    clash = sorted(taken & {unused(number) for number in range(1, num_classes + 1) if number not in named})
    if clash:
        raise UserError(f"{path}: the name {clash[0]!r} is reserved for ids without an entry; choose another")
    colors = _palette([named[number].color if number in named else None for number in range(1, num_classes + 1)])
    return ClassCatalog(
        tuple(
            named.get(number, Category(number, unused(number), colors[number - 1], True))
            for number in range(1, num_classes + 1)
        )
    )


def unused(number: int) -> str:
    """Name of an id that the label map leaves out, with ``contiguous_id`` false."""
    return f"unused_{number}"


def fold_name(name: str) -> str:
    """Names are the same where only case or white space differs."""
    return " ".join(name.split()).casefold()


def _palette(given: Sequence[tuple[int, int, int] | None]) -> list[tuple[int, int, int]]:
    """Given colours stay; the others get distinct ones that depend on their place alone: hues a golden angle apart."""
    taken = {color for color in given if color is not None}
    colors = []
    step = 0
    for color in given:
        while color is None:
            value = 0.95 - 0.15 * (step // 12 % 4)
            red, green, blue = colorsys.hsv_to_rgb(step * 0.618033988749895 % 1, 0.75, value)
            candidate = (round(red * 255), round(green * 255), round(blue * 255))
            step += 1
            if candidate not in taken:
                color = candidate
                taken.add(candidate)
        colors.append(color)
    return colors
