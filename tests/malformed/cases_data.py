"""Annotations, masks, images, label maps and folders to infer on."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tests.malformed.project import (
    EXPERIMENT,
    FOLDER,
    PAIRS,
    SPLITS,
    Break,
    Case,
    cut,
    dangling,
    edit,
    fifo,
    folder,
    merged,
    picture,
    put,
    remove,
    text,
)

CHECK = "check demo --out check.json"
CHECK_OBJECTS = "check objects --out check.json"
CHECK_PAIRS = "check pairs --out check.json"
TRAIN = f"train {EXPERIMENT}"
TRAIN_OBJECTS = f"train {EXPERIMENT}-objects"
"""Not generated, so that no record of a maker tells of the change first."""
EVALUATE = f"evaluate {EXPERIMENT}"
INFER = f"infer {EXPERIMENT} --out out inference.images="

PANOPTIC = "data/demo/panoptic_train.json"
OBJECTS = "data/demo/instances_train.json"
LINES = "data/demo/train.jsonl"
LABELS = "data/demo/label_map.json"
IMAGE = "data/demo/images/train/train_00001.png"
TESTED = "data/demo/images/test/test_00001.png"
MASK = "data/demo/masks/train/train_00001.png"
SEGMENTS = "data/demo/panoptic/train/train_00001.png"
TESTED_SEGMENTS = "data/demo/panoptic/test/test_00001.png"


def line(number: int, value: Any) -> Break:
    """That line of the JSONL, counted from 1."""

    def apply(project: Path) -> None:
        path = project / LINES
        lines = path.read_text().splitlines()
        lines[number - 1] = value if isinstance(value, str) else json.dumps(value)
        path.write_text("\n".join(lines) + "\n")

    return apply


def bomb(name: str) -> Break:
    """A PNG of a few bytes that says it has 50 000 x 50 000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    size = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size)
    return text(name, head + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b""))


def _crowd(items: list[dict[str, Any]]) -> None:
    for item in items:
        item["iscrowd"] = 1


ANNOTATIONS = [
    Case("panoptic-cut-off", CHECK, PANOPTIC, ("not valid JSON", "cut off"), (cut(PANOPTIC),)),
    Case("panoptic-missing", CHECK, PANOPTIC, ("no such file",), (remove(PANOPTIC),)),
    Case("panoptic-empty-file", CHECK, PANOPTIC, ("not valid JSON",), (text(PANOPTIC, ""),)),
    Case("panoptic-folder", CHECK, PANOPTIC, ("is a folder",), (folder(PANOPTIC),)),
    Case("panoptic-nested-without-end", CHECK, PANOPTIC, ("nested too deeply",), (text(PANOPTIC, "[" * 200_000),)),
    Case("panoptic-number-without-end", CHECK, PANOPTIC, ("not valid JSON",), (text(PANOPTIC, "9" * 5000),)),
    Case("panoptic-not-a-mapping", CHECK, PANOPTIC, ("no list `images`",), (edit(PANOPTIC, lambda value: [value]),)),
    Case(
        "panoptic-without-images",
        CHECK,
        PANOPTIC,
        ("no list `images`", "expected a COCO file"),
        (edit(PANOPTIC, lambda value: value.pop("images") and None),),
    ),
    Case(
        "panoptic-repeated-image-id",
        CHECK,
        "dataset demo",
        ("train: image id 7 occurs 3 times", "expected once"),
        (
            edit(
                PANOPTIC,
                lambda value: {
                    **value,
                    "images": [{**image, "id": 7} for image in value["images"]],
                    "annotations": [{**value["annotations"][0], "image_id": 7}],
                },
            ),
        ),
    ),
    Case(
        "panoptic-image-id-of-text",
        CHECK,
        "dataset demo",
        ("images, entry 2 (train_00001.png): id is 'two'", "expected a whole number of 0 or more"),
        (edit(PANOPTIC, put("images.1.id", "two")),),
        lines=3,
    ),
    Case(
        "panoptic-image-of-no-height",
        CHECK,
        "dataset demo",
        ("images, entry 1 (train_00000.png)", "height is 0", "expected pixels above 0"),
        (edit(PANOPTIC, put("images.0.height", 0)),),
        lines=3,
    ),
    Case(
        "panoptic-segment-id-0",
        CHECK,
        "train_00001.png: a segment has id 0",
        ("above 0 (0 is void)",),
        (edit(PANOPTIC, put("annotations.1.segments_info.0.id", 0)),),
    ),
    Case(
        "panoptic-unknown-category",
        CHECK,
        "category_id 77 in 1 record(s)",
        ("not among the 7 classes", "add the class or correct"),
        (edit(PANOPTIC, put("annotations.1.segments_info.0.category_id", 77)),),
    ),
    Case(
        "panoptic-category-that-is-a-list",
        CHECK,
        ": category_id is [1]",
        ("expected a whole number of 0 or more",),
        (edit(PANOPTIC, put("annotations.1.segments_info.0.category_id", [1])),),
    ),
    Case(
        "panoptic-segments-of-text",
        CHECK,
        "train_00001.png: segments_info is 'none'",
        ("expected a list",),
        (edit(PANOPTIC, put("annotations.1.segments_info", "none")),),
    ),
    Case(
        "panoptic-annotation-without-image",
        CHECK,
        "dataset demo",
        ("1 annotation(s) belong to images that are not listed", "image_id 999"),
        (edit(PANOPTIC, put("annotations.1.image_id", 999)),),
    ),
    Case(
        "panoptic-hostile-image-name",
        CHECK,
        "dataset demo",
        ("images, entry 2: file_name is '../../../../etc/passwd'", "without '..'"),
        (edit(PANOPTIC, put("images.1.file_name", "../../../../etc/passwd")),),
        lines=3,
    ),
    Case(
        "panoptic-absolute-image-name",
        CHECK,
        "dataset demo",
        ("images, entry 2: file_name is '/etc/passwd'", "relative to its folder"),
        (edit(PANOPTIC, put("images.1.file_name", "/etc/passwd")),),
        lines=3,
    ),
    Case(
        "panoptic-hostile-png-name",
        CHECK,
        "train_00001.png: file_name of its annotation is '..\\\\evil.png'",
        ("relative to its folder",),
        (edit(PANOPTIC, put("annotations.1.file_name", "..\\evil.png")),),
    ),
    Case(
        "panoptic-holds-instances",
        CHECK,
        PANOPTIC,
        ("no `segments_info`", "Set dataset.type to coco"),
        (lambda project: (project / PANOPTIC).write_bytes((project / OBJECTS).read_bytes()),),
    ),
    Case(
        "panoptic-image-size-differs",
        CHECK,
        "train_00001.png: the image is 64x64",
        ("annotated as 64x32",),
        (edit(PANOPTIC, put("images.1.height", 32)),),
    ),
    Case(
        "val-swaps-two-names",
        CHECK,
        "dataset demo",
        (
            "val: category 1 is 'disc' in data/demo/label_map.json and 'square' in data/demo/panoptic_val.json",
            "val: category 2 is 'square' in data/demo/label_map.json and 'disc' in data/demo/panoptic_val.json",
            "names of one id must agree",
        ),
        (
            edit(
                "data/demo/panoptic_val.json",
                lambda value: put("categories.0.name", "square")(value) or put("categories.1.name", "disc")(value),
            ),
        ),
        lines=3,
    ),
    Case(
        "annotations-that-are-none",
        CHECK,
        "data/demo/panoptic_train.json: it lists no annotation",
        ("no image has an object",),
        (edit(PANOPTIC, put("annotations", [])),),
    ),
    Case(
        "annotations-that-are-none-in-training",
        TRAIN_OBJECTS,
        "data/demo/instances_train.json: nothing can be learned from it",
        ("it lists no annotation",),
        (edit(OBJECTS, put("annotations", [])),),
    ),
    Case(
        "annotations-that-are-none-in-val-of-a-training",
        TRAIN_OBJECTS,
        "data/demo/instances_val.json: nothing can be measured on it",
        ("it lists no annotation",),
        (edit("data/demo/instances_val.json", put("annotations", [])),),
    ),
    Case(
        "val-lists-an-id-twice",
        CHECK,
        "val: category 1 is 'disc' in data/demo/label_map.json and 'square' in data/demo/panoptic_val.json",
        ("names of one id must agree",),
        (
            edit(
                "data/demo/panoptic_val.json", lambda value: value["categories"].insert(0, {"id": 1, "name": "square"})
            ),
        ),
    ),
    Case(
        "annotations-that-are-crowd-alone",
        CHECK_OBJECTS,
        "data/demo/instances_train.json: all",
        ("annotations are crowd (iscrowd 1", "set iscrowd to 0"),
        (edit(OBJECTS, lambda value: _crowd(value["annotations"])),),
    ),
    Case(
        "annotations-that-are-crowd-alone-in-training",
        TRAIN_OBJECTS,
        "data/demo/instances_train.json: nothing can be learned from it",
        ("annotations are crowd (iscrowd 1",),
        (edit(OBJECTS, lambda value: _crowd(value["annotations"])),),
    ),
    Case("objects-missing", CHECK_OBJECTS, OBJECTS, ("no such file",), (remove(OBJECTS),)),
    Case("objects-whole-dataset-missing", CHECK_OBJECTS, LABELS, ("no such file",), (remove("data/demo"),)),
    Case(
        "objects-holds-panoptic",
        CHECK_OBJECTS,
        OBJECTS,
        ("`segments_info`", "dataset.type is coco"),
        (lambda project: (project / OBJECTS).write_bytes((project / PANOPTIC).read_bytes()),),
    ),
    *(
        Case(
            f"objects-id-{name}",
            CHECK_OBJECTS,
            f"train_00000.png, annotation {value!r}: id is {value!r}",
            ("expected a whole number of 0 or more",),
            (edit(OBJECTS, put("annotations.0.id", value)),),
        )
        for name, value in (("negative", -1), ("text", "1"), ("half", 1.5), ("bool", True), ("missing", None))
    ),
    *(
        Case(
            f"objects-iscrowd-{name}",
            CHECK_OBJECTS,
            f"train_00000.png, annotation 1: iscrowd is {value!r}, expected 0 or 1",
            (),
            (edit(OBJECTS, put("annotations.0.iscrowd", value)),),
        )
        for name, value in (("text-0", "0"), ("text-false", "false"), ("two", 2), ("list", []), ("nan", float("nan")))
    ),
    *(
        Case(
            f"objects-area-{name}",
            CHECK_OBJECTS,
            f"train_00000.png, annotation 1: area is {value!r}, expected a finite number above 0",
            (),
            (edit(OBJECTS, put("annotations.0.area", value)),),
        )
        for name, value in (("negative", -1), ("text", "12.5"), ("nan", float("nan")), ("infinite", float("inf")))
    ),
    Case(
        "panoptic-iscrowd-of-text",
        CHECK,
        "iscrowd is '0', expected 0 or 1",
        ("so in 3 records",),
        (
            edit(
                PANOPTIC,
                lambda value: [item["segments_info"][0].update(iscrowd="0") for item in value["annotations"]] and None,
            ),
        ),
    ),
    Case(
        "objects-image-name-of-half-a-pair",
        CHECK_OBJECTS,
        "dataset objects",
        ("images, entry 2: file_name is 'a\\ud800.png', which is no text in UTF-8",),
        (edit(OBJECTS, put("images.1.file_name", "a\ud800.png")),),
        lines=3,
    ),
    Case("panoptic-fifo", CHECK, PANOPTIC, ("a FIFO, expected a regular file",), (fifo(PANOPTIC),)),
    Case("panoptic-link-that-leads-nowhere", CHECK, PANOPTIC, ("a link to gone/elsewhere",), (dangling(PANOPTIC),)),
    Case("pairs-fifo", CHECK_PAIRS, LINES, ("a FIFO, expected a regular file",), (fifo(LINES),)),
    Case("train-with-a-fifo", TRAIN, PANOPTIC, ("a FIFO, expected a regular file",), (fifo(PANOPTIC),)),
    Case(
        "objects-repeated-id",
        CHECK_OBJECTS,
        "annotation id 2 occurs 2 times",
        ("expected once",),
        (edit(OBJECTS, put("annotations.0.id", 2)),),
    ),
    Case(
        "objects-category-that-is-a-list",
        CHECK_OBJECTS,
        ": category_id is [1]",
        ("expected a whole number of 0 or more",),
        (edit(OBJECTS, put("annotations.0.category_id", [1])),),
    ),
    Case(
        "objects-rle-of-another-size",
        CHECK_OBJECTS,
        "train_00000.png, annotation 1",
        ("[height, width] [32, 64]", "the image has [64, 64]"),
        (edit(OBJECTS, put("annotations.0.segmentation.size", [32, 64])),),
    ),
    Case(
        "objects-rle-cut-off",
        CHECK_OBJECTS,
        "train_00000.png, annotation 1",
        ("run lengths",),
        (edit(OBJECTS, lambda value: _cut_counts(value)),),
    ),
    Case(
        "objects-rle-of-plain-counts-that-is-short",
        CHECK_OBJECTS,
        "train_00000.png, annotation 1",
        ("cover 17 pixels, the image has 4096",),
        (edit(OBJECTS, put("annotations.0.segmentation.counts", [12, 5])),),
    ),
    Case(
        "objects-polygon-of-odd-length",
        CHECK_OBJECTS,
        "train_00000.png, annotation 1",
        ("a polygon is not a list of x, y pairs",),
        (edit(OBJECTS, put("annotations.0.segmentation", [[1, 2, 3, 4, 5, 6, 7]])),),
    ),
    Case(
        "objects-polygon-far-outside",
        CHECK_OBJECTS,
        "train_00000.png, annotation 1",
        ("a polygon", "the image is 64x64"),
        (edit(OBJECTS, put("annotations.0.segmentation", [[0, 0, 1e12, 0, 1e12, 1e12]])),),
    ),
    Case(
        "objects-mask-of-text",
        CHECK_OBJECTS,
        "train_00000.png, annotation 1",
        ("segmentation is str", "expected polygons or run lengths"),
        (edit(OBJECTS, put("annotations.0.segmentation", "mask")),),
    ),
    Case(
        "objects-box-of-two-numbers",
        CHECK_OBJECTS,
        "train_00000.png, annotation 1",
        ("bbox is [1, 2]", "expected [x, y, width, height]"),
        (edit(OBJECTS, put("annotations.0.bbox", [1, 2])),),
    ),
    Case("pairs-missing", CHECK_PAIRS, LINES, ("no such file", "`img` and `segm`"), (remove(LINES),)),
    Case("pairs-empty", CHECK_PAIRS, LINES, ("lists no usable image",), (text(LINES, ""),)),
    Case(
        "pairs-not-text",
        CHECK_PAIRS,
        LINES,
        ("not UTF-8 text (byte 0)", "expected JSONL"),
        (text(LINES, b"\x89PNG\xff\xfe"),),
    ),
    Case(
        "pairs-line-cut-off",
        CHECK_PAIRS,
        "train: line 2: is not JSON",
        ("expected {",),
        (line(2, '{"img": "images/tr'),),
    ),
    Case(
        "pairs-line-nested-without-end",
        CHECK_PAIRS,
        "train: line 2: is not JSON",
        ("nested",),
        (line(2, "[" * 200_000),),
    ),
    Case(
        "pairs-line-without-mask",
        CHECK_PAIRS,
        "train: line 2: expected an object with the keys `img` and `segm`",
        (),
        (line(2, {"img": "images/train/train_00001.png"}),),
    ),
    Case(
        "pairs-hostile-name",
        CHECK_PAIRS,
        "train: line 2: segm is '../../secret.png'",
        ("without '..'",),
        (line(2, {"img": "images/train/train_00001.png", "segm": "../../secret.png"}),),
    ),
    Case(
        "pairs-name-that-is-a-number",
        CHECK_PAIRS,
        "train: line 2: img is 7",
        ("expected a file name",),
        (line(2, {"img": 7, "segm": "masks/train/train_00001.png"}),),
    ),
    Case(
        "pairs-repeated-image",
        CHECK_PAIRS,
        "img 'images/train/train_00000.png' occurs 2 times",
        ("expected once",),
        (line(2, {"img": "images/train/train_00000.png", "segm": "masks/train/train_00000.png"}),),
    ),
    Case("train-with-annotations-cut-off", TRAIN, PANOPTIC, ("not valid JSON",), (cut(PANOPTIC),)),
    Case(
        "train-with-unknown-category",
        TRAIN,
        PANOPTIC,
        ("category_id 77",),
        (edit(PANOPTIC, put("annotations.1.segments_info.0.category_id", 77)),),
    ),
    Case(
        "train-with-fewer-images-than-a-step-takes",
        f"{TRAIN} --out out dataset.train.batch_size=64",
        "dataset.train",
        ("3 image(s)", "lower dataset.train.batch_size"),
    ),
    Case(
        "train-with-a-class-of-nobody",
        f"{TRAIN} evaluate.classes=[disc,trapeze]",
        "override: evaluate.classes",
        ("the model has no class 'trapeze'",),
    ),
    Case(
        "train-with-a-colour-of-nobody",
        f"{TRAIN} inference.color_map.circel=[1,2,3]",
        "override: inference.color_map",
        ("the model has no class 'circel'; its classes are disc, square",),
    ),
    Case("train-without-data", TRAIN, LABELS, ("no such file",), (remove("data"),)),
    Case(
        "train-with-validation-annotations-cut-off",
        TRAIN,
        "data/demo/panoptic_val.json",
        ("not valid JSON",),
        (cut("data/demo/panoptic_val.json"),),
    ),
]


def _cut_counts(value: Any) -> None:
    counts = value["annotations"][0]["segmentation"]["counts"]
    value["annotations"][0]["segmentation"]["counts"] = counts[: len(counts) // 2]


def _turned(project: Path) -> None:
    """Every panoptic PNG of the train split under the name of the next."""
    folder = project / "data/demo/panoptic/train"
    paths = sorted(folder.iterdir())
    contents = [path.read_bytes() for path in paths]
    for place, path in enumerate(paths):
        path.write_bytes(contents[place - 1])


def _as_jpeg(name: str) -> Break:
    def apply(project: Path) -> None:
        with Image.open(project / name) as image:
            image.load()
        image.save(project / name, "JPEG")

    return apply


MASKS = [
    Case("mask-missing", CHECK_PAIRS, MASK, ("no such file", "expected an image"), (remove(MASK),)),
    Case("mask-cut-off", CHECK_PAIRS, MASK, ("cannot be decoded", "cut off"), (cut(MASK, 0.7),)),
    Case(
        "mask-of-another-size",
        CHECK_PAIRS,
        MASK,
        ("the mask is 48x64", "is 64x64"),
        (picture(MASK, np.ones((64, 48), np.uint8)),),
    ),
    Case(
        "mask-of-colours",
        CHECK_PAIRS,
        MASK,
        ("pixel format RGB", "expected one channel"),
        (picture(MASK, np.ones((64, 64, 3), np.uint8)),),
    ),
    Case(
        "mask-of-fractions",
        CHECK_PAIRS,
        MASK,
        ("pixel format F", "expected one channel"),
        (picture(MASK, np.ones((64, 64), np.float32), "TIFF"),),
    ),
    Case(
        "mask-of-negative-numbers",
        CHECK_PAIRS,
        MASK,
        ("values -1..-1", "expected class ids 0..65535"),
        (picture(MASK, np.full((64, 64), -1, np.int32), "TIFF"),),
    ),
    Case(
        "mask-of-unknown-ids",
        CHECK_PAIRS,
        MASK,
        ("value(s) 99 (4096 pixels)", "add the class or set dataset.ignore_id"),
        (picture(MASK, np.full((64, 64), 99, np.uint8)),),
    ),
    Case("mask-is-a-folder", CHECK_PAIRS, MASK, ("is not a readable image",), (folder(MASK),)),
    Case("mask-fifo", CHECK_PAIRS, MASK, ("a FIFO, expected a regular file",), (fifo(MASK),)),
    Case("segments-fifo", CHECK, SEGMENTS, ("a FIFO, expected a regular file",), (fifo(SEGMENTS),)),
    Case("segments-missing", CHECK, SEGMENTS, ("no such file",), (remove(SEGMENTS),)),
    Case("segments-cut-off", CHECK, SEGMENTS, ("cannot be decoded",), (cut(SEGMENTS, 0.7),)),
    Case(
        "segments-of-another-size",
        CHECK,
        SEGMENTS,
        ("is 64x32", "its image train_00001.png is 64x64"),
        (picture(SEGMENTS, np.zeros((32, 64, 3), np.uint8)),),
    ),
    Case(
        "segments-in-gray",
        CHECK,
        SEGMENTS,
        ("pixel format L", "expected RGB"),
        (picture(SEGMENTS, np.zeros((64, 64), np.uint8)),),
    ),
    Case(
        "segments-black",
        CHECK,
        "data/demo/panoptic_train.json: of the",
        ("do not meet in id and area",),
        tuple(
            picture(f"data/demo/panoptic/train/train_0000{place}.png", np.zeros((64, 64, 3), np.uint8))
            for place in range(3)
        ),
    ),
    Case(
        "segments-of-other-images",
        CHECK,
        "data/demo/panoptic_train.json: of the",
        ("do not meet in id and area", "those of other images"),
        (_turned,),
    ),
    Case("segments-saved-as-jpeg", CHECK, SEGMENTS, ("is a JPEG", "expected PNG"), (_as_jpeg(SEGMENTS),)),
    Case(
        "segments-saved-as-jpeg-in-evaluation", EVALUATE, "test_00001.png", ("is a JPEG",), (_as_jpeg(TESTED_SEGMENTS),)
    ),
    Case("mask-saved-as-jpeg", CHECK_PAIRS, MASK, ("is a JPEG", "expected PNG"), (_as_jpeg(MASK),)),
    Case(
        "masks-void",
        CHECK_PAIRS,
        "data/demo/train.jsonl: none of its 3 images has a pixel that is not ignored",
        (),
        tuple(
            picture(f"data/demo/masks/train/train_0000{place}.png", np.zeros((64, 64), np.uint8)) for place in range(3)
        ),
    ),
    Case(
        "segments-cut-off-in-evaluation",
        EVALUATE,
        "data/demo/panoptic/test/test_00001.png",
        ("cannot be decoded",),
        (cut("data/demo/panoptic/test/test_00001.png", 0.7),),
    ),
]

IMAGES = [
    Case("image-missing", CHECK, IMAGE, ("no such file",), (remove(IMAGE),)),
    Case("image-cut-off", CHECK, IMAGE, ("cannot be decoded", "cut off"), (cut(IMAGE, 0.7),)),
    Case("image-of-text", CHECK, IMAGE, ("is not a readable image",), (text(IMAGE, "a picture of a cat\n"),)),
    Case("image-of-no-bytes", CHECK, IMAGE, ("is not a readable image",), (text(IMAGE, ""),)),
    Case("image-is-a-folder", CHECK, IMAGE, ("is not a readable image",), (folder(IMAGE),)),
    Case("image-of-billions-of-pixels", CHECK, IMAGE, ("has 2500000000 pixels", "dataset.max_pixels"), (bomb(IMAGE),)),
    Case(
        "image-of-fractions",
        CHECK,
        IMAGE,
        ("floating-point pixels", "set dataset.value_range"),
        (picture(IMAGE, np.ones((64, 64), np.float32), "TIFF"),),
    ),
    Case("image-fifo", CHECK, IMAGE, ("a FIFO, expected a regular file",), (fifo(IMAGE),)),
    Case("image-link-that-leads-nowhere", CHECK, IMAGE, ("a link to gone/elsewhere",), (dangling(IMAGE),)),
    Case("image-fifo-in-evaluation", EVALUATE, TESTED, ("a FIFO, expected a regular file",), (fifo(TESTED),)),
    Case("image-missing-in-evaluation", EVALUATE, TESTED, ("no such file",), (remove(TESTED),)),
    Case("image-cut-off-in-evaluation", EVALUATE, TESTED, ("cannot be decoded",), (cut(TESTED, 0.7),)),
    Case(
        "image-cut-off-in-a-loader-process",
        f"{EVALUATE} --out out.json dataset.test.num_workers=1",
        TESTED,
        ("cannot be decoded",),
        (cut(TESTED, 0.7),),
    ),
    Case(
        "image-cut-off-in-parity",
        f"parity {EXPERIMENT} --out out.json dataset.test.num_workers=1",
        TESTED,
        ("cannot be decoded",),
        (cut(TESTED, 0.7),),
    ),
    Case("image-of-the-split-cut-off-in-inference", f"infer {EXPERIMENT}", TESTED, ("cut off",), (cut(TESTED, 0.7),)),
]

LABEL_MAPS = [
    Case("labels-missing", CHECK, LABELS, ("no such file",), (remove(LABELS),)),
    Case("labels-fifo", CHECK, LABELS, ("a FIFO, expected a regular file",), (fifo(LABELS),)),
    Case("labels-cut-off", TRAIN, LABELS, ("not valid JSON",), (cut(LABELS),)),
    Case(
        "labels-not-a-list",
        CHECK,
        LABELS,
        ("expected a non-empty list of classes", "found dict"),
        (text(LABELS, "{}"),),
    ),
    Case("labels-empty", TRAIN, LABELS, ("found an empty list",), (text(LABELS, "[]"),)),
    Case(
        "labels-repeated-id",
        CHECK,
        LABELS,
        ("entry 2: id 1 is that of entry 1 already",),
        (edit(LABELS, put("1.id", 1)),),
    ),
    Case(
        "labels-name-of-half-a-pair",
        CHECK,
        LABELS,
        ("entry 1: name is 'a\\ud800', expected text",),
        (edit(LABELS, put("0.name", "a\ud800")),),
    ),
    Case("labels-negative-id", CHECK, LABELS, ("entry 1: id is -1", "0 or more"), (edit(LABELS, put("0.id", -1)),)),
    Case(
        "labels-id-0-that-is-ignored",
        CHECK_PAIRS,
        LABELS,
        ("the class 'disc' has the id 0", "set dataset.ignore_id: null"),
        (edit(LABELS, put("0.id", 0)),),
    ),
    Case(
        "labels-of-one-class",
        CHECK_PAIRS,
        "dataset pairs: 'disc' is its only class",
        ("Expected at least two classes", "ignore_id: null"),
        (edit(LABELS, lambda value: value[:1]),),
    ),
    Case(
        "labels-of-one-class-in-training",
        f"{TRAIN} model.mode=semantic --out out",
        "dataset demo: 'disc' is its only class",
        ("Expected at least two classes",),
        (edit(LABELS, lambda value: value[:1]),),
    ),
    Case(
        "labels-that-name-an-id-otherwise",
        CHECK_OBJECTS,
        "dataset objects",
        (
            "train: category 1 is 'something' in data/demo/label_map.json and 'disc' in data/demo/instances_train.json",
            "val: category 1 is",
            "correct the one that is wrong",
        ),
        (edit(LABELS, put("0.name", "something")),),
        lines=4,
    ),
    Case(
        "labels-colour-out-of-range",
        CHECK,
        LABELS,
        ("entry 1: color is [300, 0, 0]", "each 0..255"),
        (edit(LABELS, put("0.color", [300, 0, 0])),),
    ),
    Case(
        "labels-without-name",
        CHECK,
        LABELS,
        ("entry 3: name is None", "expected text"),
        (edit(LABELS, lambda value: value[2].pop("name") and None),),
    ),
    Case(
        "labels-isthing-of-text",
        CHECK,
        LABELS,
        ("entry 1: isthing is 'yes'", "0 (stuff) or 1 (thing)"),
        (edit(LABELS, put("0.isthing", "yes")),),
    ),
    Case(
        "labels-other-number-of-classes",
        CHECK_PAIRS,
        LABELS,
        ("names 7 classes, but dataset.num_classes is 5", "Set num_classes to 7"),
        (
            text(
                "config/datasets/pairs.yaml",
                yaml.safe_dump(merged(PAIRS, {"dataset": {"num_classes": 5}})),
            ),
        ),
    ),
]


def boxes(change: Any = None) -> tuple[Break, ...]:
    """The COCO files without their masks, which leaves mode detection; then a change of the train file."""

    def strip(value: Any) -> None:
        for item in value["annotations"]:
            item["segmentation"] = []

    stripped = tuple(edit(f"data/demo/instances_{split}.json", strip) for split in SPLITS)
    return stripped if change is None else (*stripped, edit(OBJECTS, change))


def several(*names: str, **keys: Any) -> tuple[Break, ...]:
    """These files and patterns as train annotations."""
    split = {"annotations": list(names), "images": "demo/images/train"}
    value = {"dataset": {"type": "coco", "label_map": "demo/label_map.json", "train": split, **keys}}
    return (text("config/datasets/objects.yaml", yaml.safe_dump(value)),)


def copied(name: str, change: Any = None) -> tuple[Break, ...]:
    """A second annotation file beside the first, changed."""

    def apply(project: Path) -> None:
        value = json.loads((project / OBJECTS).read_text())
        if change is not None:
            change(value)
        (project / name).write_text(json.dumps(value))

    return (apply,)


DETECTION = [
    Case(
        "box-of-three-numbers",
        CHECK_OBJECTS,
        "train: train_00000.png, annotation 1: bbox is [1, 2, 3]",
        ("expected [x, y, width, height]",),
        boxes(put("annotations.0.bbox", [1, 2, 3])),
    ),
    Case(
        "box-that-is-not-a-number",
        CHECK_OBJECTS,
        "annotation 1: bbox is [1, 2, nan, 3]",
        ("expected [x, y, width, height]",),
        boxes(put("annotations.0.bbox", [1, 2, float("nan"), 3])),
    ),
    Case(
        "box-of-negative-size",
        CHECK_OBJECTS,
        "annotation 1: bbox is [30, 40, -10, 5]",
        ("width and height are 0 or more", "not two corners"),
        boxes(put("annotations.0.bbox", [30, 40, -10, 5])),
    ),
    Case(
        "box-missing",
        CHECK_OBJECTS,
        "annotation 1: bbox is None",
        ("expected [x, y, width, height]",),
        boxes(put("annotations.0.bbox", None)),
    ),
    Case(
        "box-of-an-unknown-class",
        CHECK_OBJECTS,
        "train: category_id 77 in 1 record(s)",
        ("add the class",),
        boxes(put("annotations.0.category_id", 77)),
    ),
    Case(
        "files-with-the-same-image",
        CHECK_OBJECTS,
        "train: image file name 'train_00000.png' occurs 2 times",
        ("expected once",),
        (
            *copied(
                "data/demo/instances_more.json", lambda value: value.update(images=value["images"][:1], annotations=[])
            ),
            *several("demo/instances_train.json", "demo/instances_more.json"),
        ),
    ),
    Case(
        "files-whose-categories-disagree",
        CHECK_OBJECTS,
        "data/demo/instances_more.json: category 1 is 'disc' in data/demo/label_map.json",
        ("and 'something' in data/demo/instances_more.json", "must agree"),
        (
            *copied(
                "data/demo/instances_more.json",
                lambda value: (put("categories.0.name", "something")(value), value.update(images=[], annotations=[])),
            ),
            *several("demo/instances_train.json", "demo/instances_more.json"),
        ),
    ),
    Case(
        "files-named-twice",
        CHECK_OBJECTS,
        "dataset.train.annotations leads to demo/instances_train.json 2 times",
        ("expected once",),
        several("demo/instances_train.json", "demo/instances_tr*.json"),
    ),
    Case(
        "files-of-a-pattern-that-matches-nothing",
        CHECK_OBJECTS,
        "data/shards/*.json: no file matches this pattern",
        ("dataset.train.annotations",),
        several("shards/*.json"),
    ),
    Case(
        "files-outside-the-data-root",
        CHECK_OBJECTS,
        "train.annotations: expected a path inside the data root",
        ("'../*.json'",),
        several("../*.json"),
    ),
    Case(
        "class-map-with-an-empty-line",
        CHECK_OBJECTS,
        "data/demo/classes.txt: line 2 is empty",
        ("the number of the line is the id",),
        (
            text("data/demo/classes.txt", "disk\n\nsquare\n"),
            *several("demo/instances_train.json", label_map="demo/classes.txt"),
        ),
    ),
]

FOLDERS = [
    Case("inference-folder-missing", f"{INFER}photos", "data/photos", ("no such file or folder",)),
    Case(
        "inference-folder-empty", f"{INFER}photos", "data/photos", ("holds no image", "png"), (folder("data/photos"),)
    ),
    Case(
        "inference-folder-of-text",
        f"{INFER}photos",
        "data/photos",
        ("holds no image",),
        (text("data/photos/readme.txt", "nothing here"),),
    ),
    Case(
        "inference-file-of-text",
        f"{INFER}readme.txt",
        "data/readme.txt",
        ("is not a readable image",),
        (text("data/readme.txt", "nothing here"),),
    ),
    Case(
        "inference-second-image-cut-off",
        f"{INFER}demo/images/test --runtime onnx",
        TESTED,
        ("cannot be decoded",),
        (cut(TESTED, 0.7),),
    ),
    Case(
        "inference-over-an-older-result",
        f"{INFER}demo/images/test",
        TESTED,
        ("cannot be decoded",),
        (text(f"{FOLDER}/inference/index.json", "{}"), cut(TESTED, 0.7)),
    ),
]

CASES = [*ANNOTATIONS, *MASKS, *IMAGES, *LABEL_MAPS, *DETECTION, *FOLDERS]
