"""Digests of folders: content counts, times only decide whether somebody looks again."""

import os
from pathlib import Path
from typing import Any

import pytest

from tessera.spec import digests
from tessera.spec.digests import MISSING, UNREADABLE, file_digest, folder_digest, names_digest
from tessera.spec.lineage import data_digest
from tessera.spec.schema import ConvertSpec, DatasetSpec, DemoSpec

OLD = 1_600_000_000


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(digests, "_SETTLED", 0)
    for number in range(3):
        put(f"kitti/labels/{number}.txt", f"Car {number}")


def put(name: str, text: str) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def looked() -> str:
    folder_digest.cache_clear()
    return folder_digest(Path("kitti/labels"))


def test_content_and_names_count_and_times_do_not() -> None:
    first = looked()
    os.utime("kitti/labels/1.txt", (OLD, OLD))
    assert looked() == first
    put("kitti/labels/.hidden", "x")
    assert looked() == first
    put("kitti/labels/1.txt", "Van 1")
    changed = looked()
    Path("kitti/labels/1.txt").rename("kitti/labels/4.txt")
    renamed = looked()
    put("kitti/labels/deep/1.txt", "Van 1")
    assert len({first, changed, renamed, looked()}) == 4


def test_an_unchanged_folder_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = looked()
    monkeypatch.setattr(digests, "digest_file", None)
    assert looked() == first
    put("kitti/labels/1.txt", "Van")
    with pytest.raises(TypeError):
        looked()


def test_what_changed_just_now_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_SETTLED", 3_600_000_000_000)
    first = looked()
    assert not Path("data").exists()
    monkeypatch.setattr(digests, "_SETTLED", 0)
    assert looked() == first


def test_a_project_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("data").write_text("a file where the folder should be")
    assert looked() == looked() != MISSING


def test_missing() -> None:
    assert folder_digest(Path("nowhere")) == file_digest(Path("nowhere")) == MISSING


def test_what_is_no_file_or_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    label = Path("kitti/labels/0.txt")
    assert file_digest(label / "x.json") == folder_digest(label) == folder_digest(label / "x") == MISSING
    assert file_digest(label.parent) == UNREADABLE

    def refuse(_: object) -> str:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(digests, "digest_file", refuse)
        assert file_digest(label) == looked() == UNREADABLE
    monkeypatch.setattr(os, "scandir", refuse)
    assert looked() == UNREADABLE


def test_a_link_that_leads_nowhere_is_no_file() -> None:
    first = looked()
    Path("kitti/labels/9.txt").symlink_to("../elsewhere.txt")
    assert looked() == first
    put("kitti/elsewhere.txt", "Car 9")
    assert looked() != first


def test_a_large_file_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_LARGE", 3)
    put("large", "content")
    first = file_digest(Path("large"))
    digests._file_digest.cache_clear()
    monkeypatch.setattr(digests, "digest_file", None)
    assert file_digest(Path("large")) == first


def dataset(**keys: Any) -> DatasetSpec:
    others = {key: keys.pop(key) for key in ("generator", "label_map") if key in keys}
    convert = ConvertSpec(**{"input_source": ["kitti"], "mapping_path": "map.json", **keys})
    return DatasetSpec(name="cars", type="coco", convert=convert, **others)


def digest(splits: tuple[str, ...] = ("train", "val"), **keys: Any) -> str:
    folder_digest.cache_clear()
    names_digest.cache_clear()
    return data_digest(dataset(**keys), ".", splits)


def test_a_converted_dataset_is_what_its_shards_are_made_from() -> None:
    put("map.json", '{"car": "car"}')
    first = digest()
    assert digest() == first == digest(test_source=["other"]), "training does not read the test shards"
    assert digest(("test",)) != digest(("test",), test_source=["other"])
    found = [first, digest(num_shards=2), digest(val_split=10), digest(label_dir_name="label_2")]
    put("map.json", '{"car": "van"}')
    found.append(digest())
    put("kitti/labels/0.txt", "Van")
    found.append(digest())
    put("kitti/images/0.png", "")
    found.append(digest())
    put("kitti/images/0.png", "pixels")
    put("kitti/images/.hidden", "")
    assert digest() == found[-1], "of images the names alone count"
    put("kitti.dvc", "outs: [{md5: 0123.dir, path: kitti}]")
    tracked = digest()
    put("kitti/labels/0.txt", "Tram")
    assert digest() == tracked, "what DVC tracks is compared by DVC"
    put("kitti.dvc", "outs: [{md5: 4567.dir, path: kitti}]")
    assert len({*found, tracked, digest()}) == 9


def test_generated_labels_need_not_be_there() -> None:
    keys: dict[str, Any] = {"generator": DemoSpec(), "label_map": "cars/label_map.json"}
    first = digest(**keys)
    put("cars/labels/train/0.txt", "Van")
    put("cars/label_map.json", "[]")
    assert digest(**keys) == first != digest(generator=DemoSpec(seed=1), label_map="cars/label_map.json")
