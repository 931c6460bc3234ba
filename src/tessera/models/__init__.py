"""The model families. A new one is a folder with ``build`` and ``build_postprocess``, and a line in each of the two tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tessera.models import deformable_detr, encoder_decoder, mask2former, oneformer
from tessera.models.base import Model, Postprocess
from tessera.spec.networks import ModelSpec
from tessera.spec.schema import PostprocessSpec
from tessera.structures import ClassCatalog

MODELS: dict[str, Callable[[Any, ClassCatalog, PostprocessSpec, bool, bool], Model]] = {
    "deformable_detr": deformable_detr.build,
    "encoder_decoder": encoder_decoder.build,
    "mask2former": mask2former.build,
    "oneformer": oneformer.build,
}

POSTPROCESS: dict[str, Callable[[Any, ClassCatalog, PostprocessSpec], Postprocess]] = {
    "deformable_detr": deformable_detr.build_postprocess,
    "encoder_decoder": encoder_decoder.build_postprocess,
    "mask2former": mask2former.build_postprocess,
    "oneformer": oneformer.build_postprocess,
}

Shapes = dict[str, tuple[int | None, ...]]


def _mask_shapes(classes: int) -> Shapes:
    return {"pred_logits": (None, classes + 1), "pred_masks": (None, None, None)}


OUTPUTS: dict[str, Callable[[int], Shapes]] = {
    "deformable_detr": lambda classes: {"pred_logits": (None, classes), "pred_boxes": (None, 4)},
    "encoder_decoder": lambda classes: {"logits": (classes, None, None)},
    "mask2former": _mask_shapes,
    "oneformer": _mask_shapes,
}
"""What post-processing reads of a network's outputs, by the number of classes: shapes behind the batch, None where any will do."""

TASKS: dict[str, Callable[[Any], tuple[str, ...]]] = {"oneformer": oneformer.tasks}
"""Families whose network is told what to do: the tasks that an evaluation asks one after the other."""

TASK_INPUTS: dict[str, Callable[[Any, str], Tensor]] = {"oneformer": oneformer.task_input}
"""The same families: a task as the network's input named ``task``, (L,) float32."""


def build_model(
    spec: ModelSpec,
    catalog: ClassCatalog,
    postprocess: PostprocessSpec = PostprocessSpec(),
    activation_checkpoint: bool = False,
    load_pretrained: bool = True,
) -> Model:
    """Network, criterion and post-processing of ``spec`` for the classes of ``catalog``.

    ``load_pretrained`` False leaves the backbone's weights random, for callers that load a whole model's afterwards. Raises
    UserError where the spec asks for something that cannot be built.
    """
    return MODELS[spec.name](spec, catalog, postprocess, activation_checkpoint, load_pretrained)


def build_postprocess(spec: ModelSpec, catalog: ClassCatalog, postprocess: PostprocessSpec) -> Postprocess:
    """The post-processing of ``build_model`` alone, for runtimes that execute an exported network."""
    return POSTPROCESS[spec.name](spec, catalog, postprocess)


def output_shapes(spec: ModelSpec, catalog: ClassCatalog) -> Shapes:
    return OUTPUTS[spec.name](len(catalog))


def tasks(spec: ModelSpec) -> tuple[str | None, ...]:
    """What one evaluation asks the network, in order; (None,) where it is not told anything."""
    find = TASKS.get(spec.name)
    return (None,) if find is None else find(spec)


def task_input(spec: ModelSpec, task: str) -> Tensor:
    """``task`` (panoptic, instance or semantic) as the network's input of that name, (L,) float32."""
    return TASK_INPUTS[spec.name](spec, task)
