"""One key of one experiment changes: of all stages in all runtimes, exactly those that read it, or read what they made, run again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tessera.spec.schema import Spec
from tests.workflow.project import CONFIG, Project, make_project

NAME = "mask2former_swin"
TARGETS = [
    *(f"results/{NAME}/{runtime}inference/index.json" for runtime in ("", "onnx_", "trt_")),
    "results/tables/demo.md",
    "results/figures/demo/curves.png",
    "results/metrics.json",
]

TRAIN = Counter(train=1)
EVALUATE = Counter(evaluate=1, evaluate_onnx=2, evaluate_trt=2)
INFER = Counter(infer=1, infer_onnx=1, infer_trt=1)
PARITY = Counter(parity_onnx=2, parity_trt=2)
ENGINE = Counter(engine=2)
EXPORT = Counter(export=1)
PRECISION = Counter(precision=1)
TABLES = Counter(compare=1, figures=1, metrics=1)
DEPLOYED = Counter(evaluate_onnx=2, evaluate_trt=2, infer_onnx=1, infer_trt=1)
"""What is measured of the exported graphs."""
EVERYTHING = TRAIN + EXPORT + PRECISION + ENGINE + PARITY + EVALUATE + INFER + TABLES

RERUNS: dict[str, tuple[dict[str, Any], Counter[str]]] = {
    "model": ({"loss": {"no_object_weight": 0.2}}, EVERYTHING),
    "dataset": ({"augmentation": {"flip": 0.4}}, EVERYTHING),
    "train": ({"optim": {"lr": 3.0e-4}}, EVERYTHING),
    "postprocess": ({"overlap_threshold": 0.7}, PARITY + EVALUATE + INFER + TABLES),
    "evaluate": ({"classes": ["circle"]}, PARITY + EVALUATE + INFER + TABLES),
    "testing": ({"flip": True}, PARITY + EVALUATE + INFER + TABLES),
    "inference": ({"opacity": 0.4}, INFER + Counter(figures=1)),
    "export": ({"input_height": 320}, EXPORT + PRECISION + ENGINE + PARITY + DEPLOYED + TABLES),
    "precision": (
        {"fp16_keep": ["Softmax"]},
        PRECISION + Counter(engine=1, parity_onnx=1, evaluate_onnx=1, parity_trt=1, evaluate_trt=1) + TABLES,
    ),
    "engine": ({"workspace_size": 512}, ENGINE + Counter(parity_trt=2, evaluate_trt=2, infer_trt=1) + TABLES),
    "parity": ({"tolerance": 2.0e-3}, PARITY + DEPLOYED + TABLES),
}
"""Section: a key of it, and the jobs that changing it brings."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """Every stage of one experiment, and of a second one that nothing may touch."""
    made = make_project(tmp_path_factory.mktemp("built"))
    made.configure("models/mask2former", {"model": {"name": "mask2former", "mode": "semantic"}})
    runtimes = ["torch", "onnx", "trt"]
    demo = {"experiments": [NAME, f"{NAME}-short"], "runtimes": runtimes, "precisions": ["fp32", "fp16"]}
    made.configure("config", {**CONFIG, "tables": {"demo": demo}})
    made.run(*TARGETS)
    yield made


def plan_after(project: Project, part: str, content: dict[str, Any]) -> dict[str, int]:
    before = project.configuration()
    try:
        project.configure(part, content)
        return project.plan(*TARGETS)
    finally:
        project.restore(before)


def test_nothing_changed(built: Project) -> None:
    assert built.plan(*TARGETS) == {}


@pytest.mark.parametrize("section", RERUNS)
def test_a_key_reruns_the_stages_that_read_it(built: Project, section: str) -> None:
    change, expected = RERUNS[section]
    assert plan_after(built, f"experiments/{NAME}-demo", {section: change}) == dict(expected)


def test_every_section_is_changed() -> None:
    """The two others are no experiment's: a seed is part of the name, the data root the machine's."""
    assert RERUNS.keys() == Spec.model_fields.keys() - {"seed", "data_root"}
