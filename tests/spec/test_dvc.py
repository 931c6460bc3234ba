"""Raw data that DVC tracks count with the digest that DVC recorded of them, and `dvc repro` runs only where it is safe."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tessera.files import UserError
from tessera.spec.dvc import raw_digest, refuse_unsafe_repro
from tessera.spec.lineage import data_digest
from tessera.spec.planning import Plan
from tessera.spec.schema import DatasetSpec


def track(path: Path, md5: str, **more: object) -> None:
    """As `dvc add` would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"md5": md5, "size": 12, "hash": "md5", "path": path.name, **more}
    Path(f"{path}.dvc").write_text(yaml.safe_dump({"outs": [entry]}))


def digest(root: Path, *splits: str, **changes: object) -> str:
    split = {"images": "street/images", "annotations": "street/notes/train.json"}
    test = {"images": "street/pictures", "annotations": "street/notes/test.json"}
    values = {"type": "coco", "train": split, "test": test, **changes}
    return data_digest(DatasetSpec.model_validate(values), str(root), splits or ("train", "val", "test"))


def test_every_tracked_folder_that_a_split_lies_in_counts(tmp_path: Path) -> None:
    root = tmp_path / "data"
    digests = [digest(root)]
    for place in ("street", "street/images", "street/notes/train.json", "."):
        track(root if place == "." else root / place, "1" * 32)
        digests.append(digest(root))
        track(root if place == "." else root / place, "2" * 32)
        digests.append(digest(root))
    assert len(set(digests)) == 9
    track(root / "other", "1" * 32)
    track(root / "street/images/deeper", "1" * 32)
    assert digest(root) == digests[-1]


def test_a_folder_of_one_split_counts_for_that_split(tmp_path: Path) -> None:
    before = digest(tmp_path, "train", "val"), digest(tmp_path, "test")
    track(tmp_path / "street/pictures", "1" * 32)
    assert digest(tmp_path, "train", "val") == before[0]
    assert digest(tmp_path, "test") != before[1]


def test_masks_that_no_key_names_count(tmp_path: Path) -> None:
    """The masks of pairs are named by the list of pairs alone."""
    before = digest(tmp_path, type="mask_pairs")
    track(tmp_path / "street/notes/masks", "1" * 32)
    assert digest(tmp_path, type="mask_pairs") != before
    assert digest(tmp_path) == before


def test_what_does_not_touch_the_content_does_not_count(tmp_path: Path) -> None:
    track(tmp_path / "street", "1" * 32)
    before = digest(tmp_path)
    track(tmp_path / "street", "1" * 32, remote="elsewhere", desc="new words", size=13)
    assert digest(tmp_path) == before


def test_digests_of_other_forms(tmp_path: Path) -> None:
    assert raw_digest(tmp_path / "street") is None
    track(tmp_path / "street", "1" * 32 + ".dir")
    assert raw_digest(tmp_path / "street") == "1" * 32 + ".dir"
    beside = tmp_path / "versioned.dvc"
    beside.write_text("outs:\n- path: versioned\n  files:\n  - relpath: a.jpg\n    md5: aa\n")
    first = raw_digest(tmp_path / "versioned")
    beside.write_text("outs:\n- path: versioned\n  files:\n  - relpath: a.jpg\n    md5: bbb\n")
    assert first != raw_digest(tmp_path / "versioned")


@pytest.mark.parametrize("content", ["", "outs: []\n", "outs:\n- path: street\n", "outs: 3\n"])
def test_a_file_without_a_digest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "street.dvc").write_text(content)
    with pytest.raises(UserError, match=r"street\.dvc: expected outs with one of md5.*dvc add"):
        raw_digest(tmp_path / "street")


STAGE = {
    "outs": [{"results": {"persist": True}}, "data/checks", {"data/demo": {"persist": True}}],
    "deps": ["src", "data/street"],
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Root of a project whose dvc.yaml fits the generated data in data/demo and the raw data in data/street."""
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "global"))
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    analytics = false\n")
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"experiments": STAGE}}))
    return tmp_path


def test_a_fitting_stage_may_run_and_another_one_is_not_judged(project: Path) -> None:
    refuse_unsafe_repro("experiments", {"data/demo"}, {"data/street"}, project)
    refuse_unsafe_repro("elsewhere/dvc.yaml:experiments", {"data/new"}, set(), project)


@pytest.mark.parametrize("file", ["config", "config.local"])
@pytest.mark.parametrize("kinds", ["symlink", "reflink,hardlink"])
def test_links_in_any_file_of_settings_are_refused(project: Path, file: str, kinds: str) -> None:
    with (project / ".dvc" / file).open("a") as stream:
        stream.write(f"[cache]\n    type = {kinds}\n")
    with pytest.raises(UserError, match=f"cache.type is {kinds}: with .*`dvc config cache.type reflink,copy`"):
        refuse_unsafe_repro("experiments", {"data/demo"}, {"data/street"}, project)


def test_copies_are_fine(project: Path) -> None:
    (project / ".dvc/config").write_text("[cache]\n    type = reflink,copy\n")
    refuse_unsafe_repro("experiments", {"data/demo"}, {"data/street"}, project)


def test_lines_that_dvc_yaml_lacks_or_has_too_many_are_all_named(project: Path) -> None:
    with pytest.raises(UserError) as caught:
        refuse_unsafe_repro("experiments", {"data/new"}, {"data/street", "data/other"}, project)
    lines = str(caught.value).splitlines()
    assert "dvc.yaml, stages.experiments" in lines[0]
    assert [line.split(";")[0].strip() for line in lines[1:]] == [
        "outs: add `- data/new: {persist: true}`",
        "outs: remove data/demo",
        "deps: add `- data/other`",
    ]


def test_a_plan_names_the_data_of_the_listed_experiments(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    street = {"annotations": "street/train.json", "images": "street/images"}
    parts = {
        "models/mask2former": {"model": {"name": "mask2former", "mode": "instance"}},
        "backbones/swin": {"model": {"backbone": {"name": "swin_tiny"}}},
        "datasets/demo": {"dataset": {"generator": {}}},
        "datasets/street": {"dataset": {"type": "coco", "train": street, "val": street, "test": street}},
        "config": {
            "models": ["mask2former"],
            "backbones": ["swin"],
            "datasets": ["demo", "street"],
            "experiments": ["mask2former_swin", "mask2former_swin-street"],
            "data_root": "raw",
        },
    }
    for part, content in parts.items():
        path = project / "config" / f"{part}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))
    monkeypatch.chdir(project)
    track(project / "raw/street", "1" * 32)
    annotations = project / "raw/street/train.json"
    annotations.parent.mkdir()
    annotations.write_text("{}")
    plan = Plan(parts["config"])
    plan.refuse_unsafe_repro()
    monkeypatch.setenv("DVC_STAGE", "experiments")
    with pytest.raises(UserError, match="deps: add `- raw/street`") as caught:
        plan.refuse_unsafe_repro()
    assert "outs" not in str(caught.value)
