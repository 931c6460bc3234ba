"""The model families. A new one is a folder with ``build`` and ``build_postprocess``, and a line in each of the two tables."""

from __future__ import annotations

from collections.abc import Callable

from tessera.models import mask2former
from tessera.models.base import Model, Postprocess
from tessera.spec.schema import Mask2FormerSpec, PostprocessSpec
from tessera.structures import ClassCatalog

MODELS: dict[str, Callable[[Mask2FormerSpec, ClassCatalog, PostprocessSpec, bool, bool], Model]] = {
    "mask2former": mask2former.build,
}

POSTPROCESS: dict[str, Callable[[Mask2FormerSpec, ClassCatalog, PostprocessSpec], Postprocess]] = {
    "mask2former": mask2former.build_postprocess,
}


def build_model(
    spec: Mask2FormerSpec,
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


def build_postprocess(spec: Mask2FormerSpec, catalog: ClassCatalog, postprocess: PostprocessSpec) -> Postprocess:
    """The post-processing of ``build_model`` alone, for runtimes that execute an exported network."""
    return POSTPROCESS[spec.name](spec, catalog, postprocess)
