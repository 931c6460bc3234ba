"""Tables that rename tensors."""

from __future__ import annotations

import re
from collections.abc import Callable

Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]
"""Patterns and their replacements, applied one after the other."""


def apply(rules: Rules, name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
