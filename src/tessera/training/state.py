"""What a training is at a step, beside its tensors: position, history, best result, starts. Plain values only, so that it lives in a checkpoint."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

METRIC = {"panoptic": "PQ", "instance": "AP", "semantic": "mIoU", "detection": "box_AP"}
"""Metric of each mode that decides which weights are the best."""


@dataclass
class State:
    step: int = 0
    """Optimiser steps done."""
    seconds: float = 0.0
    """Sum over all starts up to their last checkpoint."""
    starts: list[dict[str, int]] = field(default_factory=list)
    """``step`` and ``epoch`` that each start continued from."""
    rows: list[dict[str, float]] = field(default_factory=list)
    """The curves: one row per epoch and per validation, ``step`` in each."""
    sums: dict[str, float] = field(default_factory=dict)
    """Sum of every loss over the steps of the running epoch."""
    best: dict[str, Any] | None = None
    """``metric``, ``value``, ``epoch`` and ``step`` of the best regular validation."""
    schedule: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    """What they started from; see ``weights.start_from``."""
    postprocess: dict[str, Any] = field(default_factory=dict)
    """Keys of that section, the same in all validations."""
    origin: str | None = None
    """Digest of the file that ``train.resume_training_checkpoint_path`` named when this training continued from it."""

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_plain(cls, value: dict[str, Any]) -> State:
        """Raises ValueError or TypeError, in one line, on anything that ``to_plain`` did not give."""
        if "step" not in value:
            raise ValueError("its state has no `step`")
        try:
            _CHECK.validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"its state.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        return cls(**value)

    def add(self, values: dict[str, float]) -> None:
        """Counts one more step with these losses."""
        self.step += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def close_epoch(self, steps: int) -> dict[str, float]:
        """Means over the epoch's steps; the sums start again."""
        means = {name: total / steps for name, total in self.sums.items()}
        self.sums = {}
        return means

    def record(self, values: dict[str, float]) -> None:
        """Adds columns to the row of this step."""
        if not self.rows or self.rows[-1]["step"] != self.step:
            self.rows.append({"step": self.step})
        self.rows[-1].update(values)

    def consider(self, metric: str, values: dict[str, float], epoch: int) -> bool:
        """Remembers a better validation; of equal ones the later, which has learned for longer. A metric that is not a number is never
        the best."""
        value = values.get(metric, math.nan)
        if math.isnan(value) or (self.best is not None and value < self.best["value"]):
            return False
        self.best = {"metric": metric, "value": value, "epoch": epoch, "step": self.step}
        return True


_CHECK = TypeAdapter(State)


def counter_seed(seed: int, purpose: str, *counters: int) -> int:
    """A seed for torch's generators that depends on its arguments alone; neighbours are unrelated."""
    text = "/".join([str(seed), purpose, *map(str, counters)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def metrics_csv(rows: list[dict[str, float]]) -> str:
    """Columns in order of first appearance behind ``epoch`` and ``step``; numbers in full precision, so that equal runs give equal files."""
    columns = list(dict.fromkeys(["epoch", "step", *(name for row in rows for name in row)]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([repr(row[name]) if name in row else "" for name in columns] for row in rows)
    return text.getvalue()
