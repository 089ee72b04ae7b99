"""Stores of several channels, and of 16-bit pixels."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import webdataset
from array_store import array_store
from helpers import contents, said

from dist_train.data.store.build import finalize, prepare_arrays, prepare_npz
from dist_train.data.store.reader import INDEX, MARKER, SHARDS, Store
from dist_train.data.store.repair import repair
from dist_train.data.store.shards import read_records, write_shard
from dist_train.data.store.verify import verify
from dist_train.data.table.manifest import read_manifest
from dist_train.errors import ConfigError, StoreError

RGB = ("red", "green", "blue")
FORMS = [("uint8", RGB), ("uint16", ("grey",)), ("uint16", ("dapi", "gfp")), ("float16", RGB)]


def clip_of(dtype: str, channels: int, number: int) -> np.ndarray:
    shape = (2 + number, 5, 7) + ((channels,) if channels > 1 else ())
    values = np.random.default_rng(number).random(shape, np.float32)
    return (values * (1 if dtype == "float16" else np.iinfo(dtype).max)).astype(dtype)


def clips_of(dtype: str, channels: tuple[str, ...], count: int = 4) -> list[np.ndarray]:
    return [clip_of(dtype, len(channels), number) for number in range(count)]


def made(folder: Path, dtype: str, channels: tuple[str, ...]) -> Path:
    clips = [(clip, {"label": i % 2}) for i, clip in enumerate(clips_of(dtype, channels))]
    return array_store(folder / "store", clips, channels, {"spacing": [2.0, 0.5, 0.5]})


# webdataset 1.0 leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("dtype", "channels"), FORMS)
def test_clips_come_back(tmp_path: Path, dtype: str, channels: tuple[str, ...]) -> None:
    folder, clips = made(tmp_path, dtype, channels), clips_of(dtype, channels)
    for store in (Store(folder), pickle.loads(pickle.dumps(Store(folder)))):
        assert (store.channels, store.dtype) == (channels, np.dtype(dtype))
        for number, clip in enumerate(clips):
            read = store.read(number)
            assert read.dtype == clip.dtype
            np.testing.assert_array_equal(read, clip)
            flat = np.empty(clip.size, dtype)
            store.read_into(flat, number)
            np.testing.assert_array_equal(flat.reshape(clip.shape), clip)
        spacing = [store.table.sampling(f"spacing.{axis}").tolist() for axis in "zyx"]
        assert spacing == [[2.0] * 4, [0.5] * 4, [0.5] * 4]
        assert np.isnan(store.table.sampling("interval")).all()
    with pytest.raises(StoreError, match="is not to be read into uint8"):
        store.read_into(np.empty(clips[0].shape, np.float32).view(np.uint8), 0)
    path = folder / SHARDS / "shard-000000.tar"
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    for sample, clip in zip(samples, clips, strict=True):
        np.testing.assert_array_equal(sample["npy"], clip)
    assert f"{', '.join(channels)} ({dtype})" in said("info", folder)


@pytest.mark.parametrize(("dtype", "channels"), FORMS)
def test_it_is_verified_salvaged_and_rebuilt(
    tmp_path: Path, dtype: str, channels: tuple[str, ...]
) -> None:
    folder = made(tmp_path, dtype, channels)
    before = contents(folder)
    assert verify(folder, workers=1) == []
    (folder / INDEX).unlink()
    (folder / MARKER).unlink()
    finalize(folder)
    assert contents(folder) == before
    # The last byte of a clip: what would be beyond it if a value were one byte.
    path = folder / SHARDS / "shard-000000.tar"
    records = dict(read_records(path))
    record = records["0001"]
    data = bytearray(path.read_bytes())
    data[record["offset"] + record["length"] - 1] ^= 1
    path.write_bytes(data)
    faults = verify(folder, workers=1)
    assert [fault.what for fault in faults] == ["clip '0001' is missing or damaged"]
    repair(folder, None, faults, salvage=True, workers=1)
    store = Store(folder)
    assert store.table["key"].tolist() == ["0000", "0002", "0003"]
    np.testing.assert_array_equal(store.read(2), clip_of(dtype, len(channels), 3))
    assert verify(folder, workers=1) == []


def test_grey_8_bits_are_named_nowhere(tmp_path: Path) -> None:
    """So stores and their fingerprints are those of earlier versions."""
    folder = made(tmp_path, "uint8", ("grey",))
    marker = json.loads((folder / MARKER).read_text())
    assert not {"channels", "dtype"} & (marker.keys() | marker["settings"].keys())
    assert not {"store_dtype", "channel_names"} & marker["settings"].keys()
    (_, record), *_ = read_records(folder / SHARDS / "shard-000000.tar")
    assert "dtype" not in record


def test_a_shard_of_unlike_clips_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for other in (clip_of("uint16", 1, 0), clip_of("uint8", 3, 0)):
        with pytest.raises(StoreError, match=r"clip 'b' is .* the store uint8 of 1 channel"):
            write_shard(path, [("a", clip_of("uint8", 1, 0), {}), ("b", other, {})])
        assert not path.exists()
    one, two = tmp_path / "one.tar", tmp_path / "two.tar"
    write_shard(one, [("a", clip_of("uint8", 1, 0), {})])
    write_shard(two, [("b", clip_of("uint16", 1, 0), {})])
    end = one.read_bytes().rstrip(b"\0")
    path.write_bytes(end + bytes(-len(end) % 512) + two.read_bytes())
    with pytest.raises(StoreError, match="clip 'b' is uint16 of 1 channel, the store uint8"):
        list(read_records(path))


@pytest.mark.parametrize(
    ("clip", "told"),
    [
        (clip_of("uint16", 3, 0), r"has shape \[2, 5, 7, 3\], and the store 2 channels \(a, b\)"),
        (clip_of("uint16", 1, 0), r"has shape \[2, 5, 7\], and the store 2 channels"),
        (clip_of("uint8", 2, 0), "is uint8, and the store uint16"),
    ],
)
def test_a_clip_of_another_form_is_rejected(tmp_path: Path, clip: np.ndarray, told: str) -> None:
    good = clip_of("uint16", 2, 1)
    with pytest.raises(StoreError, match=rf"1 of 2 clips were rejected .*{told}"):
        array_store(tmp_path / "s", [(good, {"label": 1}), (clip, {"label": 0})], ("a", "b"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 1.5])
def test_fractions_are_from_0_to_1(tmp_path: Path, value: float) -> None:
    bad = np.full((2, 3, 3), value, np.float16)
    good = np.zeros((2, 3, 3), np.float16)
    with pytest.raises(StoreError, match="has values that are not from 0 to 1"):
        array_store(tmp_path / "s", [(good, {"label": 1}), (bad, {"label": 0})])


def test_names_of_channels_are_names(tmp_path: Path) -> None:
    clip = clip_of("uint8", 2, 0)
    for names in ((), ("a", "a"), ("a", " ")):
        with pytest.raises(ConfigError, match="Give each a name of its own"):
            array_store(tmp_path / "s", [(clip, {"label": 1})], names)


def test_as_many_arrays_as_rows_of_a_known_dtype(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("filename,label\na,1\nb,0\n")
    manifest = read_manifest(tmp_path / "t.csv")
    with pytest.raises(StoreError, match="1 clips for 2 rows"):
        prepare_arrays(manifest, [clip_of("uint8", 1, 0)], tmp_path / "s")
    with pytest.raises(StoreError, match="clips are float64"):
        prepare_arrays(manifest, [np.zeros((2, 3, 3))] * 2, tmp_path / "s")


def test_other_arrays_are_another_store(tmp_path: Path) -> None:
    folder = made(tmp_path, "uint8", RGB)
    clips = [(clip + np.uint8(1), {"label": 0}) for clip in clips_of("uint8", RGB)]
    with pytest.raises(StoreError, match="arrays"):
        array_store(folder, clips, RGB)


def test_an_npz_keeps_its_colours(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = random.integers(0, 256, (3, 4, 5, 6, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.array([[0], [1], [0]], np.uint8)
    np.savez(tmp_path / "colour.npz", **arrays)
    prepare_npz(tmp_path / "colour.npz", tmp_path / "store", channels=RGB)
    store = Store(tmp_path / "store")
    clip = store.read(store.clip_of("val_00001"))
    np.testing.assert_array_equal(clip, arrays["val_images"][1])
    prepare_npz(tmp_path / "colour.npz", tmp_path / "grey")
    assert Store(tmp_path / "grey").channels == ("grey",)
    faults = verify(tmp_path / "store", workers=1)
    assert faults == []
