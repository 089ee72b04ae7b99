"""Links and devices that stand at the names that are written: what they lead to stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import contents, ended, overrides, refused, tiny_npz, tiny_store
from make_media import drifting, outlined_frames, write_video, write_volumes
from thread_group import ALONE

from dist_train.checkpoint.retention import RetentionPolicy
from dist_train.checkpoint.writer import CheckpointWriter
from dist_train.data.raw.outline import Box
from dist_train.data.synthetic.render import synthesize
from dist_train.errors import CheckpointError, FileError, StoreError
from dist_train.training.metrics_log import EventWriter


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A file of somebody else's."""
    path = tmp_path / "elsewhere" / "thesis.txt"
    path.parent.mkdir()
    path.write_text("ten years")
    return path


def test_the_lock_of_a_run(tmp_path: Path, target: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / ".lock").symlink_to(target)
    line = refused("train", *overrides(tiny_store(tmp_path / "store"), out))
    assert f"{out / '.lock'}: is a symbolic link" in line
    assert target.read_text() == "ten years"


@pytest.mark.parametrize("name", [".lock", ".lock-1-of-2", ".lock-claim"])
def test_the_locks_of_a_store(tmp_path: Path, target: Path, name: str) -> None:
    names = write_volumes(tmp_path / "raw", 2)
    table = "".join(f"{name},{number}\n" for number, name in enumerate(names))
    (tmp_path / "clips.csv").write_text(f"filename,label\n{table}")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / name).symlink_to(target)
    part = () if name == ".lock" else ("--part", "1/2")
    line = refused(
        *("prepare", "--manifest", tmp_path / "clips.csv", "--source", tmp_path / "raw"),
        *("--out", tmp_path / "store", "--roi", "none", "--workers", 1, *part),
    )
    assert f"{tmp_path / 'store' / name}: is a symbolic link" in line
    assert target.read_text() == "ten years"


def test_files_of_a_store(tmp_path: Path, target: Path) -> None:
    """The names that a killed `prepare` would have written to, before names were random."""
    npz, store = tiny_npz(tmp_path / "tiny.npz"), tmp_path / "store"
    (store / "shards").mkdir(parents=True)
    for name in ("job.json", "manifest.csv", "index.lmdb", "store.json", "shards/shard-000000.tar"):
        (store / f"{name}.partial").symlink_to(target)
    ended("prepare-npz", npz, "--out", store)
    assert target.read_text() == "ten years"


def test_files_of_a_checkpoint(tmp_path: Path, target: Path) -> None:
    (tmp_path / "step-1.partial").mkdir()
    (tmp_path / "step-1.partial" / "rank-00000.safetensors").symlink_to(target)
    writer = CheckpointWriter(tmp_path, ALONE, keep=RetentionPolicy(9))
    writer.save(1, {"a": torch.zeros(3)}, {})
    assert writer.finish() == tmp_path / "step-1"
    assert target.read_text() == "ten years"
    # A folder that a link leads to is neither written to nor cleared.
    (tmp_path / "step-2.partial").symlink_to(target.parent)
    writer.save(2, {"a": torch.zeros(3)}, {})
    with pytest.raises(CheckpointError, match="is a link to a folder elsewhere"):
        writer.finish()
    assert contents(target.parent) == {"thesis.txt": b"ten years"}


def test_only_files_of_a_checkpoint_are_cleared_from_its_folder(tmp_path: Path) -> None:
    aside = tmp_path / "step-1.partial"
    aside.mkdir()
    for name in ("rank-00007.safetensors", "notes.txt"):
        (aside / name).write_text("mine")
    writer = CheckpointWriter(tmp_path, ALONE, keep=RetentionPolicy(9))
    writer.save(1, {"a": torch.zeros(3)}, {})
    with pytest.raises(CheckpointError, match=r"notes.txt is no file of a checkpoint"):
        writer.finish()
    assert contents(tmp_path) == {"step-1.partial/notes.txt": b"mine"}


def test_parse_metrics_a_run(tmp_path: Path, target: Path) -> None:
    target.write_text("")
    (tmp_path / "metrics.jsonl").symlink_to(target)
    with pytest.raises(FileError, match=r"metrics.jsonl: is a symbolic link"):
        EventWriter(tmp_path, {}, after=0)
    assert target.read_text() == ""


@pytest.mark.parametrize("name", ["train_labels.csv", "train_metadata.csv", "synth.json"])
def test_synth_writes_over_no_table(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("filename,label\nmine.mp4,1\n")
    before = contents(tmp_path)
    line = refused("synth", tmp_path, "--clips", 1, "--workers", 1)
    assert name in line or "with other settings" in line
    assert contents(tmp_path) == before
    assert not (tmp_path / "videos").exists()


def test_synth_leaves_its_own_table_once_it_was_edited(tmp_path: Path) -> None:
    out = tmp_path / "out"
    synthesize(out, clips=1, seed=0, stall_rate=1.0, workers=1)
    before = contents(out)
    synthesize(out, clips=1, seed=0, stall_rate=1.0, workers=1)
    assert contents(out) == before
    labels = out / "train_labels.csv"
    labels.write_text(labels.read_text().replace(",1", ",0"))
    edited = contents(out)
    with pytest.raises(StoreError, match=r"train_labels.csv: is there, and is not the table"):
        synthesize(out, clips=1, seed=0, stall_rate=1.0, workers=1)
    assert contents(out) == edited


def test_a_picture_replaces_no_device(tmp_path: Path) -> None:
    clip = write_video(tmp_path / "a.mp4", outlined_frames(drifting(Box(20, 30, 70, 84), 3)))
    png = tmp_path / "out.png"
    png.symlink_to("/dev/null")
    assert "out.png: is a device" in refused("inspect", clip, "--png", png)
    assert png.is_symlink()


def test_a_picture_does_not_replace_its_video(tmp_path: Path) -> None:
    clip = write_video(tmp_path / "a.mp4", outlined_frames(drifting(Box(20, 30, 70, 84), 3)))
    before = contents(tmp_path)
    assert "a.mp4: is the video, and would be replaced" in refused("inspect", clip, "--png", clip)
    assert contents(tmp_path) == before
