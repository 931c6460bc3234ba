"""Post-processing equals the transformers library's image processors on random outputs, wherever their formulas are the authors'.

Where they are not, the inputs are brought to a common ground, which each test names; docs/published.md lists the differences.
Detection is held to theirs in tests/interop/published.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.models.common.mask_postprocess import MaskPostprocess
from tessera.spec.schema import PostprocessSpec
from tessera.structures import Predictions
from tests.models import tiny

transformers = pytest.importorskip("transformers")

CLASSES, QUERIES, IMAGES = 5, 30, 2
THINGS = tiny.CATALOG.thing_ids
STUFF = {3, 4}
CERTAIN = 30.0
"""A logit whose sigmoid, and softmax against its negative, is 1 up to rounding."""
SIZES = {"mask2former": (384, 384), "oneformer": (57, 90)}
"""Mask2Former's processor resizes all masks to 384 x 384 first, OneFormer's does not: masks of these sizes are left alone by both."""


@pytest.fixture(params=SIZES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def processor(family: str, tmp_path: Path) -> Any:
    if family == "mask2former":
        return transformers.Mask2FormerImageProcessor()
    classes = {str(index): {"name": f"class {index}", "isthing": int(index in THINGS)} for index in range(CLASSES)}
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    return transformers.OneFormerImageProcessor(
        repo_path=str(tmp_path), class_info_file="classes.json", num_text=QUERIES
    )


def random_masks(size: tuple[int, int]) -> Tensor:
    """(B, Q, H, W), smooth and large."""
    coarse = torch.randn(IMAGES, QUERIES, 5, 6)
    return 6 * F.interpolate(coarse, size=size, mode="bicubic", align_corners=False)


def theirs(outputs: dict[str, Tensor]) -> SimpleNamespace:
    """Copies: their panoptic formula writes into what it is given."""
    return SimpleNamespace(
        class_queries_logits=outputs["pred_logits"].clone(), masks_queries_logits=outputs["pred_masks"].clone()
    )


def ours(outputs: dict[str, Tensor], size: tuple[int, int], task: str, **spec: object) -> list[Predictions]:
    postprocess = MaskPostprocess("panoptic", tiny.CATALOG, PostprocessSpec(**spec))
    return postprocess(outputs, [tiny.meta(size, size)] * IMAGES, size, task)


def test_semantic(family: str, processor: Any) -> None:
    """Common ground: masks at the final size, because theirs resizes the classes' scores and the authors resize the masks."""
    torch.manual_seed(0)
    size = SIZES[family]
    outputs = {"pred_logits": 3 * torch.randn(IMAGES, QUERIES, CLASSES + 1), "pred_masks": random_masks(size)}
    maps = processor.post_process_semantic_segmentation(theirs(outputs))
    scores = MaskPostprocess("semantic", tiny.CATALOG, PostprocessSpec()).scores(
        outputs, [tiny.meta(size, size)] * IMAGES, size
    )
    for found, expected, score in zip(ours(outputs, size, "semantic"), maps, scores, strict=True):
        assert found.semantic is not None and len(expected.unique()) >= 3
        best, second = score.topk(2, dim=0).values
        assert (best - second)[found.semantic != expected].lt(1e-5).all(), "they differ by more than rounding of a tie"
        assert (found.semantic != expected).float().mean() < 1e-4


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.6])
@pytest.mark.parametrize("family", ["mask2former"], indirect=True)
def test_instances(family: str, processor: Any, threshold: float) -> None:
    """Common ground: as many pairs as queries, things only, no resizing (theirs resizes binary masks), scores above one threshold."""
    torch.manual_seed(1)
    size = SIZES[family]
    outputs = {"pred_logits": 3 * torch.randn(IMAGES, QUERIES, CLASSES + 1), "pred_masks": random_masks(size)}
    answers = processor.post_process_instance_segmentation(
        theirs(outputs), threshold=threshold, return_binary_maps=True
    )
    for found, answer in zip(ours(outputs, size, "instance", test_topk_per_image=QUERIES), answers, strict=True):
        expected = {
            (info["label_id"], mask.bool().numpy().tobytes()): info["score"]
            for info, mask in zip(answer["segments_info"], answer["segmentation"], strict=True)
            if info["label_id"] in THINGS
        }
        assert found.instances is not None and found.instances.masks is not None
        rows = zip(found.instances.labels.tolist(), found.instances.masks, found.instances.scores.tolist(), strict=True)
        assert expected and {
            (label, mask.numpy().tobytes()): score for label, mask, score in rows if score >= threshold
        } == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["oneformer"], indirect=True)
@pytest.mark.parametrize("threshold", [0.05, 0.5])
def test_instances_of_oneformer(family: str, processor: Any, threshold: float) -> None:
    """Theirs shows instances as segments without overlap, of which a query keeps its best class, and scores them by class alone.

    Common ground: masks that do not overlap and are certain, so that their mean probability is 1; each query's best class; the pixels
    of theirs that are foreground.
    """
    torch.manual_seed(2)
    size = SIZES[family]
    stripes = torch.arange(size[1]) * QUERIES // size[1]
    masks = torch.where(stripes == torch.arange(QUERIES)[:, None], CERTAIN, -CERTAIN)
    outputs = {
        "pred_logits": 3 * torch.randn(IMAGES, QUERIES, CLASSES + 1),
        "pred_masks": masks[None, :, None].expand(IMAGES, -1, size[0], -1).contiguous(),
    }
    answers = processor.post_process_instance_segmentation(
        theirs(outputs), task_type="panoptic", is_demo=True, threshold=threshold
    )
    found_by_us = ours(outputs, size, "instance", test_topk_per_image=QUERIES)
    for image, (found, answer) in enumerate(zip(found_by_us, answers, strict=True)):
        scores, pairs = outputs["pred_logits"][image].softmax(-1)[:, :-1].flatten().topk(QUERIES)
        shown = (scores > threshold) & (pairs % CLASSES < len(THINGS))
        foreground = (outputs["pred_masks"][image, pairs[shown] // CLASSES] > 0).any(0)
        segments = {info["id"]: (answer["segmentation"] == info["id"]) & foreground for info in answer["segments_info"]}
        expected = {
            segments[info["id"]].numpy().tobytes(): (info["label_id"], info["score"])
            for info in answer["segments_info"]
            if segments[info["id"]].any()
        }
        best: dict[bytes, tuple[int, float]] = {}
        assert found.instances is not None and found.instances.masks is not None
        rows = zip(found.instances.labels.tolist(), found.instances.masks, found.instances.scores.tolist(), strict=True)
        for label, mask, score in rows:
            if score > threshold:
                best.setdefault(mask.numpy().tobytes(), (label, score))
        assert best.keys() == expected.keys() and len(expected) >= 5
        for mask, (label, score) in expected.items():
            assert best[mask][0] == label and best[mask][1] == pytest.approx(score, abs=1e-5)


def panoptic_outputs(size: tuple[int, int]) -> dict[str, Tensor]:
    """Masks that are certain and overlap freely; class scores of all sizes above one half and below; stuff behind things."""
    labels = torch.cat(
        (torch.randint(3, (QUERIES * 2 // 3,)), torch.randint(3, CLASSES + 1, (QUERIES // 3,)).sort()[0])
    )
    logits = torch.randn(IMAGES, QUERIES, CLASSES + 1)
    logits[:, torch.arange(QUERIES), labels] += 6 * torch.rand(IMAGES, QUERIES)
    coarse = torch.randn(IMAGES, QUERIES, 8, 9) - 1.8
    masks = F.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
    return {"pred_logits": logits, "pred_masks": CERTAIN * masks.sign()}


@pytest.mark.parametrize(("threshold", "overlap"), [(0.55, 0.3), (0.6, 0.8), (0.9, 0.8)])
def test_panoptic(family: str, processor: Any, threshold: float, overlap: float) -> None:
    """Theirs compares score times mask probability with one half, and gives a segment the pixels where no mask is foreground, too.

    Common ground: certain masks and thresholds above one half, where score times probability is foreground where the probability is;
    the pixels of theirs that are foreground; things before stuff, because theirs gives a new segment the number of an old one after
    it has merged stuff.
    """
    torch.manual_seed(3)
    size = SIZES[family]
    outputs = panoptic_outputs(size)
    answers = processor.post_process_panoptic_segmentation(
        theirs(outputs), threshold=threshold, overlap_mask_area_threshold=overlap, label_ids_to_fuse=STUFF
    )
    spec = {"object_mask_threshold": threshold, "overlap_threshold": overlap}
    segments = merged = 0
    for image, (found, answer) in enumerate(zip(ours(outputs, size, "panoptic", **spec), answers, strict=True)):
        scores, labels = outputs["pred_logits"][image].softmax(-1).max(-1)
        kept = (labels != CLASSES) & (scores > threshold)
        weighted = scores[kept].view(-1, 1, 1) * outputs["pred_masks"][image, kept].sigmoid()
        foreground = weighted.max(0).values >= 0.5
        expected = torch.where(foreground, answer["segmentation"], 0)
        label_of = {info["id"]: info["label_id"] for info in answer["segments_info"]}
        assert found.panoptic is not None
        assert [segment.label for segment in found.panoptic.segments] == [
            label_of[number] for number in sorted(set(expected.unique().tolist()) - {0})
        ]
        for segment in found.panoptic.segments:
            own = found.panoptic.ids == segment.id
            (number,) = expected[own].unique().tolist()
            assert torch.equal(expected == number, own)
            best = max(info["score"] for info in answer["segments_info"] if info["id"] == number)
            assert segment.score == pytest.approx(best, abs=1e-5)
        assert torch.equal(found.panoptic.ids == 0, expected == 0)
        segments += len(found.panoptic.segments)
        merged += len(answer["segments_info"]) - len(label_of)
    assert segments >= 4
    assert merged or threshold > 0.6, "no stuff was merged"
