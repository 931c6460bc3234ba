"""JSON files of many gigabytes, element by element: Python's own parser on a window that moves through the file."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection, Iterator
from io import BufferedReader
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from tessera.files import open_input, read_json, reading_json

_WINDOW = 1 << 22
_LONGEST = 16
"""Characters before the end of the window in which what is read may come from the cut alone: -Infinity, or a pair of escapes."""
_SPACE = re.compile(r"[ \t\n\r]*")


def members(
    path: Path, streamed: Collection[str], passed: Callable[[bytes], object]
) -> Iterator[tuple[str, int | None, Any]]:
    """The members of the object in a JSON file, in their order: ``(key, None, value)``.

    Of a list under a ``streamed`` key first ``(key, 0, None)``, then each element with its number from 1. A file that holds anything but
    an object yields nothing. ``passed`` is given every byte of the file on the way. Raises UserError as ``read_json`` does.
    """
    with reading_json(path), open_input(path) as stream:
        text = _Window(stream, passed)
        if text.next() != "{":
            read_json(path)
            return
        text.at += 1
        if text.next() == "}":
            text.at += 1
        else:
            yield from _members(text, streamed)
        if text.next():
            text.fail("Extra data", text.at)


def _members(text: _Window, streamed: Collection[str]) -> Iterator[tuple[str, int | None, Any]]:
    while True:
        if text.next() != '"':
            text.fail("Expecting property name enclosed in double quotes", text.at)
        key = text.value()
        text.expect(":")
        if key in streamed and text.next() == "[":
            yield key, 0, None
            text.at += 1
            yield from ((key, number, value) for number, value in enumerate(_elements(text), 1))
        else:
            yield key, None, text.value()
        if text.next() == "}":
            text.at += 1
            return
        text.expect(",")


def _elements(text: _Window) -> Iterator[Any]:
    if text.next() == "]":
        text.at += 1
        return
    while True:
        yield text.value()
        if text.next() == "]":
            text.at += 1
            return
        text.expect(",")


class _Window:
    """A piece of the file as text; everything before ``at`` has been read."""

    def __init__(self, stream: BufferedReader, passed: Callable[[bytes], object]) -> None:
        self.text = ""
        self.at = 0
        self._stream = stream
        self._passed = passed
        self._decoder = codecs.getincrementaldecoder(json.detect_encoding(stream.peek(4)[:4]))()
        self._scan: Any = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # there, and used by json itself
        self._ended = False
        self._bytes = 0
        self._lines = self._column = 0
        """Of the text that the window has left behind: its line ends, and the characters after the last of them."""

    def next(self) -> str:
        """The character after white space; nothing at the end of the file."""
        while True:
            found = _SPACE.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def expect(self, sign: str) -> None:
        if self.next() != sign:
            self.fail(f"Expecting {sign!r} delimiter", self.at)
        self.at += 1

    def value(self) -> Any:
        self.next()
        while True:
            try:
                value, end = self._scan(self.text, self.at)
            except StopIteration as stop:
                problem, place = "Expecting value", stop.value
            except JSONDecodeError as error:
                problem, place = error.msg, error.pos
            else:
                # A number may go on behind the window, also one that seems to end in 1. or 1e+.
                if end < len(self.text) - _LONGEST or not self._more():
                    self.at = end
                    return value
                continue
            cut = place >= len(self.text) - _LONGEST or problem.startswith("Unterminated string")
            if not (cut and self._more()):
                self.fail(problem, place)

    def fail(self, problem: str, place: int) -> None:
        error = JSONDecodeError(problem, self.text, place)
        error.colno += self._column if error.lineno == 1 else 0
        error.lineno += self._lines
        raise error

    def _more(self) -> bool:
        """Leaves behind what was read and takes in at least as much as is left; False at the end of the file."""
        if self._ended:
            return False
        rest = self.text[self.at :]
        piece = self._stream.read(max(_WINDOW, len(rest)))
        self._ended = not piece
        pending = len(self._decoder.getstate()[0])
        try:
            decoded = self._decoder.decode(piece, final=self._ended)
        except UnicodeDecodeError as error:
            error.start += self._bytes - pending
            raise
        if self._ended:
            return False
        self._passed(piece)
        self._bytes += len(piece)
        lines = self.text.count("\n", 0, self.at)
        self._column = self.at - self.text.rfind("\n", 0, self.at) - 1 if lines else self._column + self.at
        self._lines += lines
        self.text, self.at = rest + decoded, 0
        return True
