"""The gate between a runtime and the tables: its outputs must be PyTorch's for the same input, on real images, one at a time and in batches;
and how far the predictions agree where each runtime sees the images at its own size.

Deployed runtimes are known to be wrong without an error (zeros from plug-ins, GridSample kernels, fused fp16 attention), so what
counts is the numbers, not that a run succeeded.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_iou

from tessera import provenance
from tessera.files import UserError
from tessera.inference.predictor import Predictor
from tessera.ops.images import input_record
from tessera.spec.networks import Mode
from tessera.spec.schema import Spec
from tessera.structures import Batch, ImageMeta, Instances, Predictions

LARGEST_BATCH = 3
"""Images that are also run together."""
SAME_OBJECT = 0.5
"""Smallest IoU of two boxes that stand for one object."""


class ParityError(UserError):
    """A runtime does not compute what PyTorch computes."""


def check_parity(reference: Predictor, candidate: Predictor, loader: Iterable[Batch], spec: Spec) -> dict[str, Any]:
    """Differences of the first ``spec.parity.images`` images' raw outputs; the reference runs them one by one.

    Returns a JSON-able report. Raises ParityError naming every output that is outside the tolerance, not finite, or constant.
    """
    tolerance = tolerance_of(candidate.precision, spec)
    images = _take(loader, spec.parity.images)
    comparison = Comparison()
    batch_sizes: set[int] = set()
    largest = min(LARGEST_BATCH, candidate.max_batch or LARGEST_BATCH)
    for group, task in itertools.product(_by_size(images), candidate.tasks):
        expected = [_outputs(reference, [image], task) for image in group]
        for image, wanted in zip(group, expected, strict=True):
            comparison.add(wanted, _outputs(candidate, [image], task))
            batch_sizes.add(1)
        if largest > 1:
            together, wanted_together = group[:largest], expected[:largest]
            if len(together) == 1:
                mirrored = _Image(together[0].pixels.flip(-1), together[0].padding.flip(-1))
                together = [*together, mirrored]
                wanted_together = [*wanted_together, _outputs(reference, [mirrored], task)]
            found = _outputs(candidate, together, task)
            comparison.add({name: torch.cat([w[name] for w in wanted_together]) for name in wanted_together[0]}, found)
            batch_sizes.add(len(together))
    problems = comparison.problems(tolerance)
    what = f"{candidate.runtime} {candidate.precision}"
    if problems:
        lines = "\n  ".join(problems)
        remedy = {
            "trt": "TensorRT is known to be silently wrong on some versions: try export.sampling=gather or another TensorRT version",
            "onnx": "if the graph is fp16, add the operator types in question to precision.fp16_keep",
        }.get(candidate.runtime, "")
        raise ParityError(
            f"{candidate.header.experiment}: {what} does not give PyTorch's outputs on {len(images)} images "
            f"(batch sizes {sorted(batch_sizes)}), so no table may hold its numbers\n  {lines}\n{remedy}".rstrip()
        )
    return {
        "experiment": candidate.header.experiment,
        "reference": reference.runtime,
        "runtime": candidate.runtime,
        "precision": candidate.precision,
        "images": len(images),
        "batch_sizes": sorted(batch_sizes),
        "input_sizes": [list(size) for size in sorted({tuple(image.pixels.shape[1:]) for image in images})],
        "tolerance": tolerance,
        "differences": comparison.to_json(),
        "facts": provenance.collect(),
    }


def compare_predictions(
    reference: Predictor, candidate: Predictor, expected: Iterable[Batch], found: Iterable[Batch], spec: Spec
) -> dict[str, Any]:
    """Agreement of the final predictions on the same images, which each loader prepares as its runtime's evaluation does: what ``check_parity``
    cannot see, since it gives both the same pixels.

    Returns a JSON-able report. Images that the candidate sees scaled down are warned of. Raises ParityError where less than
    ``spec.parity.agreement`` agrees.
    """
    wanted, wanted_metas = _decisions(reference, expected, candidate.mode)
    given, given_metas = _decisions(candidate, found, candidate.mode)
    if wanted.keys() != given.keys():
        raise ValueError(f"compares predictions of images {sorted(given)} with PyTorch's of {sorted(wanted)}")
    agreeing: defaultdict[int, float] = defaultdict(float)
    total: defaultdict[int, float] = defaultdict(float)
    for image, decided in wanted.items():
        for key, (part, whole) in given[image].shared(decided).items():
            agreeing[key] += part
            total[key] += whole
    shares = [agreeing[key] / whole for key, whole in total.items() if whole]
    agreement = math.fsum(shares) / len(shares) if shares else None
    how = "mean IoU of the classes" if candidate.mode in ("panoptic", "semantic") else "share of the detections' scores"
    told = "neither predicts anything"
    if agreement is not None:
        told = f"the final predictions agree to {agreement:.1%} with PyTorch's at its own size ({how})"
    smaller = candidate.scaled_down(given_metas)
    if smaller is not None:
        told = f"{smaller.describe(len(given_metas), candidate.input_size)}; {told}"
    if agreement is not None and agreement < spec.parity.agreement:
        remedy = "; leave out export.input_height and export.input_width, or set them larger" if smaller else ""
        raise ParityError(
            f"{candidate.header.experiment}: {candidate.runtime} {candidate.precision}: {told}, less than parity.agreement, "
            f"{spec.parity.agreement:g}{remedy}"
        )
    print(f"parity: {'warning: ' if smaller else ''}{told}", file=sys.stderr, flush=True)
    return {
        "agreement": agreement,
        "sizes": {one.runtime: _sizes(metas) for one, metas in ((reference, wanted_metas), (candidate, given_metas))},
        "input": input_record(candidate.input_size, smaller),
    }


def tolerance_of(precision: str, spec: Spec) -> float:
    """Largest allowed ``share_of_std`` of an output."""
    if precision == "fp32":
        return spec.parity.tolerance
    if precision == "fp16":
        return spec.parity.tolerance_fp16
    raise UserError(f"precision {precision}: expected fp32 or fp16; there is no parity tolerance for others yet")


@dataclass
class _Output:
    """Sums over everything compared so far; from them every number of the report follows."""

    count: int = 0
    max_abs: float = 0.0
    sum_abs: float = 0.0
    per_image: list[float] = field(default_factory=list)
    """Mean absolute difference of each image, so that one wrong image of many cannot hide in the average."""
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("r", "c", "rr", "cc", "rc"), 0.0))
    finite: bool = True
    reference_finite: bool = True
    decisions: int = 0
    agreeing: int = 0

    def add(self, name: str, reference: Tensor, candidate: Tensor) -> None:
        self.reference_finite &= bool(torch.isfinite(reference).all())
        self.finite &= bool(torch.isfinite(candidate).all())
        if not (self.finite and self.reference_finite):
            return
        r, c = reference.double(), candidate.double()
        difference = (r - c).abs()
        self.count += r.numel()
        self.max_abs = max(self.max_abs, difference.max().item())
        self.sum_abs += difference.sum().item()
        self.per_image += difference.flatten(1).mean(1).tolist()
        for key, value in (("r", r), ("c", c), ("rr", r * r), ("cc", c * c), ("rc", r * c)):
            self.sums[key] += value.sum().item()
        agreement = _agreement(name, reference, candidate)
        if agreement is not None:
            self.decisions += agreement.numel()
            self.agreeing += int(agreement.sum())

    def std(self, kind: str) -> float:
        mean = self.sums[kind] / self.count
        return math.sqrt(max(0.0, self.sums[kind * 2] / self.count - mean * mean))

    @property
    def share_of_std(self) -> float:
        """Mean absolute difference of the worst image over the reference's standard deviation."""
        return max(self.per_image) / self.std("r")

    def problem(self, tolerance: float) -> str | None:
        if not self.reference_finite:
            return "PyTorch's own values are not finite; the weights are broken"
        if not self.finite:
            return "has values that are not finite"
        # A spread below single precision's resolution of the values is rounding, not content.
        floor = 1e-7 * max(1e-30, math.sqrt(self.sums["rr"] / self.count))
        if self.std("r") <= floor:
            return "PyTorch's own values are all equal; the model has learnt nothing that could be compared"
        if self.std("c") <= floor:
            kind = "zero" if self.sums["cc"] == 0 else "equal"
            return f"all values are {kind}, where PyTorch's have a standard deviation of {self.std('r'):.3g}"
        if self.share_of_std > tolerance:
            return (
                f"mean absolute difference is {self.share_of_std:.3g} of the standard deviation, tolerance {tolerance:g} "
                f"(largest difference {self.max_abs:.3g}, standard deviation {self.std('r'):.3g})"
            )
        return None

    def to_json(self) -> dict[str, Any]:
        norms = math.sqrt(self.sums["rr"] * self.sums["cc"])
        return {
            "max_abs": self.max_abs,
            "mean_abs": self.sum_abs / self.count,
            "std": self.std("r"),
            "share_of_std": self.share_of_std,
            "cosine": min(1.0, self.sums["rc"] / norms),
            "agreement": self.agreeing / self.decisions if self.decisions else None,
        }


class Comparison:
    """Accumulates the differences between two runtimes' outputs, output by output."""

    def __init__(self) -> None:
        self._outputs: dict[str, _Output] = {}

    def add(self, reference: dict[str, Tensor], candidate: dict[str, Tensor]) -> None:
        """Both (B, ...) on the CPU. Raises ParityError when names or shapes differ."""
        if list(reference) != list(candidate):
            raise ParityError(f"outputs are {', '.join(candidate)}; PyTorch's are {', '.join(reference)}")
        for name, wanted in reference.items():
            found = candidate[name]
            if wanted.shape != found.shape:
                raise ParityError(
                    f"output {name} has the shape {tuple(found.shape)}; PyTorch's is {tuple(wanted.shape)}"
                )
            self._outputs.setdefault(name, _Output()).add(name, wanted, found)

    def problems(self, tolerance: float) -> list[str]:
        """One line for every output that must not be used."""
        found = ((name, output.problem(tolerance)) for name, output in self._outputs.items())
        return [f"{name}: {problem}" for name, problem in found if problem is not None]

    def to_json(self) -> dict[str, dict[str, Any]]:
        """By output: ``max_abs``, ``mean_abs``, ``std`` (of the reference), ``share_of_std``, ``cosine``, ``agreement`` of the
        decisions (None where the output decides nothing by itself). Only meaningful without problems."""
        return {name: output.to_json() for name, output in self._outputs.items()}


def _agreement(name: str, reference: Tensor, candidate: Tensor) -> Tensor | None:
    """True where both decide alike: the best class of ``*logits``, (B, Q, C) or (B, C, H, W); inside or outside for ``*masks``."""
    if name.endswith("logits"):
        classes = 1 if reference.dim() == 4 else -1
        return reference.argmax(classes) == candidate.argmax(classes)
    if name.endswith("masks"):
        return (reference > 0) == (candidate > 0)
    return None


@dataclass(frozen=True)
class _Decided:
    """A prediction as far as it is compared."""

    classes: Tensor | None
    """(H, W) of every pixel, -1 for none; None where instances or boxes are all there is."""
    instances: Instances | None

    @classmethod
    def of(cls, prediction: Predictions, mode: Mode) -> _Decided:
        panoptic, found = prediction.panoptic, prediction.instances
        if mode == "semantic":
            return cls(prediction.semantic, None)
        if mode == "panoptic" and panoptic is not None:
            classes = torch.full_like(panoptic.ids, -1)
            for segment in panoptic.segments:
                classes[panoptic.ids == segment.id] = segment.label
            return cls(classes, None)
        if found is None:
            return cls(None, None)
        seen = (found.boxes[:, 2:] > found.boxes[:, :2]).all(1)
        return cls(None, Instances(found.scores[seen], found.labels[seen], found.boxes[seen], None))

    def shared(self, other: _Decided) -> dict[int, tuple[float, float]]:
        """How much agrees, and of how much. By class, pixels that both and that any gives to it: most pixels may be of one class, whatever
        becomes of the others. Of instances and boxes all together, the scores that both give to one object: of one class, with an IoU of at
        least ``SAME_OBJECT``."""
        if self.classes is not None and other.classes is not None:
            last = int(max(self.classes.max(), other.classes.max()))
            pairs = [(self.classes == label, other.classes == label) for label in range(last + 1)]
            return {label: (float((a & b).sum()), float((a | b).sum())) for label, (a, b) in enumerate(pairs)}
        if self.instances is None or other.instances is None:
            raise ValueError("a runtime does not predict what its mode says")
        one, two = self.instances, other.instances
        iou = box_iou(one.boxes, two.boxes) * (one.labels[:, None] == two.labels)
        iou[iou < SAME_OBJECT] = 0
        rows, columns = linear_sum_assignment(iou, maximize=True)
        same = torch.minimum(one.scores[rows], two.scores[columns])[iou[rows, columns] > 0]
        return {0: (2 * float(same.sum()), float(one.scores.sum() + two.scores.sum()))}


def _decisions(
    predictor: Predictor, loader: Iterable[Batch], mode: Mode
) -> tuple[dict[int, _Decided], list[ImageMeta]]:
    """By image id."""
    found: dict[int, _Decided] = {}
    metas: list[ImageMeta] = []
    for batch in loader:
        metas += batch.metas
        found |= {prediction.meta.image_id: _Decided.of(prediction, mode) for prediction in predictor(batch)}
    return found, metas


def _sizes(metas: Iterable[ImageMeta]) -> list[list[int]]:
    """(height, width) of images as the network sees them."""
    return [list(size) for size in sorted({meta.resized_size for meta in metas})]


@dataclass(frozen=True)
class _Image:
    pixels: Tensor
    """(3, H, W)."""
    padding: Tensor
    """(H, W)."""


def _outputs(predictor: Predictor, images: list[_Image], task: str | None) -> dict[str, Tensor]:
    pixels, padding = torch.stack([i.pixels for i in images]), torch.stack([i.padding for i in images])
    with torch.inference_mode():
        return {name: value.detach().float().cpu() for name, value in predictor.ask(pixels, padding, task).items()}


def _take(loader: Iterable[Batch], count: int) -> list[_Image]:
    images: list[_Image] = []
    for batch in loader:
        images += map(_Image, batch.images, batch.padding)
        if len(images) >= count:
            break
    if not images:
        raise UserError("parity: the evaluated split has no images; expected at least one")
    return images[:count]


def _by_size(images: list[_Image]) -> list[list[_Image]]:
    groups: dict[torch.Size, list[_Image]] = {}
    for image in images:
        groups.setdefault(image.pixels.shape, []).append(image)
    return list(groups.values())
