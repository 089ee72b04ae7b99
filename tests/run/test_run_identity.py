"""A run is judged on the clips and the splits that it was trained with, or not at all."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import said, tiny_config, tiny_npz, tiny_store
from tables import table_of

from dist_train.data.splits import CODES
from dist_train.data.store.build import prepare_npz
from dist_train.errors import CheckpointError, DistTrainError, RunError, StoreError
from dist_train.evaluation.predict import predict
from dist_train.run.data import RunData, open_data, open_run_data
from dist_train.run.record import _write_record, open_run, read_record
from dist_train.run.seen_before import held_out_seen, held_out_seen_by_init
from dist_train.run.splits import SPLITS, splits_record
from dist_train.training.train import train

SHORT = ("train.epochs=1", "snapshots.at=[1]", "optim.lr=1e-3")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store ``S`` and a run ``run`` that was trained there by the relative path of
    the store; not to be changed."""
    home = tmp_path_factory.mktemp("home")
    tiny_store(home / "S")
    with pytest.MonkeyPatch.context() as here:
        here.chdir(home)
        train(tiny_config(Path("S"), Path("run"), *SHORT))
        predict(Path("run"))
    return home


@pytest.fixture
def copy(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run that a test may change; the test is in another folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(home / "run", tmp_path / "run"))


def grown_store(folder: Path, *, swap: int | None = None) -> Path:
    """The store with 10 more clips for training, 2 test clips less, the label of the first val clip
    swapped, and other pixels in three train clips."""
    path = tiny_npz(folder.with_name("S.npz"))
    arrays = dict(np.load(path))
    for name in ("train_images", "train_labels"):
        arrays[name] = np.concatenate([arrays[name], arrays[name][:10]])
    for name in ("test_images", "test_labels"):
        arrays[name] = arrays[name][:-2]
    arrays["val_labels"][0] ^= 1
    arrays["train_images"][[0, 5, 7], 0, 0, 0] ^= 1
    np.savez(path, **arrays)
    prepare_npz(path, folder)
    return folder


CHANGED = (
    "this is not what the run was trained on "
    "(60 clips then, 68 now; 10 new, 2 gone, 1 with another label, 3 with other pixels)"
)


def forge(run: Path, **more: object) -> None:
    """Change ``run.json`` as someone who knows of its checksum."""
    _write_record(run, read_record(run) | more)


def splits_of(data: RunData) -> dict[str, str]:
    return dict(zip(data.clips["key"], data.clips["split"], strict=True))


def test_the_run_keeps_which_store_it_had_and_its_splits(home: Path) -> None:
    record = read_record(home / "run")
    data = open_data(tiny_config(home / "S", home / "run", *SHORT))
    assert record["store"] == {
        "path": str(home / "S"),
        "configured": "S",
        "fingerprint": data.store.fingerprint,
        "black_and_white": {},
        "content": data.store.content,
        "clips": 60,
    }
    table = pd.read_csv(home / "run" / SPLITS)
    assert dict(zip(table["key"], table["split"], strict=True)) == splits_of(data)
    assert table["label"].tolist() == data.store.table["label"].tolist()


def test_the_store_of_the_run_is_judged_from_whatever_folder(copy: Path, home: Path) -> None:
    """A folder of the same relative name holds another store."""
    tiny_store(copy.with_name("S"), seed=9)
    before = (copy / "predictions.csv").read_bytes()
    (copy / "predictions.csv").unlink()
    said("predict", copy)
    assert (copy / "predictions.csv").read_bytes() == before
    said("evaluate", copy)
    said("report", copy)


def test_a_store_that_was_changed_is_refused_with_what_changed(copy: Path, tmp_path: Path) -> None:
    store = grown_store(tmp_path / "S")
    for act in (
        lambda: open_run_data(copy, open_run(copy), store_path=store),
        lambda: train(tiny_config(store, copy, *SHORT), resume="auto"),
    ):
        with pytest.raises(StoreError) as caught:
            act()
        assert CHANGED in str(caught.value)


def test_held_out_clips_that_were_trained_on_before_are_told(
    copy: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After a resume with another split, and in a run that begins with another run's weights."""
    path = tiny_npz(copy.with_name("S.npz"))
    arrays = dict(np.load(path))
    arrays["val_images"][:7] = arrays["train_images"][:7]
    arrays["train_images"] = arrays["train_images"][7:]
    arrays["train_labels"] = arrays["train_labels"][7:]
    np.savez(path, **arrays)
    prepare_npz(path, copy.with_name("S"))
    store, short = copy.with_name("S"), SHORT[1:]
    more = ("train.epochs=2", "checkpoint.accept_other_order=true", "plan.batch=4")
    told = "7 of 20 held-out clips have the name or the pixels of clips that these weights were"
    begun = tiny_config(store, Path("begun"), *SHORT, f"model.init={home / 'run'}")
    resumed = tiny_config(store, copy, *short, *more)
    for config in (begun, resumed):
        caplog.clear()
        train(config, resume="auto")
        assert told in caplog.text
        assert read_record(config.out)["held_out_seen"] == 7
    # A later session does not forget it.
    train(tiny_config(store, copy, *short, *more, "train.epochs=3"), resume="auto")
    assert read_record(copy)["held_out_seen"] == 7
    for command in ("predict", "evaluate", "report"):
        caplog.clear()
        said(command, copy)
        assert "its weights were trained on 7 of the clips that it holds out" in caplog.text
    assert "trained on 7 of the held-out clips" in (copy / "report.html").read_text()


def test_the_same_split_holds_out_nothing_that_was_trained_on(
    copy: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(home / "S", Path("begun"), *SHORT, f"model.init={copy}")
    train(config)
    assert read_record(Path("begun"))["held_out_seen"] == 0
    assert "held-out" not in caplog.text
    # By the name alone, as of clips that were cropped otherwise.
    data = open_data(config)
    frame = data.store.table.frame()
    data.store.table = table_of(frame.assign(crc32c=np.arange(len(frame)), shard=0))
    splits = np.where(data.splits == CODES["train"], CODES["val"], data.splits)
    assert held_out_seen(replace(data, splits=splits), copy) == 40
    shutil.copytree(copy / "snapshots", Path("lone") / "snapshots")
    assert held_out_seen_by_init(data, Path("lone") / "snapshots" / "step-6.safetensors") is None
    assert "does not say which clips it was trained on" in caplog.text


def test_a_store_that_was_moved_is_found_by_its_new_path(copy: Path, home: Path) -> None:
    moved = shutil.copytree(home / "S", copy.with_name("moved"))
    record = read_record(copy)
    before = (copy / "predictions.csv").read_bytes()
    forge(copy, store=record["store"] | {"path": "/nowhere/S"})
    with pytest.raises(StoreError, match=r"/nowhere/S: the store .* is not there.*--store-path"):
        predict(copy)
    assert (copy / "predictions.csv").read_bytes() == before
    (copy / "predictions.csv").unlink()
    said("predict", copy, "--store-path", moved)
    assert (copy / "predictions.csv").read_bytes() == before
    said("evaluate", copy)
    said("report", copy, "--store-path", moved)


def test_a_table_of_splits_that_was_edited_is_refused(copy: Path) -> None:
    path = copy / SPLITS
    path.write_text(path.read_text().replace(",test,", ",train,", 1))
    with pytest.raises(RunError, match=r"splits\.csv: the run's table of splits cannot be used"):
        open_run_data(copy, open_run(copy))


def test_a_table_of_splits_that_is_gone_is_made_again_if_that_is_proven(
    copy: Path, home: Path
) -> None:
    before = splits_of(open_run_data(copy, open_run(copy)))
    (copy / SPLITS).unlink()
    assert splits_of(open_run_data(copy, open_run(copy))) == before
    forge(copy, splits={"crc32c": 1})
    with pytest.raises(RunError, match="is missing, and cannot be made again"):
        open_run_data(copy, open_run(copy))


def test_resuming_writes_a_lost_table_of_splits_anew(copy: Path, home: Path) -> None:
    before = (copy / SPLITS).read_bytes()
    (copy / SPLITS).unlink()
    train(
        tiny_config(home / "S", copy, *SHORT, "train.epochs=2", "snapshots.at=[2]"), resume="auto"
    )
    assert (copy / SPLITS).read_bytes() == before


def test_a_run_is_not_gone_on_with_on_other_pixels(copy: Path, tmp_path: Path) -> None:
    """The fingerprint is of names and settings, and is the same."""
    (tmp_path / "other").mkdir()
    other = tiny_store(tmp_path / "other" / "S", seed=9)
    config = tiny_config(other, copy, *SHORT, "train.epochs=2", "snapshots.at=[2]")
    with pytest.raises(StoreError, match="with other pixels"):
        train(config, resume="auto")
    (copy / "run.json").unlink()
    with pytest.raises(CheckpointError, match="trained with another store"):
        train(config, resume="auto")
    accepted = config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update={"accept_other_order": True})}
    )
    train(accepted, resume="auto")
    assert read_record(copy)["store"]["path"] == str(other)


def test_other_held_out_clips_are_refused_where_training_is_the_same(
    home: Path, copy: Path
) -> None:
    """Val and test change places: the plan of training does not tell."""
    record = read_record(copy)
    text = (copy / SPLITS).read_text()
    swapped = text.replace(",val,", ",?,").replace(",test,", ",val,").replace(",?,", ",test,")
    (copy / SPLITS).write_text(swapped)
    forge(copy, splits=splits_record(SPLITS, swapped.encode()))
    assert record["splits"] != read_record(copy)["splits"]
    config = tiny_config(home / "S", copy, *SHORT, "train.epochs=2", "snapshots.at=[2]")
    with pytest.raises(DistTrainError, match="give other splits than the run was trained with"):
        train(config, resume="auto")
