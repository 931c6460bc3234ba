"""The data of a run: opened once, held to what its record says, and handed on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tessera.data.catalog import load_catalog
from tessera.data.converted import require_made
from tessera.data.datasets import SegmentationDataset, open_dataset, unannotated_images
from tessera.files import UserError
from tessera.spec.digests import file_digest
from tessera.spec.lineage import Lineages, data_files
from tessera.spec.schema import Spec
from tessera.structures import Batch, ClassCatalog


class OpenedData:
    """Classes and splits of a dataset, the same for as long as a run lasts, whatever becomes of the files."""

    def __init__(
        self,
        spec: Spec,
        splits: Sequence[str] = (),
        catalog: ClassCatalog | None = None,
        lineages: Lineages | None = None,
        truths: bool = True,
    ) -> None:
        """``catalog``: the classes of a model that is there already, in place of the dataset's. ``lineages``: what the run has been planned with.
        ``truths`` False: of a split without annotations, as test servers give it out, ``images`` alone are asked for.

        Raises UserError as ``open_dataset`` does, and where a file is not what ``lineages`` say, or changes while it is opened.
        """
        dataset, root = spec.dataset, spec.data_root
        # Without a label map, the train annotations name the classes.
        named = splits if dataset.label_map is not None else ("train", *splits)
        self._stamps = {path: _stamp(path) for path in data_files(dataset, root, named)}
        self._digests = {path: file_digest(path) for path in self._stamps}
        present = Lineages(spec)
        self.lineages = present if lineages is None else lineages
        """What a record of this run says of the data is in them from now on."""
        stage = "evaluate" if "test" in splits else "train"
        if self.lineages.of(stage)["data"] != present.of(stage)["data"]:
            raise UserError(
                f"dataset {dataset.name}: its annotations or label map changed while this began; run it again"
            )
        self.catalog = load_catalog(dataset, root, spec.model.mode) if catalog is None else catalog
        listed = {split: None if truths else unannotated_images(dataset, split, root) for split in splits}
        self._listed = {split: images for split, images in listed.items() if images is not None}
        self.splits = {
            split: open_dataset(dataset, split, self.catalog, spec.model.mode, root)
            for split in splits
            if split not in self._listed
        }
        for path, stamp in self._stamps.items():
            if _stamp(path) != stamp:
                raise UserError(f"{path}: changed while it was opened; run this again")
        require_made(dataset, root, self._digests)
        self._pictures: dict[str, dict[str, int]] = {split: {} for split in splits}

    def split(self, name: str) -> SegmentationDataset:
        """One of ``splits``."""
        return self.splits[name]

    def images(self, name: str) -> list[tuple[Path, str, int]]:
        """File, name and id of every image."""
        if name in self._listed:
            return self._listed[name]
        split = self.splits[name]
        return [
            (split.image_path(index), split.file_names[index], int(split.image_ids[index]))
            for index in range(len(split))
        ]

    def require_unchanged(self) -> None:
        """Raises UserError naming an annotation file or label map that is no longer the one that was opened. Times alone do not count."""
        for path, digest in self._digests.items():
            stamp = _stamp(path)
            if stamp == self._stamps[path]:
                continue
            found = file_digest(path)
            if found != digest:
                raise UserError(
                    f"{path}: changed during this run, which goes by the former file (sha256 {digest[:12]}, now {found[:12]}); put that back "
                    "to continue, or run this again with the new one"
                )
            self._stamps[path] = stamp

    def require_same_pictures(self, split: str, batch: Batch) -> None:
        """Raises UserError naming an image that was seen before with another size or time, or whose file of masks was."""
        seen = self._pictures[split]
        for meta, stamp in zip(batch.metas, batch.stamps or (), strict=False):
            if seen.setdefault(meta.file_name, stamp) != stamp:
                raise UserError(
                    f"{meta.file_name} ({split} split of {self.splits[split].source}): the image or its masks changed during this run, which "
                    "has seen the former ones; put them back, or leave them alone while it runs, and start it again"
                )


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Equal ones mean the same content; a file put back as it was has another one."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
