"""The part that COCO instance and COCO panoptic files have in common: images, categories and the join by image id."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from tessera.data.reader import Findings, relative_name, report_repeated
from tessera.files import UserError, read_json


@dataclass(frozen=True)
class CocoIndex:
    images: list[dict[str, Any]]
    """``id``, ``file_name`` (normalised), ``height`` and ``width`` (None where absent), by ascending id."""
    annotations: dict[int, list[dict[str, Any]]]
    """Image id -> its annotations in the order of the file."""


def read_coco(path: Path, segments: bool) -> dict[str, Any]:
    """The content of a COCO file whose annotations do (panoptic) or do not (instance) have ``segments_info``.

    Raises UserError where the file is of the other kind, or no COCO file.
    """
    content = read_json(path)
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(
                f"{path}: has no list `{key}`; expected a COCO file (is dataset.type right? JSONL of image and mask is mask_pairs)"
            )
    annotations = content["annotations"]
    if annotations and isinstance(annotations[0], dict) and ("segments_info" in annotations[0]) != segments:
        if segments:
            raise UserError(
                f"{path}: holds COCO instance annotations (no `segments_info`), but dataset.type is coco_panoptic. "
                "Set dataset.type to coco and model.mode to instance or detection, or give the panoptic JSON."
            )
        raise UserError(
            f"{path}: holds COCO panoptic annotations (`segments_info`), but dataset.type is coco. "
            "Set dataset.type to coco_panoptic and the split's `panoptic` folder, or give the instance JSON."
        )
    return dict(content)


def category_names(content: dict[str, Any]) -> dict[int, str]:
    """Dataset id -> name as the file lists them; entries without both are left out, since a label map may say more."""
    listed = content.get("categories")
    entries = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    return {item["id"]: str(item["name"]) for item in entries if is_whole(item.get("id")) and "name" in item}


def index_coco(content: dict[str, Any], findings: Findings) -> CocoIndex:
    """Joins annotations to images. Faulty images and annotations without an image are errors and left out."""
    images = []
    for number, image in enumerate(content["images"], 1):
        parsed = _image(image, f"images, entry {number}", findings)
        if parsed is not None:
            images.append(parsed)
    report_repeated((image["id"] for image in images), "image id", findings)
    report_repeated((image["file_name"] for image in images), "image file name", findings)
    images.sort(key=lambda image: image["id"])

    known = {image["id"] for image in images}
    annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
    orphans: Counter[Any] = Counter()
    for number, annotation in enumerate(content["annotations"], 1):
        if not isinstance(annotation, dict):
            findings.errors.append(f"annotations, entry {number}: is {type(annotation).__name__}, expected an object")
        elif is_whole(annotation.get("image_id")) and annotation["image_id"] in known:
            annotations[annotation["image_id"]].append(annotation)
        else:
            orphans[str(annotation.get("image_id"))] += 1
    if orphans:
        findings.errors.append(
            f"{sum(orphans.values())} annotation(s) belong to images that are not listed (image_id {_some(orphans)})"
        )
    return CocoIndex(images, dict(annotations))


def report_unknown_categories(found: Counter[Any], known: Collection[int], findings: Findings) -> None:
    """``found``: category id -> how many records have it. Ids outside the classes are one error each, with the count."""
    for category, count in sorted(found.items(), key=lambda item: str(item[0])):
        if not is_whole(category) or category < 1:
            findings.errors.append(f"category_id {category!r} in {count} record(s), expected a whole number above 0")
        elif category not in known:
            findings.errors.append(
                f"category_id {category} in {count} record(s) is not among the {len(known)} classes "
                "(label map, or the categories of the train annotations); add the class or correct the annotations"
            )


def is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def hashable_id(value: Any) -> Any:
    """The id itself where it is a number or text, else its representation, so that broken ids can be counted."""
    return value if value is None or isinstance(value, (int, float, str)) else repr(value)


def _image(image: Any, where: str, findings: Findings) -> dict[str, Any] | None:
    if not isinstance(image, dict):
        findings.errors.append(f"{where}: is {type(image).__name__}, expected an object")
        return None
    identity = image.get("id")
    if not is_whole(identity) or identity < 0:
        findings.errors.append(f"{where}: id is {identity!r}, expected a whole number")
        return None
    name = relative_name(image.get("file_name"), findings, f"{where}: file_name")
    if name is None:
        return None
    sides = []
    for key in ("height", "width"):
        value = image.get(key)
        if value is not None and (not is_whole(value) or value < 1):
            findings.errors.append(f"{where} ({name}): {key} is {value!r}, expected pixels above 0")
            return None
        sides.append(value)
    height, width = sides if None not in sides else (None, None)
    return {"id": identity, "file_name": name, "height": height, "width": width}


def _some(counted: Counter[Any]) -> str:
    shown = ", ".join(list(counted)[:5])
    return shown + (", ..." if len(counted) > 5 else "")
