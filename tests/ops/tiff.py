"""TIFF files of any bands and depth, which Pillow cannot write."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np


def tiff(*pages: np.ndarray, **tags: Any) -> bytes:
    """Uncompressed; pages (H, W) or (H, W, bands). ``colours`` 1 gray, 2 RGB; ``extra`` the kinds of bands beyond them (0: any, 2: alpha);
    ``kinds``: of each page (1: a smaller version)."""
    content = b"II*\0"
    place = len(content)
    content += bytes(4)
    for number, page in enumerate(pages):
        data = np.ascontiguousarray(page)
        height, width = data.shape[:2]
        bands = data.shape[2] if data.ndim == 3 else 1
        start = len(content)
        content += data.tobytes()
        entries: list[tuple[int, Sequence[int]]] = [
            (254, [tags.get("kinds", [0] * len(pages))[number]]),
            (256, [width]),
            (257, [height]),
            (258, [data.dtype.itemsize * 8] * bands),
            (259, [1]),
            (262, [tags.get("colours", 1 if bands == 1 else 2)]),
            (273, [start]),
            (277, [bands]),
            (278, [height]),
            (279, [data.nbytes]),
            *([(338, tags["extra"])] if "extra" in tags else []),
            (339, [{"u": 1, "i": 2, "f": 3}[data.dtype.kind]] * bands),
        ]
        content += bytes(len(content) % 2)
        arrays = b""
        directory = len(content)
        behind = directory + 2 + 12 * len(entries) + 4
        rows = b""
        for tag, values in entries:
            kind, packed = (
                (4, struct.pack("<I", values[0]))
                if tag in (254, 273, 279)
                else (3, struct.pack(f"<{len(values)}H", *values))
            )
            if len(packed) > 4:
                packed, arrays = struct.pack("<I", behind + len(arrays)), arrays + packed
            rows += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
        content = content[:place] + struct.pack("<I", directory) + content[place + 4 :]
        content += struct.pack("<H", len(entries)) + rows
        place = len(content)
        content += bytes(4) + arrays
    return content
