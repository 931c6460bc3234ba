"""What is wrong or contradictory in a TAO spec is refused with the file, the key, what was found and what to do; nothing is written."""

import json
from pathlib import Path
from typing import Any

import pytest

from tessera.files import UserError
from tessera.interop.tao import import_spec
from tessera.interop.tao.table import Fate
from tests.interop.tao.project import read

M2F, OF, DETR = "mask2former", "oneformer", "deformable_detr"
PANOPTIC = {
    "dataset.train.type": "coco_panoptic",
    "dataset.train.panoptic_json": "/data/a.json",
    "dataset.train.panoptic_dir": "/data/png",
}
SOURCES = {"dataset.val_data_sources": [{"image_dir": "/data/images", "json_file": "/data/a.json"}]}

REFUSED: dict[str, tuple[str | None, dict[str, Any], tuple[str, ...]]] = {
    "unknown": (M2F, {"train.optim.learning_rate": 1}, ("train.optim.learning_rate: unknown key", "legal here", "lr")),
    "misspelled": (M2F, {"train.num_epoch": 1}, ("train.num_epoch: unknown key", "did you mean train.num_epochs?")),
    "elsewhere": (M2F, {"train.lr": 1}, ("train.lr: unknown key", "train.optim.lr")),
    "of another model": (DETR, {"model.mask_former.nheads": 8}, ("model.mask_former.nheads: unknown key", "model.nheads")),
    "document only": (OF, {"dataset.dataset_type": "serialized"}, ("dataset.dataset_type: unknown key", "document only")),
    "workers": (M2F, {"dataset.workers": 8}, ("dataset.workers: unknown key", "num_workers of each split")),
    "no section": (M2F, {"train": 3}, ("train: expected a section with the keys", "optim")),
    "no value": (M2F, {"train.num_epochs": {"a": 1}}, ("train.num_epochs: expected a whole number",)),
    "type": (M2F, {"train.num_epochs": "many"}, ("train.num_epochs: expected a whole number", "'many'")),
    "fraction": (M2F, {"train.num_epochs": 1.5}, ("train.num_epochs: expected a whole number", "found 1.5")),
    "range": (M2F, {"train.optim.lr": 0}, ("train.optim.lr: expected a number, above 0, found 0",)),
    "choice": (M2F, {"train.optim.type": "Adam"}, ("expected one of AdamW, SGD", "'Adam'")),
    "sharded": (M2F, {"train.distributed_strategy": "ddp_sharded"}, ("expected one of ddp, fsdp", "fsdp", "sharded")),
    "reduce on plateau": (M2F, {"train.optim.lr_scheduler": "AutoReduce"}, ("one of MultiStep, Warmuppoly",)),
    "list": (M2F, {"dataset.pixel_mean": [0.5]}, ("dataset.pixel_mean: expected a list", "3 of them")),
    "scale": (M2F, {"dataset.pixel_mean": [123.7, 116.3, 103.5]}, ("dataset.pixel_mean", "divide by 255")),
    "target size": (M2F, {"dataset.val.target_size": [64]}, ("dataset.val.target_size", "expected [width, height]")),
    "address": (M2F, {"dataset.train.img_dir": "s3://b/images"}, ("dataset.train.img_dir", "download it")),
    "archive": (M2F, {"dataset.train.img_dir": "/d/images.tar.gz"}, ("dataset.train.img_dir", "unpack it")),
    "size": (M2F, {"export.input_width": 1000}, ("export.input_width: found 1000", "multiple of 32; take 992")),
    "channels": (M2F, {"export.input_channel": 1}, ("export.input_channel", "here it is always 3", "RGB")),
    "opset": (M2F, {"export.opset_version": 30}, ("export.opset_version", "at most 25", "found 30")),
    "dry run": (M2F, {"train.is_dry_run": True}, ("train.is_dry_run", "train.iters_per_epoch=1")),
    "positions": (M2F, {"model.backbone.swin.ape": True}, ("model.backbone.swin.ape", "here it is always false")),
    "no layer": (M2F, {"model.mask_former.dec_layers": 1}, ("model.mask_former.dec_layers: found 1", "at least 2")),
    "heads": (M2F, {"model.mask_former.nheads": 3}, ("model.mask_former.nheads: becomes", "divisor", "256")),
    "widths": (M2F, {"model.sem_seg_head.convs_dim": 128}, ("convs_dim 128", "hidden_dim 256", "same number")),
    "freeze": (M2F, {"train.freeze": ["head"]}, ("train.freeze: no module", "'head'", "sem_seg_head.predictor")),
    "mode": (M2F, {**PANOPTIC, "model.mode": "instance", "dataset.train.type": "ade", "dataset.train.annot_file": "/a.jsonl"},
             ("model.mode: the dataset", "serve semantic", "set model.mode: semantic")),
    "mode of instances": (M2F, {"dataset.type": "coco", "dataset.val.instance_json": "/a.json"},
                          ("model.mode: the dataset", "type coco, which serve instance", "set model.mode: instance")),
    "types": (M2F, {**PANOPTIC, "dataset.val.type": "ade", "dataset.val.annot_file": "/data/v.jsonl"},
              ("dataset.val.type", "train: coco_panoptic", "val: ade")),
    "no annotations": (M2F, {"dataset.train.type": "coco", "dataset.train.img_dir": "/data/i", "model.mode": "instance"},
                       ("dataset.train.instance_json: not given", "type coco")),
    "mixed paths": (M2F, {**PANOPTIC, "dataset.train.img_dir": "images"}, ("dataset.train.img_dir", "'images' is relative")),
    "milestones": (M2F, {"train.optim.milestones": [9, 3]}, ("train.optim.milestones: expected increasing epochs",)),
    "batches": (M2F, {"gen_trt_engine.tensorrt.max_batch_size": 4, "gen_trt_engine.tensorrt.opt_batch_size": 8}, ("batch",)),
    "layers": (M2F, {"gen_trt_engine.tensorrt.layers_precision": ["a:fp32"]}, ("layers_precision", "precision.fp16_keep")),
    "int8": (M2F, {"gen_trt_engine.tensorrt.data_type": "INT8"}, ("data_type: expected one of FP32, FP16",)),
    "backbone": (OF, {"model.backbone.name": "D2RADIO"}, ("model.backbone.name", "take a Swin")),
    "no panoptic": (OF, {"dataset.train.annotations": "/data/a.json"}, ("dataset.train.panoptic: not given",)),
    "lightning": (OF, {"train.precision": 64}, ("train.precision", "found 64")),
    "precision": (OF, {"train.precision": "half"}, ("train.precision: expected", "fp16", "'half'")),
    "lengths": (OF, {"dataset.max_seq_len": 64}, ("dataset.max_seq_len: 64", "context_length is 77")),
    "scales": (OF, {"dataset.min_scale": 3.0}, ("dataset.min_scale: becomes dataset.augmentation.train_scale", "[3.0, 2.0]")),
    "contexts": (OF, {"model.text_encoder.n_ctx": 200}, ("model.text_encoder.n_ctx: becomes", "fewer than")),
    "levels": (DETR, {"model.num_feature_levels": 3}, ("return_interm_indices", "4 levels", "num_feature_levels is 3")),
    "level order": (DETR, {"model.return_interm_indices": [3, 2, 1, 4]}, ("return_interm_indices", "ascending")),
    "extra level alone": (DETR, {"model.return_interm_indices": [4], "model.num_feature_levels": 1}, ("one of 0..3",)),
    "no scales": (DETR, {"dataset.augmentation.scales": []}, ("dataset.augmentation.scales: expected", "at least 1 of them")),
    "crops": (DETR, {"dataset.augmentation.train_random_crop_min": 700}, ("700 is above train_random_crop_max",)),
    "source": (DETR, {"dataset.train_data_sources": [{"image_dir": "/d"}]}, ("a source has the keys image_dir; expected", "json_file")),
    "source key": (DETR, {"dataset.val_data_sources": [{"image_dir": "/d", "json_file": "/j", "json": "/k"}]}, ("a source has the keys", " json,")),
    "source address": (DETR, {"dataset.val_data_sources": [{"image_dir": "s3://d", "json_file": "/j"}]}, ("download it",)),
    "source type": (DETR, {"dataset.val_data_sources": "/data"}, ("dataset.val_data_sources: expected a list",)),
    "infer key": (DETR, {"dataset.infer_data_sources": {"images": "/d"}}, ("dataset.infer_data_sources", "'images'")),
    "infer folder": (DETR, {"dataset.infer_data_sources": {"image_dir": ["/d", 5]}}, ("dataset.infer_data_sources: expected", "[/d, 5]")),
    "infer address": (DETR, {"dataset.infer_data_sources": {"image_dir": "s3://d"}}, ("dataset.infer_data_sources", "s3://d", "download it")),
    "class map": (DETR, {"dataset.infer_data_sources": {"classmap": 5}}, ("dataset.infer_data_sources: expected", "classmap: 5")),
    "refined alone": (DETR, {"model.aux_loss": False}, ("model.aux_loss: becomes model.loss.aux_loss", "with_box_refine")),
    "one class": (DETR, {"dataset.num_classes": 1}, ("dataset.num_classes: expected a whole number, at least 2",)),
    "ids": (DETR, {**SOURCES, "dataset.eval_class_ids": [1]}, ("dataset.eval_class_ids: ids [1]", "template", "evaluate.classes")),
    "colour": (DETR, {"inference.color_map": {"car": "bluish"}}, ("inference.color_map: car", "no colour")),
    "loss": (DETR, {"model.loss_types": ["boxes"]}, ("model.loss_types", "weight 0")),
    "queries": (DETR, {"model.num_queries": 0}, ("model.num_queries: expected a whole number, at least 1",)),
    "model": ("yolo", {"train.num_epochs": 1}, ("--model yolo", "oneformer")),
    "no model": (None, {"train.num_epochs": 1}, ("say which with --model",)),
    "twice": (M2F, {"train.seed": 1, "train": {"seed": 2}}, ("train.seed", "2", "1", "one value")),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_with_advice(name: str, tmp_path: Path) -> None:
    family, values, words = REFUSED[name]
    with pytest.raises(UserError) as caught:
        read(tmp_path, family, values)
    for word in words:
        assert word in str(caught.value)
    assert str(tmp_path / "spec.yaml") in str(caught.value) or name == "model"
    assert [path.name for path in tmp_path.iterdir()] == ["spec.yaml"]


def test_all_mistakes_at_once_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("model:\n  mask_former:\n    num_objects: 3\ntrain:\n  num_epochs: -1\n  optim: {lr: fast}\n")
    with pytest.raises(UserError) as caught:
        import_spec([path], "coco", root=tmp_path)
    lines = str(caught.value).split("\n")
    assert lines[0] == f"{path}: 3 mistakes"
    for line, word in zip(
        lines[1:],
        ("line 3: model.mask_former.num_objects", "line 5: train.num_epochs", "line 6: train.optim.lr"),
        strict=True,
    ):
        assert word in line


def test_paths_are_normalised(tmp_path: Path) -> None:
    done = read(tmp_path, M2F, {**PANOPTIC, "dataset.train.img_dir": "/data/sub/../images/"})
    assert done.converted.values["dataset.train.images"] == "images"
    assert done.converted.data_root == "/data"


# With the files on this machine


def label_map(folder: Path, ids: list[int]) -> str:
    path = folder / "labels.json"
    path.write_text(json.dumps([{"id": number, "name": f"class {number}"} for number in ids]))
    return str(path)


def counted(folder: Path, count: int, contiguous: bool, ids: list[int]) -> dict[str, Any]:
    data = {
        key: f"{folder}/{Path(value).name}" if str(value).startswith("/") else value for key, value in PANOPTIC.items()
    }
    return {
        **data,
        "dataset.label_map": label_map(folder, ids),
        "dataset.contiguous_id": contiguous,
        "model.sem_seg_head.num_classes": count,
    }


@pytest.mark.parametrize(
    ("count", "contiguous", "ids", "words"),
    [
        (2, True, [1, 5, 9], ("2, but the label map has 3 classes", "set model.sem_seg_head.num_classes to 3")),
        (
            8,
            False,
            [1, 5, 9],
            ("8, but with contiguous_id false", "the largest is 9", "at least 9", "contiguous_id to true"),
        ),
    ],
)
def test_too_few_classes_for_the_label_map(
    count: int, contiguous: bool, ids: list[int], words: tuple[str, ...], tmp_path: Path
) -> None:
    """TAO fails on these with an assertion of the GPU in the middle of the training."""
    with pytest.raises(UserError) as caught:
        read(tmp_path, M2F, counted(tmp_path, count, contiguous, ids))
    for word in words:
        assert word in str(caught.value)


def test_room_for_classes_that_do_not_exist_is_not_built(tmp_path: Path) -> None:
    done = read(tmp_path, M2F, counted(tmp_path, 90, True, [1, 5, 9]))
    assert done.converted.values["dataset.num_classes"] == 3
    assert "90 in the file; the label map has 3" in done.report
    done = read(tmp_path, M2F, counted(tmp_path, 90, False, [1, 5, 9]))
    assert done.converted.values["dataset.num_classes"] == 90


def test_a_class_map_that_goes_beyond_num_classes(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("person\ncar\ndog\n")
    values = {
        "dataset.infer_data_sources": {"classmap": str(tmp_path / "classes.txt")},
        "dataset.val_data_sources": [{"image_dir": str(tmp_path), "json_file": str(tmp_path / "a.json")}],
    }
    with pytest.raises(UserError, match=r"dataset.num_classes: 3, but the class map has 3 classes.*set it to 4"):
        read(tmp_path, DETR, {**values, "dataset.num_classes": 3})
    done = read(tmp_path, DETR, {**values, "dataset.num_classes": 4, "dataset.eval_class_ids": [2, 3]})
    assert done.converted.values["dataset.num_classes"] == 3
    assert done.converted.values["evaluate.classes"] == ["car", "dog"]


def test_evaluated_ids_are_named_by_the_annotations(tmp_path: Path) -> None:
    annotations = tmp_path / "a.json"
    annotations.write_text(json.dumps({"categories": [{"id": 1, "name": "person"}, {"id": 7, "name": "train"}]}))
    source = [{"image_dir": str(tmp_path / "images"), "json_file": str(annotations)}]
    done = read(tmp_path, DETR, {"dataset.train_data_sources": source, "dataset.eval_class_ids": [7]})
    assert done.converted.values["evaluate.classes"] == ["train"]
    with pytest.raises(UserError, match=r"ids \[2\] have no names here \(the annotations have no such ids\)"):
        read(tmp_path, DETR, {"dataset.train_data_sources": source, "dataset.eval_class_ids": [7, 2]})
    annotations.write_text(json.dumps({"categories": [{"id": number, "name": "screen"} for number in (1, 7)]}))
    done = read(tmp_path, DETR, {"dataset.train_data_sources": source, "dataset.eval_class_ids": [7]})
    assert done.converted.values["evaluate.classes"] == ["screen (7)"]


# Not refused, and said


def outcome(done: Any, key: str) -> Any:
    return next(outcome for outcome in done.converted.outcomes if outcome.key == key)


def test_disagreeing_gpus_follow_the_larger(tmp_path: Path) -> None:
    done = read(tmp_path, M2F, {"train.num_gpus": 1, "train.gpu_ids": [0, 1]})
    assert done.converted.values["train.num_gpus"] == 2
    assert "the larger counts" in outcome(done, "train.num_gpus").notes[0]


@pytest.mark.parametrize(
    ("family", "key", "value", "fate", "ours"),
    [
        (M2F, "model.mask_former.train_num_points", 3136, Fate.REVIVED, {"model.loss.train_num_points": 3136}),
        (M2F, "model.backbone.swin.embed_dim", 128, Fate.IGNORED, {}),
        (M2F, "train.optim.monitor_name", "val_loss", Fate.IGNORED, {}),
        (OF, "train.optim.lr_scheduler", "Warmuppoly", Fate.REVIVED, {"train.optim.lr_scheduler": "WarmupPoly"}),
        (OF, "train.clip_gradients.clip_value", 0.01, Fate.REVIVED, {"train.clip_grad_norm": 0.01}),
        (OF, "train.accumulate_grad_batches", 4, Fate.IGNORED, {}),
        (OF, "dataset.augmentation.train_min_size", [640], Fate.IGNORED, {}),
        (OF, "dataset.cutmix_prob", 0.5, Fate.IGNORED, {}),
        (DETR, "model.num_select", 300, Fate.REVIVED, {"postprocess.num_select": 300}),
        (DETR, "evaluate.input_width", 640, Fate.IGNORED, {}),
        (DETR, "model.clip_max_norm", 0.5, Fate.IGNORED, {}),
    ],
)
def test_what_tao_ignores_is_named(
    family: str, key: str, value: Any, fate: Fate, ours: dict[str, Any], tmp_path: Path
) -> None:
    done = read(tmp_path, family, {key: value})
    found = outcome(done, key)
    assert (found.fate, found.ours) == (fate, ours)
    assert found.notes
    assert fate.value in done.report


def test_defaults_of_what_tao_ignores_are_not_imposed(tmp_path: Path) -> None:
    values = read(tmp_path, OF, {"train.num_epochs": 3, "dataset.contiguous_id": True}).converted.values
    for key in (
        "train.clip_grad_norm",
        "train.optim.lr_scheduler",
        "train.optim.warmup_iters",
        "model.task_probability.panoptic",
    ):
        assert key not in values
    assert values["train.optim.lr"] == 1e-5


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ('{"categories": [', "line 1, column 17: not valid JSON"),
        ("[1]", "names any"),
        ('{"categories": 3}', "names any"),
        ('{"categories": [{"id": 1}, 3, {"id": [1], "name": "a"}]}', "names any"),
    ],
)
def test_annotations_that_name_no_class(content: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    source = [{"image_dir": str(tmp_path), "json_file": str(tmp_path / "a.json")}]
    with pytest.raises(UserError, match=word):
        read(tmp_path, DETR, {"dataset.val_data_sources": source, "dataset.eval_class_ids": [1]})


def test_a_class_map_that_is_no_text_is_left_to_the_check(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(b"\xff\xfecat\n")
    classmap = {"classmap": str(tmp_path / "names.txt")}
    done = read(tmp_path, DETR, {**SOURCES, "dataset.infer_data_sources": classmap, "dataset.num_classes": 3})
    assert done.converted.values["dataset.num_classes"] == 2


def test_keys_that_another_key_makes_idle(tmp_path: Path) -> None:
    done = read(tmp_path, M2F, {"model.backbone.type": "efficientvit", "model.backbone.swin.type": "large"})
    assert outcome(done, "model.backbone.swin.type").fate is Fate.LEFT_OUT
    done = read(tmp_path, DETR, {"dataset.augmentation.fixed_random_crop": 640, "dataset.augmentation.scales": [480]})
    assert "fixed_random_crop takes its place" in outcome(done, "dataset.augmentation.scales").notes
    done = read(tmp_path, OF, {"train.clip_grad_norm": 0.5, "train.clip_gradients.clip_value": 0.1})
    assert outcome(done, "train.clip_grad_norm").fate is Fate.LEFT_OUT
    assert done.converted.values["train.clip_grad_norm"] == 0.1


def test_names_that_only_the_documents_have(tmp_path: Path) -> None:
    done = read(tmp_path, OF, {"model.object_mask_threshold": 0.3, "train.pretrained_model_path": "m.pth"})
    assert done.converted.values["postprocess.object_mask_threshold"] == 0.3
    assert done.converted.values["train.pretrained_model_path"] == "m.pth"
    assert (
        "TAO's source calls it model.test.object_mask_threshold" in outcome(done, "model.object_mask_threshold").notes
    )


def test_numbers_and_truth_values_may_be_quoted(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("train: {optim: {lr: 2e-4}, num_epochs: '3'}\ndataset: {augmentation: {fixed_padding: 'FALSE'}}\n")
    values = import_spec([path], "coco", model=DETR, root=tmp_path).converted.values
    assert values["train.optim.lr"] == 2e-4
    assert values["train.num_epochs"] == 3
    assert values["dataset.augmentation.fixed_padding"] is None


def test_a_model_is_told_by_its_keys_or_its_name(tmp_path: Path) -> None:
    assert read(tmp_path, None, {"model.one_former.nheads": 8}).converted.family == OF
    assert read(tmp_path, None, {"model_name": "mask2former", "train.num_epochs": 3}).converted.family == M2F
    assert read(tmp_path, None, {"dataset.eval_class_ids": None, "dataset.num_classes": 3}).converted.family == DETR
