"""The index is a function of the shards, and is refused when it is damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dist_train.data.store.index import read_index, write_index
from dist_train.data.store.shards import shard_name, write_shard
from dist_train.errors import StoreError


def make_shards(folder: Path, keys: list[list[str]]) -> list[Path]:
    paths = []
    for number, names in enumerate(keys):
        paths.append(folder / shard_name(number))
        clip = np.full((2, 3, 4), number, np.uint8)
        write_shard(paths[-1], [(key, clip, {"label": 1, "key": key}) for key in names])
    return paths


def test_every_clip_is_found_in_the_order_of_keys(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [["b", "d"], [], ["a", "c"]])
    assert write_index(tmp_path / "index", shards) == 4
    entries = list(read_index(tmp_path / "index"))
    assert [key for key, _ in entries] == ["a", "b", "c", "d"]
    assert [record["shard"] for _, record in entries] == [2, 0, 2, 0]
    for key, record in entries:
        assert record["key"] == key
        content = shards[record["shard"]].read_bytes()
        pixels = content[record["offset"] : record["offset"] + record["length"]]
        assert pixels == bytes([record["shard"]]) * 24


def test_bytes_depend_on_the_shards_alone(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [[f"{s}_{i}" for i in range(200)] for s in range(3)])
    write_index(tmp_path / "first", shards)
    (tmp_path / "second.partial").write_bytes(b"left by a killed process")
    write_index(tmp_path / "second", shards)
    first = (tmp_path / "first").read_bytes()
    assert (tmp_path / "second").read_bytes() == first


def test_key_in_two_shards(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [["a", "b"], ["b"]])
    with pytest.raises(StoreError, match="clip 'b' is in two shards"):
        write_index(tmp_path / "index", shards)
    assert not (tmp_path / "index").exists()


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"the index cannot be read .*No such file.*finalize"):
        list(read_index(tmp_path / "index"))


@pytest.mark.parametrize("content", [b"", b"garbage" * 5000])
def test_damaged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "index"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"the index cannot be read.*finalize"):
        list(read_index(path))
