"""Files appear whole or not at all, and checksums are CRC-32C."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from syncs import Sync, record_syncs

from dist_train.data.files import PARTIAL, crc32c, write_whole, written_whole


def test_text_and_bytes(tmp_path: Path) -> None:
    write_whole(tmp_path / "text", "größe\n")
    write_whole(tmp_path / "bytes", b"\x00\xff")
    assert (tmp_path / "text").read_bytes() == "größe\n".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes", "text"]


def test_nothing_is_seen_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with written_whole(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"


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


def test_what_a_killed_process_left_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / f"file{PARTIAL}").write_bytes(b"much longer rubbish")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_content_is_on_the_disk_before_its_name_and_the_name_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a loss of power could leave the name of a file that is empty."""
    syncs = record_syncs(monkeypatch)
    write_whole(tmp_path / "file", b"new")
    aside = tmp_path / f"file{PARTIAL}"
    assert syncs == [Sync(aside, size=3), Sync(tmp_path, names=frozenset({"file"}))]


def test_crc32c_check_value() -> None:
    # The check value of CRC-32/ISCSI in the RevEng catalogue.
    assert crc32c(b"123456789") == 0xE3069283


def test_crc32c_of_an_array_is_that_of_its_bytes() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    assert crc32c(array) == crc32c(array.tobytes())
