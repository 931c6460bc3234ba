"""OneFormer: the mask transformers' losses and a contrastive one; the post-processing is the shared one, asked task by task."""

from __future__ import annotations

from tessera.models.base import Model
from tessera.models.common.mask_postprocess import MaskPostprocess
from tessera.models.oneformer.criterion import OneFormerCriterion
from tessera.models.oneformer.network import OneFormer
from tessera.models.oneformer.text import task_input, tasks
from tessera.spec.networks import OneFormerSpec
from tessera.spec.schema import PostprocessSpec
from tessera.structures import ClassCatalog

__all__ = ["build", "build_postprocess", "task_input", "tasks"]


def build(
    spec: OneFormerSpec,
    catalog: ClassCatalog,
    postprocess: PostprocessSpec,
    activation_checkpoint: bool,
    load_pretrained: bool,
) -> Model:
    return Model(
        network=OneFormer(spec, catalog.names, activation_checkpoint, load_pretrained),
        criterion=OneFormerCriterion(len(catalog), spec.loss),
        postprocess=build_postprocess(spec, catalog, postprocess),
    )


def build_postprocess(spec: OneFormerSpec, catalog: ClassCatalog, postprocess: PostprocessSpec) -> MaskPostprocess:
    return MaskPostprocess(spec.mode, catalog, postprocess)
