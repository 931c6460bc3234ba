from pathlib import Path

import pytest

from tessera.files import UserError
from tessera.spec.parts import line_of, read_mapping, shown

BROKEN = {
    "tab": ("train:\n\tnum_epochs: 3\n", "line 2, column 1", "spaces, not tabs"),
    "unclosed list": ("train: [1, 2\n", "line 2, column 1", "not valid YAML"),
    "bad indentation": ("train:\n  a: 1\n b: 2\n", "line 3, column 2", "not valid YAML"),
    "duplicate key": ("train:\n  lr: 1\n  lr: 2\n", "line 3, column 3", "'lr' stands twice, first in line 2"),
    "duplicate section": ("train: {}\nmodel: {}\ntrain: {}\n", "line 3, column 1", "'train' stands twice"),
    "key that YAML reads as bool": ("on: 1\n", "line 1, column 1", "'on', which YAML reads as bool; quote it"),
    "key that is a number": ("1: a\n", "line 1, column 1", "'1', which YAML reads as int"),
    "list as key": ("? [a]\n: 1\n", "line 1, column 3", "expected a key of text"),
    "python object": (
        "a: !!python/object/apply:os.system [ls]\n",
        "line 1, column 4",
        "could not determine a constructor",
    ),
    "binary": ("a: !!binary aGk=\n", "line 1, column 4", "could not determine a constructor"),
    "unknown alias": ("a: *b\n", "line 1, column 4", "undefined alias"),
    "two documents": ("a: 1\n---\nb: 2\n", "line 2, column 1", "but found another document"),
    "control character": ("a: \x07\n", "part.yaml", "not valid YAML"),
    "refers to itself": ("a: &x [*x]\n", "part.yaml", "refers to itself"),
    "list at the top": ("- 1\n", "part.yaml", "expected a mapping"),
    "text at the top": ("hello\n", "part.yaml", "found the text 'hello'"),
}


@pytest.mark.parametrize(("text", "place", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_file_is_refused_with_its_position(tmp_path: Path, text: str, place: str, reason: str) -> None:
    path = tmp_path / "part.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_mapping(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and place in message and reason in message


def test_broken_encoding_missing_file_and_folder(tmp_path: Path) -> None:
    path = tmp_path / "part.yaml"
    with pytest.raises(UserError, match="no such file"):
        read_mapping(path)
    path.write_bytes(b"a: \xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read_mapping(path)
    with pytest.raises(UserError, match="is a folder"):
        read_mapping(tmp_path)


GOOD = {
    "empty": ("", {}),
    "comments only": ("# nothing\n", {}),
    "exponent without a dot is text": ("a: 2e-4\n", {"a": "2e-4"}),
    "exponent with a dot": ("a: 2.0e-4\n", {"a": 0.0002}),
    "date stays text": ("a: 2020-01-02\n", {"a": "2020-01-02"}),
    "anchors and merge keys": (
        "a: &x {b: 1, c: 2}\nd:\n  <<: *x\n  c: 3\n",
        {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}},
    ),
    "same key in two sections": ("a: {b: 1}\nc: {b: 2}\n", {"a": {"b": 1}, "c": {"b": 2}}),
}


@pytest.mark.parametrize(("text", "expected"), GOOD.values(), ids=GOOD.keys())
def test_good_file(tmp_path: Path, text: str, expected: dict[str, object]) -> None:
    path = tmp_path / "part.yaml"
    path.write_text(text)
    assert read_mapping(path) == expected


def test_line_of_a_key_or_of_the_section_above_it(tmp_path: Path) -> None:
    path = tmp_path / "part.yaml"
    path.write_text("# head\ntrain:\n  num_epochs: 3\n  optim:\n    lr: 1.0\n")
    assert [
        line_of(path, key) for key in ("train", "train.num_epochs", "train.optim.lr", "train.optim.x", "model")
    ] == [2, 3, 5, 4, None]


def test_shown_is_short() -> None:
    assert len(shown("x" * 1000)) < 120
    assert [shown(v) for v in (None, True, 3, "a", {}, [1])] == [
        "nothing (null)",
        "true",
        "3",
        "the text 'a'",
        "an empty section",
        "the list [1]",
    ]
