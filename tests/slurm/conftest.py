from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import cluster


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Its folder, with the daemons' logs. Left out with one line where it cannot be started."""
    reason = cluster.missing()
    if reason is not None:
        pytest.skip(f"no SLURM to test with: {reason}")
    folder = tmp_path_factory.mktemp("slurm")
    with cluster.running(folder):
        yield folder
