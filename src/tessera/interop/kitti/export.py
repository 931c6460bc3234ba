"""The way back: COCO annotations to KITTI label files, without loss of class and box."""

import json
from decimal import Decimal
from pathlib import Path, PurePosixPath

from tessera.data.catalog import compare_names, full_catalog, split_sources
from tessera.data.coco_index import open_index
from tessera.data.reader import Findings, brief
from tessera.files import UserError, atomic_folder, read_text
from tessera.interop.kitti.convert import DIGITS, EXACT
from tessera.ops.kitti import kitti_names, kitti_row
from tessera.spec.lineage import SPLITS, annotation_root
from tessera.spec.schema import DatasetSpec


def export_kitti(dataset: DatasetSpec, data_root: str, out: Path) -> dict[str, tuple[int, int]]:
    """Writes ``<out>/<split>/<file name of the image>.txt`` for every image, empty where it has no box; split -> images and boxes.
    A box keeps its digits; crowd regions become ``DontCare``; masks are lost. Raises UserError with all faults of the annotations at once."""
    if dataset.type != "coco" or out.exists():
        wrong = f"dataset {dataset.name}: its type is {dataset.type}; only boxes of type coco have KITTI labels"
        raise UserError(wrong if dataset.type != "coco" else f"{out}: exists already; name a folder that is to be made")
    catalog, findings = full_catalog(dataset, data_root), Findings()
    names = dict(zip(catalog.from_dataset_id, kitti_names(catalog), strict=True))
    counts: dict[str, tuple[int, int]] = {}
    with atomic_folder(out) as folder:
        for split in (name for name in SPLITS if getattr(dataset, name).annotations is not None):
            labels: dict[Path, list[str]] = {}
            for source in split_sources(dataset, split, data_root):
                path, found = Path(annotation_root(dataset, data_root)) / source.annotations, Findings()
                index = open_index(path, segments=False)
                compare_names(dataset, data_root, index.categories(), path, findings)
                index.report(names, found)
                index.report_boxes(names, found)
                rows: dict[int, list[str]] = {number: [] for number in index.image_ids.tolist()}
                # Read once more, because here numbers keep their digits. 1.0 and 1 are one key.
                for item in () if found.errors else json.loads(read_text(path), parse_float=Decimal)["annotations"]:
                    x, y, width, height = map(Decimal, item["bbox"])
                    try:
                        corners = [f"{side:f}" for side in (x, y, EXACT.add(x, width), EXACT.add(y, height))]
                    except ArithmeticError:
                        wrong = f"bbox is {brief(item['bbox'])}, expected corners of {DIGITS} digits at most"
                        found.errors.append(f"annotation {item['id']}: {wrong}")
                        continue
                    name = "DontCare" if item.get("iscrowd") else names[item["category_id"]]
                    rows[item["image_id"]].append(kitti_row(name, corners))
                for image, lines in () if found.errors else zip(index.file_names, rows.values(), strict=True):
                    label = folder / split / PurePosixPath(image).with_suffix(".txt")
                    if labels.setdefault(label, lines) is not lines:
                        found.errors.append(f"{image}: another image has the label file {label.name} already")
                findings.errors += [f"{path}: {error}" for error in found.errors]
            for label, lines in labels.items():
                label.parent.mkdir(parents=True, exist_ok=True)
                label.write_text("".join(lines), encoding="utf-8")
            counts[split] = (len(labels), sum(map(len, labels.values())))
        findings.raise_errors(f"dataset {dataset.name}")
        if not any(boxes for _, boxes in counts.values()):
            raise UserError(f"dataset {dataset.name}: has no box, so there is nothing to write")
    return counts
