"""Post-processing equals upstream's formulas written out one query at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.models.common import mask_postprocess
from tessera.models.common.mask_postprocess import MaskPostprocess
from tessera.spec.schema import PostprocessSpec
from tessera.structures import Predictions
from tests.models import tiny

INPUT, RESIZED, ORIGINAL = (64, 96), (57, 90), (83, 131)
THINGS = (0, 1, 2)


def random_outputs(queries: int = 12, classes: int = 5) -> dict[str, Tensor]:
    torch.manual_seed(0)
    smooth = F.interpolate(torch.randn(1, queries, 4, 6), size=(16, 24), mode="bicubic") * 6
    return {"pred_logits": 4 * torch.randn(1, queries, classes + 1), "pred_masks": smooth}


def predict(outputs: dict[str, Tensor], **spec: object) -> Predictions:
    postprocess = MaskPostprocess("panoptic", tiny.CATALOG, PostprocessSpec(**spec))
    (found,) = postprocess(outputs, [tiny.meta(ORIGINAL, RESIZED)], INPUT)
    return found


def full_masks(outputs: dict[str, Tensor]) -> Tensor:
    padded = F.interpolate(outputs["pred_masks"], size=INPUT, mode="bilinear", align_corners=False)
    cropped = padded[..., : RESIZED[0], : RESIZED[1]]
    return F.interpolate(cropped, size=ORIGINAL, mode="bilinear", align_corners=False)[0]


@pytest.fixture(params=[2**24, 1], ids=["one chunk", "query by query"])
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mask_postprocess, "CHUNK", request.param)


@pytest.mark.usefixtures("_chunk")
def test_semantic_equals_the_sum_over_queries():
    outputs = random_outputs()
    share = full_masks(outputs).sigmoid()
    probability = outputs["pred_logits"][0].softmax(-1)[:, :-1]
    score = torch.zeros(5, *ORIGINAL)
    for query in range(12):
        for label in range(5):
            score[label] += probability[query, label] * share[query]
    found = predict(outputs).semantic
    assert found is not None
    different = found != score.argmax(0)
    top = score.topk(2, dim=0).values
    assert (top[0] - top[1])[different].lt(1e-5).all()  # rounding may decide a tie
    assert different.float().mean() < 1e-3


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize(("mask_threshold", "overlap"), [(0.4, 0.5), (0.8, 0.8), (0.0, 0.0), (1.0, 0.5)])
def test_panoptic_equals_upstream(mask_threshold: float, overlap: float):
    outputs = random_outputs()
    scores, labels = outputs["pred_logits"][0].softmax(-1).max(-1)
    share = full_masks(outputs).sigmoid()
    kept = [q for q in range(12) if labels[q] != 5 and scores[q] > mask_threshold]
    ids = torch.zeros(ORIGINAL, dtype=torch.int32)
    segments: list[tuple[int, int]] = []
    stuff: dict[int, int] = {}
    if kept:
        owner = torch.stack([scores[q] * share[q] for q in kept]).argmax(0)
        for k, q in enumerate(kept):
            own, full = owner == k, share[q] >= 0.5
            mask = own & full
            if not own.any() or not full.any() or not mask.any() or own.sum() / full.sum() < overlap:
                continue
            label = int(labels[q])
            if label not in THINGS and label in stuff:
                ids[mask] = stuff[label]
                continue
            segments.append((len(segments) + 1, label))
            ids[mask] = len(segments)
            if label not in THINGS:
                stuff[label] = len(segments)
    found = predict(outputs, object_mask_threshold=mask_threshold, overlap_threshold=overlap).panoptic
    assert found is not None
    assert torch.equal(found.ids, ids)
    assert [(segment.id, segment.label) for segment in found.segments] == segments
    assert {int(i) for i in ids.unique()} - {0} == {segment.id for segment in found.segments}
    assert all(mask_threshold < segment.score <= 1 for segment in found.segments)
    assert mask_threshold < 1.0 or not segments


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("topk", [5, 60, 1000])
def test_instances_equal_upstream(topk: int):
    outputs = random_outputs()
    probability = outputs["pred_logits"][0].softmax(-1)[:, :-1]
    masks = full_masks(outputs)
    ranked = sorted(((float(probability[q, c]), q, c) for q in range(12) for c in range(5)), reverse=True)[:topk]
    expected = []
    for score, query, label in ranked:
        inside = masks[query] > 0
        if label in THINGS and inside.any():
            quality = float(masks[query].sigmoid()[inside].sum() / (inside.sum() + 1e-6))
            expected.append((score * quality, label, inside))
    expected.sort(key=lambda row: -row[0])
    found = predict(outputs, test_topk_per_image=topk).instances
    assert found is not None and found.masks is not None
    assert len(found.scores) == len(expected) > 0
    torch.testing.assert_close(found.scores, torch.tensor([row[0] for row in expected]), atol=1e-5, rtol=1e-4)
    assert found.labels.tolist() == [row[1] for row in expected]
    for mask, box, (_, _, inside) in zip(found.masks, found.boxes, expected, strict=True):
        assert torch.equal(mask, inside)
        rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_padding_never_shows():
    """A mask that is foreground in the padding alone is empty."""
    outputs = random_outputs()
    outputs["pred_masks"][:] = -9.0
    outputs["pred_masks"][..., 15:, :] = 9.0  # rows 60..63 of the input, the image ends at 57
    found = predict(outputs)
    assert found.instances is not None and len(found.instances.scores) == 0
    assert found.panoptic is not None and not found.panoptic.segments


def test_large_images_need_little_memory():
    """100 queries at 1000 x 1000: masks in fp32 alone would be 400 MB several times over."""
    resource = pytest.importorskip("resource")
    outputs = {"pred_logits": torch.randn(1, 100, 6), "pred_masks": torch.randn(1, 100, 64, 64)}
    postprocess = MaskPostprocess("panoptic", tiny.CATALOG, PostprocessSpec(object_mask_threshold=0.3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    postprocess(outputs, [tiny.meta((1000, 1000), (256, 256))], (256, 256))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20 < 1.5  # GiB
