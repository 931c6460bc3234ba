"""Deformable DETR: boxes and their classes."""

from __future__ import annotations

from tessera.models.base import Model
from tessera.models.deformable_detr.criterion import DetectionCriterion
from tessera.models.deformable_detr.network import DeformableDetr
from tessera.models.deformable_detr.postprocess import DetectionPostprocess
from tessera.spec.networks import DeformableDetrSpec
from tessera.spec.schema import PostprocessSpec
from tessera.structures import ClassCatalog


def build(
    spec: DeformableDetrSpec,
    catalog: ClassCatalog,
    postprocess: PostprocessSpec,
    activation_checkpoint: bool,
    load_pretrained: bool,
) -> Model:
    return Model(
        network=DeformableDetr(spec, len(catalog), activation_checkpoint, load_pretrained),
        criterion=DetectionCriterion(spec.loss),
        postprocess=build_postprocess(spec, catalog, postprocess),
    )


def build_postprocess(
    spec: DeformableDetrSpec, catalog: ClassCatalog, postprocess: PostprocessSpec
) -> DetectionPostprocess:
    return DetectionPostprocess(postprocess)
