"""Arrays in a mapped file: round trips, other readers, and damage."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from dist_train.array_file import DTYPES, ArrayFile, Spool, write_arrays
from dist_train.errors import FileError

ARRAYS = {
    "words": np.arange(5, dtype=np.int64),
    "none": np.empty(0, np.float64),
    "bytes": np.arange(7, dtype=np.uint8),
    "flags": np.array([True, False]),
}


def written(path: Path, arrays: dict[str, np.ndarray]) -> int:
    with path.open("wb") as file:
        return write_arrays(file, arrays)


@given(st.dictionaries(st.text(max_size=9), st.tuples(st.sampled_from(list(DTYPES)), st.binary())))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, given: dict) -> None:
    path = tmp_path_factory.mktemp("arrays") / "a.safetensors"
    arrays = {}
    for name, (kind, content) in given.items():
        dtype = DTYPES[kind]
        content = content[: len(content) // dtype.itemsize * dtype.itemsize]
        values = np.frombuffer(content, dtype if kind != "BOOL" else np.uint8)
        arrays[name] = values > 7 if kind == "BOOL" else values
    arrays.pop("__metadata__", None)
    checksum = written(path, arrays)
    for source in (path, path.read_bytes()):
        read = pickle.loads(pickle.dumps(ArrayFile(source, checksum)))
        assert set(read) == set(arrays)
        for name, array in arrays.items():
            assert read[name].dtype == array.dtype
            assert read[name].tobytes() == array.tobytes()
            assert not read[name].flags.writeable


def test_other_programs_read_it(tmp_path: Path) -> None:
    written(tmp_path / "a.safetensors", ARRAYS)
    for name, array in load_file(tmp_path / "a.safetensors").items():
        np.testing.assert_array_equal(array, ARRAYS[name])


def test_it_is_pickled_as_its_path(tmp_path: Path) -> None:
    checksum = written(tmp_path / "a", {"much": np.zeros(10**6)})
    assert len(pickle.dumps(ArrayFile(tmp_path / "a", checksum))) < 500


def test_a_spool_gives_what_was_appended(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        spool = Spool(folder, np.dtype(np.int32))
        for first in range(0, 300_000, 100_000):
            spool.append(np.arange(first, first + 100_000))
        assert len(spool) == 300_000
        np.testing.assert_array_equal(np.concatenate(list(spool.pieces())), np.arange(300_000))
        spool.close()


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    """In the header when the file is opened, in an array when it is used."""
    path = tmp_path / "a"
    checksum = written(path, ARRAYS)
    content = path.read_bytes()
    header = len(content) - sum(array.nbytes for array in ARRAYS.values())
    for at in range(len(content)):
        damaged = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
        path.write_bytes(damaged)
        if at < header:
            with pytest.raises(FileError, match=r"is damaged"):
                ArrayFile(path, checksum)
        else:
            with pytest.raises(FileError, match=r"is damaged \(the checksum of '"):
                ArrayFile(path, checksum).check()


def test_every_cut_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a"
    checksum = written(path, ARRAYS)
    content = path.read_bytes()
    for cut in (*(content[:n] for n in range(len(content))), content + b"\0"):
        path.write_bytes(cut)
        for known in (checksum, None):
            with pytest.raises(FileError, match=r"is damaged"):
                ArrayFile(path, known)


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_refused(content: bytes, has_length: bool) -> None:
    if has_length:
        content = len(content).to_bytes(8, "little") + content
    with pytest.raises(FileError, match=r"is damaged"):
        ArrayFile(content)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"nowhere: cannot be read \(No such file"):
        ArrayFile(tmp_path / "nowhere")
    with pytest.raises(FileError, match="is a folder"):
        ArrayFile(tmp_path)
