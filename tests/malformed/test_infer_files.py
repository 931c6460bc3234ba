"""`tessera infer MODEL IMAGES --out FOLDER`: from the model file alone, in a folder without a project."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from tessera.files import digest_file, read_json, write_json
from tessera.models import build_model
from tessera.models.artifact import save_model
from tessera.provenance import Header
from tessera.spec.schema import read_spec
from tests.malformed.conftest import Answer, call
from tests.malformed.project import EXPERIMENT, FOLDER, GRAPH, MODEL
from tests.models import tiny, tiny_deformable_detr


@pytest.fixture
def place(valid: Path, tmp_path: Path) -> Path:
    """Two model files and 18 pictures, two of them in a sub-folder, and nothing else."""
    shutil.copy(valid / MODEL, tmp_path / "m.pth")
    shutil.copy(valid / GRAPH, tmp_path / "m.onnx")
    (first, *_) = sorted((valid / "data/demo/images/test").iterdir())
    for number in range(18):
        path = tmp_path / "photos" / ("more" if number > 15 else ".") / f"{number:02d}{first.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(first, path)
    return tmp_path


def infer(words: str, place: Path, capsys: pytest.CaptureFixture[str]) -> Answer:
    return call(["infer", *shlex.split(words)], place, capsys)


@pytest.mark.parametrize("model", ["m.pth", "m.onnx"])
def test_every_image_of_a_folder(model: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = infer(f"{model} photos --out found", place, capsys)
    assert done.code == 0, done.err
    assert "infer: image: 18 of 18" in done.err
    assert re.search(r"^wrote found: index\.json, which lists all files of 18 images, \d+ segments$", done.out, re.M)
    index = read_json(place / "found/index.json")
    assert [image["file_name"] for image in index["images"]][-1].startswith("more/17")
    assert index["model"]["file"] == model and index["experiment"] == EXPERIMENT
    assert len(list(place.glob("found/overlays/*"))) == 17 and len(list(place.glob("found/overlays/more/*"))) == 2


def test_what_may_be_asked_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalog = read_json(place / "found/index.json")["categories"] if (place / "found").exists() else None
    assert infer("m.pth photos --out found --limit 1 --draw off", place, capsys).code == 0
    assert not (place / "found/overlays").exists()
    catalog = read_json(place / "found/index.json")["categories"]
    renamed = [{**category, "name": f"my {category['name']}", "color": [1, 2, 3]} for category in catalog]
    write_json(place / "map.json", renamed)
    words = "m.pth photos/00* photos/more --out found --limit 2 --draw one --label-map map.json postprocess.object_mask_threshold=0"
    (image,) = place.glob("photos/00*")
    done = infer(words.replace("photos/00*", f"photos/{image.name}"), place, capsys)
    assert done.code == 0, done.err
    assert "infer: 2 of 3 images; a larger --limit, or none, takes more" in done.err
    index = read_json(place / "found/index.json")
    assert [category["name"] for category in index["categories"]] == [category["name"] for category in renamed]
    assert [entry["file_name"] for entry in index["images"]] == [image.name, f"more/16{image.suffix}"]
    assert all(entry["segments"] for entry in index["images"])
    assert {key for key in index["images"][0] if key.startswith("overlay")} == {"overlay"}


def test_nothing_found_is_no_fault(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A batch of faultless parts: empty lists, and a warning."""
    torch.manual_seed(0)
    model = tiny_deformable_detr.spec("swin_tiny", hidden_dim=64)
    network = build_model(model, tiny.CATALOG, load_pretrained=False).network
    spec = read_spec({"model": model.model_dump(mode="json"), "dataset": {"augmentation": {"test_min_size": 64}}})
    save_model(place / "detector.pth", network.state_dict(), Header("train", "detector", spec, {}, tiny.CATALOG))
    done = infer("detector.pth photos --out found postprocess.conf_threshold=0.9", place, capsys)
    assert done.code == 0, done.err
    assert "infer: warning: the model found no instance in any of the 18 images (postprocess.conf_threshold" in done.err
    assert "18 images, 0 detections" in done.out
    assert read_json(place / "found/instances.json") == []
    assert {path.read_text() for path in (place / "found/labels").rglob("*.txt")} == {""}


def test_broken_pictures_are_listed_at_the_end(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = sorted((place / "photos").glob("0*"))
    pictures[0].write_bytes(b"broken")
    pictures[3].write_bytes(pictures[3].read_bytes()[:-200])
    (place / "photos/note.heic").touch()
    done = infer("m.onnx photos --out found", place, capsys)
    assert done.code == 1
    assert "infer: photos: 1 other entries are not read (1 .heic)" in done.err
    *_, title, first, second = done.err.splitlines()
    assert title == "error: 2 of 18 images cannot be read; the others are in found"
    assert first.startswith(f"  photos/{pictures[0].name}: ") and second.startswith(f"  photos/{pictures[3].name}: ")
    index = read_json(place / "found/index.json")
    assert len(index["images"]) == 16


def test_all_pictures_broken_leaves_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "bad.png").write_bytes(b"bad")
    done = infer("m.onnx bad.png --out found", place, capsys)
    assert done.code == 1 and "none of 1 images can be read\n  bad.png: " in done.err
    assert sorted(path.name for path in place.iterdir()) == ["bad.png", "m.onnx", "m.pth", "photos"]


def test_a_list_of_images_for_a_test_server(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = min(path.name for path in (place / "photos").glob("0*"))
    write_json(place / "image_info.json", {"images": [{"id": 581929, "file_name": name}]})
    done = infer("m.onnx image_info.json --images photos --out found", place, capsys)
    assert done.code == 0, done.err
    (annotation,) = read_json(place / "found/panoptic.json")["annotations"]
    assert annotation["image_id"] == 581929
    with Image.open(place / "found/panoptic" / annotation["file_name"]) as picture:
        assert picture.mode == "RGB"
    assert not (place / "data").exists()


def test_a_list_of_images_is_read_as_every_other_coco_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, *_ = sorted(path.name for path in (place / "photos").glob("0*"))
    entries = [
        {"id": 2.0, "file_name": f"photos\\{first}"},
        {"id": 1, "coco_url": f"http://images.org/photos/{second}"},
    ]
    write_json(place / "image_info.json", {"images": entries})
    done = infer("m.onnx image_info.json --out found --draw off", place, capsys)
    assert done.code == 0, done.err
    index = read_json(place / "found/index.json")
    assert [image["id"] for image in index["images"]] == [1, 2]
    write_json(place / "twice.json", {"images": [{"id": 1, "file_name": first}] * 2})
    done = infer("m.onnx twice.json --images photos --out twice", place, capsys)
    assert done.code == 1 and "twice.json" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{EXPERIMENT} photos --out x --runtime foo", "--runtime foo: expected one of torch, onnx, trt"),
        (f"{EXPERIMENT} photos --out x --precision fp16", "choose --runtime onnx or trt"),
        (f"{EXPERIMENT} photos --out x --runtime onnx --precision int8", "--precision int8: expected fp32 or fp16"),
        ("m.pth photos --out x --runtime torch", "--runtime torch: is for an experiment; m.pth is one kind of file"),
        ("m.onnx photos --out x --precision fp16", "--precision fp16: is for an experiment"),
        ("m.pth photos --out x --data-root .", "--data-root .: is for an experiment's own images"),
        ("m.pth photos --out x --expect 0", "--expect 0: is for an experiment's own images"),
        ("m.pth photos --out x --checkpoint m.onnx", "--checkpoint m.onnx: images that are named take one model"),
        ("m.pth photos", "`tessera infer m.pth photos --out out/m`"),
        ("m.pth", "expected images, folders or addresses behind the model file"),
        ("m.pth phtos --out x", "phtos: no such file or folder"),
        ("x.pth photos --out x", "x.pth: no such file"),
        ("m.pth photos --out photos/found", "--out photos/found: lies in photos"),
        ("m.pth photos --out .", "holds"),
        ("m.pth photos --out m.onnx", "is a file, expected a folder or nothing"),
        ("m.pth photos --out x train.seed=3", "only postprocess, testing and inference can be changed"),
        ("m.pth photos --out x inference.opactiy=1", "inference.opactiy"),
        ("m.pth photos --out x --draw some", "inference.draw"),
        ("m.pth photos --out x --images photos", "--images photos: belongs to a list of images"),
        ("m.pth photos --out x --label-map map.json", "map.json: does not name the model's classes"),
        ("m.pth empty --out x", "empty: holds no image; expected files of the kinds bmp, jpeg"),
        (f"{EXPERIMENT} photos --out x", f"`snakemake --cores 2 {MODEL}`"),
    ],
)
def test_what_cannot_work_is_refused_first(
    words: str, message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "empty").mkdir()
    write_json(place / "map.json", [{"id": 1, "name": "x"}])
    before = sorted(place.rglob("*"))
    done = infer(words, place, capsys)
    assert done.code == 1 and message in done.err, done.err
    assert sorted(place.rglob("*")) == before


def test_an_experiment_takes_other_images_too(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = infer(f"{EXPERIMENT} data/demo/images/val --runtime onnx --out found", project, capsys)
    assert done.code == 0, done.err
    assert read_json(project / "found/index.json")["runtime"] == "onnx"


def test_an_experiment_limits_its_own_images(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit and what is drawn are keys, so that the result is no longer the workflow's."""
    refused = infer(f"{EXPERIMENT} --limit 1 --draw off", project, capsys)
    assert (
        refused.code == 1 and "inference.draw=off: results/mask2former_swin/inference is the workflow's" in refused.err
    )
    (command,) = re.findall(r"`tessera infer (.*)`", refused.err)
    done = infer(command, project, capsys)
    assert done.code == 0, done.err
    assert "infer: 1 of 2 images; inference.max_images=null for all" in done.err
    assert "wrote out/mask2former_swin/inference: index.json" in done.out


def test_a_test_split_without_annotations(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As test servers give it out: checked and inferred on with its own ids, without a folder of truth; never evaluated."""
    test = yaml.safe_load((project / "config/datasets/demo.yaml").read_text())["dataset"]["test"]
    path = project / "data" / test["annotations"]
    document = read_json(path)
    write_json(path, {"images": document["images"]})
    manifest = read_json(project / "data/demo/manifest.json")
    manifest["files"][path.name] = digest_file(path)
    write_json(project / "data/demo/manifest.json", manifest)
    shutil.rmtree(project / "data" / test["panoptic"])
    checked = call(["check", "demo", "--out", "check.json"], project, capsys)
    assert checked.code == 0, checked.err
    assert "warning: test: without annotations: its images can be inferred on, not evaluated: 2" in checked.out
    assert read_json(project / "check.json")["splits"]["test"] == {"images": 2}
    done = call(["infer", EXPERIMENT], project, capsys)
    assert done.code == 0, done.err
    annotations = read_json(project / FOLDER / "inference/panoptic.json")["annotations"]
    assert {a["image_id"] for a in annotations} == {image["id"] for image in document["images"]}
    refused = call(["evaluate", EXPERIMENT], project, capsys)
    assert refused.code == 1 and "has no list `annotations`" in refused.err
    (project / "data" / test["images"] / document["images"][0]["file_name"]).write_bytes(b"broken")
    assert "test: data/demo/images/test/" in call(["check", "demo", "--out", "check.json"], project, capsys).err


def test_another_way_of_testing_is_the_project_s(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "m.pth photos/00.png --draw off --testing strict"
    assert "no config/config.yaml here; give its keys" in infer(f"{words} --out found", place, capsys).err
    (place / "config/testing").mkdir(parents=True)
    folders = ("models", "backbones", "datasets")
    for folder, name in zip(folders, ("mask2former", "swin", "demo"), strict=True):
        (place / "config" / folder).mkdir()
        (place / "config" / folder / f"{name}.yaml").write_text("{}\n")
    (place / "config/config.yaml").write_text("models: [mask2former]\nbackbones: [swin]\ndatasets: [demo]\n")
    (place / "config/testing/strict.yaml").write_text("postprocess: {object_mask_threshold: 1.0}\n")
    done = infer(f"{words} --out found", place, capsys)
    assert done.code == 0, done.err
    assert "found no segment" in done.err
    index = read_json(place / "found/index.json")
    assert index["testing"] == "strict" and index["lineage"]["postprocess"]["object_mask_threshold"] == 1.0
    assert (
        "no way of testing 'strickt'" in infer(words.replace("strict", "strickt") + " --out found", place, capsys).err
    )
