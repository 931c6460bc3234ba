"""Planning costs little more than Snakemake itself does, and grows with the number of experiments, not faster."""

from __future__ import annotations

import gc
import time
from pathlib import Path

from benchmarks.planning import make_grid, measure
from tessera.spec.planning import Plan

STAGES = [
    ("train", "torch"),
    ("evaluate", "torch"),
    ("infer", "torch"),
    ("export", "torch"),
    ("engine", "torch"),
    ("parity", "trt"),
    ("evaluate", "trt"),
    ("infer", "trt"),
]


def seconds_per_experiment(root: Path, experiments: int) -> float:
    """Of the processor, for everything that the rules ask about them."""
    root.mkdir()
    project = make_grid(root, experiments)
    gc.freeze()  # What other tests left in memory is not to be searched for garbage meanwhile.
    start = time.process_time()
    plan = Plan({}, project.root)
    for name in plan.grid.experiments:
        for verb, runtime in STAGES:
            assert plan.lineage(name, verb, runtime) and plan.digest(name, verb, runtime)
        assert plan.dataset_of(name) == "demo" and plan.root_of("demo")
    assert plan.table_evaluations("all") and plan.table_lineage("all")
    seconds = time.process_time() - start
    gc.unfreeze()
    return seconds / experiments


def test_our_share_grows_with_the_number_of_experiments(tmp_path: Path) -> None:
    few, many = (seconds_per_experiment(tmp_path / str(count), count) for count in (150, 900))
    assert many < 2 * few


def test_planning_beside_bare_snakemake(tmp_path: Path) -> None:
    """200 experiments with 8 stages each; processor time, because others may use the machine."""
    project = make_grid(tmp_path, 200)
    bare, ours = measure(project.root / "bare", "all"), measure(project.root, "stages")
    assert ours.jobs == bare.jobs == 200 * 8 + 4
    assert ours.cpu < 2 * bare.cpu
