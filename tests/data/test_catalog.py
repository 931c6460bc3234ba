import json
from pathlib import Path

import pytest

from tessera.data.catalog import full_catalog, load_catalog
from tessera.data.label_map import parse_label_map, read_label_map
from tessera.files import UserError
from tessera.ops.kitti import kitti_names
from tessera.spec.networks import Mode
from tessera.spec.schema import DatasetSpec, SplitSpec

HERE = Path("map.json")


def test_defaults_and_order() -> None:
    catalog = parse_label_map([{"id": 9, "name": "b"}, {"id": 2, "name": "a", "isthing": 0, "color": [1, 2, 3]}], HERE)
    assert catalog.names == ("b", "a")
    assert catalog.from_dataset_id == {9: 0, 2: 1}
    assert [category.isthing for category in catalog.categories] == [True, False]
    assert catalog.categories[1].color == (1, 2, 3)


def test_palette_is_distinct_and_repeatable() -> None:
    entries = [{"id": number, "name": f"c{number}"} for number in range(1, 251)]
    first, second = parse_label_map(entries, HERE), parse_label_map(entries, HERE)
    assert first == second
    assert len({category.color for category in first.categories}) == 250


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"id": -1, "name": "a"}, "id is -1, expected a whole number of 0 or more"),
        ({"id": True, "name": "a"}, "id is True"),
        ({"id": 1.5, "name": "a"}, "id is 1.5"),
        ({"id": 2, "name": " "}, "name is ' '"),
        ({"id": 2, "name": "a", "color": [0, 0, 256]}, "color is"),
        ({"id": 2, "name": "a", "color": [0, 0]}, "color is"),
        ({"id": 2, "name": "a", "isthing": 2}, "isthing is 2"),
        ({"id": 1, "name": "other"}, "id 1 is that of entry 1"),
        ("text", "is str"),
    ],
)
def test_faults_are_named(entry: object, message: str) -> None:
    with pytest.raises(UserError, match=r"map\.json") as caught:
        parse_label_map([{"id": 1, "name": "first"}, entry], HERE)
    assert message in str(caught.value) and "entry 2" in str(caught.value)


def test_all_faults_at_once() -> None:
    with pytest.raises(UserError, match="3 problem") as caught:
        parse_label_map([{"id": -1, "name": ""}, {"id": 1, "name": "a", "isthing": "yes"}], HERE)
    assert "entry 1" in str(caught.value) and "entry 2" in str(caught.value)


def test_class_count_against_label_map(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps([{"id": 1, "name": "a"}, {"id": 4, "name": "b"}]))
    assert len(read_label_map(path, num_classes=2)) == 2
    with pytest.raises(UserError, match=r"names 2 classes, but dataset.num_classes is 3"):
        read_label_map(path, num_classes=3)
    padded = read_label_map(path, contiguous=False, num_classes=5)
    assert padded.names == ("a", "unused_2", "unused_3", "b", "unused_5")
    assert padded.from_dataset_id[4] == 3
    with pytest.raises(UserError, match="largest id is 4"):
        read_label_map(path, contiguous=False, num_classes=3)
    with pytest.raises(UserError, match="num_classes must be set"):
        read_label_map(path, contiguous=False)
    path.write_text(json.dumps([{"id": 0, "name": "a"}, {"id": 4, "name": "b"}]))
    with pytest.raises(UserError, match=r"class with id 0, but with contiguous_id false .* set contiguous_id to true"):
        read_label_map(path, contiguous=False, num_classes=5)


def test_classes_of_one_name_are_told_apart_by_their_ids() -> None:
    names = {24: "screen", 131: "screen", 5: "screen (131)", 2: "Screen"}
    catalog = parse_label_map([{"id": number, "name": name} for number, name in names.items()], HERE)
    assert catalog.names == ("screen", "screen", "screen (131)", "Screen")
    assert catalog.keys == ("screen (24)", "screen (131)", "screen (131) (5)", "Screen (2)")
    plain = parse_label_map([{"id": number, "name": name} for number, name in names.items() if number != 5], HERE)
    assert plain.keys == ("screen (24)", "screen (131)", "Screen")
    assert kitti_names(plain) == ("screen_(24)", "screen_(131)", "Screen")


@pytest.mark.parametrize(
    ("kind", "mode", "advice"),
    [
        ("mask_pairs", "instance", "coco or coco_panoptic"),
        ("mask_pairs", "panoptic", "type coco_panoptic"),
        ("coco", "semantic", "mask_pairs or coco_panoptic"),
        ("coco", "panoptic", "Set model.mode to instance"),
    ],
)
def test_type_against_mode(kind, mode, advice: str) -> None:
    with pytest.raises(UserError) as caught:
        load_catalog(DatasetSpec(type=kind, label_map="map.json"), ".", mode)
    assert advice in str(caught.value)


def test_instance_models_know_things_only(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(
        json.dumps([{"id": 1, "name": "sky", "isthing": 0}, {"id": 2, "name": "car", "isthing": 1}])
    )
    dataset = DatasetSpec(type="coco_panoptic", label_map="map.json")
    assert load_catalog(dataset, str(tmp_path), "instance").names == ("car",)
    assert load_catalog(dataset, str(tmp_path), "panoptic").names == ("sky", "car")


def test_coco_files_name_their_own_classes(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"categories": [{"id": 7, "name": "cat", "supercategory": "x"}]}))
    dataset = DatasetSpec(type="coco", train=SplitSpec(images="i", annotations="a.json"))
    assert full_catalog(dataset, str(tmp_path)).from_dataset_id == {7: 0}
    with pytest.raises(UserError, match="label_map is not set"):
        full_catalog(DatasetSpec(type="mask_pairs", train=SplitSpec(annotations="a.jsonl")), str(tmp_path))


def test_a_class_cannot_be_the_unlabeled_value(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps([{"id": 0, "name": "road"}, {"id": 3, "name": "car"}]))
    dataset = DatasetSpec(type="mask_pairs", label_map="map.json")
    for value, name in ((0, "road"), (3, "car")):
        with pytest.raises(
            UserError, match=rf"'{name}' has the id {value}, .* set dataset\.ignore_id: null \(255 stays"
        ):
            full_catalog(dataset.model_copy(update={"ignore_id": value}), str(tmp_path))
    for other in (None, 7):
        assert full_catalog(dataset.model_copy(update={"ignore_id": other}), str(tmp_path)).from_dataset_id == {
            0: 0,
            3: 1,
        }


def test_a_semantic_model_needs_two_classes(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps([{"id": 1, "name": "polyp", "isthing": 1}]))
    with pytest.raises(
        UserError, match=r"'polyp' is its only class.* at least two classes; where mask value 0 is the background, add"
    ):
        load_catalog(DatasetSpec(type="mask_pairs", label_map="map.json"), str(tmp_path), "semantic")
    panoptic = DatasetSpec(type="coco_panoptic", label_map="map.json")
    with pytest.raises(UserError, match=r"'polyp' is its only class.* at least two classes$"):
        load_catalog(panoptic, str(tmp_path), "semantic")
    assert load_catalog(panoptic, str(tmp_path), "panoptic").names == ("polyp",)


def test_more_than_255_classes_fit_instances_only(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps([{"id": number, "name": f"c{number}"} for number in range(1, 257)]))
    assert len(load_catalog(DatasetSpec(type="coco", label_map="map.json"), str(tmp_path), "instance")) == 256
    with pytest.raises(UserError, match="at most 255"):
        load_catalog(DatasetSpec(type="coco_panoptic", label_map="map.json"), str(tmp_path), "semantic")


@pytest.mark.parametrize("mode", ["panoptic", "semantic"])
def test_an_id_that_no_picture_of_classes_holds_is_refused_before_training(tmp_path: Path, mode: Mode) -> None:
    """Inference, which would find it at the end, writes ids up to 24 bits."""
    entries = [{"id": 70000, "name": "a"}, {"id": 2**24, "name": "far", "isthing": 0}]
    (tmp_path / "map.json").write_text(json.dumps(entries))
    dataset = DatasetSpec(name="d", type="coco_panoptic", label_map="map.json")
    with pytest.raises(UserError, match=r"dataset d: the class 'far' has the id 16777216; .* hold ids up to 16777215"):
        load_catalog(dataset, str(tmp_path), mode)
    assert len(load_catalog(dataset, str(tmp_path), "instance")) == 1
