"""The gate must let equal outputs pass and stop every kind of wrong ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tessera.deploy.parity import Comparison, ParityError, check_parity, compare_predictions
from tessera.files import UserError
from tessera.inference import load_predictor
from tessera.inference.predictor import Predictor
from tessera.provenance import Header
from tessera.spec.networks import Mode
from tessera.spec.schema import Spec
from tessera.structures import Batch, ImageMeta, Instances, Panoptic, Predictions, Segment
from tests.deploy.conftest import CATALOG, EXPERIMENT, make_spec


class Fake(Predictor):
    """Logits and masks that follow from the image alone, and then whatever ``wrong`` makes of them."""

    runtime = "onnx"

    def __init__(
        self,
        spec: Spec,
        wrong: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda found: found,
        precision: str = "fp32",
        max_batch: int | None = None,
    ) -> None:
        super().__init__(
            Header("export", EXPERIMENT, spec, {}, CATALOG, precision, facts={}),
            lambda outputs, metas, size, task=None: [],
            ["images"],
            max_batch=max_batch,
        )
        self.wrong = wrong
        self.batches: list[int] = []

    def outputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        images = inputs["images"]
        self.batches.append(len(images))
        masks = images[:, :, ::4, ::4] - 0.5
        logits = images.mean((2, 3)).unsqueeze(1) * torch.tensor([[1.0, -2.0, 3.0], [4.0, 1.0, -1.0]])
        return self.wrong({"pred_logits": logits, "pred_masks": masks})


def loader(sizes: list[tuple[int, int, int]], seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Batch(torch.rand(b, 3, h, w, generator=generator), torch.zeros(b, h, w, dtype=torch.bool), [], None, None)
        for b, h, w in sizes
    ]


def test_equal_outputs_pass_alone_and_in_batches() -> None:
    spec = make_spec()
    candidate = Fake(spec)
    report = check_parity(Fake(spec), candidate, loader([(1, 32, 32), (2, 32, 64), (3, 32, 64)]), spec)
    assert candidate.batches == [1, 2, 1, 1, 1, 3]
    assert report["images"] == spec.parity.images == 4
    assert report["batch_sizes"] == [1, 2, 3]
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    for output in report["differences"].values():
        assert output["max_abs"] == output["mean_abs"] == output["share_of_std"] == 0
        assert output["cosine"] == pytest.approx(1)
        assert output["agreement"] == 1


def test_fixed_batch_is_never_exceeded() -> None:
    spec = make_spec()
    candidate = Fake(spec, max_batch=1)
    assert check_parity(Fake(spec), candidate, loader([(4, 32, 32)]), spec)["batch_sizes"] == [1]
    assert candidate.batches == [1, 1, 1, 1]


def test_numbers_equal_their_definitions() -> None:
    spec = make_spec(parity={"images": 2, "tolerance": 10.0})
    noise = torch.Generator().manual_seed(3)
    kept: list[dict[str, Tensor]] = []

    def noisy(found: dict[str, Tensor]) -> dict[str, Tensor]:
        kept.append({k: v + 0.3 * torch.randn(v.shape, generator=noise) for k, v in found.items()})
        return kept[-1]

    images = loader([(2, 32, 32)])
    report = check_parity(Fake(spec), Fake(spec, noisy, max_batch=1), images, spec)["differences"]
    expected = Fake(spec).outputs({"images": images[0].images})
    for name, wanted in expected.items():
        found = torch.cat([k[name] for k in kept])
        difference = (wanted - found).abs().double()
        std = wanted.double().std(correction=0).item()
        assert report[name]["max_abs"] == pytest.approx(difference.max().item())
        assert report[name]["mean_abs"] == pytest.approx(difference.mean().item())
        assert report[name]["std"] == pytest.approx(std, rel=1e-5)
        assert report[name]["share_of_std"] == pytest.approx(difference.flatten(1).mean(1).max().item() / std, rel=1e-5)
        cosine = torch.cosine_similarity(wanted.double().flatten(), found.double().flatten(), dim=0).item()
        assert report[name]["cosine"] == pytest.approx(cosine)
    decisions = (expected["pred_masks"] > 0) == (torch.cat([k["pred_masks"] for k in kept]) > 0)
    assert report["pred_masks"]["agreement"] == pytest.approx(decisions.double().mean().item())
    assert report["pred_masks"]["agreement"] < 1


def test_the_class_of_a_pixel_is_decided_over_the_classes() -> None:
    decided, otherwise = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)
    decided[:, 0], otherwise[:, 0] = 1.0, 1.0
    otherwise[:, 1, 0, 0] = 2.0
    comparison = Comparison()
    comparison.add({"logits": decided}, {"logits": otherwise})
    assert comparison.to_json()["logits"]["agreement"] == pytest.approx(11 / 12)


def masks(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda found: {**found, "pred_masks": change(found["pred_masks"])}


def second_image_wrong(x: Tensor) -> Tensor:
    return torch.cat([x[:1], x[1:].flip(-1)])


WRONG = [
    pytest.param(masks(torch.zeros_like), "all values are zero", id="zeros"),
    pytest.param(masks(lambda x: torch.full_like(x, 0.25)), "all values are equal", id="constant"),
    pytest.param(masks(lambda x: x * float("nan")), "not finite", id="nan"),
    pytest.param(masks(lambda x: x / 0), "not finite", id="infinite"),
    pytest.param(masks(lambda x: x * 1.01), "tolerance 0.001", id="one per cent off"),
    pytest.param(masks(lambda x: x.flip(-1)), "tolerance 0.001", id="mirrored"),
    pytest.param(masks(second_image_wrong), "tolerance 0.001", id="wrong only beyond the first of a batch"),
    pytest.param(masks(lambda x: x[..., 1:]), "has the shape", id="shape"),
    pytest.param(lambda f: {"pred_masks": f["pred_masks"], "pred_logits": f["pred_logits"]}, "outputs are", id="order"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_wrong_outputs_are_stopped(wrong: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str) -> None:
    spec = make_spec()
    with pytest.raises(ParityError, match=message) as caught:
        check_parity(Fake(spec), Fake(spec, wrong), loader([(4, 32, 32)]), spec)
    assert "pred_masks" in str(caught.value)
    if message != "outputs are":
        assert "pred_logits:" not in str(caught.value)


def test_one_wrong_image_of_many_is_not_averaged_away() -> None:
    spec = make_spec(parity={"images": 40})
    calls = iter(range(100))
    change = masks(lambda x: x + 0.002 if next(calls) == 5 else x)
    with pytest.raises(ParityError, match="pred_masks: mean absolute difference"):
        check_parity(Fake(spec), Fake(spec, change), loader([(40, 32, 32)]), spec)


def test_half_precision_has_its_own_tolerance() -> None:
    spec = make_spec()
    slightly = masks(lambda x: x * 1.01)
    report = check_parity(Fake(spec), Fake(spec, slightly, precision="fp16"), loader([(2, 32, 32)]), spec)
    assert report["tolerance"] == spec.parity.tolerance_fp16
    with pytest.raises(UserError, match="int8"):
        check_parity(Fake(spec), Fake(spec, precision="int8"), loader([(2, 32, 32)]), spec)


def test_a_broken_reference_proves_nothing() -> None:
    spec = make_spec()
    with pytest.raises(ParityError, match="PyTorch's own values are all equal"):
        check_parity(Fake(spec, masks(torch.zeros_like)), Fake(spec), loader([(1, 32, 32)]), spec)
    with pytest.raises(ParityError, match="PyTorch's own values are not finite"):
        check_parity(Fake(spec, masks(lambda x: x / 0)), Fake(spec), loader([(1, 32, 32)]), spec)


def test_no_images_is_an_error() -> None:
    spec = make_spec()
    with pytest.raises(UserError, match="no images"):
        check_parity(Fake(spec), Fake(spec), [], spec)


class Answers(Fake):
    """The same prediction for every image."""

    def __init__(self, runtime: str, mode: Mode, answer: Predictions) -> None:
        super().__init__(make_spec(), precision="fp32")
        self.runtime, self.mode, self.answer = runtime, mode, answer  # type: ignore[misc]  # two runtimes of one class

    def __call__(self, batch: Batch) -> list[Predictions]:
        return [replace(self.answer, meta=meta) for meta in batch.metas]


META = ImageMeta(1, "1.png", (2, 4), (2, 4))


def agreement(mode: Mode, one: Predictions, two: Predictions) -> float | None:
    batch = Batch(torch.zeros(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.bool), [META], None, None)
    answers = Answers("torch", mode, one), Answers("onnx", mode, two)
    found: float | None = compare_predictions(*answers, [batch], [batch], make_spec())["agreement"]
    return found


def instances(*found: tuple[float, int, list[float]]) -> Predictions:
    boxes = torch.tensor([box for _, _, box in found]).view(-1, 4)
    scores, labels = (
        torch.tensor([score for score, *_ in found]),
        torch.tensor([label for _, label, _ in found], dtype=torch.long),
    )
    return Predictions(META, instances=Instances(scores, labels, boxes, None))


def test_pixels_agree_class_by_class() -> None:
    """Of 8 pixels 7 are alike, but of the small class none."""
    one, two = torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long)
    one[0, 0] = 1
    assert agreement("semantic", Predictions(META, one), Predictions(META, one)) == 1
    assert agreement("semantic", Predictions(META, one), Predictions(META, two)) == pytest.approx((7 / 8 + 0) / 2)


def test_segments_agree_by_class_whatever_their_ids() -> None:
    def panoptic(numbers: tuple[int, int], labels: tuple[int, int]) -> Predictions:
        ids = torch.tensor([[0, numbers[0], numbers[0], numbers[1]]] * 2)
        segments = [Segment(number, label, 1.0) for number, label in zip(numbers, labels, strict=True)]
        return Predictions(META, panoptic=Panoptic(ids, segments))

    assert agreement("panoptic", panoptic((1, 2), (0, 2)), panoptic((7, 3), (0, 2))) == 1
    assert agreement("panoptic", panoptic((1, 2), (0, 2)), panoptic((1, 2), (0, 1))) == pytest.approx(1 / 3)


def test_instances_agree_by_score() -> None:
    left, right, nowhere = [0.0, 0, 2, 2], [2.0, 0, 4, 2], [1.0, 1, 1, 1]
    one = instances((0.9, 0, left), (0.3, 1, right), (0.5, 2, nowhere))
    assert agreement("instance", one, instances((0.3, 1, right), (0.9, 0, left))) == pytest.approx(1)
    assert agreement("instance", one, instances((0.9, 1, left), (0.3, 1, right))) == pytest.approx(0.3 * 2 / 2.4)
    assert agreement("detection", one, instances((0.6, 0, left))) == pytest.approx(0.6 * 2 / 1.8)
    assert agreement("detection", one, instances()) == 0
    assert agreement("detection", instances(), instances()) is None


def test_onnx_runtime_passes_with_a_real_export(spec: Spec, model_path: Path, onnx_path: Path) -> None:
    report = check_parity(
        load_predictor(model_path, device="cpu"),
        load_predictor(onnx_path, device="cpu"),
        loader([(2, 64, 96), (1, 64, 96)]),
        spec,
    )
    assert report["batch_sizes"] == [1, 3]
    assert all(output["share_of_std"] < 1e-4 for output in report["differences"].values())
