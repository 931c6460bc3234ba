import pytest
import torch

from tests.training import toy


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tests compare bits with processes that have one thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Holds the toy data, and ``results/whole``: the toy training, never interrupted."""
    path = tmp_path_factory.mktemp("training")
    toy.run(path, name="whole")
    return path


@pytest.fixture
def work(root, tmp_path):
    """An empty place for a training on the same data."""
    (tmp_path / "data").symlink_to(root / "data")
    return tmp_path
