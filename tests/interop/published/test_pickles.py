"""Pickles of arrays come back as they were; whatever else a pickle can do, it does not do here."""

from __future__ import annotations

import collections
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tessera.files import UserError
from tessera.interop.published import read_state
from tessera.interop.published.pickles import read_pickle

GENERATOR = np.random.default_rng(0)
ARRAYS: dict[str, Any] = {
    "weight": GENERATOR.normal(size=(3, 4, 2)).astype(np.float32),
    "half": GENERATOR.normal(size=(5,)).astype(np.float16),
    "columns first": np.asfortranarray(GENERATOR.normal(size=(3, 4))),
    "big end": GENERATOR.normal(size=(2, 3)).astype(">f4"),
    "mask": GENERATOR.normal(size=(4,)) > 0,
    "count": np.int64(7),
    "no axis": np.array(2.5, dtype=np.float32),
    "empty": np.zeros((0, 4), dtype=np.float32),
}


def write(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_round_trip(tmp_path: Path, protocol: int) -> None:
    content = {"model": ARRAYS, "__author__": "third_party", "matching_heuristics": True, "iteration": 3}
    found = read_pickle(write(tmp_path / "model.pkl", content, protocol))
    assert found.keys() == ARRAYS.keys()
    for name, value in ARRAYS.items():
        expected = np.asarray(value)
        assert found[name].shape == expected.shape and found[name].is_contiguous(), name
        assert np.array_equal(found[name].numpy(), expected), name
    assert found["weight"].dtype == torch.float32 and found["count"].dtype == torch.int64


def test_names_of_older_numpy(tmp_path: Path) -> None:
    """Until numpy 2 the private module had a public name."""
    text = pickle.dumps({"model": ARRAYS}, protocol=2).replace(b"numpy._core.", b"numpy.core.")
    path = tmp_path / "model.pkl"
    path.write_bytes(text)
    assert torch.equal(read_pickle(path)["weight"], torch.from_numpy(ARRAYS["weight"]))


def test_python_2(tmp_path: Path) -> None:
    """Byte strings for names, types and values, as Python 2 wrote them with protocol 0."""
    values = np.array([1.5, -2.0], dtype="<f4")
    raw = values.tobytes().decode("latin1").encode("unicode_escape").decode()
    program = (
        "(dS'model'\n(dS'w'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\nt"
        f"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'{raw}'\ntbss."
    )
    path = tmp_path / "model.pkl"
    path.write_bytes(program.encode())
    assert torch.equal(read_pickle(path)["w"], torch.from_numpy(values))


def test_ordered_dictionary_and_bare_arrays(tmp_path: Path) -> None:
    ordered = collections.OrderedDict(ARRAYS)
    ordered._metadata = {"": {"version": 2}}  # type: ignore[attr-defined]  # as PyTorch's state dictionaries have it
    assert read_pickle(write(tmp_path / "one.pkl", {"state_dict": ordered})).keys() == ARRAYS.keys()
    assert read_state(write(tmp_path / "two.pkl", ARRAYS)).keys() == ARRAYS.keys()


class Hostile:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.parts = (call, arguments)

    def __reduce__(self) -> Any:
        return self.parts


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("call", "name"),
    [(os.system, r"posix\.system"), (eval, r"builtins\.eval|__builtin__\.eval"), (np.load, r"numpy\.load")],
)
def test_code_is_refused_and_does_not_run(tmp_path: Path, call: Any, name: str, protocol: int) -> None:
    witness = tmp_path / "ran"
    argument = f"open({str(witness)!r}, 'w')" if call is eval else f"touch {witness}"
    path = write(tmp_path / "model.pkl", {"model": {**ARRAYS, "x": Hostile(call, argument)}}, protocol)
    with pytest.raises(UserError, match=rf"model\.pkl: names ({name}), .*Nothing in it was executed"):
        read_pickle(path)
    assert not witness.exists()


def test_dotted_names_reach_nothing(tmp_path: Path) -> None:
    """Protocol 4 may name an attribute of an attribute."""
    program = b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93."
    path = tmp_path / "model.pkl"
    path.write_bytes(program)
    with pytest.raises(UserError, match=r"names numpy\.ndarray\.__init__"):
        read_pickle(path)


def test_objects_in_arrays_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "model.pkl", {"model": {"x": np.array([{"a": 1}], dtype=object)}})
    with pytest.raises(UserError, match=r"'x' cannot be read: an array of type 'O8', expected one of f2, f4"):
        read_pickle(path)


def test_bytes_that_claim_another_size(tmp_path: Path) -> None:
    text = pickle.dumps({"model": {"x": np.zeros(3, dtype=np.float32)}}, protocol=2).replace(b"K\x03\x85", b"K\x09\x85")
    path = tmp_path / "model.pkl"
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"'x' cannot be read: .*is the file damaged\?"):
        read_pickle(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_truncated(tmp_path: Path, share: float) -> None:
    whole = pickle.dumps({"model": ARRAYS}, protocol=4)
    path = tmp_path / "model.pkl"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"model\.pkl: is no whole pickle .* is it cut off\?"):
        read_pickle(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds no named arrays"),
        ({"model": {}}, "holds no named arrays"),
        ({"model": {"x": 3}}, "entry 'x' is a int, expected a name and an array"),
        ({1: np.zeros(2)}, "entry '1' is a array"),
    ],
)
def test_anything_else(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_pickle(write(tmp_path / "model.pkl", content))


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_pickle(tmp_path / "model.pkl")
    with pytest.raises(UserError, match="is a folder, expected a pickle"):
        read_pickle(tmp_path)
