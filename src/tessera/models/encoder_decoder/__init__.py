"""Encoder-decoder segmentors: FCN, PSPNet, DeepLabV3(+), U-Net, UPerNet, FPN, SegFormer, LinkNet on any backbone."""

from __future__ import annotations

from tessera.models.base import Model
from tessera.models.encoder_decoder.criterion import SegmentationCriterion
from tessera.models.encoder_decoder.network import EncoderDecoder
from tessera.models.encoder_decoder.postprocess import SegmentationPostprocess
from tessera.spec.networks import EncoderDecoderSpec
from tessera.spec.schema import PostprocessSpec
from tessera.structures import ClassCatalog


def build(
    spec: EncoderDecoderSpec,
    catalog: ClassCatalog,
    postprocess: PostprocessSpec,
    activation_checkpoint: bool,
    load_pretrained: bool,
) -> Model:
    return Model(
        network=EncoderDecoder(spec, len(catalog), activation_checkpoint, load_pretrained),
        criterion=SegmentationCriterion(spec, catalog),
        postprocess=build_postprocess(spec, catalog, postprocess),
    )


def build_postprocess(
    spec: EncoderDecoderSpec, catalog: ClassCatalog, postprocess: PostprocessSpec
) -> SegmentationPostprocess:
    return SegmentationPostprocess()
