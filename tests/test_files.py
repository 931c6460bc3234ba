import errno
import fcntl
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tessera.files import (
    UserError,
    atomic_folder,
    atomic_path,
    canonical_json,
    digest_file,
    digest_text,
    is_abandoned,
    only_process,
    read_json,
    remove_abandoned,
    temporaries,
    write_json,
    write_text,
)


class StopWritingError(Exception):
    pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_whole_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "model.pth"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".pth"
        temporary.write_bytes(b"half")
        assert not path.exists()
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    assert names(path.parent) == ["model.pth"]


def test_failed_writing_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    path.write_text("old")
    with pytest.raises(StopWritingError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise StopWritingError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["eval.json"]


def test_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def test_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "inference"
    path.mkdir()
    (path / "old.png").touch()
    with pytest.raises(StopWritingError), atomic_folder(path) as temporary:
        (temporary / "new.png").touch()
        raise StopWritingError
    assert names(path) == ["old.png"]
    with atomic_folder(path) as temporary:
        (temporary / "new.png").touch()
    assert names(path) == ["new.png"]
    assert names(tmp_path) == ["inference"]


def test_the_former_folder_stays_until_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "converted"
    path.mkdir()
    (path / "old").touch()
    rename = Path.rename

    def stop(self: Path, target: Path) -> Path:
        if target == path and not self.name.endswith(".former"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt), atomic_folder(path) as temporary:
        (temporary / "new").touch()
    assert names(path) == ["old"] and names(tmp_path) == ["converted"]


def test_a_folder_behind_a_link_is_replaced_there(tmp_path: Path) -> None:
    link, scratch = tmp_path / "converted", tmp_path / "scratch/cars"
    link.symlink_to(scratch)
    for name in ("first", "second"):
        with atomic_folder(link) as temporary:
            assert temporary.parent == scratch.parent
            (temporary / name).touch()
        assert link.is_symlink() and names(scratch) == [name]
    assert names(scratch.parent) == ["cars"]


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """Two checkouts may fill the same folder through links of their own."""
    path = tmp_path / "cars"
    path.mkdir()
    with atomic_folder(path) as one:
        token = one.name.removeprefix(".cars.tessera-")
        (one / "mine").touch()
    dead = token[:16] + "0" * 8
    for left in (f".cars.tessera-{dead}", f".cars.tessera-{dead}.former", ".cars.backup", ".cars", ".cars.abcd1234"):
        (tmp_path / left).mkdir()
    (tmp_path / f".model.tessera-{dead}.pth").touch()
    (tmp_path / f".model.tessera-{token[:8]}{'0' * 16}.pth").touch()  # from before this machine was started again
    (tmp_path / f".model.tessera-{'0' * 8}{token[8:16]}{'0' * 8}.pth").touch()  # of a container on it
    elsewhere = tmp_path / f".model.tessera-{'f' * 24}.pth"  # of another machine: locks may not reach there
    elsewhere.touch()
    with atomic_folder(path) as one:
        (one / "mine").touch()
        with atomic_folder(path) as other:
            (other / "yours").touch()
        assert set(names(tmp_path)) == {
            ".cars",
            ".cars.abcd1234",
            ".cars.backup",
            one.name,
            "cars",
            elsewhere.name,
        }
    assert names(path) == ["mine"]
    os.utime(elsewhere, (0, 0))
    write_text(tmp_path / "a.txt", "x")
    assert names(tmp_path) == [".cars", ".cars.abcd1234", ".cars.backup", "a.txt", "cars"]


def test_a_folder_that_another_machine_still_fills_stays(tmp_path: Path) -> None:
    """Files that are written into a folder below leave the folder's own time as it is."""
    filled = tmp_path / f".images.tessera-{'f' * 24}"
    (filled / "deep").mkdir(parents=True)
    (filled / "deep/1.png").touch()
    for path in (filled / "deep", filled):
        os.utime(path, (0, 0))
    remove_abandoned(tmp_path)
    assert (filled / "deep/1.png").exists() and is_abandoned(filled) is None
    remove_abandoned(tmp_path, alone=True)
    assert names(tmp_path) == []


REPLACED = """
import os, signal, sys
from pathlib import Path
from tessera.files import atomic_folder

path, rename = Path(sys.argv[1]), Path.rename

def kill(self, target):
    if target == path:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)

Path.rename = kill
with atomic_folder(path) as temporary:
    (temporary / "new").touch()
"""


def test_a_writer_killed_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "converted"
    path.mkdir()
    (path / "old").touch()
    assert subprocess.run([sys.executable, "-c", REPLACED, str(path)], check=False).returncode == -signal.SIGKILL
    assert not path.exists() and len(names(tmp_path)) == 2
    remove_abandoned(tmp_path)
    assert names(tmp_path) == ["converted"] and names(path) == ["old"]


KILLED = """
import os, signal, sys, time
from pathlib import Path
from tessera.files import atomic_path

with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    if os.fork() == 0:  # a loader process, which outlives its killed parent for a while
        time.sleep(60)
        os._exit(0)
    print(temporary, flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_nothing_behind_the_next_one(tmp_path: Path) -> None:
    """Neither does its orphan keep what it left; while it lives it is left alone."""
    path = tmp_path / "model.onnx"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    left = Path(process.stdout.readline().strip())
    try:
        write_text(tmp_path / "eval.json", "{}")
        assert left.exists() and temporaries(tmp_path) == [left] and not is_abandoned(left)
        process.kill()
        process.wait(10)
        assert left.exists() and is_abandoned(left)
        write_text(path, "whole")
        assert names(tmp_path) == ["eval.json", "model.onnx"] and path.read_text() == "whole"
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_too_large_a_file_is_told_as_the_limit_that_it_is(tmp_path: Path) -> None:
    program = """
import resource, sys
from pathlib import Path
from tessera.files import write_bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
write_bytes(Path(sys.argv[1]), bytes(2000))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.bin")], capture_output=True, text=True, check=False
    )
    assert "a.bin: cannot be written: files may not become that large here; raise the limit (`ulimit -f" in done.stderr
    assert names(tmp_path) == []


def test_a_link_to_nowhere_is_named(tmp_path: Path) -> None:
    link = tmp_path / "results"
    link.symlink_to(tmp_path / "scratch")
    with pytest.raises(
        UserError, match=r"results/a/eval\.json: cannot be written: .*results: is a link to .*scratch, where"
    ):
        write_text(link / "a" / "eval.json", "{}")
    with pytest.raises(UserError, match=r"results: is a link to .*scratch, where nothing is"):
        read_json(link / "a" / "eval.json")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file stands where a folder is expected"):
        write_text(tmp_path / "file" / "eval.json", "{}")


@pytest.mark.parametrize("dangling", [True, False])
def test_a_lock_is_no_link(tmp_path: Path, dangling: bool) -> None:
    """Its target would be emptied, or made."""
    target = tmp_path / "thesis.tex"
    if not dangling:
        target.write_text("years of work")
    (tmp_path / "lock").symlink_to(target)
    with (
        pytest.raises(UserError, match="lock: is a link, expected a lock file or nothing; remove it"),
        only_process(tmp_path / "lock"),
    ):
        pass
    assert not target.exists() if dangling else target.read_text() == "years of work"


def test_a_lock_never_empties_a_file_of_another_name(tmp_path: Path) -> None:
    target = tmp_path / "thesis.tex"
    target.write_text("years of work")
    os.link(target, tmp_path / "lock")
    with only_process(tmp_path / "lock"):
        assert target.read_text() == "years of work"


def test_a_lock_is_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(UserError, match="lock: is no regular file"), only_process(tmp_path / "lock"):
        pass


def test_a_file_in_place_of_a_folder_stays(tmp_path: Path) -> None:
    path = tmp_path / "inference"
    path.write_text("a file")
    with pytest.raises(UserError, match="inference: is a file, expected a folder or nothing"), atomic_folder(path):
        pass
    assert path.read_text() == "a file" and names(tmp_path) == ["inference"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with (
        pytest.raises(
            UserError, match=r"lock: cannot be locked \(.+\); mount the file system with locks .*, or buy one"
        ),
        only_process(tmp_path / "lock", lockless="buy one"),
    ):
        pass


def test_json_round_trip_and_form(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5], "a": "ä"})
    assert read_json(path) == {"b": [1, 2.5], "a": "ä"}
    assert path.read_text(encoding="utf-8").startswith('{\n  "b": [') and path.read_text().endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_json_has_no_nan(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", value)
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(value)
    assert names(tmp_path) == []


BAD_JSON = {
    "cut off": (b'{"a": [1, 2', "line 1, column 12: not valid JSON"),
    "empty": (b"", "line 1, column 1: not valid JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8 text (byte 7)"),
}


@pytest.mark.parametrize(("content", "reason"), BAD_JSON.values(), ids=BAD_JSON.keys())
def test_bad_json_is_told_with_its_position(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(path)
    assert str(caught.value).startswith(str(path)) and reason in str(caught.value)


def test_missing_json_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match="is a folder"):
        read_json(tmp_path)


def test_canonical_json_is_equal_for_equal_values() -> None:
    assert canonical_json({"b": 1, "a": {"d": [1, 2], "c": None}}) == '{"a":{"c":null,"d":[1,2]},"b":1}'
    assert canonical_json({"a": [1, 2]}) != canonical_json({"a": [2, 1]})
    assert json.loads(canonical_json({"a": 1e-7})) == {"a": 1e-7}


def test_digests_are_sha256(tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(content)
    assert digest_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    assert digest_text("ä") == hashlib.sha256("ä".encode()).hexdigest()
