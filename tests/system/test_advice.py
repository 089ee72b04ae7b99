"""Faults of the machine are reported as such, never as damage of a file."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_config, tiny_npz, tiny_store
from make_media import write_manifest
from room import files_all_open

from dist_train.checkpoint.format import latest_valid
from dist_train.data.store import shard_bytes
from dist_train.data.store.build import PrepareSettings, prepare, prepare_npz
from dist_train.data.store.build_spec import read_job
from dist_train.data.store.index import read_index
from dist_train.data.store.reader import Store
from dist_train.data.store.shards import read_records, shard_name
from dist_train.data.store.verify import verify
from dist_train.errors import DecodeError, MachineError
from dist_train.evaluation.predict import predict
from dist_train.system.advice import (
    ADVICE,
    advice,
    blame_machine,
    first_line,
    lack_of_memory,
    open_files,
)
from dist_train.training.train import train

TOO_MANY = r"Too many open files.*Raise the limit of open files"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 60 shards. Tests must not change it."""
    folder = tmp_path_factory.mktemp("advice")
    prepare_npz(tiny_npz(folder / "store.npz"), folder / "store", shard_clips=1)
    return folder / "store"


@pytest.mark.parametrize("number", ADVICE, ids=errno.errorcode.__getitem__)
def test_each_error_of_the_machine_has_its_advice(number: int) -> None:
    error = OSError(number, os.strerror(number))
    with pytest.raises(MachineError) as caught:
        blame_machine(error, "a/file")
    assert str(caught.value) == f"a/file: cannot be read ({error.strerror}). {ADVICE[number]}"
    blame_machine(error, "a/file", but={number})


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), ValueError(), OSError("odd")])
def test_other_errors_may_be_the_files(error: Exception) -> None:
    assert advice(error) is None
    blame_machine(error, "a/file")


def test_the_first_line() -> None:
    assert first_line(RuntimeError("CUDA error: out of memory.\nMore.")) == (
        "CUDA error: out of memory"
    )


def test_lack_of_memory_is_told_as_torch_and_numpy_word_it() -> None:
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(2**50, dtype=torch.uint8)
    assert (lack_of_memory(of_torch.value) or "").startswith(
        "memory ran out (DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        f"{2**50} bytes"
    )
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(2**50, dtype=np.uint8)
    assert "1.00 PiB" in (lack_of_memory(of_numpy.value) or "")
    assert lack_of_memory(RuntimeError("a bug")) is None


READERS: list[Callable[[Path], object]] = [
    lambda store: Store(store),
    lambda store: list(read_index(store / "index.lmdb")),
    lambda store: list(read_records(store / "shards" / shard_name(3))),
    read_job,
    lambda store: verify(store, workers=1),
]


@pytest.mark.parametrize("reader", READERS, ids=["store", "index", "shard", "job", "verify"])
def test_too_many_open_files_are_no_damage(store: Path, reader: Callable[[Path], object]) -> None:
    with files_all_open(), pytest.raises(MachineError, match=TOO_MANY):
        reader(store)


def test_a_clip_is_read_with_the_last_descriptor(store: Path) -> None:
    """The store closes one of its shards rather than fail."""
    opened = Store(store)
    first = [opened.read(clip) for clip in range(4)]
    with files_all_open():
        for clip in range(10):
            opened.read(clip)
        np.testing.assert_array_equal(opened.read(0), first[0])
    other = Store(store)
    with files_all_open(), pytest.raises(MachineError, match=TOO_MANY):
        other.read(0)
    np.testing.assert_array_equal(other.read(0), first[0])


def test_open_shards_follow_the_limit(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_files() == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    monkeypatch.setattr(shard_bytes, "open_files", lambda: 80)
    opened = Store(store)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for clip in range(60):
        opened.read(clip)
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 20


def test_a_disk_that_fails_is_no_damage(store: Path, tmp_path: Path) -> None:
    """A file whose first byte cannot be read: the kernel returns EIO."""
    shutil.copytree(store, tmp_path / "store")
    opened = Store(tmp_path / "store")
    shard = tmp_path / "store" / "shards" / shard_name(int(opened.table["shard"][7]))
    shard.unlink()
    shard.symlink_to("/proc/self/mem")
    with pytest.raises(MachineError, match=rf"{shard.name}.*Input/output error\)\. The disk"):
        opened.read(7)


def test_too_many_open_files_reject_no_raw_file(tmp_path: Path) -> None:
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.full((4, 8, 8), number, np.uint8))
    manifest = write_manifest(tmp_path / "clips.csv", ["0.npy", "1.npy", "2.npy"], [0, 1, 0])
    settings = PrepareSettings(roi="none")
    # One is the shard's.
    (tmp_path / "out").mkdir()
    with files_all_open(spare=1), pytest.raises((MachineError, OSError)) as caught:
        prepare(manifest, tmp_path, tmp_path / "out", settings, workers=1, max_rejected=1.0)
    assert not isinstance(caught.value, DecodeError)
    assert prepare(manifest, tmp_path, tmp_path / "out", settings, workers=1)["clips"] == 3


def test_too_many_open_files_pass_over_no_checkpoint_and_no_snapshot(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(tiny_store(tmp_path / "store"), run, "train.epochs=1", "snapshots.at=[1]"))
    newest = latest_valid(run / "checkpoints")
    with files_all_open(), pytest.raises(OSError, match="Too many open files"):
        # Folders cannot be listed either.
        latest_valid(run / "checkpoints")
    with files_all_open(spare=1), pytest.raises(MachineError, match=TOO_MANY):
        predict(run)
    assert latest_valid(run / "checkpoints") == newest
