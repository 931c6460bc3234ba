"""Every key of a spec: its type, default, range and meaning. The reference in docs/ and the editors' JSON Schema are made from here.

A key marked ``Inert`` cannot change a result (worker counts, verbosity); it stays out of every lineage, so that changing it
reruns nothing. Paths of data are relative to the data root, which is inert too. The keys of `model` are in ``networks``.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tessera.spec import checks
from tessera.spec.networks import DeformableDetrSpec, EncoderDecoderSpec, Mask2FormerSpec, ModelSpec, OneFormerSpec
from tessera.spec.section import Inert, InertBatchSize, Section, Side, Unit, refuse

Precision = Literal["fp32", "fp16", "int8"]


Depth = Annotated[float, Field(ge=-1e12, le=1e12)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


class DemoSpec(Section):
    """Generated scenes: coloured shapes (things) over textured ground (stuff); byte-identical for equal keys."""

    train_images: int = Field(96, ge=1, le=100_000)
    """Scenes of the train split."""
    val_images: int = Field(16, ge=1, le=100_000)
    """Scenes of the val split."""
    test_images: int = Field(24, ge=1, le=100_000)
    """Scenes of the test split."""
    height: Side = 128
    """Pixels."""
    width: Side = 128
    """Pixels."""
    max_objects: int = Field(5, ge=1, le=50)
    """A scene has 1 to this many shapes."""
    seed: Seed = 0
    """Every scene depends on (seed, split, index) alone."""


MAX_PIXELS = 178_956_970
"""Where Pillow takes an image for an attack unless told otherwise."""

Byte = Annotated[int, Field(ge=0, le=255)]
Names = Annotated[list[str], Field(min_length=1)]


class SplitSpec(Section):
    images: str | Names | None = None
    """Folder of the images, relative to the data root; a list has one folder for each entry of `annotations`."""
    annotations: str | Names | None = None
    """COCO JSON, or JSONL of `img` and `segm` for mask pairs, relative to the data root; a pattern (`shards/*.json`), or a list of both.
    Image ids stay unique: a file whose ids meet those of an earlier file has them all raised by the largest one so far plus 1."""
    panoptic: str | Names | None = None
    """Folder of the panoptic PNG files (`coco_panoptic` only), relative to the data root; a list as for `images`."""
    names: str | None = None
    """Text file of image names, one a line, relative to the data root: of all images that `annotations` list, the split has these alone. So
    lists such as KITTI's and Pascal VOC's ImageSets divide one set of annotations. Endings and folders may be left out where they need not tell
    images apart: `000007` is `training/image_2/000007.png`."""
    batch_size: int = Field(1, ge=1)
    """Images per step and process. In val and test it changes nothing but speed and memory, and is inert.
    Every pass shuffles the whole split and every process takes its share of each batch, on one node as on several (TAO: `train_sampler`)."""
    num_workers: int = Field(2, ge=0, le=256, json_schema_extra=Inert)
    """Loader processes; 0 loads in the main process. All of them share one copy of the annotations (TAO: `serialized`)."""
    target_size: tuple[Side, Side] | None = None
    """(height, width) every image is stretched to before anything else; left out, images keep their size."""


class AugmentationSpec(Section):
    train_min_size: list[Side] = Field([640], min_length=1)
    """Shorter side after resizing; one is drawn per image. A single value stays single (TAO silently widens it)."""
    train_max_size: Side = 2560
    """Longer side is never resized beyond this."""
    train_scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = None
    """Large-scale jitter: resize to fit the crop times a factor drawn from this range, instead of `train_min_size` (TAO: `fixed_random_crop`)."""
    train_random_resize: list[Side] | None = Field(None, min_length=1)
    """With probability one half, resize to one of these shorter sides and cut out `train_random_crop` first (Deformable DETR)."""
    train_random_crop: tuple[Side, Side] | None = None
    """[smallest, largest] side of the window that goes with `train_random_resize`; height and width are drawn apart."""
    train_crop_size: tuple[Side, Side] | None = (640, 640)
    """(height, width) of the random crop; smaller images are padded to it. None: no crop, and a batch is as large as its largest image."""
    fixed_padding: tuple[Side, Side] | None = None
    """(height, width) that every training batch is padded to where `train_crop_size` is None; larger images are scaled down to fit."""
    single_class_max_area: float = Field(1.0, gt=0, le=1)
    """A semantic crop is drawn again (up to 10 times) while one class covers more than this share; 1 turns it off."""
    flip: Unit = 0.5
    """Probability of a horizontal flip."""
    color_jitter: bool = True
    """Brightness, contrast, saturation and hue as in SSD."""
    test_min_size: Side = 640
    """Shorter side in validation, test, inference and export."""
    test_max_size: Side = 2560
    """Longer side in the same."""


class ArchiveSpec(Section):
    address: str = Field(json_schema_extra=Inert)
    """`s3://bucket/key`, or a path relative to the data root. A tar archive (`.tar`, `.tar.gz`, `.tgz`, `.tar.bz2`, `.tar.xz`) is unpacked,
    any other file copied. What is at the address counts by its digest alone."""
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    """Of the archive as it lies at its address; anything else there is refused. Without it `tessera fetch` stops and says which it found."""


class ConvertSpec(Section):
    """KITTI folders to COCO shards in data/<dataset>/converted/ (docs/convert.md)."""

    input_source: Names
    """Folders below the data root that become the train shards; each has images and labels (TAO: the lines of its text file)."""
    val_source: list[str] = []
    """Folders that become the val shards; with `val_split` above 0 there are none, because val is drawn from `input_source`."""
    test_source: list[str] = []
    """Folders that become the test shards."""
    image_dir_name: str = "images"
    """Where a source has its images: `<source>/<image_dir_name>`. With `{source}` in it, such as `photos/{source}`, the whole path."""
    label_dir_name: str = "labels"
    """The same for its labels, one text file of 15 columns an image, with the image's name."""
    mapping_path: str | None = None
    """JSON object of KITTI class: class, relative to the data root; case does not count in the KITTI classes. A class that it does not name is
    dropped. Left out, the classes of `dataset.label_map` stand for themselves."""
    val_split: float = Field(0, ge=0, lt=100)
    """Percent of the images of `input_source` that become val; each is drawn by its own name and `seed`, so that the share is approximate."""
    num_partitions: int = Field(1, ge=1, le=100)
    """Above 1: `input_source` becomes so many folds of about equal size (`fold0`, `fold1`, ...) in place of train and val."""
    num_shards: int = Field(8, ge=1, le=10_000)
    """Files that train, val, test and each fold are cut into; fewer where there are fewer images."""
    seed: Seed = 0
    """Of `val_split` and `num_partitions`."""


class DatasetSpec(Section):
    name: str = "demo"
    """Name of its file in config/datasets and of its folder in data/."""
    type: Literal["mask_pairs", "coco", "coco_panoptic"] = "coco_panoptic"
    """`mask_pairs`: JSONL of image and mask PNG (TAO's `ade`), semantic; `coco`: instance JSON; `coco_panoptic`: JSON and PNG, all modes."""
    generator: DemoSpec | None = None
    """Set for the demo dataset, whose files are generated."""
    fetch: dict[str, ArchiveSpec] = {}
    """Folder -> archive that becomes the content of data/<dataset>/<folder>/. The paths of such a dataset are relative to the project's
    data/, not to the data root."""
    convert: ConvertSpec | None = None
    """Set for a dataset of KITTI folders, whose COCO files are made. `annotations` are then relative to the project's data/ and start with
    `<dataset>/converted/shards/`; images in them are relative to the data root, so that `images` is `.`."""
    label_map: str | None = None
    """JSON list of `id` (0 or more), `name`, `color`, `isthing`, relative to the data root. COCO files may do without: theirs is used; names
    that they give to the same ids must be the same but for case and white space. Classes of one name are told apart as `screen (131)`
    wherever a key or a table names them. A `.txt` file is a class map: one name a line, the id being the number of the line, all things."""
    contiguous_id: bool = True
    """Classes are the label map's entries in order. False: classes are the ids 1..num_classes, unnamed where the map has none (TAO)."""
    num_classes: int | None = Field(None, ge=1)
    """Checked against the label map where given; required when `contiguous_id` is false."""
    ignore_id: int | None = Field(0, ge=0, le=65535)
    """Mask value that means unlabeled (`mask_pairs`); 255 always does, unless the label map has a class 255. null: no other value does, so that
    0 may be a class, as in masks of 0..C-1 and 255, or of background 0 and object 1. A class of the label map with this value is refused."""
    value_range: tuple[Depth, Depth] | None = None
    """[low, high] of images deeper than 8 bits: gray of 16 or 32 bits and of floating point, colour PNG of 16 bits. `low` and what is below become
    black, `high` and what is above white, in 256 steps. Left out, such images are refused; images of 8 bits keep their values."""
    max_pixels: int = Field(MAX_PIXELS, ge=1, le=10**12, json_schema_extra=Inert)
    """Pixels that an image or a mask may have. What has more is refused before it is decoded, because a file of a few bytes can claim to have
    billions. Each takes some 10 bytes of memory in every loader process."""
    train: SplitSpec = SplitSpec()
    val: SplitSpec = Field(SplitSpec(), json_schema_extra=InertBatchSize)
    test: SplitSpec = Field(SplitSpec(), json_schema_extra=InertBatchSize)
    augmentation: AugmentationSpec = AugmentationSpec()

    @model_validator(mode="after")
    def _agree(self) -> DatasetSpec:
        refuse(checks.dataset_mistakes(self))
        return self


class OptimSpec(Section):
    type: Literal["AdamW", "SGD"] = "AdamW"
    """Optimiser."""
    lr: float = Field(1e-4, gt=0)
    """Learning rate; not scaled by batch size or number of processes."""
    backbone_multiplier: float = Field(0.1, ge=0)
    """Factor on the learning rate of the backbone."""
    multipliers: dict[str, Annotated[float, Field(ge=0)]] = {}
    """More factors by part of a parameter's dotted name, such as `decoder` or `backbone.layer4`; the longest that fits counts."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD only."""
    weight_decay: float = Field(0.05, ge=0)
    """Not applied to norms, biases of norms, embeddings and relative position biases (as published)."""
    lr_scheduler: Literal["MultiStep", "StepLR", "WarmupPoly", "ReduceOnPlateau", "Constant"] = "MultiStep"
    """MultiStep, StepLR and ReduceOnPlateau step per epoch; WarmupPoly per optimiser step, down to `min_lr` after the last one."""
    milestones: list[Annotated[int, Field(ge=1)]] = [88, 96]
    """MultiStep: epochs after which the rate is multiplied by `gamma`."""
    step_size: int = Field(40, ge=1)
    """StepLR: epochs between two multiplications by `gamma`."""
    gamma: float = Field(0.1, gt=0, le=1)
    """MultiStep, StepLR, ReduceOnPlateau: factor."""
    power: float = Field(0.9, gt=0)
    """WarmupPoly: exponent."""
    min_lr: float = Field(0.0, ge=0)
    """WarmupPoly: where `lr` ends, at most `lr` itself; the multipliers scale both."""
    warmup_iters: int = Field(0, ge=0)
    """Optimiser steps of linear warm-up, under every scheduler."""
    warmup_factor: float = Field(0.001, gt=0, le=1)
    """Share of the rate at the first warm-up step."""
    monitor_name: Literal["train_loss", "val_loss"] = "train_loss"
    """ReduceOnPlateau: what has to fall."""
    patience: int = Field(10, ge=0)
    """ReduceOnPlateau: epochs without a fall before the rate is multiplied."""


class TrainSpec(Section):
    num_epochs: int = Field(50, ge=0)
    """Passes over the train split. Raising it later continues the same training (not under WarmupPoly, whose curve would change).
    0 trains nothing: the weights of `pretrained_model_path`, which must be complete, become model.pth as they are."""
    iters_per_epoch: int | None = Field(None, ge=1)
    """Steps that make up an epoch; left out, one pass over the split (the incomplete last batch is dropped). A schedule by iterations, such as
    40k with a validation every 4k, is `iters_per_epoch: 4000` and `num_epochs: 10`."""
    checkpoint_interval: int = Field(1, ge=1, json_schema_extra=Inert)
    """Epochs or steps between checkpoints."""
    checkpoint_interval_unit: Literal["epoch", "step"] = Field("epoch", json_schema_extra=Inert)
    """Unit of `checkpoint_interval`."""
    keep_checkpoints: int | None = Field(2, ge=1, json_schema_extra=Inert)
    """Newest checkpoints to keep beside the latest and the best, which are other names of them where they can be; null keeps all."""
    shared_checkpoints: bool = Field(False, json_schema_extra=Inert)
    """Whether the folder of the resume state may be one that other users can write, who are trusted then; otherwise it is refused."""
    validation_interval: int = Field(1, ge=1)
    """Epochs or steps between validations; the last epoch always ends with one."""
    validation_interval_unit: Literal["epoch", "step"] = "epoch"
    """Unit of `validation_interval`."""
    select: Literal["last", "best"] = "last"
    """Which weights become model.pth: those after the last epoch, or those of the best validation metric of the mode (PQ, AP, mIoU, box_AP); of
    equal ones the later."""
    num_gpus: int = Field(1, ge=1)
    """Processes on each machine, one GPU each; without a GPU, processes on the CPU. The larger of this and the length of `gpu_ids` counts."""
    gpu_ids: list[Annotated[int, Field(ge=0)]] = [0]
    """Which GPUs. No result depends on it but through their number, so that [1] for [0] retrains nothing."""
    num_nodes: int = Field(1, ge=1)
    """Machines. Of this, `num_gpus` and `gpu_ids` the number of all processes alone can change a result."""
    threads: int = Field(2, ge=1, le=1024)
    """Threads of PyTorch in each process, whatever `--cores`, OMP_NUM_THREADS or SLURM say: on the CPU their number decides how sums are
    rounded, so that another one is another training. On a GPU there is no reason to change it. Loader processes have one thread each."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """fp16 and bf16 are mixed precision: weights stay fp32. fp16 needs a GPU."""
    distributed_strategy: Literal["ddp", "fsdp"] = "ddp"
    """Used with more than one process: replicated, or fully sharded parameters."""
    activation_checkpoint: bool = Field(False, json_schema_extra=Inert)
    """Recompute activations in the backward pass: less memory, the same numbers, about a third slower."""
    clip_grad_type: Literal["full", "value", "none"] = "full"
    """`full`: norm over all parameters; `value`: each element; `none`: no clipping."""
    clip_grad_norm: float = Field(0.01, gt=0)
    """Largest norm, or largest absolute value."""
    clip_grad_norm_type: float = Field(2.0, gt=0)
    """Order of the norm."""
    freeze: list[str] = []
    """Dotted module names whose parameters are not trained, such as `backbone`; an unknown name is an error."""
    pretrained_model_path: str | None = None
    """Checkpoint whose weights training starts from (fine-tuning): by name and shape, with a report; heads of another class count start afresh.
    Published ones become such a file by `tessera import`."""
    resume_training_checkpoint_path: str | None = None
    """Checkpoint to continue from instead of the latest one; refused where model, data or optimiser differ."""
    verbose: bool = Field(False, json_schema_extra=Inert)
    """Logs the learning rate of every parameter group at every step."""
    optim: OptimSpec = OptimSpec()

    @property
    def processes(self) -> int:
        """On each machine."""
        return max(self.num_gpus, len(self.gpu_ids))

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.processes * self.num_nodes


class PostprocessSpec(Section):
    """Read by evaluation and inference, and by the validations of a training, which go on with what they began with: `train.json` says what
    (`postprocess`). Changing a threshold retrains nothing, unless `train.select` is best and the threshold decides the metric that chooses
    the weights: the first two keys in mode panoptic (PQ), `test_topk_per_image` in mode instance (AP), the last two in mode detection
    (box_AP)."""

    object_mask_threshold: Unit = 0.8
    """Panoptic: queries whose best class scores lower are dropped."""
    overlap_threshold: Unit = 0.8
    """Panoptic: a segment is dropped when less than this share of its mask is left after the others took theirs."""
    test_topk_per_image: int = Field(100, ge=1)
    """Instance: (query, class) pairs kept per image."""
    num_select: int = Field(100, ge=1)
    """Detection: (query, class) pairs kept per image."""
    conf_threshold: Unit = 0.0
    """Detection: boxes that score lower are dropped before anything else; an image may be left with none. AP is made from all of them, so
    that above 0 it falls."""


class EvaluateSpec(Section):
    split: Literal["val", "test"] = "test"
    """Which images the numbers are made from."""
    classes: Names | None = None
    """Names of the classes that metrics are restricted to; left out, all. Where several have one name, `name (id)`."""
    max_detections: list[Annotated[int, Field(ge=1, le=100_000)]] = Field([1, 10, 100], min_length=1)
    """Instances and detections: how many of an image and class count, best first, in ascending order. Average recall is reported for each
    number (`AR10`), all else for the last; where that is not COCO's 100, names carry it, such as `AP@300`. Validations keep to COCO's."""
    size_borders: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (32.0, 96.0)
    """Instances and detections: sides in pixels of the squares that part small from medium, and medium from large objects. Where they are
    not COCO's, names carry them, such as `APs@16-64`."""

    @model_validator(mode="after")
    def _ascending(self) -> EvaluateSpec:
        for key in ("max_detections", "size_borders"):
            values = getattr(self, key)
            if list(values) != sorted(set(values)):
                raise ValueError(f"{key} is {list(values)}, expected ascending numbers")
        return self


class ViewsSpec(Section):
    """Semantic predictions averaged over views of an image, in evaluation and inference (MMSegmentation's slide mode and its multi-scale and
    flip testing). With another mode of the model everything here stays at its default. Validations of a training see whole images at one scale."""

    mode: Literal["whole", "slide"] = "whole"
    """`slide`: the network sees windows, and their scores are averaged where they overlap."""
    crop_size: tuple[Side, Side] = (512, 512)
    """Slide: (height, width) of a window in pixels of the resized image, multiples of 32; smaller images are padded to it."""
    stride: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (341, 341)
    """Slide: (down, right) steps between windows, at most `crop_size`."""
    scales: list[Annotated[float, Field(gt=0)]] = Field([1.0], min_length=1)
    """Factors on the resized image (`test_min_size`); the scores at all of them are averaged."""
    flip: bool = False
    """Adds the mirror image of every view."""


class InferenceSpec(Section):
    images: str | None = None
    """Folder (its sub-folders too), image file or COCO file of images beside it, relative to the data root; left out, the images of the
    evaluated split."""
    max_images: int | None = Field(16, ge=1)
    """The first so many in sorted order; null: all. Left out, all of `images` where that is set."""
    draw: Literal["off", "one", "all"] = "all"
    """Pictures of the results: none, one per image, or of a panoptic model one each of segments, instances and classes. Figures show one,
    where there is any."""
    score_threshold: Unit = 0.5
    """Instances and detections below are neither drawn nor written as KITTI labels; the JSON results keep them."""
    opacity: Unit = 0.5
    """Of the drawn masks."""
    color_map: dict[str, tuple[Byte, Byte, Byte]] = {}
    """Class name: [red, green, blue], each 0..255. Classes that are not named keep the label map's colour. Where several have one name,
    `name (id)`."""
    outline_width: int | None = Field(None, ge=1, le=100)
    """Of drawn boxes and contours, in pixels of the picture; left out, by the picture's size."""

    @model_validator(mode="after")
    def _no_limit(self) -> InferenceSpec:
        """Unless one is set, on images that are named."""
        if self.images is not None and "max_images" not in self.model_fields_set:
            object.__setattr__(self, "max_images", None)
        return self


class ExportSpec(Section):
    input_height: Side | None = None
    """Of the exported graph, a multiple of 32. Left out, as large as the images of the val split (without one, of the train split) need at
    their test size (`test_min_size`, `test_max_size`). Images that are larger are scaled down, with a warning, in evaluation and inference."""
    input_width: Side | None = None
    """The same for the width."""
    dynamic_size: bool = False
    """Height and width stay free; `input_height` and `input_width` then only trace."""
    batch_size: int = Field(-1, ge=-1)
    """-1: the batch stays free; otherwise fixed."""
    opset_version: int = Field(18, ge=18, le=25)
    """ONNX operator set."""
    task: Literal["panoptic", "instance", "semantic"] | None = None
    """OneFormer: the task that is built into the graph, which then does that one alone; left out, the task is an input of the graph."""
    on_cpu: bool = True
    """True: standard operators only, runs everywhere. False: deformable attention as TensorRT's MultiscaleDeformableAttnPlugin_TRT."""
    sampling: Literal["grid_sample", "gather"] = "grid_sample"
    """How deformable attention samples with `on_cpu`: `gather` avoids GridSample, which some TensorRT versions compute wrongly."""

    @model_validator(mode="after")
    def _sizes(self) -> ExportSpec:
        for key in ("input_height", "input_width"):
            value = getattr(self, key)
            if value is not None and value % 32:
                raise ValueError(
                    f"{key} is {value}, expected a multiple of 32 (nearest: {max(32, round(value / 32) * 32)})"
                )
        if self.batch_size == 0:
            raise ValueError("batch_size is 0, expected -1 (free) or at least 1")
        return self


class PrecisionSpec(Section):
    fp16_keep: list[str] = [
        "GridSample",
        "Softmax",
        "LayerNormalization",
        "GroupNormalization",
        "InstanceNormalization",
        "ReduceMean",
        "Pow",
    ]
    """ONNX operator types that stay in fp32 inside an fp16 graph."""


class EngineSpec(Section):
    min_batch_size: int = Field(1, ge=1)
    """Smallest batch the engine accepts."""
    opt_batch_size: int = Field(1, ge=1)
    """Batch the engine is tuned for."""
    max_batch_size: int = Field(1, ge=1)
    """Largest batch the engine accepts."""
    workspace_size: int = Field(1024, ge=1)
    """Scratch memory for building, MiB."""
    timing_cache: str | None = Field(None, json_schema_extra=Inert)
    """File that remembers kernel timings between builds; left out, none is kept."""
    verbose: bool = Field(False, json_schema_extra=Inert)
    """TensorRT's own detailed log."""

    @model_validator(mode="after")
    def _order(self) -> EngineSpec:
        if not self.min_batch_size <= self.opt_batch_size <= self.max_batch_size:
            raise ValueError(
                f"min_batch_size {self.min_batch_size}, opt_batch_size {self.opt_batch_size}, max_batch_size "
                f"{self.max_batch_size}: expected min <= opt <= max"
            )
        return self


class ParitySpec(Section):
    images: int = Field(4, ge=1)
    """Images of the evaluated split that both runtimes see."""
    tolerance: float = Field(1e-3, gt=0)
    """fp32: largest allowed mean absolute difference of an output, as a share of the output's standard deviation."""
    tolerance_fp16: float = Field(2e-2, gt=0)
    """The same for fp16 graphs."""
    agreement: float = Field(0.0, ge=0, le=1)
    """Smallest agreement of the final predictions with PyTorch's where each runtime sees the images as in its evaluation, at its own size: mean
    IoU of the classes, or of instances and boxes the share of the scores. 0 refuses nothing; what is scaled down is warned of all the same."""


class Spec(Section):
    """One experiment."""

    seed: Seed = 0
    """Everything random derives from it."""
    data_root: str = Field("data", json_schema_extra=Inert)
    """Folder that the dataset's paths are relative to; set by `--config data_root=...` or `--data-root`."""
    model: ModelSpec = Mask2FormerSpec()
    dataset: DatasetSpec = DatasetSpec()
    train: TrainSpec = TrainSpec()
    postprocess: PostprocessSpec = PostprocessSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    testing: ViewsSpec = ViewsSpec()
    inference: InferenceSpec = InferenceSpec()
    export: ExportSpec = ExportSpec()
    precision: PrecisionSpec = PrecisionSpec()
    engine: EngineSpec = EngineSpec()
    parity: ParitySpec = ParitySpec()

    @property
    def evaluated(self) -> SplitSpec:
        """Split of `evaluate.split`."""
        return self.dataset.val if self.evaluate.split == "val" else self.dataset.test

    @model_validator(mode="after")
    def _agree(self) -> Spec:
        refuse(checks.mistakes(self))
        return self


class Mask2FormerExperiment(Spec):
    model: Mask2FormerSpec = Mask2FormerSpec()


class OneFormerExperiment(Spec):
    model: OneFormerSpec = OneFormerSpec()


class DeformableDetrExperiment(Spec):
    model: DeformableDetrSpec = DeformableDetrSpec()


class EncoderDecoderExperiment(Spec):
    model: EncoderDecoderSpec = EncoderDecoderSpec()


SPECS: dict[str, type[Spec]] = {
    "mask2former": Mask2FormerExperiment,
    "oneformer": OneFormerExperiment,
    "deformable_detr": DeformableDetrExperiment,
    "encoder_decoder": EncoderDecoderExperiment,
}
"""The class of a spec, by its model family: ``Spec`` with the keys of that family under ``model``. Every spec is of one of these."""


def read_spec(values: Any) -> Spec:
    """From what ``model_dump(mode="json")`` gave. Raises ValidationError, and ValueError for a family that is unknown."""
    model = values.get("model") if isinstance(values, dict) else None
    family = model.get("name") if isinstance(model, dict) else None
    if family not in SPECS:
        raise ValueError(f"model.name is {family!r}, expected one of {', '.join(SPECS)}")
    return SPECS[family].model_validate_json(json.dumps(values))
