"""The images and label files of KITTI folders, sorted by name and dealt to train, val, test or folds."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from tessera.files import UserError, is_text
from tessera.ops.image_size import IMAGE_SUFFIXES
from tessera.spec.schema import ConvertSpec
from tessera.spec.sources import kitti_sources, source_folder


class Listing:
    """Every image with its label file, sorted by source, then by name. Paths are relative to the root."""

    def __init__(self, root: Path, convert: ConvertSpec) -> None:
        self.faults: list[str] = []
        self.orphans: list[str] = []
        """Label files without an image."""
        self.unlabeled: list[str] = []
        """Images without a label file."""
        self._root, self._convert = root, convert
        folds = convert.num_partitions
        parts = ["train"] if folds == 1 else [f"fold{number}" for number in range(folds)]
        parts += ["val"] if convert.val_split or convert.val_source else []
        parts += ["test"] if convert.test_source else []
        self.pairs: dict[str, list[tuple[str, str]]] = {part: [] for part in parts}
        """Part -> image and label file."""
        for split, listed in kitti_sources(convert).items():
            for source in listed:
                self._deal(split, source)

    def _deal(self, split: str, source: str) -> None:
        folders = (
            (source_folder(source, self._convert.image_dir_name), IMAGE_SUFFIXES),
            (source_folder(source, self._convert.label_dir_name), frozenset({".txt"})),
        )
        images, labels = (self._files(place, suffixes) for place, suffixes in folders)
        for stem in sorted(images.keys() | labels.keys()):
            image, label = images.get(stem), labels.get(stem)
            if image is None:
                self.orphans.append(labels[stem])
            elif label is None:
                self.unlabeled.append(image)
            else:
                self.pairs[self._part(split, f"{source}/{stem}")].append((image, label))

    def _part(self, split: str, name: str) -> str:
        """Depends on the name and the seed alone: more images move none from part to part."""
        folds = self._convert.num_partitions
        if split != "train" or (folds == 1 and not self._convert.val_split):
            return split
        number = hashlib.blake2b(f"{self._convert.seed}\0{name}".encode(), digest_size=8).digest()
        share = int.from_bytes(number, "big") / 2**64
        if folds > 1:
            return f"fold{min(int(share * folds), folds - 1)}"
        return "val" if share < self._convert.val_split / 100 else "train"

    def _files(self, place: str, suffixes: frozenset[str]) -> dict[str, str]:
        """Stem -> path of the files of a folder that have one of the suffixes; hidden ones are left out."""
        folder = self._root / place
        found: dict[str, str] = {}
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except FileNotFoundError:
            raise UserError(
                f"{folder}: no such folder; expected one of the source's (convert.input_source, image_dir_name, label_dir_name)"
            ) from None
        except OSError as error:
            raise UserError(f"{folder}: cannot be read as a folder ({error.strerror})") from None
        for entry in entries:
            stem, dot, ending = entry.name.rpartition(".")
            if (dot + ending).lower() not in suffixes or entry.name.startswith(".") or entry.is_dir():
                continue
            wrong = None
            if not entry.is_file():
                wrong = "is no file (a link that leads nowhere, or a FIFO); remove it"
            elif not is_text(entry.name) or set(entry.name) & set("\n\r\\"):
                wrong = "expected a name of UTF-8 text without line breaks and backslashes; rename it"
            elif stem in found:
                wrong = f"belongs to one image with {found[stem]}; rename or remove one of them"
            if wrong is not None:
                self.faults.append(f"{place}/{entry.name!r}: {wrong}")
                continue
            found[stem] = f"{place}/{entry.name}"
        return found
