"""Large stores: what one process makes and all map is the same as what each would make."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import metrics_of, tiny_config, tiny_store

from dist_train.config import CacheSettings
from dist_train.data.duplicates import find_duplicates
from dist_train.data.store.clip_cache import ClipCache
from dist_train.data.store.publish import folder_of
from dist_train.data.store.reader import Store
from dist_train.errors import RunError, StoreError
from dist_train.evaluation.predict import predict
from dist_train.places import CACHE, user_cache
from dist_train.run import data as data_module
from dist_train.run import seen_before
from dist_train.run import splits as splits_module
from dist_train.run.data import check_same_data, open_data, write_splits
from dist_train.run.record import _write_record, read_record
from dist_train.run.seen_before import held_out_seen
from dist_train.run.shared_arrays import KEPT, shared_arrays
from dist_train.run.splits import splits_record
from dist_train.training.train import train


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("large") / "S")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every store counts as a large one."""
    monkeypatch.setattr(data_module, "SHARED", 1)
    monkeypatch.setattr(splits_module, "LARGE", 1)
    return folder


@pytest.mark.parametrize(
    "setting", ["plan.order=random", "plan.balance_groups=true", "plan.ratio=natural", "seed=3"]
)
def test_splits_and_order_are_the_same(
    store: Path, folder: Path, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(store, folder / "run", setting)
    small = open_data(config, training=True)
    monkeypatch.setattr(data_module, "SHARED", 1)
    files: set[Path] = set()
    for _ in range(2):
        data = open_data(config, training=True)
        np.testing.assert_array_equal(data.splits, small.splits)
        plan, own = data.plan(), small.plan()
        assert plan.fingerprint == own.fingerprint
        np.testing.assert_array_equal(plan.global_batch(7), own.global_batch(7))
        assert not files or files == set(folder.glob("*.safetensors"))
        files = set(folder.glob("*.safetensors"))
        assert len(files) == 3


@pytest.mark.slow
def test_a_run_of_a_large_store(store: Path, large: Path, tmp_path: Path) -> None:
    """It trains, resumes and predicts as one of a small store, by its own file of splits."""
    short = ("train.epochs=2", "snapshots.at=[2]", "optim.lr=1e-3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_module, "SHARED", 2**22)
        patch.setattr(splits_module, "LARGE", 2**22)
        train(tiny_config(store, tmp_path / "small", *short))
        predict(tmp_path / "small")
    config = tiny_config(store, tmp_path / "run", *short)
    train(config)
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "small")
    assert not (tmp_path / "run" / "splits.csv").exists()
    codes = np.load(tmp_path / "run" / "splits.npy")
    named = pd.read_csv(tmp_path / "small" / "splits.csv", keep_default_na=False)["split"]
    assert np.array(["", "train", "val", "test"])[codes].tolist() == named.tolist()
    predict(tmp_path / "run")
    for name in ("predictions.csv", "submission.csv"):
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "small" / name).read_text()
    train(config.model_copy(update={"train": config.train.model_copy(update={"epochs": 3})}),
          resume="auto")  # fmt: skip

    path = tmp_path / "run" / "splits.npy"
    whole, record = path.read_bytes(), read_record(tmp_path / "run")
    # val and test change places.
    np.save(path, np.array([0, 1, 3, 2], codes.dtype)[codes])
    _write_record(
        tmp_path / "run", record | {"splits": splits_record("splits.npy", path.read_bytes())}
    )
    with pytest.raises(RunError, match="these settings give other splits"):
        train(tiny_config(store, tmp_path / "run", *short, "train.epochs=4"), resume="auto")
    path.write_bytes(whole)
    _write_record(tmp_path / "run", record)
    swapped = tiny_store(tmp_path / "other", seed=9)
    with pytest.raises(StoreError, match=r"not what the run was trained on \(60 clips then, 60"):
        train(tiny_config(swapped, tmp_path / "run", *short), resume="auto")
    (tmp_path / "run" / "splits.npy").write_bytes(b"edited")
    with pytest.raises(RunError, match=r"splits\.npy: the run's table of splits cannot be used"):
        predict(tmp_path / "run")


def test_copies_are_not_kept_if_a_clip_cannot_be_read(
    store: Path, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_duplicates(Store(store))
    given = found._replace(unread=True)
    monkeypatch.setattr(data_module, "find_duplicates", lambda _: given)
    config = tiny_config(store, tmp_path / "run", "split.duplicates=together")
    open_data(config, training=True)
    assert not list(large.glob("*.safetensors"))
    given = found
    open_data(config, training=True)
    assert len(list(large.glob("*.safetensors"))) == 2


def test_another_version_of_the_code_makes_its_own_splits(
    store: Path, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(store, tmp_path / "run")
    open_data(config, training=True)
    monkeypatch.setattr(data_module, "SPLITS_VERSION", 0)
    monkeypatch.setattr(data_module, "COPIES_VERSION", 0)
    open_data(config, training=True)
    assert len(list(large.glob("*.safetensors"))) == 4


def test_a_large_run_names_its_own_table_of_splits(
    store: Path, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data(tiny_config(store, tmp_path / "run"))
    (tmp_path / "run").mkdir()
    record = write_splits(tmp_path / "run", data) | {"checkpointed": True}
    monkeypatch.setattr(data_module, "read_record", lambda _: record)
    check_same_data(tmp_path / "run", data)
    record["splits"]["crc32c"] ^= 1
    with pytest.raises(RunError, match=r"splits\.npy: these settings give other splits"):
        check_same_data(tmp_path / "run", data)


def test_clips_of_another_large_store_are_not_compared_by_position(
    store: Path, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data(tiny_config(store, tmp_path / "run"))
    (tmp_path / "run").mkdir()
    record = write_splits(tmp_path / "run", data)
    monkeypatch.setattr(seen_before, "read_record", lambda _: record)
    assert held_out_seen(data, tmp_path / "run") == 0
    record["store"]["content"] = "0" * 64
    assert held_out_seen(data, tmp_path / "run") is None


def arrays() -> dict[str, np.ndarray]:
    return {"a": np.arange(10), "b": np.zeros(3, np.uint8)}


def never() -> dict[str, np.ndarray]:
    pytest.fail("it is made already")


def test_one_of_many_makes_them(folder: Path) -> None:
    """Threads here: each opens the lock for itself, as processes do."""
    makes = []

    def made(_: int) -> list[int]:
        return list(shared_arrays("x", 1, lambda: makes.append(1) or arrays())["a"])

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(made, range(4))) == [list(range(10))] * 4
    assert makes == [1]


def test_another_key_is_another_file(folder: Path) -> None:
    shared_arrays("x", 1, arrays)
    other = shared_arrays("x", 2, lambda: {"a": np.ones(1)})
    assert len(other["a"]) == 1
    assert len(shared_arrays("x", 1, never)["a"]) == 10


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [damage, lambda path: path.write_bytes(b""), Path.unlink])
def test_a_damaged_file_is_made_again(folder: Path, harm: Callable[[Path], Any]) -> None:
    shared_arrays("x", 1, arrays)
    (path,) = folder.glob("*.safetensors")
    harm(path)
    np.testing.assert_array_equal(shared_arrays("x", 1, arrays)["b"], np.zeros(3))
    assert len(shared_arrays("x", 1, never)["a"]) == 10


def test_only_the_files_used_last_are_kept(folder: Path) -> None:
    shared_arrays("x", 0, arrays)
    left = folder / f"x-0.safetensors.{'0' * 16}.partial"
    left.touch()
    (folder / "notes.txt").touch()
    for key in range(1, KEPT + 3):
        shared_arrays("x", key, arrays)
        shared_arrays("x", 0, never)
    assert len(list(folder.glob("*.safetensors"))) == KEPT
    assert not left.exists()
    assert (folder / "notes.txt").exists()


def test_without_a_place_each_process_makes_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE, str(tmp_path / "file" / "cache"))
    assert len(shared_arrays("x", 1, arrays)["a"]) == 10
    assert "large arrays are not shared" in caplog.text


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_the_default_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "dist_train"
    assert folder_of("s3://b/s").parent == tmp_path / "dist_train" / "written"
    assert ClipCache(CacheSettings()).folder == tmp_path / "dist_train" / "stores"
    # A user without a home.
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert user_cache() == tmp_path / "dist_train"
    monkeypatch.setenv(CACHE, str(tmp_path / "own"))
    assert folder_of("s3://b/s").parent == tmp_path / "own" / "written"
