"""Truth and prediction side by side, three per experiment, for this page.

``python docs/results/panels.py <data_root> <experiment>...`` writes docs/results/<experiment>-<n>.jpg from results/<experiment>/model.pth,
for images spread evenly over the evaluated split.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tessera.data.datasets import open_dataset
from tessera.inference import load_predictor
from tessera.pictures.overlays import draw_predictions, draw_truth
from tessera.pictures.panels import Row, draw_sheet, evenly_spread
from tessera.pictures.style import save
from tessera.spec.compose import load_grid

PICTURES = 3


def main(data_root: str, *experiments: str) -> None:
    grid = load_grid(data_root=data_root)
    for experiment in experiments:
        spec = grid.resolve(experiment).spec
        model = load_predictor(Path("results") / experiment / "model.pth", spec.postprocess)
        catalog, mode = model.header.catalog, spec.model.mode
        split = open_dataset(spec.dataset, spec.evaluate.split, catalog, mode, data_root)
        for number, index in enumerate(evenly_spread(len(split), PICTURES), 1):
            sample = split.read(index)
            predictions = model.predict(sample.image.permute(1, 2, 0).numpy())
            panels = [
                ("truth", draw_truth(sample.image, sample.target, catalog, mode)),
                ("prediction", draw_predictions(sample.image, predictions, catalog, mode)),
            ]
            path = Path("docs/results") / f"{experiment}-{number}.jpg"
            save(draw_sheet([Row("", panels)], width=6), path, dpi=150)
            print(f"{path}: {sample.file_name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
