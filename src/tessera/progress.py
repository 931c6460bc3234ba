"""How far a loop is: a bar on a terminal, about ten plain lines anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track as bar

T = TypeVar("T")


def track(items: Iterable[T], verb: str, total: int | None, show: bool = True) -> Iterator[T]:
    """Yields ``items``; ``total`` is how many there will be, if that is known. Progress goes to standard error."""
    if not show:
        yield from items
    elif sys.stderr.isatty():
        yield from bar(items, f"{verb} ", total=total, console=Console(stderr=True), transient=True)
    else:
        yield from _lines(items, verb, total)


def _lines(items: Iterable[T], verb: str, total: int | None) -> Iterator[T]:
    step = max(1, -(-total // 10)) if total else 100
    for number, item in enumerate(items, 1):
        yield item
        if number % step == 0 or number == total:
            print(f"{verb}: {number}{f' of {total}' if total else ''}", file=sys.stderr, flush=True)
