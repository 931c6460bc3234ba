"""The infer stage: overlays to look at and files that other programs read.

A folder holds ``index.json``, which lists every image and (as ``outputs``) file, ``overlays/`` and, as far as the mode has them:

- ``instances.json``: COCO results (``image_id``, ``category_id``, ``bbox``, ``score``, ``segmentation``), every instance kept
- ``panoptic.json`` and ``panoptic/``: COCO panoptic, a segment's id = R + 256 G + 65536 B
- ``labels/``: KITTI label files of a detector, one per image, empty where nothing is certain enough
- ``semantic/``: one gray PNG per image with the dataset's class ids, 16 bits where an id exceeds 255

A panoptic model fills all but the labels, and draws ``overlays_instance/`` and ``overlays_semantic/`` too. Names and sub-folders are the images'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from tessera import provenance
from tessera.evaluation.draw import draw_predictions
from tessera.evaluation.progress import track
from tessera.files import UserError, atomic_folder, encoded, write_json, write_text
from tessera.inference.predictor import Predictor
from tessera.inference.sources import ImageSource, list_images, number_files, open_source, safe_name
from tessera.ops.kitti import kitti_names, kitti_row
from tessera.ops.masks import masks_to_boxes
from tessera.ops.rle import encode_masks
from tessera.spec.lineage import lineage
from tessera.spec.networks import Mode
from tessera.spec.schema import InferenceSpec, Spec
from tessera.structures import ClassCatalog, Instances, Panoptic, Predictions, unknown_class

FORMAT = 1


def infer(
    predictor: Predictor,
    spec: Spec,
    folder: Path,
    split_images: Sequence[ImageSource] = (),
    inputs: Mapping[str, str] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Predicts on ``spec.inference.images``, or on ``split_images`` where that is not set, and writes ``folder`` whole or not at all.

    ``inputs``: ``provenance.digests`` of the model; ``origin``: what the lineage says of a model that is not the experiment's own.
    Raises UserError when there is no image, and when a model of instances or detections finds nothing in any of them.
    """
    sources = choose_images(spec, split_images)
    header = predictor.header
    split = spec.dataset.val if spec.evaluate.split == "val" else spec.dataset.test
    stream = track(predictor.stream(sources, split.batch_size), "infer: image", len(sources))
    facts = {
        "experiment": header.experiment,
        "runtime": predictor.runtime,
        "precision": predictor.precision,
        "source": spec.inference.images or f"the {spec.evaluate.split} split of {spec.dataset.name}",
        "lineage": lineage(spec, "infer", predictor.runtime, predictor.precision) | dict(origin or {}),
        "facts": provenance.collect(),
    }
    names = [source.file_name for source in sources]
    write_results(stream, names, folder, header.catalog, predictor.mode, spec.inference, facts, inputs)


def predict_to(
    predictor: Predictor, source: Any, folder: str | Path, settings: InferenceSpec = InferenceSpec()
) -> None:
    """The same from Python: everything that ``predictor.predict`` takes, with the pictures and files of ``infer`` below ``folder``.

    Of ``settings`` the keys that say how to draw are read: ``score_threshold``, ``opacity``, ``color_map``, ``outline_width``.
    """
    sources = open_source(source)
    names = [item.file_name for item in sources]
    stream = predictor.stream(sources)
    write_results(stream, names, Path(folder), predictor.header.catalog, predictor.mode, settings)


def choose_images(spec: Spec, split_images: Sequence[ImageSource] = ()) -> list[ImageSource]:
    """Sorted by name, at most ``inference.max_images``."""
    sources = list(split_images)
    if spec.inference.images is not None:
        path = Path(spec.data_root) / spec.inference.images
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; set inference.images to images below {spec.data_root}")
        sources = number_files(list_images(path), path) if path.is_dir() else number_files([path], path.parent)
    if not sources:
        raise UserError(f"dataset {spec.dataset.name}: the {spec.evaluate.split} split has no image to infer on")
    return sorted(sources, key=lambda source: source.file_name)[: spec.inference.max_images]


def write_results(
    stream: Iterable[tuple[Tensor, Predictions]],
    file_names: Sequence[str],
    folder: Path,
    catalog: ClassCatalog,
    mode: Mode,
    spec: InferenceSpec = InferenceSpec(),
    facts: dict[str, Any] | None = None,
    inputs: Mapping[str, str] | None = None,
) -> None:
    """``stream`` yields (3, H, W) uint8 images with their predictions in the order of ``file_names``; ``facts`` go into the index, which is
    ``provenance.sealed`` with ``inputs`` and the files of the folder."""
    if not file_names:
        raise UserError(f"{folder}: no images were given, so there is nothing to write")
    stems = output_stems(file_names)
    largest = max(catalog.categories, key=lambda category: category.id)
    if mode in ("panoptic", "semantic") and largest.id > 65535:
        raise UserError(
            f"the class {largest.name!r} has the id {largest.id}, but semantic/*.png hold ids up to 65535; "
            "give the classes smaller ids in the annotations and the label map, and train again"
        )
    palette = recolored(catalog, spec.color_map)
    kitti = kitti_names(catalog) if mode == "detection" else ()
    with atomic_folder(folder) as temporary:
        writer = _Writer(temporary, catalog, palette, kitti, mode, spec)
        for (image, prediction), file_name in zip(stream, file_names, strict=True):
            if prediction.meta.file_name != file_name:
                raise ValueError(f"got the predictions of {prediction.meta.file_name}, expected those of {file_name}")
            writer.add(image, prediction, stems[file_name])
        writer.finish({"format": FORMAT, "mode": mode, **(facts or {})}, inputs)


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
    images: list[dict[str, Any]] = field(default_factory=list)
    instances: list[dict[str, Any]] = field(default_factory=list)
    panoptic: list[dict[str, Any]] = field(default_factory=list)

    def add(self, image: Tensor, prediction: Predictions, stem: str) -> None:
        meta = prediction.meta
        entry: dict[str, Any] = {
            "id": meta.image_id,
            "file_name": meta.file_name,
            "height": meta.original_size[0],
            "width": meta.original_size[1],
            "overlay": self._draw(image, prediction, self.mode, f"overlays/{stem}"),
        }
        if self.mode == "panoptic":
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
                write_text(self.folder / entry["labels"], rows)
        if prediction.panoptic is not None:
            entry["panoptic"] = f"panoptic/{stem}.png"
            entry["segments"] = len(prediction.panoptic.segments)
            self._save(panoptic_png(prediction.panoptic), entry["panoptic"])
            segments = segments_info(prediction.panoptic, self.catalog)
            self.panoptic.append({"image_id": meta.image_id, "file_name": f"{stem}.png", "segments_info": segments})
        self.images.append(entry)

    def finish(self, head: dict[str, Any], inputs: Mapping[str, str] | None) -> None:
        if self.mode in ("instance", "detection") and not self.instances:
            raise UserError(
                f"the model found no instance in any of the {len(self.images)} images, not even an uncertain one; is it trained? "
                "(postprocess.conf_threshold drops detections that score lower)"
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

    def _save(self, picture: Image.Image, name: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"quality": 92, "subsampling": 0} if path.suffix == ".jpg" else {"compress_level": 3}
        path.write_bytes(encoded(picture, path.suffix, **options))


def semantic_png(semantic: Tensor, catalog: ClassCatalog) -> Image.Image:
    """(H, W) contiguous ids to a gray image of the dataset's ids; no palette, which some readers would turn into brightness."""
    ids = np.array([category.id for category in catalog.categories])
    return Image.fromarray(ids.astype(np.uint8 if ids.max() <= 255 else np.uint16)[semantic.numpy()])


def panoptic_png(panoptic: Panoptic) -> Image.Image:
    ids = panoptic.ids.numpy()
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


def _xywh(box: Tensor) -> list[float]:
    x1, y1, x2, y2 = box.double().tolist()
    return [x1, y1, x2 - x1, y2 - y1]


def _stem(path: PurePosixPath) -> str:
    return path.with_suffix("").as_posix()
