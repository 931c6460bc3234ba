"""Renaming tensors by tables, and loading them with nothing missing and nothing left over."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from tessera.files import UserError

Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]
"""Patterns and their replacements, applied one after the other."""
_SHOWN = 10


def apply(rules: Rules, name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def renamed(rules: Rules, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {apply(rules, name): value for name, value in state.items()}


def split_packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The packed projection of ``nn.MultiheadAttention`` to our three."""
    split: dict[str, Tensor] = {}
    for name, value in state.items():
        found = re.fullmatch(r"(.*)\.in_proj_(weight|bias)", name)
        names = [name] if found is None else [f"{found[1]}.{part}_proj.{found[2]}" for part in "qkv"]
        split |= zip(names, value.chunk(3) if found else [value], strict=True)
    return split


def load_strictly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    may_miss: Callable[[str], bool] = lambda name: False,
    may_add: Callable[[str], bool] = lambda name: False,
) -> None:
    """Copies ``state`` into ``module``. Raises UserError naming tensors that are missing, left over or of another shape, except
    those that ``may_miss`` and ``may_add`` allow."""
    own = module.state_dict()
    missing = [name for name in own if name not in state and not may_miss(name)]
    left_over = [name for name in state if name not in own and not may_add(name)]
    require_fit(f"{source}: these weights do not fit", own, state, missing, left_over)
    module.load_state_dict({name: value for name, value in state.items() if name in own}, strict=False)


def require_fit(
    title: str,
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    missing: list[str],
    left_over: list[str],
    advice: Callable[[str, Tensor], str] = lambda name, value: "",
) -> None:
    """Raises UserError where there are such, or tensors of another shape than ``own``."""
    shapes = [
        f"{name} is {tuple(given[name].shape)}, expected {tuple(value.shape)}{advice(name, given[name])}"
        for name, value in own.items()
        if name in given and given[name].shape != value.shape
    ]
    problems = {"of another shape": shapes, "missing": missing, "that the network does not have": left_over}
    lines = [f"{len(names)} {what}: {few(names)}" for what, names in problems.items() if names]
    if lines:
        raise UserError("\n  ".join([title, *lines]))


def few(names: list[str], everything: bool = False) -> str:
    shown = names if everything else names[:_SHOWN]
    return ", ".join(shown) + (f", and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
