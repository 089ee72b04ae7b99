"""A file takes whole records, and those that it has no room for later."""

from __future__ import annotations

from pathlib import Path

import pytest
from room import LittleRoom
from syncs import Sync, record_syncs

from dist_train.growing_file import GrowingFile


def test_records_follow_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before|")
    file = GrowingFile(path)
    for record in (b"one|", b"", b"two|"):
        file.append(record)
    assert path.read_bytes() == b"before|one|two|", "at once, for those who watch"
    file.close()


def test_flush_puts_all_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint must not outlast the figures of its steps."""
    syncs = record_syncs(monkeypatch)
    path = tmp_path / "file"
    file = GrowingFile(path)
    file.append(b"one|")
    file.append(b"two|")
    file.flush()
    assert syncs == [Sync(path, size=8)]
    file.close()


def test_what_has_no_room_waits_in_its_order(tmp_path: Path, little_room: LittleRoom) -> None:
    path = tmp_path / "file"
    file = GrowingFile(path)
    file.append(b"a" * 40)
    little_room(100)
    for letter in (b"b", b"c", b"d"):
        with pytest.raises(OSError, match=f"{path}"):
            file.append(letter * 80)
        assert path.read_bytes() == b"a" * 40, "no part of a record"
    with pytest.raises(OSError, match=f"{path}"):
        file.flush()
    little_room(199)
    with pytest.raises(OSError, match=f"{path}"):
        file.flush()
    assert path.read_bytes() == b"a" * 40 + b"b" * 80
    little_room(None)
    file.append(b"e")
    assert path.read_bytes() == b"a" * 40 + b"b" * 80 + b"c" * 80 + b"d" * 80 + b"e"
    file.close()
