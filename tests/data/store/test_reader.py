"""Reading a store: any clip, from any process, and damage by its name."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from make_media import read_volume, write_manifest, write_volumes

from dist_train.data.store import reader as store_module
from dist_train.data.store import shard_bytes
from dist_train.data.store.build import PrepareSettings, finalize, prepare
from dist_train.data.store.clip_table import TABLE
from dist_train.data.store.index import index_checksum, read_index
from dist_train.data.store.reader import INDEX, MARKER, SHARDS, Store, read_marker
from dist_train.data.store.shards import shard_name
from dist_train.data.store.verify import verify
from dist_train.errors import StoreError
from dist_train.files import sealed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store of ten clips in four shards."""
    names = write_volumes(tmp_path / "raw", 10)
    manifest = write_manifest(tmp_path / "clips.csv", names)
    settings = PrepareSettings(roi="none", shard_clips=3)
    prepare(manifest, tmp_path / "raw", tmp_path / "store", settings, workers=1)
    return tmp_path / "store"


def write_marker(folder: Path, content: dict[str, Any]) -> None:
    (folder / MARKER).write_text(sealed(content))


def source_of(store: Store, clip: int) -> np.ndarray:
    return read_volume(store.folder.parent / "raw" / store.table["filename"][clip])


def test_every_clip_in_any_order(folder: Path) -> None:
    store = Store(folder)
    for clip in [7, 0, 9, 3, 3, *range(10)]:
        pixels = store.read(clip)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, source_of(store, clip))
        assert store.clip_of(store.table["key"][clip]) == clip
    with pytest.raises(StoreError, match="holds no clip 'clip999'"):
        store.clip_of("clip999")


def test_table(folder: Path) -> None:
    table = Store(folder).table.frame()
    assert table["key"].tolist() == sorted(table["key"])
    assert table["label"].tolist() == [0, 1] * 5
    assert table["frames"].tolist() == [4 + i % 5 for i in range(10)]
    assert table["height"].tolist() == [10 + i % 3 for i in range(10)]
    assert (table["width"] == 12).all()
    assert table["shard"].tolist() == [i // 3 for i in range(10)]
    assert table["crowd_score"].dtype == np.float64
    assert table["crowd_score"].isna().all()


def test_no_more_files_are_open_than_allowed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_bytes, "OPEN_SHARDS", 2)
    store = Store(folder)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for clip in [0, 3, 6, 9, 0, 6, 1, 9]:
        np.testing.assert_array_equal(store.read(clip), source_of(store, clip))
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


def test_a_store_that_is_dropped_closes_its_shards(folder: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    store = Store(folder)
    for clip in range(len(store.table)):
        store.read(clip)
    assert len(list(Path("/proc/self/fd").iterdir())) > before
    del store
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_pickled_store_opens_its_own_files(folder: Path) -> None:
    store = Store(folder)
    store.read(4)
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy.read(4), source_of(store, 4))
    assert copy.table.frame().equals(store.table.frame())
    assert copy.fingerprint == store.fingerprint


def _sum(store: Store, clip: int) -> int:
    return int(store.read(clip).sum())


def test_a_fork_reads_beside_its_parent(folder: Path) -> None:
    """By hand, since the point is a child that inherits open descriptors."""
    store = Store(folder)
    expected = [_sum(store, clip) for clip in range(10)]
    child = os.fork()
    if child == 0:
        same = all(_sum(store, clip) == expected[clip] for clip in [*range(10)] * 20)
        os._exit(0 if same else 1)
    read = [_sum(store, clip) for clip in [*range(9, -1, -1)] * 20]
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert read == expected[::-1] * 20


def test_damaged_byte_is_named_by_key(folder: Path) -> None:
    record = dict(read_index(folder / INDEX))["clip004"]
    path = folder / SHARDS / shard_name(record["shard"])
    content = bytearray(path.read_bytes())
    content[record["offset"] + 5] ^= 1
    path.write_bytes(content)
    store = Store(folder)
    clip = store.clip_of("clip004")
    with pytest.raises(StoreError, match=r"'clip004' cannot be read \(the bytes are not") as raised:
        store.read(clip)
    assert raised.value.where == path
    np.testing.assert_array_equal(store.read(clip + 1), source_of(store, clip + 1))


def test_a_cut_and_a_missing_shard_are_named_by_key(folder: Path) -> None:
    path = folder / SHARDS / shard_name(1)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StoreError, match="'clip005' cannot be read"):
        Store(folder).read(5)
    path.unlink()
    with pytest.raises(StoreError, match=r"'clip003' cannot be read \(No such file"):
        Store(folder).read(3)


def test_a_store_that_is_lost_bit_by_bit(folder: Path) -> None:
    for name, message in (
        (TABLE, r"the clip table cannot be read \(No such file.*'dist-train finalize'"),
        (MARKER, "the store is not finished.*to finish it"),
        (SHARDS, "there is no store here.*check the path"),
    ):
        (folder / name).rename(folder.parent / name)
        with pytest.raises(StoreError, match=message):
            Store(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '"text"', "\xff"])
def test_marker_that_is_none(folder: Path, content: str) -> None:
    (folder / MARKER).write_bytes(content.encode("latin-1"))
    with pytest.raises(StoreError, match=r"store.json: is not the marker of a store"):
        read_marker(folder)


def test_marker_of_another_format(folder: Path) -> None:
    write_marker(folder, read_marker(folder) | {"format": "dist_train store 99"})
    with pytest.raises(StoreError, match="format 'dist_train store 99', this version reads"):
        Store(folder)


def without_table(folder: Path) -> dict[str, Any]:
    """Make a store that an earlier version might have written; returns its marker."""
    marker = read_marker(folder)
    del marker["table_crc32c"]
    (folder / TABLE).unlink()
    write_marker(folder, marker)
    return marker


def test_a_store_without_a_table_is_read_from_its_index(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, text = Store(folder), (folder / MARKER).read_bytes()
    without_table(folder)
    monkeypatch.setattr(store_module, "MANY", 10)
    store = pickle.loads(pickle.dumps(Store(folder)))
    assert caplog.text.count("'dist-train finalize' writes the table") == 1
    assert store.table.frame().equals(whole.table.frame())
    assert store.content == whole.content
    np.testing.assert_array_equal(store.read(4), whole.read(4))
    assert verify(folder, workers=1) == []
    finalize(folder)
    assert (folder / MARKER).read_bytes() == text


def test_index_of_another_store(folder: Path) -> None:
    write_marker(folder, read_marker(folder) | {"clips": 11})
    with pytest.raises(StoreError, match="the clip table is another store's"):
        Store(folder)
    write_marker(folder, without_table(folder))
    with pytest.raises(StoreError, match=r"not that of the store \(it holds 10 clips, not 11\)"):
        Store(folder)


def test_a_marker_of_an_older_version(folder: Path) -> None:
    """It has neither the content nor a checksum of its own."""
    marker = without_table(folder)
    content = marker.pop("content")
    (folder / MARKER).write_text(json.dumps(marker, indent=2, sort_keys=True))
    store = Store(folder)
    assert store.content == content
    assert verify(folder, workers=1) == []


ODD = {
    "clips": [True, 10.0, "10", None, -1],
    "index_crc32c": [None, "1", -1, 1 << 32],
    "fingerprint": ["", 7, "g" * 64],
    "rejected": [[], {"-2": 1}, {"0": -1}, {"0": "1"}],
    "settings": [None, []],
    "content": ["", 0, "A" * 64],
}


def test_markers_of_another_form_are_refused(folder: Path) -> None:
    """Sealed, as another program might have written them."""
    marker = read_marker(folder)
    for name, values in ODD.items():
        for value in values:
            write_marker(folder, marker | {name: value})
            with pytest.raises(StoreError, match=rf"store.json: is not the marker.*'{name}"):
                Store(folder)


def test_a_marker_that_was_edited_is_refused(folder: Path) -> None:
    text = (folder / MARKER).read_text()
    for name in ("fingerprint", "content"):
        value = read_marker(folder)[name]
        (folder / MARKER).write_text(text.replace(value, value[::-1]))
        with pytest.raises(StoreError, match=r"checksum is wrong\)\. Run 'dist-train finalize'"):
            Store(folder)
        assert finalize(folder)[name] == value
        assert (folder / MARKER).read_text() == text


# Of an index that another program wrote, with the checksum in the marker.
RECORDS = {
    "label": [2, -2, True, None, "1", 0.5],
    "shape": [[1, 2], [0, 1, 1], [1.5, 1, 1], "abc", None, [1 << 70, 1, 1]],
    "shard": [4, -1, "0", 1 << 70],
    "offset": [-1, None],
    "crc32c": [-1, 1 << 32, None],
    "weight": [-1.0, "x", None],
    "tier1": [1, "true"],
    "filename": [None, 3],
    "crowd_score": ["much"],
}


def test_records_of_another_form_are_refused(folder: Path) -> None:
    marker, whole = without_table(folder), (folder / INDEX).read_bytes()
    for name, values in RECORDS.items():
        for value in values:
            (folder / INDEX).write_bytes(whole)
            with (
                lmdb.open(str(folder / INDEX), subdir=False, lock=False, map_size=1 << 20) as env,
                env.begin(write=True) as transaction,
            ):
                record = json.loads(bytes(transaction.get(b"clip003"))) | {name: value}
                transaction.put(b"clip003", json.dumps(record).encode())
            checksum = index_checksum(folder / INDEX)
            write_marker(folder, marker | {"index_crc32c": checksum})
            with pytest.raises(StoreError, match=r"index.lmdb: the index is not that of the store"):
                Store(folder)


def test_flipped_labels_of_the_index_are_not_trained_on(folder: Path) -> None:
    without_table(folder)
    path = folder / INDEX
    path.write_bytes(path.read_bytes().replace(b'"label": 1', b'"label": 0', 3))
    with pytest.raises(StoreError, match=r"the index is damaged: its checksum is wrong"):
        Store(folder)


@pytest.mark.parametrize("clip", [-1, 10**6, 1.5])
def test_a_clip_that_does_not_exist(folder: Path, clip: int) -> None:
    store = Store(folder)
    message = rf"holds no clip {clip}; they are 0 to {len(store.table) - 1}"
    with pytest.raises(StoreError, match=message):
        store.read(clip)
    with pytest.raises(StoreError, match=message):
        store.read_into(np.empty(1, np.uint8), clip)


def test_memory_that_does_not_fit_a_clip(folder: Path) -> None:
    store = Store(folder)
    pixels = store.read(0)
    for out in (np.empty(pixels.size - 1, np.uint8), pixels.astype(np.uint16), pixels.T):
        with pytest.raises(StoreError, match="clip 0 is not to be read into"):
            store.read_into(out, 0)
