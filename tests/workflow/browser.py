"""What a page looks like in a browser, offline."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (make packages)")


def open_page(page: Path, profile: Path, screenshot: Path | None = None, size: str = "1400,1000") -> str:
    """The document as it stands after its scripts ran. Whatever it asks of any host fails."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", f"--window-size={size}"),
            *("--virtual-time-budget=20000", "--hide-scrollbars", "--force-color-profile=srgb"),
            *(["--dump-dom"] if screenshot is None else [f"--screenshot={screenshot}"]),
            page.absolute().as_uri() if not str(page).startswith("file:") else str(page),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
