"""How long `snakemake --dry-run` takes for a grid of many experiments, all stages of each and a table over all of them.

    python -m benchmarks.planning --experiments 1000 --bare --built
    python -m benchmarks.planning --experiments 1000 --profile planning.prof

makes a project with the repository's own models, backbones and rules in a temporary folder and plans eight stages of each experiment,
from training to the TensorRT evaluation. It prints a row of a Markdown table per measurement. `--bare` plans the same graph from rules
without params, which is what Snakemake itself costs; `--built` lets the tests' stand-in for the command line write every output
first (minutes) and measures the plan of a finished tree.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.workflow.project import ROOT, Project, make_project

MODELS = ["mask2former", "oneformer", "deformable_detr", "unet"]
STAGES = 8
TARGETS = ("eval.json", "inference/index.json", "trt_eval.json", "trt_inference/index.json")
TABLE = "results/tables/all.md"

BARE = """
EXPERIMENTS = open("experiments.txt").read().split()
RESULTS = "results/{experiment}/"
wildcard_constraints: experiment="[^/]+"
rule all:
    default_target: True
    input: open("targets.txt").read().split()
rule demo:
    output: "data/demo/manifest.json"
    shell: "true"
rule check:
    input: "data/demo/manifest.json"
    output: "data/checks/demo.json"
    shell: "true"
rule train:
    input: "data/checks/demo.json"
    output: RESULTS + "model.pth", RESULTS + "metrics.csv", RESULTS + "train.json"
    shell: "true"
rule evaluate:
    input: RESULTS + "model.pth"
    output: RESULTS + "eval.json", RESULTS + "eval.predictions.json.gz"
    shell: "true"
rule infer:
    input: RESULTS + "model.pth"
    output: RESULTS + "inference/index.json"
    shell: "true"
rule export:
    input: RESULTS + "model.pth"
    output: RESULTS + "model.onnx"
    shell: "true"
rule engine:
    input: RESULTS + "model.onnx"
    output: RESULTS + "model.engine", RESULTS + "model.engine.json"
    shell: "true"
rule parity_trt:
    input: RESULTS + "model.pth", RESULTS + "model.engine"
    output: RESULTS + "trt_parity.json"
    shell: "true"
rule evaluate_trt:
    input: RESULTS + "model.engine", RESULTS + "trt_parity.json"
    output: RESULTS + "trt_eval.json", RESULTS + "trt_eval.predictions.json.gz"
    shell: "true"
rule infer_trt:
    input: RESULTS + "model.engine", RESULTS + "trt_parity.json"
    output: RESULTS + "trt_inference/index.json"
    shell: "true"
rule compare:
    input: expand("results/{experiment}/{file}", experiment=EXPERIMENTS, file=["eval.json", "trt_eval.json"])
    output: "results/tables/all.csv", "results/tables/all.md", "results/tables/all.tex"
    shell: "true"
"""


@dataclass
class Cost:
    jobs: int
    wall: float
    cpu: float
    """User and system seconds; unlike ``wall`` it does not grow when others use the machine."""
    memory: float
    """Peak, MiB."""

    def row(self, name: str, experiments: int) -> str:
        return f"| {name} | {experiments} | {self.jobs} | {self.wall:.1f} | {self.cpu:.1f} | {self.memory:.0f} |"


def make_grid(root: Path, experiments: int) -> Project:
    """The first ``experiments`` of every combination of four models, the repository's backbones and as many seeds as that takes."""
    project = make_project(root)
    # An ONNX file does not hold swin_huge.
    backbones = sorted({path.stem for path in (ROOT / "config/backbones").glob("*.yaml")} - {"swin_huge"})
    for folder, names in (("models", MODELS), ("backbones", backbones)):
        for name in names:
            shutil.copy(ROOT / f"config/{folder}/{name}.yaml", root / f"config/{folder}")
    seeds = -(-experiments // (len(MODELS) * len(backbones)))
    listed = [
        f"{model}_{backbone}{f'-seed{seed}' if seed else ''}"
        for model in MODELS
        for backbone in backbones
        for seed in range(seeds)
    ][:experiments]
    config = {"models": MODELS, "backbones": backbones, "datasets": ["demo"], "seeds": list(range(seeds))}
    tables = {"all": {"experiments": listed, "runtimes": ["torch", "trt"]}}
    project.configure("config", {**config, "experiments": listed, "tables": tables})
    targets = [f"results/{name}/{file}" for name in listed for file in TARGETS] + [TABLE]
    (root / "targets.txt").write_text("\n".join(targets))
    with (root / "Snakefile").open("a") as stream:
        stream.write('\n\nrule stages:\n    input:\n        open("targets.txt").read().split(),\n')
    bare = root / "bare"
    bare.mkdir()
    (bare / "Snakefile").write_text(BARE)
    for name, values in (("experiments", listed), ("targets", targets)):
        (bare / f"{name}.txt").write_text("\n".join(values))
    return project


def measure(folder: Path, target: str, profile: Path | None = None) -> Cost:
    """Plans ``target`` in a process of its own, everything that `snakemake -n` prints going to a file."""
    profiled = ["-m", "cProfile", "-o", str(profile)] if profile else []
    said = folder / "planned.txt"
    with said.open("w") as stream:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *profiled, "-m", "snakemake", "--cores", "1", "--dry-run", target],
            cwd=folder,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    text = said.read_text()
    if status != 0:
        sys.exit(text[-4000:])
    total = re.search(r"^total +(\d+)", text, re.MULTILINE)
    jobs = int(total[1]) if total else 0
    return Cost(jobs, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, nargs="+", default=[1000])
    parser.add_argument("--bare", action="store_true", help="also the same graph without params")
    parser.add_argument("--built", action="store_true", help="also a finished tree, which the stand-in writes first")
    parser.add_argument("--profile", type=Path, help="write cProfile's record of the first plan here and stop")
    arguments = parser.parse_args()
    print("| plan | experiments | jobs | wall, s | CPU, s | peak memory, MiB |\n| --- | --- | --- | --- | --- | --- |")
    for count in arguments.experiments:
        with tempfile.TemporaryDirectory() as folder:
            project = make_grid(Path(folder), count)
            profile = arguments.profile.resolve() if arguments.profile else None
            print(measure(project.root, "stages", profile).row("nothing made yet", count), flush=True)
            if profile:
                return
            if arguments.bare:
                print(measure(project.root / "bare", "all").row("the same in bare Snakemake", count), flush=True)
            if arguments.built:
                project.run("stages", "--quiet", "all")
                print(measure(project.root, "stages").row("everything up to date", count), flush=True)


if __name__ == "__main__":
    main()
