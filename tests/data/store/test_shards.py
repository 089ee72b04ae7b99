"""Shards: deterministic bytes, in a form that any WebDataset reader takes."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from dist_train.data.store.shards import read_records, shard_name, write_shard
from dist_train.data.types import Record, Volume
from dist_train.errors import StoreError
from dist_train.files import crc32c


def samples(count: int = 4) -> list[tuple[str, Volume, Record]]:
    rng = np.random.default_rng(0)
    return [
        (
            f"clip{i}",
            rng.integers(0, 256, (3 + i, 5, 7), dtype=np.uint8),
            {"label": i % 2, "group": "größe"},
        )
        for i in range(count)
    ]


def test_name_sorts_like_its_number() -> None:
    assert shard_name(7) == "shard-000007.tar"


# webdataset 1.0 leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_plain_webdataset_reads_it(tmp_path: Path) -> None:
    path = tmp_path / shard_name(0)
    write_shard(path, samples())
    read = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in read] == ["clip0", "clip1", "clip2", "clip3"]
    for sample, (_, clip, record) in zip(read, samples(), strict=True):
        np.testing.assert_array_equal(sample["npy"], clip)
        assert sample["json"] == record | {"shape": list(clip.shape), "crc32c": crc32c(clip)}


def test_bytes_depend_on_the_content_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "a.tar", samples())
    monkeypatch.setenv("USER", "somebody")
    before = os.umask(0o077)
    try:
        write_shard(tmp_path / "b.tar", iter(samples()))
    finally:
        os.umask(before)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


def test_a_view_is_written_as_the_array_it_shows(tmp_path: Path) -> None:
    clip = np.arange(4 * 5 * 6, dtype=np.uint8).reshape(4, 5, 6)[::2, 1:, ::3]
    write_shard(tmp_path / "a.tar", [("k", np.ascontiguousarray(clip), {})])
    ((_, record),) = read_records(tmp_path / "a.tar")
    content = (tmp_path / "a.tar").read_bytes()
    pixels = content[record["offset"] : record["offset"] + record["length"]]
    assert pixels == clip.tobytes()


def test_offset_and_length_point_at_the_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, samples())
    content = path.read_bytes()
    for (key, record), (expected, clip, _) in zip(read_records(path), samples(), strict=True):
        assert key == expected
        assert record["shape"] == list(clip.shape)
        pixels = content[record["offset"] : record["offset"] + record["length"]]
        assert pixels == clip.tobytes()
        assert crc32c(pixels) == record["crc32c"]


def test_no_samples_is_an_empty_tar(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [])
    assert list(read_records(tmp_path / "a.tar")) == []


def test_the_longest_key_fits(tmp_path: Path) -> None:
    key = "k" * 95
    write_shard(tmp_path / "a.tar", [(key, samples()[0][1], {})])
    assert [k for k, _ in read_records(tmp_path / "a.tar")] == [key]


def test_failure_half_way_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> object:
        yield samples()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a.tar", broken())  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def damaged_tar(members: list[tuple[str, bytes]]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return content.getvalue()


DAMAGE = {
    "not a tar": b"nothing of the kind" * 100,
    "empty": b"",
    "no record": damaged_tar([("a.npy", b"x")]),
    "other record": damaged_tar([("a.npy", b"x"), ("b.json", b"{}")]),
    "no json": damaged_tar([("a.npy", b"x"), ("a.json", b"{")]),
    "no shape": damaged_tar([("a.npy", b"x"), ("a.json", json.dumps({"label": 1}).encode())]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(DAMAGE[damage])
    with pytest.raises(StoreError, match=r"a.tar: (is not a readable shard|'a.npy' has no record)"):
        list(read_records(path))


def test_cut_shard_is_never_taken_for_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, samples(2))
    whole = path.read_bytes()
    last = max(record["offset"] + record["length"] for _, record in read_records(path))
    for length in range(1, last, 512):
        path.write_bytes(whole[:length])
        try:
            count = len(list(read_records(path)))
        except StoreError:
            continue
        assert count < 2
