"""What every runtime shares: one preprocessing before it, one post-processing after it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tessera.files import UserError
from tessera.inference.sources import ImageSource, is_many, open_source
from tessera.models import output_shapes, task_input, tasks
from tessera.models.base import Postprocess
from tessera.ops.images import ScaledDown, input_size, make_batch, padded_size, scaled_down
from tessera.provenance import Header
from tessera.spec.networks import Mode
from tessera.structures import Batch, ImageMeta, Instances, Panoptic, Predictions, merge_parts

INPUT = "images"
"""What every network takes: (B, 3, H, W) float32 RGB in [0, 1]."""
INPUTS = (INPUT, "padding", "task")
"""What a network may take; see ``models.base.Network.input_names``."""


class Predictor(ABC):
    """A runtime implements ``outputs``; everything else is here."""

    runtime: ClassVar[str]
    """torch, onnx or trt."""
    size_divisor: int = 32
    """Height and width of a batch are multiples of this."""

    def __init__(
        self,
        header: Header,
        postprocess: Postprocess,
        input_names: Sequence[str],
        fixed_size: tuple[int, int] | None = None,
        max_batch: int | None = None,
    ) -> None:
        self.header = header
        self.precision = header.precision
        self.postprocess = postprocess
        self.input_names = tuple(input_names)
        self._shapes = output_shapes(header.spec.model, header.catalog)
        self.tasks = tasks(header.spec.model)
        """What the network is asked for every image, in order; (None,) where it is not told anything."""
        self.mode: Mode = header.spec.model.mode
        """What the answers hold, and an evaluation measures."""
        fixed_task = header.spec.export.task
        if "task" not in self.input_names and fixed_task is not None:
            self.tasks, self.mode = (fixed_task,), fixed_task
        self.input_size = fixed_size
        """(height, width) that every batch must have; None for any."""
        self.target_size = header.spec.evaluated.target_size
        """(height, width) to which ``stream`` stretches images first: as in the split that the model is evaluated on, which a stage's spec may
        name otherwise than the model's."""
        self.max_batch = max_batch
        """Images that one call of ``outputs`` takes at most; None for any number."""

    @abstractmethod
    def outputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The network's raw outputs for what ``input_names`` lists, B at most ``max_batch``, on any device."""

    def ask(self, images: Tensor, padding: Tensor, task: str | None) -> dict[str, Tensor]:
        """``outputs`` for (B, 3, H, W) float32 RGB in [0, 1] and (B, H, W) bool, True where padded; ``task`` is one of ``tasks``."""
        inputs = {"images": images, "padding": padding}
        if "task" in self.input_names:
            if task is None:
                raise ValueError("the network takes a task, and none was given")
            inputs["task"] = task_input(self.header.spec.model, task).expand(len(images), -1)
        return self.outputs({name: inputs[name] for name in self.input_names})

    def _require_shapes(self, outputs: dict[str, Tensor], count: int) -> None:
        """Raises UserError where another network stands under this header: its answers would be read as something else."""
        for name, shape in self._shapes.items():
            found = tuple(outputs[name].shape) if name in outputs else ()
            wanted = (count, *shape)
            if len(found) != len(wanted) or any(
                side not in (None, here) for side, here in zip(wanted, found, strict=True)
            ):
                expected = ", ".join("any" if side is None else str(side) for side in wanted)
                there = f"is of shape {found}" if name in outputs else f"is not among its outputs {', '.join(outputs)}"
                raise UserError(
                    f"{self.header.experiment}: the {self.runtime} model is not the {self.header.spec.model.name} of its header: {name} {there}, "
                    f"expected ({expected}); make the file again"
                )

    def _require_sound(self, outputs: dict[str, Tensor], metas: Sequence[ImageMeta]) -> None:
        """Raises UserError where outputs are not the network's, or naming an image where they are not finite: of NaN, thresholds and argmax
        would make answers, only worse."""
        self._require_shapes(outputs, len(metas))
        for name in self._shapes:
            values = outputs[name]
            low, high = values.flatten(1).aminmax(
                dim=1
            )  # NaN passes on; unlike isfinite it needs no copy of large outputs
            finite = (low.isfinite() & high.isfinite()).tolist()
            if not all(finite):
                raise UserError(
                    f"{metas[finite.index(False)].file_name}: {self.runtime} {self.precision} gives values of {name} that are not finite; "
                    "use fp32, or in fp16 add the operator types that overflow to precision.fp16_keep; if PyTorch's are not finite "
                    "either, the weights are broken"
                )

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> list[Predictions]:
        """One answer per image, on the CPU. Splits a batch that is larger than the runtime takes."""
        size = (batch.images.shape[2], batch.images.shape[3])
        if self.input_size is not None and size != self.input_size:
            raise UserError(
                f"{self.runtime} {self.precision}: takes images of {self.input_size} (height, width), got a batch of {size}; "
                "prepare the batch with this fixed size, or export with export.dynamic_size=true"
            )
        step = self.max_batch or len(batch.metas)
        found: list[Predictions] = []
        for start in range(0, len(batch.metas), step):
            part = slice(start, start + step)
            metas = batch.metas[part]
            answers = []
            for task in self.tasks:
                outputs = self.ask(batch.images[part], batch.padding[part], task)
                self._require_sound(outputs, metas)
                answers.append([_to_cpu(answer) for answer in self.postprocess(outputs, metas, size, task)])
            found += [merge_parts(parts) for parts in zip(*answers, strict=True)]
        return found

    def predict(self, source: Any, batch_size: int = 1) -> Predictions | list[Predictions]:
        """For a path, an http(s) address, a Pillow image, an array or a tensor its predictions; for a folder or a list a list of them.

        Arrays (H, W), (H, W, 1) or (H, W, 3) and tensors (H, W), (1, H, W) or (3, H, W) are RGB or gray: uint8 in 0..255; uint16 in 0..65535
        and floating point in 0..1, or all else in the ``dataset.value_range`` that the model was trained with; see ``sources.to_rgb``. Raises
        UserError for everything else.
        """
        value_range = self.header.spec.dataset.value_range
        found = [prediction for _, prediction in self.stream(open_source(source, value_range), batch_size)]
        return found if is_many(source) else found[0]

    def stream(
        self, sources: Iterable[ImageSource], batch_size: int = 1, broken: list[str] | None = None
    ) -> Iterator[tuple[Tensor, Predictions]]:
        """Image (3, H, W) uint8 and predictions, in order, keeping one batch in memory. Given ``broken``, an image that cannot be read is left
        out, and what is wrong with it is put there.

        A batch holds successive images of equal padded size only, so that batch-mates never change an image's input.
        """
        limit = min(batch_size, self.max_batch or batch_size)
        dataset = self.header.spec.dataset
        group: list[tuple[ImageSource, Tensor]] = []
        group_size: tuple[int, int] | None = None
        for source in sources:
            try:
                image = source.read(dataset.value_range, dataset.max_pixels)
            except UserError as error:
                if broken is None:
                    raise
                broken.append(str(error))
                continue
            size = self._padded_size(image)
            if group and (size != group_size or len(group) == limit):
                yield from self._predict(group)
                group = []
            group.append((source, image))
            group_size = size
        if group:
            yield from self._predict(group)

    def _predict(self, group: list[tuple[ImageSource, Tensor]]) -> Iterator[tuple[Tensor, Predictions]]:
        yield from zip((image for _, image in group), self(self.prepare(group)), strict=True)

    def prepare(self, group: Sequence[tuple[ImageSource, Tensor]]) -> Batch:
        """Images (3, H, W) uint8 as the runtime is given them."""
        spec = self.header.spec
        return make_batch(
            [image for _, image in group],
            [source.image_id for source, _ in group],
            [source.file_name for source, _ in group],
            spec.dataset.augmentation,
            spec.model.pixel_mean,
            self.size_divisor,
            self.input_size,
            self.target_size,
        )

    def _padded_size(self, image: Tensor) -> tuple[int, int]:
        height, width = self.target_size or (image.shape[1], image.shape[2])
        inside = input_size(height, width, self.header.spec.dataset.augmentation, self.input_size)
        return padded_size([inside], self.size_divisor, self.input_size)

    def scaled_down(self, metas: Iterable[ImageMeta]) -> ScaledDown | None:
        """Of images that were predicted on, those that the network saw smaller than at their test size."""
        sizes = ((meta.original_size, meta.resized_size) for meta in metas)
        return scaled_down(sizes, self.header.spec.dataset.augmentation, self.target_size)


def choose_device(device: str, path: Path) -> torch.device:
    """``auto``: the GPU where PyTorch sees one. Raises UserError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"{path}: device {device!r} is unknown; expected auto, cpu, cuda or cuda:<number>") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"{path}: device {device} asked for, but PyTorch sees {torch.cuda.device_count()} GPU(s); use device auto or cpu"
        )
    return chosen


def _to_cpu(found: Predictions) -> Predictions:
    instances, panoptic = found.instances, found.panoptic
    return Predictions(
        found.meta,
        None if found.semantic is None else found.semantic.cpu(),
        None
        if instances is None
        else Instances(
            instances.scores.cpu(),
            instances.labels.cpu(),
            instances.boxes.cpu(),
            None if instances.masks is None else instances.masks.cpu(),
        ),
        None if panoptic is None else Panoptic(panoptic.ids.cpu(), panoptic.segments),
    )
