"""Mask2Former: losses and post-processing are the ones that the mask transformers share."""

from __future__ import annotations

from tessera.models.base import Model
from tessera.models.common.mask_criterion import MaskCriterion
from tessera.models.common.mask_postprocess import MaskPostprocess
from tessera.models.mask2former.network import Mask2Former
from tessera.spec.networks import Mask2FormerSpec
from tessera.spec.schema import PostprocessSpec
from tessera.structures import ClassCatalog


def build(
    spec: Mask2FormerSpec,
    catalog: ClassCatalog,
    postprocess: PostprocessSpec,
    activation_checkpoint: bool,
    load_pretrained: bool,
) -> Model:
    return Model(
        network=Mask2Former(spec, len(catalog), activation_checkpoint, load_pretrained),
        criterion=MaskCriterion(len(catalog), spec.loss),
        postprocess=build_postprocess(spec, catalog, postprocess),
    )


def build_postprocess(spec: Mask2FormerSpec, catalog: ClassCatalog, postprocess: PostprocessSpec) -> MaskPostprocess:
    return MaskPostprocess(spec.mode, catalog, postprocess)
