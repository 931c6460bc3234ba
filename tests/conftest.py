"""Before anything imports torch: one thread, for test processes run side by side and sums depend on the number of threads."""

from __future__ import annotations

import os

import pytest

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")


@pytest.fixture(scope="session", autouse=True)
def _own_index(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Indices of annotations away from the project's own data/.index, for commands that tests start, too."""
    os.environ["TESSERA_INDEX"] = str(tmp_path_factory.mktemp("index"))
