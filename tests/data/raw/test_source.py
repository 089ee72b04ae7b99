"""A folder of raw files, and the words for a source that does not exist."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from dist_train.data.raw.remote import open_source
from dist_train.data.raw.source import LocalFolder
from dist_train.errors import StoreError


@pytest.mark.parametrize("scheme", ["", "file://", "local://"])
def test_local_files_are_used_where_they_are(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "a.bin").write_bytes(b"here")
    source = open_source(f"{scheme}{tmp_path}")
    assert source == open_source(tmp_path) == LocalFolder(tmp_path)
    with source.fetched("a.bin") as path:
        assert path == tmp_path / "a.bin"
    assert source.missing(["a.bin", "b.bin", "c.bin"]) == ["b.bin", "c.bin"]
    assert source.where("b.bin") == str(tmp_path / "b.bin")
    assert source.narrowed(["a.bin"]) is source


def test_local_change_is_when_the_file_was_put_there(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"here")
    os.utime(tmp_path / "a.bin", (0, 0))
    changed = (tmp_path / "a.bin").stat().st_ctime
    source = open_source(tmp_path)
    assert source.changed_since("a.bin", changed - 1)
    assert not source.changed_since("a.bin", changed)
    assert not source.changed_since("b.bin", 0)


def test_the_hint_for_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").symlink_to("gone")
    assert LocalFolder(tmp_path).hint("a.mp4") == "It is a link that leads nowhere."


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere", "nowhere: the source folder does not exist"),
        ("file:///nowhere", "/nowhere: the source folder does not exist"),
        ("s4://bucket/train", "s4://bucket/train: 's4://' is not known"),
        ("s3://", "is not the URL of one place"),
        ("zip://a::s3://bucket/a.zip", "is not the URL of one place"),
    ],
)
def test_no_such_source(place: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        open_source(place)


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    # As in a process that has not used it yet.
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    fix = r"pip install 'dist_train\[s3\]'"
    with pytest.raises(StoreError, match=f"the library for 's3://' is not installed. .*{fix}"):
        open_source("s3://bucket")
