"""An evaluation file (eval.json), the same whatever the runtime: what tables and figures read of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from tessera.spec.planning import Condition

RUNTIME_NAMES = {"torch": "PyTorch", "onnx": "ONNX Runtime", "trt": "TensorRT"}


def runtime_name(runtime: str, precision: str, testing: str = "") -> str:
    """What executed the network, and the way of testing; fp32 and the experiment's own way go without saying."""
    return " ".join(filter(None, (RUNTIME_NAMES[runtime], precision.replace("fp32", ""), testing)))


class RowName(NamedTuple):
    """Everything in an experiment's name but the seed."""

    model: str
    backbone: str
    dataset: str
    variant: str
    """Variants joined by ``-``, the way of testing behind them where rows tell it; empty for the plain recipe."""


class Evaluation(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)

    experiment: str
    model: str
    backbone: str
    dataset: str
    variants: list[str]
    seed: int
    mode: str
    split: str
    runtime: str
    precision: str
    testing: str = ""
    """Name of the way of testing; empty for the experiment's own."""
    testing_as: Literal["columns", "rows"] = "columns"
    """Where a table tells ways of testing apart; no part of the file."""
    images: int = Field(ge=1)
    metrics: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(min_length=1)
    """Fractions; without those that the images hold nothing of."""
    per_class: list[dict[str, Any]]
    remarks: list[str] = Field([])
    """What a reader of the numbers must know."""
    seconds: float = Field(gt=0)
    """Of the whole evaluation, loading included."""
    lineage: dict[str, Any]
    facts: dict[str, Any]
    """See ``provenance.collect``."""

    @property
    def row(self) -> RowName:
        told = [self.testing] if self.testing and self.testing_as == "rows" else []
        return RowName(self.model, self.backbone, self.dataset, "-".join([*self.variants, *told]))

    @property
    def column(self) -> Condition:
        return self.runtime, self.precision, self.testing if self.testing_as == "columns" else ""

    @property
    def key(self) -> tuple[str, Condition]:
        """What tells it from all others: the experiment, and the run."""
        return self.experiment, (self.runtime, self.precision, self.testing)
