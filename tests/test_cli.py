"""What the command line does around its stages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_on_a_full_disk_hides_no_message(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tessera.cli", "compare", "t", "--log", "/dev/full"]
    done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 1
    warning, error = done.stderr.splitlines()
    assert warning == "warning: /dev/full: cannot be written (No space left on device); the log ends here"
    assert error.startswith("error: config/config.yaml: no such file")
