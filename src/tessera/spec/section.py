"""What every section of a spec is: strict, frozen, documented by its attributes' docstrings."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

Inert: JsonDict = {"inert": True}
"""For ``json_schema_extra``: the key cannot change a result."""
InertBatchSize: JsonDict = {"inert_keys": ["batch_size"]}
"""The same for one key of a section, where the section is used more than once."""

Unit = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Side = Annotated[int, Field(ge=32)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def refuse(mistakes: list[tuple[str, str]]) -> None:
    """Raises one error that carries every (key, message) in its context, where ``compose`` finds them again."""
    if mistakes:
        text = "; ".join(f"{key}: {message}" for key, message in mistakes)
        raise PydanticCustomError("disagreement", "{text}", {"text": text, "mistakes": mistakes})


def is_inert(section: type[BaseModel], key: str) -> bool:
    extra: Any = section.model_fields[key].json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("inert"))


def inert_keys(section: type[BaseModel], key: str) -> frozenset[str]:
    """Keys of the sub-section ``key`` that are inert here though not everywhere."""
    extra: Any = section.model_fields[key].json_schema_extra
    return frozenset(extra.get("inert_keys", ())) if isinstance(extra, dict) else frozenset()
