"""The contract of a model: three objects that know nothing of files, datasets, trainers or runtimes.

network
    ``network(images, padding=None, ...) -> dict[str, Tensor]``. ``images`` is (B, 3, H, W) float32 RGB in [0, 1] of any H and W;
    ``padding`` is (B, H, W) bool, True where padded. What else a family takes, ``inputs`` makes from a batch. The network
    normalises by itself (``pixel_mean``, ``pixel_std`` buffers).
    The returned tensors are plain and named; their order is the order of the exported graph's outputs. In training mode
    the dictionary has one more entry, ``aux``: a list of dictionaries with the same names, for deep supervision.
criterion
    ``criterion(outputs, targets) -> dict[str, Tensor]``: weighted scalar losses by name; their sum is minimised. Everything random
    in it (sampled points) uses torch's global generator, which the trainer seeds for every step.
postprocess
    ``postprocess(outputs, metas, input_size, task=None) -> list[Predictions]`` at original size; ``outputs`` are torch tensors that
    any runtime produced, ``input_size`` is (H, W) of the padded batch, ``task`` is what the network was asked, where it takes one:
    the answers then hold that task's part alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from tessera.structures import Batch, ImageMeta, Predictions, Target


class Criterion(Protocol):
    def __call__(self, outputs: dict[str, Tensor], targets: list[Target]) -> dict[str, Tensor]: ...


class Postprocess(Protocol):
    def __call__(
        self, outputs: dict[str, Tensor], metas: list[ImageMeta], input_size: tuple[int, int], task: str | None = None
    ) -> list[Predictions]: ...


class SemanticPostprocess(Postprocess, Protocol):
    """Post-processing that can say how sure the semantic prediction is."""

    def scores(
        self, outputs: dict[str, Tensor], metas: list[ImageMeta], input_size: tuple[int, int], task: str | None = None
    ) -> list[Tensor]:
        """(C, H, W) per image at original size; the largest makes the class."""
        ...


class Network(nn.Module):
    """Base of every network: holds the preprocessing that all runtimes share and names what the exporter must know."""

    pixel_mean: Tensor
    pixel_std: Tensor
    input_names: tuple[str, ...] = ("images",)
    """What ``forward`` needs in evaluation mode, and an exported graph takes, in order: `images`, then of `padding` (B, H, W) bool and
    `task` (B, L) float32 what the family reads."""
    output_names: tuple[str, ...] = ()
    """Names of the tensors that ``forward`` returns in evaluation mode, in order."""
    size_divisor: int = 32
    """Height and width of a batch are padded to a multiple of this."""

    def __init__(self, pixel_mean: tuple[float, float, float], pixel_std: tuple[float, float, float]) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", _channel(pixel_mean), persistent=False)
        self.register_buffer("pixel_std", _channel(pixel_std), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """[0, 1] RGB to zero mean and unit variance per channel; padding (the pixel mean) becomes zero."""
        return (images - self.pixel_mean) / self.pixel_std

    def forward(self, images: Tensor, padding: Tensor | None = None) -> dict[str, Tensor]:
        raise NotImplementedError

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The arguments of ``forward`` for a batch on the network's device; in training mode also what only losses need."""
        return {"images": batch.images, "padding": batch.padding}

    def backbone_parameters(self) -> set[str]:
        """Names of the parameters whose learning rate is scaled by ``train.optim.backbone_multiplier``."""
        return {name for name, _ in self.named_parameters() if name.startswith("backbone.")}


@dataclass(frozen=True)
class Model:
    network: Network
    criterion: Callable[[dict[str, Tensor], list[Target]], dict[str, Tensor]]
    postprocess: Postprocess


def _channel(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)
