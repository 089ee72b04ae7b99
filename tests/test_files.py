"""Files appear complete or not at all, and checksums are CRC-32C."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest
from syncs import Sync, record_syncs

from dist_train.errors import FileError
from dist_train.files import (
    PARTIAL,
    aside_for,
    crc32c,
    open_lock,
    read_json,
    read_plain,
    write_whole,
    written_whole,
)


def test_a_file_appears_with_its_whole_content(tmp_path: Path) -> None:
    write_whole(tmp_path / "text", "größe\n")
    assert (tmp_path / "text").read_bytes() == "größe\n".encode()
    with written_whole(tmp_path / "bytes") as file:
        file.write(b"\x00\xff")
        assert not (tmp_path / "bytes").exists()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes", "text"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_failure_leaves_the_old_file(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")

    def fail() -> None:
        with written_whole(path) as file:
            file.write(b"half")
            raise failure

    with pytest.raises(failure):
        fail()
    assert path.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_what_a_killed_process_left_is_known_by_its_name(tmp_path: Path) -> None:
    """And no other file is taken for one."""
    child = os.fork()
    if child == 0:
        with written_whole(tmp_path / "a file.partial"):
            os._exit(0)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    assert aside_for(left) == "a file.partial"
    token = left.name.split(".")[-2]
    others = [f"file{PARTIAL}", f"file.{token[1:]}{PARTIAL}", f"file.{token}", f".{token}{PARTIAL}"]
    for name in others:
        (tmp_path / name).write_bytes(b"a download of the user")
        assert aside_for(tmp_path / name) is None
    link = tmp_path / f"file.{token}{PARTIAL}"
    link.symlink_to(left)
    assert aside_for(link) is None


def test_writers_of_the_same_path_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with written_whole(path) as one, written_whole(path) as two:
        one.write(b"one")
        two.write(b"two, longer")
    assert path.read_bytes() == b"one"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_link_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"of somebody else")
    for name, target in (("link", "target"), ("dangling", "nothing")):
        (tmp_path / name).symlink_to(target)
        write_whole(tmp_path / name, b"new")
        assert not (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_bytes() == b"new"
    assert (tmp_path / "target").read_bytes() == b"of somebody else"
    assert not (tmp_path / "nothing").exists()


def stands(folder: Path, kind: str) -> Path:
    """A path to be read or written that is not a plain file."""
    path = folder / "here"
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    return path


KINDS = ("folder", "FIFO", "socket", "device")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_plain_file_is_not_replaced(tmp_path: Path, kind: str) -> None:
    path = stands(tmp_path, kind)
    before = path.lstat()[:7]
    with pytest.raises(FileError, match=f"here: is a {kind}, and would be replaced"):
        write_whole(path, b"new")
    assert path.lstat()[:7] == before
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_plain_file_is_not_read_or_locked(tmp_path: Path, kind: str) -> None:
    """Opening a FIFO would wait for a writer, and reading a device would never end."""
    path = stands(tmp_path, kind)
    reason = "cannot be read" if kind == "socket" else f"is a {kind}, not a plain file"
    with pytest.raises(FileError, match=f"here: {reason}"):
        read_plain(path, most_bytes=100)
    with pytest.raises((FileError, OSError), match="here"):
        open_lock(path)


def test_a_lock_changes_nothing_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"of somebody else")
    (tmp_path / "lock").symlink_to("target")
    with pytest.raises(FileError, match="lock: is a symbolic link"):
        open_lock(tmp_path / "lock")
    open_lock(tmp_path / "target").close()
    assert (tmp_path / "target").read_bytes() == b"of somebody else"
    open_lock(tmp_path / "new").close()
    assert (tmp_path / "new").read_bytes() == b""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 10**6, "too deep"),
        (b'{"a": 1, "a": 2}', "a name twice"),
        (b"[NaN]", "NaN is not a number of JSON"),
        (b"[1", "is not valid JSON"),
        (b"9" * 5000, "is not valid JSON"),
        (b'"\xff"', "is not valid JSON"),
        (b"[1, 2, 3]", "is longer than 8 bytes"),
        (None, "cannot be read"),
    ],
    ids=["deep", "twice", "NaN", "torn", "digits", "no text", "long", "missing"],
)
def test_bad_json_is_refused(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileError, match=f"a.json: .*{reason}"):
        read_json(path, most_bytes=8 if reason.endswith("8 bytes") else 2**20)


def test_good_json_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, 2.5, null, true, "b"]}')
    assert read_json(path) == {"a": [1, 2.5, None, True, "b"]}


def test_content_is_on_the_disk_before_its_name_and_the_name_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the fsync, a power failure could leave an empty file under the final name."""
    syncs = record_syncs(monkeypatch)
    write_whole(tmp_path / "file", b"new")
    content, name = syncs
    assert content.path.name.endswith(PARTIAL)
    assert content.size == 3
    assert name == Sync(tmp_path, names=frozenset({"file"}))


def test_crc32c_of_bytes_and_of_an_array() -> None:
    # The check value of CRC-32/ISCSI in the RevEng catalogue.
    assert crc32c(b"123456789") == 0xE3069283
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    assert crc32c(array) == crc32c(array.tobytes())
