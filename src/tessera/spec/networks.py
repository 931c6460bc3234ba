"""The keys of `model`, family by family. A family is a class here with its own ``name``, and a folder of the same name in models/."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field

from tessera.spec.section import Positive, Section, Unit

Mode = Literal["panoptic", "instance", "semantic", "detection"]


class SwinSpec(Section):
    """Explicit sizes; a key left out is given by the backbone's name."""

    embed_dim: int | None = Field(None, ge=8, le=1024)
    """Channels of the first stage; every later stage doubles them."""
    depths: list[Annotated[int, Field(ge=1)]] | None = Field(None, min_length=4, max_length=4)
    """Blocks per stage."""
    num_heads: list[Annotated[int, Field(ge=1)]] | None = Field(None, min_length=4, max_length=4)
    """Attention heads per stage; each must divide its stage's channels."""
    window_size: int | None = Field(None, ge=2, le=64)
    """Side of an attention window in patches of 4 pixels; 7, or 12 for 384-pixel pretraining."""


class SwinSize(NamedTuple):
    embed_dim: int
    depths: list[int]
    num_heads: list[int]
    window_size: int


SWIN_SIZES = {
    "swin_tiny": SwinSize(96, [2, 2, 6, 2], [3, 6, 12, 24], 7),
    "swin_small": SwinSize(96, [2, 2, 18, 2], [3, 6, 12, 24], 7),
    "swin_base": SwinSize(128, [2, 2, 18, 2], [4, 8, 16, 32], 7),
    "swin_large": SwinSize(192, [2, 2, 18, 2], [6, 12, 24, 48], 7),
    "swin_huge": SwinSize(352, [2, 2, 18, 2], [11, 22, 44, 88], 7),
}
"""Liu et al. 2021; huge is the size of SwinV2 and SimMIM."""


class BackboneSpec(Section):
    name: str = "swin_tiny"
    """`swin_tiny|small|base|large|huge`, `gc_vit_xxtiny|xtiny|tiny|small|base|large|large_384`, `efficientvit_b0..b3`, `efficientvit_l0..l3`, or
    any timm pyramid model by its timm name, such as `resnet50`."""
    swin: SwinSpec = SwinSpec()
    """Only with a Swin backbone."""
    drop_path_rate: float = Field(0.3, ge=0, lt=1)
    """Stochastic depth, growing linearly to this rate at the last block; 0 turns it off."""
    norm: Literal["batch", "frozen"] = "batch"
    """`frozen`: batch norms keep their stored statistics and are not trained (Deformable DETR, with pretrained weights). Only with a
    backbone that has batch norms."""
    pretrained: str | None = None
    """Weights to start from: a local file, `timm` for timm's own download, or nothing. Files name their tensors like timm; ResNets also like
    torchvision, detectron2 and transformers, Swin like the original code, torchvision and transformers, GC ViT like the original code."""


class ModelSpec(Section):
    """What every family has."""

    modes: ClassVar[tuple[Mode, ...]]
    """What the family can be trained for; the first that the dataset's annotations can teach is the default of ``mode``."""

    name: str
    """Model family."""
    mode: Mode
    """What the network is trained for and its post-processing yields; panoptic yields all three. Left out, what the annotations can teach."""
    pixel_mean: tuple[Unit, Unit, Unit] = (0.485, 0.456, 0.406)
    """RGB, for images in [0, 1]."""
    pixel_std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """RGB, for images in [0, 1]."""
    backbone: BackboneSpec = BackboneSpec()


class PixelDecoderSpec(Section):
    """Multi-scale deformable attention over strides 32, 16 and 8, then one top-down step to stride 4 (Mask2Former, section 3.2.2)."""

    hidden_dim: int = Field(256, ge=32, le=1024)
    """Channels everywhere in the pixel decoder and of the mask features; a multiple of 32 (group norm) and of `nheads`."""
    layers: int = Field(6, ge=1, le=24)
    """Encoder layers."""
    nheads: int = Field(8, ge=1, le=32)
    """Attention heads."""
    points: int = Field(4, ge=1, le=16)
    """Sampling points per head and level."""
    dim_feedforward: int = Field(1024, ge=32)
    """Inner width of the encoder's feed-forward layers."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """After attention and inside the feed-forward layers."""


class TransformerDecoderSpec(Section):
    """Masked attention decoder (Mask2Former, section 3.2.1). Its width is the pixel decoder's `hidden_dim`."""

    num_object_queries: int = Field(100, ge=1, le=2000)
    """Upper bound of objects per image."""
    layers: int = Field(9, ge=1, le=50)
    """Layers; one less than TAO's and detectron2's `dec_layers`, which counts the prediction on the raw queries."""
    nheads: int = Field(8, ge=1, le=32)
    """Attention heads."""
    dim_feedforward: int = Field(2048, ge=32)
    """Inner width of the feed-forward layers."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """In attention and feed-forward layers."""
    pre_norm: bool = False
    """Normalise before each block instead of after it."""


class MaskLossSpec(Section):
    """Losses of the mask transformers, and the costs of the matching, which have the same weights."""

    class_weight: float = Field(2.0, ge=0)
    """Cross-entropy over C classes and no-object."""
    mask_weight: float = Field(5.0, ge=0)
    """Binary cross-entropy at the sampled points."""
    dice_weight: float = Field(5.0, ge=0)
    """Dice loss at the sampled points."""
    no_object_weight: float = Field(0.1, ge=0)
    """Weight of the no-object class inside the cross-entropy."""
    deep_supervision: bool = True
    """The same losses after every decoder layer and on the raw queries."""
    train_num_points: int = Field(12544, ge=1)
    """Points per mask in the losses, and in the matching costs."""
    oversample_ratio: float = Field(3.0, ge=1)
    """Random candidates per chosen point."""
    importance_sample_ratio: Unit = 0.75
    """Share of the points that are the most uncertain candidates; the rest are uniform."""


class Mask2FormerSpec(ModelSpec):
    modes: ClassVar[tuple[Mode, ...]] = ("panoptic", "instance", "semantic")

    name: Literal["mask2former"] = "mask2former"
    mode: Literal["panoptic", "instance", "semantic"] = "panoptic"
    pixel_decoder: PixelDecoderSpec = PixelDecoderSpec()
    decoder: TransformerDecoderSpec = TransformerDecoderSpec()
    loss: MaskLossSpec = MaskLossSpec()


class ClassDecoderSpec(Section):
    """Initialises the queries from the task token by attending to the mask features (OneFormer, section 3.1)."""

    layers: int = Field(2, ge=1, le=24)
    """Layers."""
    nheads: int = Field(8, ge=1, le=32)
    """Attention heads."""
    dim_feedforward: int = Field(2048, ge=32)
    """Inner width of the feed-forward layers."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """In attention and feed-forward layers."""


class TextEncoderSpec(Section):
    """Read in training only: texts of what an image holds, against which the queries are contrasted (OneFormer, section 3.2)."""

    width: int = Field(256, ge=64, le=1024)
    """Channels; a multiple of 64, the width of a head. The projection gives the decoder's `hidden_dim`."""
    layers: int = Field(6, ge=1, le=24)
    """Layers of the causal transformer."""
    context_length: int = Field(77, ge=8, le=512)
    """Tokens of a text, zero-padded."""
    num_context: int = Field(16, ge=0)
    """Learned contexts appended to the texts; the texts number `num_object_queries` less these (TAO: `n_ctx`)."""
    projection_layers: int = Field(2, ge=1, le=8)
    """Layers of the projection (TAO: `proj_num_layers`)."""


class TaskProbabilitySpec(Section):
    """How often training shows an image with each task; the three are shares of their sum. With mode panoptic only."""

    semantic: float = Field(1.0, ge=0)
    """One mask per class."""
    instance: float = Field(1.0, ge=0)
    """Countable things only."""
    panoptic: float = Field(1.0, ge=0)
    """Both."""


class OneFormerLossSpec(MaskLossSpec):
    contrastive_weight: float = Field(0.5, ge=0)
    """Of the contrastive loss between queries and texts; 0 leaves the text encoder out."""
    contrastive_temperature: float = Field(0.07, gt=0)
    """What the learned temperature starts from."""


class OneFormerPixelDecoderSpec(PixelDecoderSpec):
    dropout: float = Field(0.1, ge=0, lt=1)
    """After attention and inside the feed-forward layers."""


class OneFormerDecoderSpec(TransformerDecoderSpec):
    num_object_queries: int = Field(150, ge=2, le=2000)
    """Upper bound of objects per image, and the task token."""


class OneFormerSpec(ModelSpec):
    """With mode panoptic one training serves all three tasks, and an evaluation asks each one with its own task token."""

    modes: ClassVar[tuple[Mode, ...]] = ("panoptic", "instance", "semantic")

    name: Literal["oneformer"] = "oneformer"
    mode: Literal["panoptic", "instance", "semantic"] = "panoptic"
    task_length: int = Field(77, ge=8, le=512)
    """Tokens of the task's text, zero-padded: the width of the task input (TAO: `task_seq_len`)."""
    task_probability: TaskProbabilitySpec = TaskProbabilitySpec()
    pixel_decoder: OneFormerPixelDecoderSpec = OneFormerPixelDecoderSpec()
    class_decoder: ClassDecoderSpec = ClassDecoderSpec()
    decoder: OneFormerDecoderSpec = OneFormerDecoderSpec()
    use_task_norm: bool = True
    """Normalises the task token before it becomes queries."""
    text: TextEncoderSpec = TextEncoderSpec()
    loss: OneFormerLossSpec = OneFormerLossSpec()


class DetectionLossSpec(Section):
    """Losses of the box transformers, and the costs of the matching, which have the same weights (Deformable DETR, section 4)."""

    class_weight: float = Field(2.0, ge=0)
    """Sigmoid focal loss (TAO: `cls_loss_coef`)."""
    box_weight: float = Field(5.0, ge=0)
    """L1 distance of normalised centre-size boxes (TAO: `bbox_loss_coef`)."""
    giou_weight: float = Field(2.0, ge=0)
    """Generalised IoU (TAO: `giou_loss_coef`)."""
    focal_alpha: Unit = 0.25
    """Weight of the positives in the focal loss."""
    aux_loss: bool = True
    """The same losses after every decoder layer."""


class DeformableDetrSpec(ModelSpec):
    modes: ClassVar[tuple[Mode, ...]] = ("detection",)

    name: Literal["deformable_detr"] = "deformable_detr"
    mode: Literal["detection"] = "detection"
    strides: list[Literal[4, 8, 16, 32]] = Field([8, 16, 32], min_length=1, max_length=4)
    """Which of the backbone's maps are used, ascending (TAO: `return_interm_indices` 0..3 are strides 4..32, 4 is a level beyond them)."""
    num_feature_levels: int = Field(4, ge=1, le=5)
    """Levels of the transformer; those beyond the backbone's maps come from convolutions of stride 2."""
    dilation: bool = False
    """The backbone's last stage is dilated instead of strided, so that its map has stride 16 (DC5)."""
    num_queries: int = Field(300, ge=1, le=2000)
    """Upper bound of objects per image."""
    hidden_dim: int = Field(256, ge=32, le=1024)
    """Channels of the transformer; a multiple of 32 (group norm) and of `nheads`."""
    nheads: int = Field(8, ge=1, le=32)
    """Attention heads."""
    enc_layers: int = Field(6, ge=1, le=24)
    """Encoder layers."""
    dec_layers: int = Field(6, ge=1, le=24)
    """Decoder layers."""
    dim_feedforward: int = Field(1024, ge=32)
    """Inner width of the feed-forward layers."""
    enc_n_points: int = Field(4, ge=1, le=16)
    """Sampling points per head and level in the encoder."""
    dec_n_points: int = Field(4, ge=1, le=16)
    """Sampling points per head and level in the decoder."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """In attention and feed-forward layers (TAO: `dropout_ratio`, 0.3 there)."""
    with_box_refine: bool = True
    """Every decoder layer corrects the boxes of the one before it and has its own heads."""
    loss: DetectionLossSpec = DetectionLossSpec()


class DecodeHeadSpec(Section):
    type: Literal["fcn", "pspnet", "deeplabv3", "deeplabv3plus", "unet", "upernet", "fpn", "segformer", "linknet"] = (
        "deeplabv3plus"
    )
    """`fcn`, `pspnet` and `deeplabv3` read the last map, `deeplabv3plus` the first as well, the others all four. FPN and LinkNet need
    `output_stride` 32."""
    channels: int = Field(256, ge=8, le=2048)
    """Width of the decoder. U-Net starts with it and halves it twice; FPN adds up half of it (a multiple of 64); LinkNet has the backbone's."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Before the classifier."""
    atrous_rates: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (
        12,
        24,
        36,
    )
    """DeepLabV3 and V3+: dilations of the 3x3 convolutions. Published for an output stride of 8; half of them go with 16."""


class AuxiliaryHeadSpec(Section):
    """An FCN head on an earlier map, in training only."""

    stride: Literal[4, 8, 16, 32] = 16
    """Which of the backbone's maps; with `output_stride`, the map that would have it."""
    channels: int = Field(256, ge=8, le=2048)
    """Width of the head."""
    convs: int = Field(1, ge=0, le=8)
    """3x3 convolutions."""
    weight: float = Field(0.4, ge=0)
    """Factor on its losses."""


class SegmentationLossSpec(Section):
    type: Literal["cross_entropy", "dice", "focal", "lovasz", "tversky"] = "cross_entropy"
    """`focal` is one sigmoid per class; `dice`, `tversky` and `lovasz` compare regions over the whole batch."""
    weight: float = Field(1.0, ge=0)
    """Factor."""
    focal_gamma: float = Field(2.0, ge=0)
    """Focal: exponent by which easy pixels lose weight."""
    tversky_alpha: Unit = 0.3
    """Tversky: weight of false positives; 0.5 for both is Dice."""
    tversky_beta: Unit = 0.7
    """Tversky: weight of false negatives."""


class OhemSpec(Section):
    """Online hard example mining: the cross-entropy of the decode head counts the pixels of which the network is least sure."""

    thresh: Unit | None = 0.7
    """Pixels whose own class has a smaller probability count; left out, those of `min_kept` alone."""
    min_kept: int = Field(100_000, ge=1)
    """At least so many pixels per image, taken over the batch, count."""


class EncoderDecoderSpec(ModelSpec):
    """Segmentor = preprocessing + backbone + decode head + auxiliary heads, freely combined."""

    modes: ClassVar[tuple[Mode, ...]] = ("semantic",)

    name: Literal["encoder_decoder"] = "encoder_decoder"
    mode: Literal["semantic"] = "semantic"
    output_stride: Literal[8, 16, 32] = 32
    """Convolutional backbones are dilated to it; pyramid transformers, which cannot be, keep 32, as in MMSegmentation."""
    decoder: DecodeHeadSpec = DecodeHeadSpec()
    auxiliary: dict[str, AuxiliaryHeadSpec] = {}
    """Auxiliary heads by name."""
    losses: dict[str, SegmentationLossSpec] = {"ce": SegmentationLossSpec()}
    """Losses by name; all are added up. The name is what the logs show."""
    class_weights: list[Annotated[float, Field(ge=0)]] | None = None
    """Of the classes in the cross-entropy and the focal loss, in the order of the catalogue."""
    ohem: OhemSpec | None = None


FAMILIES: tuple[type[ModelSpec], ...] = (Mask2FormerSpec, OneFormerSpec, DeformableDetrSpec, EncoderDecoderSpec)
