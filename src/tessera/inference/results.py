"""The infer stage: overlays to look at and files that other programs read.

A folder holds ``index.json``, which lists every image and (as ``outputs``) file, ``overlays/`` and, as far as the mode has them:

- ``instances.json``: COCO results (``image_id``, ``category_id``, ``bbox``, ``score``, ``segmentation``), every instance kept
- ``panoptic.json`` and ``panoptic/``: COCO panoptic, a segment's id = R + 256 G + 65536 B
- ``labels/``: KITTI label files of a detector, one per image, empty where nothing is certain enough
- ``semantic/``: one PNG per image with the dataset's class ids: gray of 8 bits, of 16 where an id exceeds 255, and RGB where one exceeds
  65535, as in panoptic PNGs: id = R + 256 G + 65536 B

A panoptic model fills all but the labels, and draws ``overlays_instance/`` and ``overlays_semantic/`` too. Names and sub-folders are the images'.
``instances.json``, and ``panoptic.json`` with its folder, are what test servers take.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from tessera import provenance
from tessera.files import UserError, atomic_folder, encoded, read_json, write_json
from tessera.inference.predictor import Predictor
from tessera.inference.sources import ImageSource, gather, open_source, safe_name
from tessera.ops.images import input_record
from tessera.ops.kitti import kitti_names, kitti_row
from tessera.ops.masks import masks_to_boxes
from tessera.ops.rle import encode_masks
from tessera.pictures.overlays import draw_predictions
from tessera.progress import track
from tessera.spec.lineage import lineage
from tessera.spec.networks import Mode
from tessera.spec.schema import InferenceSpec, Spec
from tessera.structures import (
    LARGEST_PIXEL_ID,
    ClassCatalog,
    ImageMeta,
    Instances,
    Panoptic,
    Predictions,
    unknown_class,
)

FORMAT = 1


@dataclass(frozen=True)
class Written:
    """What a folder of results holds."""

    images: int
    found: int
    """Instances, detections or segments, certain or not; in semantic mode images."""
    broken: tuple[str, ...]
    """What was wrong with images that could not be read, one line each."""


def infer(
    predictor: Predictor,
    spec: Spec,
    folder: Path,
    split_images: Sequence[ImageSource] = (),
    inputs: Mapping[str, str] | None = None,
    record: Mapping[str, Any] | None = None,
    finished: Callable[[], None] | None = None,
    testing: str = "",
) -> Written:
    """Predicts on ``spec.inference.images``, or on ``split_images`` where that is not set, and writes ``folder`` whole or not at all.

    ``inputs``: ``provenance.digests`` of the model; ``record``: the lineage, where it is not the spec's own. ``finished`` is called after
    the last image and before anything bears its name; may raise. ``testing``: name of the way of testing that the spec has.
    Raises UserError when there is no image; that nothing is found in any of them is only warned of.
    """
    sources = choose_images(spec, split_images)
    header = predictor.header
    stream = track(predictor.stream(sources, spec.evaluated.batch_size), "infer: image", len(sources))
    facts = {
        "experiment": header.experiment,
        "runtime": predictor.runtime,
        "precision": predictor.precision,
        "testing": testing,
        "source": spec.inference.images or f"the {spec.evaluate.split} split of {spec.dataset.name}",
        "lineage": dict(record or lineage(spec, "infer", predictor.runtime, predictor.precision)),
        "facts": provenance.collect(),
    }
    names = [source.file_name for source in sources]
    if finished is not None:
        stream = _then(stream, finished)
    inputs_of = partial(_input, predictor)
    return write_results(
        stream, names, folder, header.catalog, predictor.mode, spec.inference, facts, inputs, told=inputs_of
    )


def _then(
    stream: Iterable[tuple[Tensor, Predictions]], finished: Callable[[], None]
) -> Iterator[tuple[Tensor, Predictions]]:
    yield from stream
    finished()


def predict_to(
    predictor: Predictor,
    source: Any,
    folder: str | Path,
    settings: InferenceSpec = InferenceSpec(),
    catalog: ClassCatalog | None = None,
    facts: Mapping[str, Any] | None = None,
    skip_broken: bool = False,
) -> Written:
    """The same from Python: everything that ``predictor.predict`` takes, or a list of ``ImageSource``, with the pictures and files of ``infer``
    below ``folder``, which is replaced where an earlier call made it.

    Of ``settings`` the keys that say what is drawn and how are read. ``catalog``: the model's classes under other
    names and colours. ``facts`` go into the index. ``skip_broken``: an image that cannot be read is told of at the end and hinders no other.
    """
    given = isinstance(source, list) and all(isinstance(item, ImageSource) for item in source)
    sources = source if given else open_source(source)
    require_replaceable(Path(folder))
    broken: list[str] | None = [] if skip_broken else None
    names = [item.file_name for item in sources]
    stream = track(predictor.stream(sources, broken=broken), "infer: image", len(sources))
    head = {
        "experiment": predictor.header.experiment,
        "runtime": predictor.runtime,
        "precision": predictor.precision,
        "lineage": {"model": predictor.header.lineage, "inference": settings.model_dump(mode="json")},
        "facts": provenance.collect(),
        **(facts or {}),
    }
    classes = predictor.header.catalog if catalog is None else catalog
    told = partial(_input, predictor)
    return write_results(stream, names, Path(folder), classes, predictor.mode, settings, head, broken=broken, told=told)


def _input(predictor: Predictor, metas: Sequence[ImageMeta]) -> dict[str, Any]:
    """What the index says of the size at which the network saw the images; what is scaled down to fit is said here, too."""
    smaller = predictor.scaled_down(metas)
    if smaller is not None:
        _say(f"warning: {smaller.describe(len(metas), predictor.input_size)}")
    return {"input": input_record(predictor.input_size, smaller)}


def require_replaceable(folder: Path) -> None:
    """Raises UserError where the folder holds anything that results did not bring: it is going to be replaced whole."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    index = folder / "index.json"
    document = read_json(index) if index.is_file() else None
    brought = document.get("outputs") if isinstance(document, dict) else None
    known = {"index.json", *(brought if isinstance(brought, dict) else ())}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in known:
            raise UserError(
                f"{folder}: holds {name}, which no inference wrote, and would be replaced whole; name a new folder"
            )


def choose_images(spec: Spec, split_images: Sequence[ImageSource] = ()) -> list[ImageSource]:
    """Sorted by name, at most ``inference.max_images``; says what is left out."""
    sources = list(split_images)
    if spec.inference.images is not None:
        path = Path(spec.data_root) / spec.inference.images
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; set inference.images to images below {spec.data_root}")
        sources, notes = gather([str(path)])
        for note in notes:
            _say(note)
    if not sources:
        raise UserError(f"dataset {spec.dataset.name}: the {spec.evaluate.split} split has no image to infer on")
    sources = sorted(sources, key=lambda source: source.file_name)
    return limited(sources, spec.inference.max_images, "inference.max_images=null for all")


def limited(sources: list[ImageSource], count: int | None, advice: str) -> list[ImageSource]:
    """The first ``count``; says so where others are left out."""
    kept = sources[:count]
    if len(kept) < len(sources):
        _say(f"{len(kept)} of {len(sources)} images; {advice}")
    return kept


def write_results(
    stream: Iterable[tuple[Tensor, Predictions]],
    file_names: Sequence[str],
    folder: Path,
    catalog: ClassCatalog,
    mode: Mode,
    spec: InferenceSpec = InferenceSpec(),
    facts: dict[str, Any] | None = None,
    inputs: Mapping[str, str] | None = None,
    broken: Sequence[str] | None = None,
    told: Callable[[Sequence[ImageMeta]], Mapping[str, Any]] | None = None,
) -> Written:
    """``stream`` yields (3, H, W) uint8 images with their predictions in the order of ``file_names``, all of them but those that it puts into
    ``broken`` on its way; ``facts`` go into the index, which is ``provenance.sealed`` with ``inputs`` and the files of the folder, and so does
    what ``told`` answers for all images in the end."""
    if not file_names:
        raise UserError(f"{folder}: no images were given, so there is nothing to write")
    stems = output_stems(file_names)
    largest = max(catalog.categories, key=lambda category: category.id)
    if mode in ("panoptic", "semantic") and largest.id > LARGEST_PIXEL_ID:
        raise UserError(
            f"the class {largest.name!r} has the id {largest.id}, but semantic/*.png hold ids up to {LARGEST_PIXEL_ID}; "
            "give the classes smaller ids in the annotations and the label map, and train again"
        )
    palette = recolored(catalog, spec.color_map)
    kitti = kitti_names(catalog) if mode == "detection" else ()
    with atomic_folder(folder) as temporary:
        writer = _Writer(temporary, catalog, palette, kitti, mode, spec)
        expected = iter(file_names)
        for image, prediction in stream:
            file_name = prediction.meta.file_name
            if file_name not in expected:  # consumes the names of broken ones before it
                raise ValueError(f"got the predictions of {file_name}, which comes twice, out of turn or unasked")
            writer.add(image, prediction, stems[file_name])
        lost = tuple(broken or ())
        if len(writer.images) + len(lost) != len(file_names):
            raise ValueError(f"got predictions of {len(writer.images)} images, expected {len(file_names) - len(lost)}")
        if not writer.images:
            raise UserError(f"none of {len(lost)} images can be read\n" + "\n".join(f"  {line}" for line in lost))
        head = {"format": FORMAT, "mode": mode, **(facts or {}), **(told(writer.metas) if told else {})}
        return writer.finish(head, inputs, lost)


def output_stems(file_names: Sequence[str]) -> dict[str, str]:
    """Image name -> what its results are called, without suffix: the stem, or the whole name where two images share a stem.

    Stems that differ in case only count as shared: some file systems cannot hold both. Raises UserError for a name that leaves
    its folder, and for one that comes twice.
    """
    paths = {name: safe_name(name) for name in file_names}
    if len(paths) != len(file_names):
        repeated = next(name for name, count in Counter(file_names).items() if count > 1)
        raise UserError(f"image {repeated!r} is given {Counter(file_names)[repeated]} times, expected once")
    shared = Counter(_stem(path).lower() for path in paths.values())
    stems = {name: _stem(path) if shared[_stem(path).lower()] == 1 else name for name, path in paths.items()}
    # a.jpg and a.png become a.jpg and a.png; should there be an a.jpg.png as well, its stem would be taken.
    return stems if len(set(stems.values())) == len(stems) else {name: name for name in stems}


@dataclass
class _Writer:
    folder: Path
    catalog: ClassCatalog
    palette: ClassCatalog
    """The catalogue in the colours to draw with."""
    kitti: Sequence[str]
    """Class names as label files have them; empty where none are written."""
    mode: Mode
    spec: InferenceSpec
    metas: list[ImageMeta] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)
    instances: list[dict[str, Any]] = field(default_factory=list)
    panoptic: list[dict[str, Any]] = field(default_factory=list)

    def add(self, image: Tensor, prediction: Predictions, stem: str) -> None:
        meta = prediction.meta
        self.metas.append(meta)
        entry: dict[str, Any] = {
            "id": meta.image_id,
            "file_name": meta.file_name,
            "height": meta.original_size[0],
            "width": meta.original_size[1],
        }
        if self.spec.draw != "off":
            entry["overlay"] = self._draw(image, prediction, self.mode, f"overlays/{stem}")
        if self.spec.draw == "all" and self.mode == "panoptic":
            entry["overlay_instance"] = self._draw(image, prediction, "instance", f"overlays_instance/{stem}")
            entry["overlay_semantic"] = self._draw(image, prediction, "semantic", f"overlays_semantic/{stem}")
        if prediction.semantic is not None:
            entry["semantic"] = f"semantic/{stem}.png"
            self._save(semantic_png(prediction.semantic, self.catalog), entry["semantic"])
        if prediction.instances is not None:
            entry["instances"] = len(prediction.instances.scores)
            entry["instances_drawn"] = int((prediction.instances.scores >= self.spec.score_threshold).sum())
            self.instances += coco_results(prediction.instances, meta.image_id, self.catalog)
            if self.mode == "detection":
                entry["labels"] = f"labels/{stem}.txt"
                rows = kitti_rows(prediction.instances, self.kitti, self.spec.score_threshold)
                self._save(rows.encode(), entry["labels"])
        if prediction.panoptic is not None:
            entry["panoptic"] = f"panoptic/{stem}.png"
            entry["segments"] = len(prediction.panoptic.segments)
            self._save(panoptic_png(prediction.panoptic), entry["panoptic"])
            segments = segments_info(prediction.panoptic, self.catalog)
            self.panoptic.append({"image_id": meta.image_id, "file_name": f"{stem}.png", "segments_info": segments})
        self.images.append(entry)

    def finish(self, head: dict[str, Any], inputs: Mapping[str, str] | None, broken: tuple[str, ...]) -> Written:
        found = len(self.images)
        if self.mode == "panoptic":
            found = sum(entry["segments"] for entry in self.images)
        elif self.mode != "semantic":
            found = len(self.instances)
        if not found:
            what = "segment" if self.mode == "panoptic" else "instance"
            thresholds = {"panoptic": "postprocess.object_mask_threshold", "detection": "postprocess.conf_threshold"}
            key = thresholds.get(self.mode)
            _say(
                f"warning: the model found no {what} in any of the {len(self.images)} images"
                + (f" ({key} drops what scores lower)" if key else "")
            )
        categories = self.catalog.to_json()
        if self.mode != "semantic":
            write_json(self.folder / "instances.json", self.instances)
        if self.mode == "panoptic":
            images = [{key: entry[key] for key in ("id", "file_name", "height", "width")} for entry in self.images]
            document = {"images": images, "annotations": self.panoptic, "categories": categories}
            write_json(self.folder / "panoptic.json", document)
        outputs = provenance.digests(self.folder, sorted(path for path in self.folder.rglob("*") if path.is_file()))
        index = {**head, "images": self.images, "categories": categories}
        write_json(self.folder / "index.json", provenance.sealed(index, inputs, outputs))
        return Written(len(self.images), found, broken)

    def _draw(self, image: Tensor, prediction: Predictions, mode: Mode, stem: str) -> str:
        """JPEG for photographs that came as JPEG, PNG otherwise."""
        jpeg = PurePosixPath(prediction.meta.file_name).suffix.lower() in (".jpg", ".jpeg")
        spec = self.spec
        picture = draw_predictions(
            image, prediction, self.palette, mode, spec.opacity, spec.score_threshold, spec.outline_width
        )
        name = stem + (".jpg" if jpeg else ".png")
        self._save(picture, name)
        return name

    def _save(self, content: Image.Image | bytes, name: str) -> None:
        """Plainly: the folder itself is temporary until it is whole."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Image.Image):
            options = {"quality": 92, "subsampling": 0} if path.suffix == ".jpg" else {"compress_level": 3}
            content = encoded(content, path.suffix, **options)
        path.write_bytes(content)


def semantic_png(semantic: Tensor, catalog: ClassCatalog) -> Image.Image:
    """(H, W) contiguous ids to an image of the dataset's ids, gray or, where 16 bits do not hold them, RGB as ``panoptic_png``; no palette,
    which some readers would turn into brightness."""
    ids = np.array([category.id for category in catalog.categories])
    if ids.max() > 65535:
        return _id_image(ids[semantic.numpy()])
    return Image.fromarray(ids.astype(np.uint8 if ids.max() <= 255 else np.uint16)[semantic.numpy()])


def panoptic_png(panoptic: Panoptic) -> Image.Image:
    return _id_image(panoptic.ids.numpy())


def _id_image(ids: np.ndarray) -> Image.Image:
    return Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8))


def segments_info(panoptic: Panoptic, catalog: ClassCatalog) -> list[dict[str, Any]]:
    found = []
    for segment in panoptic.segments:
        mask = panoptic.ids == segment.id
        category = catalog.categories[segment.label]
        found.append(
            {
                "id": segment.id,
                "category_id": category.id,
                "isthing": int(category.isthing),
                "score": segment.score,
                "area": int(mask.sum()),
                "bbox": _xywh(masks_to_boxes(mask[None])[0]),
                "iscrowd": 0,
            }
        )
    return found


def coco_results(instances: Instances, image_id: int, catalog: ClassCatalog) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for score, label, box in zip(instances.scores.tolist(), instances.labels.tolist(), instances.boxes, strict=True):
        category = catalog.categories[label]
        found.append({"image_id": image_id, "category_id": category.id, "bbox": _xywh(box), "score": score})
    if instances.masks is not None:
        for record, rle in zip(found, encode_masks(instances.masks), strict=True):
            record["segmentation"] = rle
    return found


def recolored(catalog: ClassCatalog, color_map: Mapping[str, tuple[int, int, int]]) -> ClassCatalog:
    """``color_map``: by the catalogue's keys. Raises UserError for one that is no class."""
    unknown = [name for name in color_map if name not in catalog.keys]
    if unknown:
        raise UserError(f"inference.color_map: {unknown_class(unknown[0], catalog)}")
    colored = zip(catalog.keys, catalog.categories, strict=True)
    return ClassCatalog(tuple(replace(category, color=color_map.get(key, category.color)) for key, category in colored))


def kitti_rows(instances: Instances, names: Sequence[str], score_threshold: float) -> str:
    """A line of 16 columns for each that scores at least the threshold."""
    kept = instances.scores >= score_threshold
    fields = zip(
        instances.labels[kept].tolist(), instances.boxes[kept].tolist(), instances.scores[kept].tolist(), strict=True
    )
    return "".join(
        kitti_row(names[label], [f"{side:.2f}" for side in box], f"{score:.4f}") for label, box, score in fields
    )


def _say(message: str) -> None:
    print(f"infer: {message}", file=sys.stderr, flush=True)


def _xywh(box: Tensor) -> list[float]:
    x1, y1, x2, y2 = box.double().tolist()
    return [x1, y1, x2 - x1, y2 - y1]


def _stem(path: PurePosixPath) -> str:
    return path.with_suffix("").as_posix()
