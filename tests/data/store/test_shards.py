"""Shards: deterministic bytes, in a form that any WebDataset reader takes."""

from __future__ import annotations

import io
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


DAMAGE: dict[str, list[tuple[str, bytes]]] = {
    "no record": [("a.npy", b"x")],
    "other record": [("a.npy", b"x"), ("b.json", b"{}")],
    "no json": [("a.npy", b"x"), ("a.json", b"{")],
    "no shape": [("a.npy", b"x"), ("a.json", b'{"label": 1}')],
    "no crc32c": [("a.npy", b"x"), ("a.json", b'{"shape": [1, 1, 1]}')],
    "no array": [("a.txt", b"x")],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in DAMAGE[damage]:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    with pytest.raises(StoreError, match=r"a.tar: is not a readable shard"):
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
