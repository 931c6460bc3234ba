import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tessera.files import UserError
from tessera.spec.parts import LinedKey, inline_yaml, parse_yaml, read_mapping, shown

BROKEN = {
    "tab": ("train:\n\tnum_epochs: 3\n", "line 2, column 1", "spaces, not tabs"),
    "unclosed list": ("train: [1, 2\n", "line 2, column 1", "not valid YAML"),
    "bad indentation": ("train:\n  a: 1\n b: 2\n", "line 3, column 2", "not valid YAML"),
    "duplicate key": ("train:\n  lr: 1\n  lr: 2\n", "line 3, column 3", "'lr' stands twice, first in line 2"),
    "duplicate section": ("train: {}\nmodel: {}\ntrain: {}\n", "line 3, column 1", "'train' stands twice"),
    "key that is a boolean": ("true: 1\n", "line 1, column 1", "'true', which YAML reads as true; quote it"),
    "key that is a number": ("1: a\n", "line 1, column 1", "'1', which YAML reads as 1; quote it"),
    "list as key": ("? [a]\n: 1\n", "line 1, column 3", "expected a key of text"),
    "python object": (
        "a: !!python/object/apply:os.system [ls]\n",
        "line 1, column 4",
        "os.system; expected plain values without tags",
    ),
    "binary": ("a: !!binary aGk=\n", "line 1, column 4", "found the tag tag:yaml.org,2002:binary"),
    "unknown alias": ("a: *b\n", "line 1, column 4", "alias *b, but no value before it is &b"),
    "two documents": ("a: 1\n---\nb: 2\n", "line 2, column 1", "but found another document"),
    "another version": ("%YAML 1.1\n---\na: 1\n", "line 2, column 1", "another version than YAML 1.2"),
    "merged text": ("a: 1\n<<: b\n", "line 2, column 5", "expected sections to merge (<<), found the text 'b'"),
    "control character": ("a: \x07\n", "part.yaml", "not valid YAML"),
    "refers to itself": ("a: &x [*x]\n", "line 1, column 8", "alias *x, but no value before it is &x"),
    "a number of 5,000 digits": ("a:\n  b: " + "9" * 5000, "line 2, column 6", "found a number of 5000 digits"),
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


UNREAD = {
    "no such file": lambda path: None,
    "not UTF-8 text (byte 3)": lambda path: path.write_bytes(b"a: \xff\n"),
    "is a folder": Path.mkdir,
    "cannot be read (a FIFO, expected a regular file)": os.mkfifo,
    "has 1000003 bytes": lambda path: path.write_text("a: " + "x" * 1_000_000),
}


@pytest.mark.parametrize("reason", UNREAD)
def test_a_file_that_is_none_or_too_long_is_refused_unread(tmp_path: Path, reason: str) -> None:
    path = tmp_path / "part.yaml"
    UNREAD[reason](path)
    with pytest.raises(UserError, match=rf"part\.yaml: {re.escape(reason)}[;,] expected a YAML file"):
        read_mapping(path)


GOOD = {
    "empty": ("", {}),
    "comments only": ("# nothing\n", {}),
    "numbers of YAML 1.2": ("a: [2e-4, 2.0e-4, 1e3, .5, 0o17, 0x1f]\n", {"a": [2e-4, 2e-4, 1000.0, 0.5, 15, 31]}),
    "leading zeros": ("a: [010, 007]\n", {"a": [10, 7]}),
    "neither a time nor a number": ("a: [1:30, 1_0, 0b11]\n", {"a": ["1:30", "1_0", "0b11"]}),
    "booleans": ("a: [true, FALSE, yes, no, on, off, y]\n", {"a": [True, False, "yes", "no", "on", "off", "y"]}),
    "keys that were booleans": ("on: 1\nno: 2\n", {"on": 1, "no": 2}),
    "nothing": ("a: [null, ~, Null]\nb:\n", {"a": [None, None, None], "b": None}),
    "quoted": ("a: ['10', \"true\", !!str 3]\n", {"a": ["10", "true", "3"]}),
    "date stays text": ("a: 2020-01-02\n", {"a": "2020-01-02"}),
    "anchors and merge keys": (
        "a: &x {b: 1, c: 2}\nd:\n  <<: *x\n  c: 3\n",
        {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}},
    ),
    "the first of several to merge wins": (
        "a: &x {b: 1}\nc: &y {b: 2, d: 3}\ne: {<<: [*x, *y]}\n",
        {"a": {"b": 1}, "c": {"b": 2, "d": 3}, "e": {"b": 1, "d": 3}},
    ),
    "same key in two sections": ("a: {b: 1}\nc: {b: 2}\n", {"a": {"b": 1}, "c": {"b": 2}}),
}


@pytest.mark.parametrize(("text", "expected"), GOOD.values(), ids=GOOD.keys())
def test_good_file(tmp_path: Path, text: str, expected: dict[str, object]) -> None:
    path = tmp_path / "part.yaml"
    path.write_text(text)
    assert read_mapping(path) == expected


def test_keys_know_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "part.yaml"
    path.write_text("# head\ntrain:\n  num_epochs: 3\n  optim:\n    lr: 1.0\n")
    found: dict[str, int] = {}

    def walk(section: Any) -> None:
        for key, value in section.items():
            assert isinstance(key, LinedKey)
            found[key] = key.line
            if isinstance(value, dict):
                walk(value)

    walk(read_mapping(path))
    assert found == {"train": 2, "num_epochs": 3, "optim": 4, "lr": 5}


TWO_MEANINGS = {
    "010": ("10", "8", "write 10"),
    "1:30": ("the text '1:30'", "90", "quote it"),
    "1_0": ("the text '1_0'", "10", "quote it"),
    "on": ("the text 'on'", "true", "quote it"),
    "No": ("the text 'No'", "false", "quote it"),
    "0o17": ("15", "the text '0o17'", "write 15"),
    "2020-01-02": ("the text '2020-01-02'", "2020-01-02", "quote it"),
}


@pytest.mark.parametrize(("text", "meanings"), TWO_MEANINGS.items(), ids=TWO_MEANINGS.keys())
def test_scalar_of_two_meanings_in_a_file_of_two_readers(text: str, meanings: tuple[str, str, str]) -> None:
    new, old, advice = meanings
    with pytest.raises(UserError) as caught:
        parse_yaml(f"a:\n- {text}\n", "config.yaml", twice_read=True)
    assert f"config.yaml, line 2, column 3: {text} is {new} in YAML 1.2 and {old} in YAML 1.1" in str(caught.value)
    assert str(caught.value).endswith(advice) or f"{advice}, or quote it" in str(caught.value)
    assert parse_yaml(f"['{text}', true, null, 12, 1.5, 1e-4, a-b]", "config.yaml", twice_read=True)[0] == text


BOMBS = {
    "aliases": "a0: &a0 [1, 2]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)),
    "merged aliases": "a0: &a0 {b: 1}\n"
    + "".join(f"a{n}: &a{n} {{b: *a{n - 1}, c: *a{n - 1}}}\n" for n in range(1, 30)),
    "lists": "a: " + "[" * 100_000,
    "sections": "a: " + "{b: " * 100_000,
    "lists of blocks": "a:\n  " + "- " * 100_000,
    "mixed": "a: " + "[{b: " * 50_000,
    "sections of blocks": "".join(" " * depth + "a:\n" for depth in range(1000)),
    "complex keys": "? " * 100_000,
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS.keys())
def test_bomb_is_refused_at_once_with_its_place(tmp_path: Path, text: str) -> None:
    path = tmp_path / "part.yaml"
    path.write_text(text)
    start = time.process_time()
    with pytest.raises(UserError, match=r"part\.yaml, line \d+, column \d+: .*(inside one another|aliases repeat)"):
        read_mapping(path)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    "value", ["1e3", "0o17", "010", "1:30", "on", "a b", "", "~", "#c", "é", 1e-07, 1e20, 3, True, None, [1.5, "x"], {}]
)
def test_what_is_written_reads_back_in_both_versions(value: object) -> None:
    text = f"a: {inline_yaml(value)}\n"
    assert parse_yaml(text, "spec")["a"] == value == yaml.safe_load(text)["a"]


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
