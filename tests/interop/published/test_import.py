"""Published checkpoints are taken over whole, in every form that they are published in, and what has no explanation is an error."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tessera.files import UserError
from tessera.interop.published import Imported, read_state, take_over
from tessera.models.deformable_detr.network import DeformableDetr
from tessera.models.mask2former.network import Mask2Former
from tessera.models.oneformer.network import OneFormer
from tessera.spec.networks import BackboneSpec, DeformableDetrSpec, Mask2FormerSpec, OneFormerSpec, SwinSpec
from tessera.structures import Category, ClassCatalog
from tests.interop.published import originals
from tests.interop.published import test_deformable_detr as detr
from tests.interop.published import test_mask2former as m2f
from tests.interop.published import test_oneformer as one
from tests.models import tiny

CATALOG = tiny.CATALOG
"""Five classes, as the small models of the transformers library have."""
SWIN_LARGE: dict[str, Any] = {"dim": 192, "depths": (2, 2, 18, 2), "heads": (6, 12, 24, 48), "window": 12}
RESNET = BackboneSpec(name="resnet50", drop_path_rate=0.0)


def classes(count: int) -> ClassCatalog:
    return ClassCatalog(tuple(Category(index + 1, f"class {index}", (0, 0, 0), True) for index in range(count)))


def load(network: nn.Module, imported: Imported) -> nn.Module:
    network.load_state_dict(imported.state)
    return network.eval()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder as the transformers library saves one, by family."""
    folders: dict[str, Path] = {}

    def saved(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            models = {
                "mask2former": m2f.published,
                "oneformer": one.published,
                "deformable_detr": lambda: detr.published(False),
            }
            models[family]().save_pretrained(folders[family])
        return folders[family]

    return saved


# --- outputs -----------------------------------------------------------------------------------------------------------


def assert_same_masks(network: Any, model: Any, task: Tensor | None = None) -> None:
    torch.manual_seed(5)
    images = torch.rand(2, 3, 72, 104)
    theirs = {} if task is None else {"task_inputs": task, "text_inputs": torch.zeros(2, 9, 77, dtype=torch.int64)}
    with torch.no_grad():
        found = network(images) if task is None else network(images, task=task)
        expected = model(network.normalise(images), **theirs)
    torch.testing.assert_close(found["pred_masks"], expected.masks_queries_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["pred_logits"], expected.class_queries_logits, atol=1e-4, rtol=1e-4)


def test_mask2former_of_the_transformers_library(hub: Callable[[str], Path]) -> None:
    network = Mask2Former(m2f.SPEC, 5)
    imported = take_over(hub("mask2former"), network, m2f.SPEC, CATALOG)
    assert imported.form.title == "Mask2Former, transformers library" and not imported.afresh
    assert_same_masks(load(network, imported), m2f.published())


def test_oneformer_of_the_transformers_library(hub: Callable[[str], Path]) -> None:
    """Saved without its text encoder, as it is by default."""
    network = one.build()
    imported = take_over(hub("oneformer"), network, one.SPEC, CATALOG)
    given = {"text.logit_scale"}
    assert {name for name, _ in imported.afresh} == {
        name for name in network.state_dict() if one.oneformer.is_text(name)
    } - given
    network.load_state_dict(imported.state, strict=False)
    assert_same_masks(network.eval(), one.published(), one.tasks("panoptic", "instance"))


def test_deformable_detr_of_the_transformers_library(hub: Callable[[str], Path]) -> None:
    spec = detr.spec(False)
    network = DeformableDetr(spec, 5)
    imported = take_over(hub("deformable_detr"), network, spec, CATALOG)
    images, padding = detr.padded_batch((75, 109), [(75, 109), (50, 60)])
    detr.assert_same(load(network, imported), detr.published(False), images, padding)


def test_mask2former_of_the_original_code(tmp_path: Path) -> None:
    """A detectron2 pickle of arrays, of an earlier version."""
    state = one.original_names(m2f.ours(m2f.published()))
    old = {}
    for name, value in state.items():
        name = name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.")
        old["sem_seg_head.predictor.static_query.weight" if name == "query_feat.weight" else name] = value.numpy()
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": old, "__author__": "somebody", "matching_heuristics": True}))
    network = Mask2Former(m2f.SPEC, 5)
    imported = take_over(path, network, m2f.SPEC, CATALOG)
    assert dict(imported.dropped) == {
        "criterion.empty_weight": "a constant of the loss (model.loss.no_object_weight)",
        "backbone.layers.0.blocks.0.attn.relative_position_index": "follows from the window size",
    }
    assert_same_masks(load(network, imported), m2f.published())


def test_oneformer_of_the_original_code(tmp_path: Path) -> None:
    trained = one.ours(one.published(training=True))
    torch.save({"model": one.original_names(trained), "iteration": 3}, tmp_path / "oneformer.pth")
    network = one.build()
    imported = take_over(tmp_path / "oneformer.pth", network, one.SPEC, CATALOG)
    assert imported.form.title == "OneFormer, original code" and not imported.afresh
    assert_same_masks(load(network, imported), one.published(training=True), one.tasks("semantic", "instance"))
    silent = one.build(loss={"contrastive_weight": 0.0})
    without = take_over(tmp_path / "oneformer.pth", silent, silent.spec, CATALOG)
    assert ("prompt_ctx.weight", "read in training only, and model.loss.contrastive_weight is 0") in without.dropped
    load(silent, without)


@pytest.mark.parametrize("refine", [False, True], ids=["shared heads", "refined"])
def test_deformable_detr_of_the_original_code(tmp_path: Path, refine: bool) -> None:
    """Its files keep their options in an ``argparse.Namespace`` and are older than PyTorch's zip format."""
    content = {
        "model": detr.to_original(detr.published(refine).state_dict()),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 49,
        "args": argparse.Namespace(lr=2e-4, lr_backbone_names=["backbone.0"], masks=False, num_queries=12),
    }
    path = tmp_path / "r50_deformable_detr-checkpoint.pth"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    spec = detr.spec(refine)
    network = DeformableDetr(spec, 5)
    imported = take_over(path, network, spec, CATALOG)
    copies = [name for name, reason in imported.dropped if reason.startswith("equal to another tensor")]
    assert len(copies) == (detr.LAYERS * 6 if refine else (detr.LAYERS - 1) * 8)
    images, padding = detr.padded_batch((64, 96), [(64, 96)])
    detr.assert_same(load(network, imported), detr.published(refine), images, padding)


# --- complete lists of names, at the published sizes --------------------------------------------------------------------


def meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def take_names(
    tmp_path: Path, shapes: originals.Shapes, network: nn.Module, spec: Any, count: int, **options: bool
) -> Imported:
    """Through ``take_over``, without a file of a gigabyte."""
    path = tmp_path / "names.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tessera.interop.published.importing.read_state", lambda path: originals.tensors(shapes))
        imported = take_over(path, network, spec, classes(count), **options)
    assert imported.state.keys() | {name for name, _ in imported.afresh} == network.state_dict().keys()
    assert {old for old, _ in imported.renamed} | {old for old, _ in imported.dropped} == shapes.keys()
    return imported


@pytest.mark.parametrize("early", [False, True], ids=["version 2", "before"])
def test_names_of_mask2former_swin_large(tmp_path: Path, early: bool) -> None:
    """COCO panoptic with 200 queries: maskformer2_swin_large_IN21k_384_bs16_100ep."""
    backbone = originals.swin("backbone", **SWIN_LARGE)
    shapes = originals.mask2former(backbone, [192, 384, 768, 1536], queries=200, classes=133)
    spec = Mask2FormerSpec.model_validate(
        {"backbone": {"name": "swin_large", "swin": {"window_size": 12}}, "decoder": {"num_object_queries": 200}}
    )
    network = meta(lambda: Mask2Former(spec, 133))
    imported = take_names(tmp_path, originals.before_version_2(shapes) if early else shapes, network, spec, 133)
    assert len(imported.dropped) == 1 + sum(SWIN_LARGE["depths"]) and not imported.afresh


def test_names_of_mask2former_resnet(tmp_path: Path) -> None:
    """COCO instance: maskformer2_R50_bs16_50ep."""
    backbone = originals.detectron2_resnet50("backbone")
    shapes = originals.mask2former(backbone, [256, 512, 1024, 2048], queries=100, classes=80)
    spec = Mask2FormerSpec(backbone=RESNET, mode="instance")
    network = meta(lambda: Mask2Former(spec, 80))
    imported = take_names(tmp_path, shapes, network, spec, 80)
    table = dict(imported.renamed)
    for old, new in (
        ("backbone.stem.conv1.norm.running_var", "backbone.net.bn1.running_var"),
        ("backbone.res4.5.conv2.weight", "backbone.net.layer3.5.conv2.weight"),
        ("backbone.res5.0.shortcut.weight", "backbone.net.layer4.0.downsample.0.weight"),
        ("backbone.res2.0.shortcut.norm.bias", "backbone.net.layer1.0.downsample.1.bias"),
        ("sem_seg_head.pixel_decoder.adapter_1.norm.weight", "pixel_decoder.lateral.1.weight"),
        ("sem_seg_head.predictor.transformer_ffn_layers.8.linear1.bias", "decoder.layers.8.linear1.bias"),
        ("sem_seg_head.predictor.class_embed.weight", "decoder.heads.class_embed.weight"),
    ):
        assert table[old] == new
    packed = "sem_seg_head.predictor.transformer_self_attention_layers.4.self_attn.in_proj_bias"
    assert [new for old, new in imported.renamed if old == packed] == [
        f"decoder.layers.4.self_attn.{part}_proj.bias" for part in "qkv"
    ]


def test_names_of_oneformer_swin_large(tmp_path: Path) -> None:
    """COCO: 150_16_swin_l_oneformer_coco_100ep."""
    shapes = originals.oneformer(originals.swin("backbone", **SWIN_LARGE), [192, 384, 768, 1536], 150, 133)
    spec = OneFormerSpec.model_validate({"backbone": {"name": "swin_large", "swin": {"window_size": 12}}})
    network = meta(lambda: OneFormer(spec, classes(133).names))
    assert not take_names(tmp_path, shapes, network, spec, 133).afresh


@pytest.mark.parametrize("refine", [False, True], ids=["shared heads", "refined"])
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_names_of_deformable_detr(tmp_path: Path, refine: bool, norm: str) -> None:
    """r50_deformable_detr and r50_deformable_detr_plus_iterative_bbox_refinement."""
    backbone = BackboneSpec.model_validate(RESNET.model_dump() | {"norm": norm})
    spec = DeformableDetrSpec(backbone=backbone, with_box_refine=refine)
    imported = take_names(tmp_path, originals.deformable_detr(refine), meta(lambda: DeformableDetr(spec, 91)), spec, 91)
    assert len(imported.dropped) == (36 if refine else 40)
    assert all(name.endswith(".num_batches_tracked") for name, _ in imported.afresh)
    assert bool(imported.afresh) == (norm == "batch")


# --- class heads -------------------------------------------------------------------------------------------------------


def test_other_classes(hub: Callable[[str], Path]) -> None:
    three = classes(3)
    network = Mask2Former(m2f.SPEC, 3)
    with pytest.raises(
        UserError, match=r"class heads have 5 classes, the experiment's dataset has 3\. .*--reset-heads or"
    ):
        take_over(hub("mask2former"), network, m2f.SPEC, three)
    with pytest.raises(UserError, match="only published Deformable DETR counts its classes by category id"):
        take_over(hub("mask2former"), network, m2f.SPEC, three, classes_by_id=True)
    imported = take_over(hub("mask2former"), network, m2f.SPEC, three, reset_heads=True)
    heads = {"decoder.heads.class_embed.weight", "decoder.heads.class_embed.bias"}
    assert {name for name, _ in imported.afresh} == heads
    assert imported.state.keys() == network.state_dict().keys() - heads
    assert "2 not taken from the file: class heads start afresh (--reset-heads)" in imported.describe()


def test_no_object_stays_last(hub: Callable[[str], Path]) -> None:
    network = Mask2Former(m2f.SPEC, 5)
    imported = take_over(hub("mask2former"), network, m2f.SPEC, CATALOG)
    assert torch.equal(imported.state["decoder.heads.class_embed.weight"], m2f.published().class_predictor.weight)
    assert "5 classes in the order of the dataset (class 0, class 1, class 2, ...)" in imported.describe()


def test_rows_of_category_ids(hub: Callable[[str], Path]) -> None:
    """Published Deformable DETR has a row for every number up to the largest category id."""
    spec = detr.spec(False)
    ids = ClassCatalog(
        tuple(replace(category, id=number) for category, number in zip(CATALOG.categories, (1, 4), strict=False))
    )
    network = DeformableDetr(spec, 2)
    with pytest.raises(UserError, match=r"have 5 classes, the experiment's dataset has 2\. .*--classes-by-id"):
        take_over(hub("deformable_detr"), network, spec, ids)
    imported = take_over(hub("deformable_detr"), network, spec, ids, classes_by_id=True)
    theirs = detr.published(False).class_embed[0]
    assert torch.equal(imported.state["decoder.class_embed.0.weight"], theirs.weight[[1, 4]])
    assert torch.equal(imported.state["decoder.class_embed.0.bias"], theirs.bias[[1, 4]])
    assert "2 of 5 rows" in imported.describe()
    with pytest.raises(UserError, match=r"rows 0 to 4, but the dataset has a category with id 5"):
        take_over(hub("deformable_detr"), DeformableDetr(spec, 5), spec, CATALOG, classes_by_id=True)


# --- what does not fit -------------------------------------------------------------------------------------------------


def changed(hub: Callable[[str], Path], folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    state = load_file(hub("mask2former") / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


QUERY = "model.transformer_module.queries_embedder.weight"
TABLE = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(QUERY), r"1 missing: query_embed\.weight"),
        (
            lambda state: state.update({"model.neck.weight": torch.ones(2)}),
            r"1 that the network does not have: model\.neck\.weight",
        ),
        (
            lambda state: state.update({QUERY: torch.zeros(20, 64)}),
            r"query_embed\.weight is \(20, 64\), expected \(12, 64\) \(set model\.decoder\.num_object_queries: 20\)",
        ),
    ],
    ids=["missing", "left over", "another shape"],
)
def test_what_has_no_reason(
    hub: Callable[[str], Path], tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    path = changed(hub, tmp_path, change)
    with pytest.raises(UserError, match=rf"(?s)not of this experiment's sizes; nothing was written.*{message}"):
        take_over(path, Mask2Former(m2f.SPEC, 5), m2f.SPEC, CATALOG)


def test_another_window(hub: Callable[[str], Path]) -> None:
    swin = SwinSpec.model_validate(m2f.SPEC.backbone.swin.model_dump() | {"window_size": 3})
    spec = m2f.SPEC.model_copy(update={"backbone": m2f.SPEC.backbone.model_copy(update={"swin": swin})})
    with pytest.raises(
        UserError, match=r"bias_table is \(49, 1\), expected \(25, 1\) \(set model\.backbone\.swin\.window_size: 4\)"
    ):
        take_over(hub("mask2former"), Mask2Former(spec, 5), spec, CATALOG)


def test_what_no_shape_shows(hub: Callable[[str], Path], tmp_path: Path) -> None:
    """Numbers of heads change every output and no tensor: config.json is asked."""
    decoder = m2f.SPEC.decoder.model_copy(update={"nheads": 8})
    spec = m2f.SPEC.model_copy(update={"decoder": decoder})
    with pytest.raises(UserError, match=r"num_attention_heads is 4, but the experiment's model\.decoder\.nheads is 8"):
        take_over(hub("mask2former"), Mask2Former(spec, 5), spec, CATALOG)
    alone = changed(hub, tmp_path, lambda state: None)
    (note,) = (note for note in take_over(alone, Mask2Former(m2f.SPEC, 5), m2f.SPEC, CATALOG).notes if "told" in note)
    assert "model.pixel_decoder.nheads is 4, model.decoder.nheads is 4, model.decoder.pre_norm is False" in note
    assert not any(
        "told" in note for note in take_over(hub("mask2former"), Mask2Former(m2f.SPEC, 5), m2f.SPEC, CATALOG).notes
    )


def test_another_family(hub: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"holds a Mask2Former, transformers library, but .*model\.name is oneformer"):
        take_over(hub("mask2former"), one.build(), one.SPEC, CATALOG)


def test_unknown_form(tmp_path: Path) -> None:
    torch.save({"module.stem.weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError) as caught:
        take_over(tmp_path / "other.pth", Mask2Former(m2f.SPEC, 5), m2f.SPEC, CATALOG)
    message = str(caught.value)
    assert "is of no known form; its 1 tensors have names like stem.weight; looked for" in message
    for mark in (
        "task_mlp.*",
        "model.task_encoder.*",
        "sem_seg_head.predictor.query_feat.*",
        "transformer.encoder.layers.0",
    ):
        assert mark in message
    torch.save(Mask2Former(m2f.SPEC, 5).state_dict(), tmp_path / "ours.pth")
    with pytest.raises(UserError, match=r"has this project's own names: set train\.pretrained_model_path"):
        take_over(tmp_path / "ours.pth", Mask2Former(m2f.SPEC, 5), m2f.SPEC, CATALOG)


def test_folders(hub: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder without model\.safetensors or pytorch_model\.bin"):
        read_state(tmp_path)
    state = load_file(hub("mask2former") / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert read_state(tmp_path).keys() == state.keys()


def test_every_name_is_reported(hub: Callable[[str], Path]) -> None:
    imported = take_over(hub("mask2former"), Mask2Former(m2f.SPEC, 5), m2f.SPEC, CATALOG)
    given = load_file(hub("mask2former") / "model.safetensors")
    assert {old for old, _ in imported.renamed} | {old for old, _ in imported.dropped} == given.keys()
    text = imported.describe(verbose=True)
    assert all(name in text for name in given)
    assert len(imported.describe().splitlines()) < 8


def test_tensors_forget_their_past(hub: Callable[[str], Path], tmp_path: Path) -> None:
    imported = take_over(hub("mask2former"), Mask2Former(m2f.SPEC, 5), m2f.SPEC, CATALOG)
    assert {type(value) for value in imported.state.values()} == {Tensor}
    torch.save(imported.state, tmp_path / "state.pth")
    assert json.dumps(sorted(torch.load(tmp_path / "state.pth", weights_only=True))) == json.dumps(
        sorted(imported.state)
    )
