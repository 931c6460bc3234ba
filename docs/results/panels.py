"""Truth and prediction side by side, three per experiment, for this page.

``python docs/results/panels.py <data_root> <experiment>...`` writes docs/results/<experiment>-<n>.jpg from results/<experiment>/model.pth,
for images spread evenly over the evaluated split.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tessera.data.datasets import open_dataset
from tessera.evaluation.draw import draw_predictions, draw_truth, side_by_side
from tessera.inference import load_predictor
from tessera.spec.compose import load_grid

PICTURES = 3


def main(data_root: str, *experiments: str) -> None:
    grid = load_grid(data_root=data_root)
    for experiment in experiments:
        spec = grid.resolve(experiment).spec
        model = load_predictor(Path("results") / experiment / "model.pth", spec.postprocess)
        catalog, mode = model.header.catalog, spec.model.mode
        split = open_dataset(spec.dataset, spec.evaluate.split, catalog, mode, data_root)
        for number in range(PICTURES):
            sample = split.read((2 * number + 1) * len(split) // (2 * PICTURES))
            predictions = model.predict(sample.image.permute(1, 2, 0).numpy())
            sheet = side_by_side(
                [
                    ("truth", draw_truth(sample.image, sample.target, catalog, mode)),
                    ("prediction", draw_predictions(sample.image, predictions, catalog, mode)),
                ],
                height=320,
            )
            sheet.save(Path("docs/results") / f"{experiment}-{number + 1}.jpg", quality=85)
            print(f"docs/results/{experiment}-{number + 1}.jpg: {sample.file_name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
