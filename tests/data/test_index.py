"""The index of a COCO file says what the file says, is made once, and is shared."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import pickle
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tessera.data import coco_file, coco_index
from tessera.data.catalog import load_catalog
from tessera.data.coco import parse_segmentation
from tessera.data.coco_index import FOLDER, open_index
from tessera.data.columns import Texts
from tessera.data.datasets import open_dataset
from tessera.data.joined import JoinedDataset
from tessera.data.reader import Findings, SegmentationDataset, box_target
from tessera.files import UserError, read_json
from tessera.ops.rle import encode_masks
from tessera.spec.schema import DatasetSpec, SplitSpec
from tessera.structures import Target
from tests.data.files import LABEL_MAP, opened, photo, save, write, write_coco

SIZE = (10, 16)
LABELS = {7: 0, 90: 1}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path / "index"))
    return tmp_path / "index"


def indices(folder: Path) -> list[str]:
    """All files but the locks."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("lock"))


def any_number(dice: random.Random) -> float:
    return dice.choice([dice.randint(0, 9), dice.uniform(0, 9), dice.randint(0, 9) / 10, 1e-300, 2**40 + 1])


def segmentation(dice: random.Random) -> Any:
    mask = np.zeros(SIZE, bool)
    mask[dice.randint(0, 4) : 6, 3 : dice.randint(4, 16)] = True
    x, y = dice.randint(0, 8), dice.uniform(0, 4)
    polygon = [x, y, x + 6, y, x + 6.25, y + 5, x, y + 5]
    (rle,) = encode_masks(mask[None])
    return dice.choice(
        [[polygon], [polygon, [0, 0, 3, 0, 3, 3]], rle, [], None, {"size": [10, 16], "counts": [150, 10]}]
    )


def annotation(number: int, images: int, dice: random.Random) -> dict[str, Any]:
    item = {
        "id": dice.choice([number, number + 2**40]),
        "image_id": dice.randint(1, images),
        "category_id": dice.choice([2, 7, 90]),
        "bbox": [any_number(dice) for _ in range(4)],
        "area": dice.choice([any_number(dice), None, 0, 0.0]),
        "iscrowd": dice.choice([0, 1, 0.0, None, True]),
        "segmentation": segmentation(dice),
        "note": {"é": ["\u20ac", {}]},
    }
    for key in ("area", "iscrowd"):
        if dice.random() < 0.2:
            del item[key]
    return item


def plain_targets(path: Path, mode: str) -> list[Target]:
    """What a reader makes of the file that loads it whole and keeps lists of dictionaries."""
    content = json.loads(path.read_text())
    by_image = defaultdict(list)
    for item in content["annotations"]:
        if item["category_id"] in LABELS:
            by_image[item["image_id"]].append({"iscrowd": None, **item, "area": item.get("area") or None})
    targets = []
    for image in sorted(content["images"], key=lambda image: image["id"]):
        items = by_image[image["id"]]
        if mode == "detection":
            targets.append(box_target(items, LABELS, SIZE, Findings()))
            continue
        pairs = [(item, parse_segmentation(item["segmentation"], SIZE, "", Findings())) for item in items]
        kept = [(item, mask) for item, mask in pairs if mask is not None]
        masks = torch.from_numpy(np.stack([np.zeros(SIZE, bool), *(mask for _, mask in kept)]))[1:]
        corners = [[x, y, x + width, y + height] for x, y, width, height in (item["bbox"] for item, _ in kept)]
        areas = [float(item["area"] or mask.sum()) for item, mask in kept]
        targets.append(
            Target(
                labels=torch.tensor([LABELS[item["category_id"]] for item, _ in kept], dtype=torch.int64),
                masks=masks,
                boxes=torch.tensor(corners, dtype=torch.float64) if kept else torch.zeros(0, 4),
                iscrowd=torch.tensor([bool(item["iscrowd"]) for item, _ in kept], dtype=torch.bool),
                areas=torch.tensor(areas, dtype=torch.float64),
            )
        )
    return targets


def bits(target: Target) -> list[Any]:
    parts = (target.labels, target.masks, target.boxes, target.iscrowd, target.areas)
    return [None if part is None else (part.dtype, tuple(part.shape), part.numpy().tobytes()) for part in parts]


@pytest.mark.parametrize("mode", ["instance", "detection"])
@pytest.mark.parametrize("order", [("images", "annotations"), ("annotations", "info", "images")])
def test_every_bit_is_that_of_a_plain_reading(
    mode: Any, order: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coco_file, "_PIECE", 701)
    dice = random.Random(f"{mode} {order}")
    images = list(range(1, 13))
    dice.shuffle(images)
    content = {
        "images": [{"id": n, "file_name": f"ü/{n}.png", "height": 10, "width": 16} for n in images],
        "annotations": [annotation(number, 12, dice) for number in range(1, 121)],
        "info": {"annotations": [1], "text": '"}],'},
    }
    write(tmp_path / "a.json", {key: content[key] for key in order})
    for number in images:
        save(tmp_path / f"images/ü/{number}.png", photo(*SIZE))
    write(tmp_path / "map.json", LABEL_MAP)
    split = SplitSpec(images="images", annotations="a.json")
    reader = opened(DatasetSpec(name="tiny", type="coco", label_map="map.json", train=split), tmp_path, mode)
    assert list(reader.file_names) == [f"ü/{number}.png" for number in range(1, 13)]
    found = [bits(reader.read(index).target) for index in range(len(reader))]
    assert found == [bits(target) for target in plain_targets(tmp_path / "a.json", mode)]
    assert found == [bits(pickle.loads(pickle.dumps(reader)).read(index).target) for index in range(len(reader))]


TEXT = """{"images": [{"id": 1, "file_name": "a.png", "é\\u20ac\\ud83d\\ude00": [true, null, 1e999]}],
 "empty": {}, "annotations":[ ], "version": 1.5, "size":-20.25E+1 , "other"\t: [[1, {"x": false}], {}],
 "categories": "}"
} """
HALF, NAN = TEXT.replace("a.png", "\\ud83d"), TEXT.replace("true", "NaN")


def problem(read: Any, path: Path) -> str:
    try:
        read(path)
    except UserError as error:
        return str(error)
    return ""


def test_faults_are_told_as_python_tells_them(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    content = TEXT.encode()
    broken = [content, NAN.encode(), content.replace(b"1e999", b"-Infinity"), content + b"x", b"9" * 5000]
    broken += [content.replace(b"1e999", b"9" * 400), content.replace(b"1.5", b"9" * 400), b"\xef\xbb\xbf" + content]
    for old, new in ((b"],", b"];"), (b"true", b"tru"), (b'"other"', b"other"), (b"{}", b"{,}"), (b'"x": ', b'"x" ')):
        broken.append(content.replace(old, new, 1))
    broken += [b"[" * 90000, b'{"images": [' + b"[" * 90000, content.replace(b"1.5", b"[" * 9000)]
    broken += [content.replace(b"a.png", b'"\n"'), content.replace("é".encode(), b"\xff"), TEXT.encode("utf-16")[:-1]]
    for text in broken:
        path.write_bytes(text)
        assert problem(open_index, path) == problem(read_json, path), text[-60:]


@pytest.mark.parametrize("length", [0, 1, 20, 60, 150, -4])
def test_what_is_cut_off_is_told_with_its_end(length: int, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(TEXT.encode()[:length])
    with pytest.raises(UserError, match=r"a\.json, line \d, column \d+: not valid JSON .*; is the file cut off"):
        open_index(path)


def test_half_a_pair_of_surrogates_is_told_of_its_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(HALF)
    findings = Findings()
    open_index(tmp_path / "a.json").report((), findings)
    assert len(findings.errors) == 1 and "images, entry 1: file_name is '\\ud83d'" in findings.errors[0]


def test_an_index_is_made_once_and_again_when_its_source_changes(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    build = coco_index._build
    monkeypatch.setattr(coco_index, "_build", lambda *arguments: (made.append(arguments), build(*arguments)))
    write_coco(tmp_path, [{"id": 1, "category_id": 7, "bbox": [1, 2, 3, 4]}])
    path = tmp_path / "a.json"
    for _ in range(2):
        assert open_index(path).objects(0)[0]["bbox"] == [1, 2, 3, 4]
    (tmp_path / "copy.json").write_bytes(path.read_bytes())
    open_index(tmp_path / "copy.json")
    assert len(made) == 1 and len(indices(folder)) == 1
    path.write_text(path.read_text().replace("[1, 2, 3, 4]", "[1, 2, 3, 40]"))
    assert open_index(path).objects(0)[0]["bbox"] == [1, 2, 3, 40]
    assert len(made) == 2 and len(indices(folder)) == 2


def test_a_damaged_or_older_index_is_made_again(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_coco(tmp_path, [{"id": 1, "category_id": 7, "bbox": [1, 2, 3, 4]}])
    source = tmp_path / "a.json"
    open_index(source)
    (name,) = indices(folder)
    files = {path: path.read_bytes() for path in (folder / name).iterdir()}
    assert len(files) == 6
    for path, whole in files.items():
        for damaged in (b"", whole[:10], whole[:-1], whole[: len(whole) // 2], None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            assert open_index(source).objects(0)[0]["bbox"] == [1, 2, 3, 4]
            assert {path: path.read_bytes() for path in (folder / name).iterdir()} == files
    monkeypatch.setattr(coco_index, "FORMAT", coco_index.FORMAT + 1)
    open_index(source)
    assert (folder / name / "facts.json").read_bytes() != files[folder / name / "facts.json"]


def test_a_builder_that_is_stopped_leaves_nothing(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    write_coco(tmp_path, [])
    with monkeypatch.context() as patched:
        patched.setattr(np, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            open_index(tmp_path / "a.json")
    assert indices(folder) == []
    assert len(open_index(tmp_path / "a.json")) == 1


def test_a_folder_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    write_coco(tmp_path, [])
    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(UserError, match=r"index/lock-.: cannot be locked \(No locks available\).*TESSERA_INDEX"):
        open_index(tmp_path / "a.json")


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(UserError, match=r"a\.json: is a folder, expected a JSON file"):
        open_index(tmp_path / "a.json")
    (tmp_path / "b").touch()
    with pytest.raises(UserError, match=r"b/a\.json: cannot be read \(Not a directory\)"):
        open_index(tmp_path / "b/a.json")


def test_a_source_that_changes_meanwhile_is_refused(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_coco(tmp_path, [])
    monkeypatch.setattr(coco_index, "file_digest", lambda _: "0" * 64)
    with pytest.raises(UserError, match=r"a\.json: has changed while it was read; run again"):
        open_index(tmp_path / "a.json")
    assert indices(folder) == []


def open_at_once(path: Path, barrier: Any, log: Path) -> None:
    build = coco_index._build

    def logged(*arguments: Any) -> None:
        with log.open("a") as stream:
            stream.write("built\n")
        build(*arguments)

    coco_index._build = logged
    barrier.wait()
    assert len(open_index(path).objects(1)) == 4000


def test_of_two_builders_at_once_one_waits(tmp_path: Path, folder: Path) -> None:
    items = [{"id": n, "image_id": n % 2 + 1, "category_id": 7, "bbox": [n, 0, 1, 1]} for n in range(1, 8001)]
    write_coco(tmp_path, items, [SIZE, SIZE])
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    arguments = (tmp_path / "a.json", barrier, tmp_path / "log")
    processes = [context.Process(target=open_at_once, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "built\n" and len(indices(folder)) == 1


def test_a_reader_for_another_process_is_small_and_keeps_no_file_open(tmp_path: Path) -> None:
    items = [{"id": n, "image_id": 1, "category_id": 7, "bbox": [n, 0, 1, 1]} for n in range(1, 2001)]
    dataset = write_coco(tmp_path, items, [SIZE] * 3)
    before = len(list(Path("/proc/self/fd").iterdir()))
    reader = opened(dataset, tmp_path, "detection")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert len(pickle.dumps(reader)) < 2000


def test_shards_are_joined_without_lists(tmp_path: Path) -> None:
    for number in range(3):
        entries = [{"id": n, "file_name": f"{number}-{n}.png", "height": 10, "width": 16} for n in (0, 2)]
        box = {"id": 1, "image_id": 2, "category_id": 7, "bbox": [number, 1, 2, 3]}
        write(tmp_path / f"shards/{number}.json", {"images": entries, "annotations": [box], "categories": LABEL_MAP})
    split = SplitSpec(images="images", annotations="shards/*.json")
    dataset = DatasetSpec(name="tiny", type="coco", train=split)
    reader = open_dataset(
        dataset, "train", load_catalog(dataset, str(tmp_path), "detection"), "detection", str(tmp_path)
    )
    assert isinstance(reader, JoinedDataset)
    copy = pickle.loads(pickle.dumps(reader))
    for one in (reader, copy):
        assert one.image_ids.tolist() == [0, 2, 3, 5, 6, 8]
        assert list(one.file_names) == ["0-0.png", "0-2.png", "1-0.png", "1-2.png", "2-0.png", "2-2.png"]
        assert one.file_names[-1] == "2-2.png"
        boxes = [one.target(index, SIZE, Findings()).boxes.tolist() for index in range(6)]
        assert boxes == [[], [[0, 1, 2, 4]], [], [[1, 1, 3, 4]], [], [[2, 1, 4, 4]]]


class Listed(SegmentationDataset):
    """Nothing but image ids."""

    def __init__(self, number: int, ids: list[int]) -> None:
        self.source = Path(f"/shards/{number}.json")
        self.image_folder = Path("/images")
        self.image_ids = ids
        self.file_names = [f"{number}-{place}.png" for place in range(len(ids))]

    def annotated_size(self, index: int) -> None:
        return None

    def target(self, index: int, size: tuple[int, int], findings: Findings) -> Target:
        raise NotImplementedError


def joined(*ids: list[int]) -> JoinedDataset:
    findings = Findings()
    made = JoinedDataset([Listed(number, own) for number, own in enumerate(ids)], findings)
    assert findings.errors == []
    return made


def test_ids_that_are_taken_are_raised() -> None:
    assert joined([5, 1], [3], [], [4, 9]).image_ids.tolist() == [5, 1, 3, 4, 9]
    assert joined([1, 2], [3], [2, 5], [], [9], [40]).image_ids.tolist() == [1, 2, 3, 6, 9, 19, 40]


def test_ten_thousand_shards_are_joined_at_once() -> None:
    """Each with each would take minutes."""
    count = 10_000
    start = time.monotonic()
    apart = joined(*([number] for number in range(count)))
    mixed = joined(*([number, count * 2 - number] for number in range(count)), [0])
    assert time.monotonic() - start < 10
    assert apart.image_ids.tolist() == list(range(count)) and apart.file_names[count - 1] == "9999-0.png"
    assert mixed.image_ids[-1] == count * 2 + 1


def test_of_equal_names_all_are_told() -> None:
    findings = Findings()
    JoinedDataset([Listed(1, [1, 2]), Listed(2, [3]), Listed(1, [4])], findings)
    assert findings.errors == ["image file name '1-0.png' occurs 2 times, expected once"]


def test_texts() -> None:
    values = ["", "a", "ä€", "", "b/c.png"]
    texts = Texts.of(values)
    assert list(texts) == values and [texts[index] for index in range(-5, 5)] == values * 2
    assert len(Texts.of([])) == 0
    with pytest.raises(IndexError):
        texts[5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: {**content, "images": {}}, "has no list `images`"),
        (lambda content: {"images": content["images"]}, "has no list `annotations`"),
        (lambda content: [content], "has no list `images`"),
    ],
)
def test_no_coco_file(change: Any, message: str, tmp_path: Path) -> None:
    write_coco(tmp_path, [])
    write(tmp_path / "a.json", change(json.loads((tmp_path / "a.json").read_text())))
    with pytest.raises(UserError, match=message):
        open_index(tmp_path / "a.json", segments=False)


def test_lists_that_come_twice_are_refused(tmp_path: Path) -> None:
    for text in ('{"images": [], "annotations": [], "images": []}', '{"annotations": [], "images": [], "images": {}}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match="has two lists `images`; expected one"):
            open_index(tmp_path / "a.json")


def test_the_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_coco(tmp_path, [])
    monkeypatch.delenv(FOLDER)
    monkeypatch.chdir(tmp_path)
    open_index(tmp_path / "a.json")
    assert len(indices(tmp_path / "data/.index")) == 1
    monkeypatch.setenv(FOLDER, os.fspath(tmp_path / "a.json"))
    with pytest.raises(UserError, match="TESSERA_INDEX"):
        open_index(tmp_path / "a.json")
