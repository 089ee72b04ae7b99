"""Bad and missing raw files: rejected with a reason, counted, and stored once they are mended."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
from helpers import contents
from make_media import outlined_frames, write_manifest, write_video, write_volumes
from stores import WHOLE, make, rejected, stamps

from dist_train.data.raw.outline import Box
from dist_train.data.raw.remote import open_source
from dist_train.data.raw.video import Video
from dist_train.data.store.build import (
    PrepareSettings,
    finalize,
    new_task,
    prepare,
    prepare_part,
)
from dist_train.data.store.build_spec import Part, read_job
from dist_train.data.store.reader import MARKER, REJECTED, SHARDS, Store
from dist_train.data.store.shard_task import write_task
from dist_train.data.store.shards import shard_name
from dist_train.data.table.manifest import read_manifest
from dist_train.errors import StoreError
from dist_train.system.supervised_pool import UNWATCHED

NOISE = np.random.default_rng(0).integers(0, 255, (10, 48, 64, 3), dtype=np.uint8)
FASTSTART = {"container_options": {"movflags": "faststart"}, "options": {"g": "1"}}


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: int(0.6 * path.stat().st_size)])
    return path


def test_every_bad_file_is_rejected_with_its_reason(tmp_path: Path, raw: Path) -> None:
    cut(write_video(raw / "cut.mp4", NOISE, **FASTSTART))
    cut(write_video(raw / "no_header.mp4", NOISE))
    (raw / "zero.npy").touch()
    for name in ("garbage.mp4", "garbage.tif", "notes.txt", "brain.nii.gz", "c.dcm"):
        (raw / name).write_bytes(b"garbage" * 99)
    (raw / "frames").mkdir()
    np.save(raw / "complex.npy", np.zeros((3, 4, 5), np.complex64))
    np.save(raw / "object.npy", np.array([[[None]]]), allow_pickle=True)
    good = write_volumes(raw, 3)
    reasons = {
        "cut.mp4": r"the video stops after \d+ of 10 declared frames.*--truncated keep",
        "no_header.mp4": "cannot be opened",
        "zero.npy": "cannot be read",
        "garbage.mp4": "cannot be opened",
        "garbage.tif": "cannot be decoded .*not a TIFF file",
        "notes.txt": r"unknown kind of file '.txt'.*Known: .*\.avi",
        "brain.nii.gz": "is no NIfTI file",
        "c.dcm": "c.dcm is no DICOM file",
        "frames": "is a folder, and none that is read as one clip. Make one file of it",
        "complex.npy": "holds complex64 values",
        "object.npy": "cannot be read",
    }
    store = make(tmp_path, [*reasons, *good], max_rejected=0.8)
    found = rejected(store)
    assert found.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert re.match(reason, found[name]), found[name]
    assert Store(store).table["filename"].tolist() == sorted(good)
    # Labels alternate from 0, over eleven bad files.
    assert Store(store).info["rejected"] == {"0": 6, "1": 5}


def test_a_truncated_video_can_be_kept(tmp_path: Path, raw: Path) -> None:
    path = cut(write_video(raw / "cut.mp4", NOISE, **FASTSTART))
    settings = PrepareSettings(roi="none", truncated="keep")
    store = Store(make(tmp_path, ["cut.mp4"], settings=settings))
    decoded = np.stack([frame.luma for frame in Video(path)])
    assert 0 < len(decoded) < 10
    np.testing.assert_array_equal(store.read(0), decoded)


def test_a_clip_without_outline_is_rejected(tmp_path: Path, raw: Path) -> None:
    write_video(raw / "with.mp4", outlined_frames([Box(20, 30, 70, 84)] * 4))
    write_video(raw / "without.mp4", outlined_frames([None] * 4))
    np.save(raw / "volume.npy", NOISE[..., 0])
    names = ["with.mp4", "without.mp4", "volume.npy"]
    found = rejected(make(tmp_path, names, settings=PrepareSettings(), max_rejected=0.7))
    assert found.keys() == {"without.mp4", "volume.npy"}
    assert "no outline found in any frame" in found["without.mp4"]
    assert "a volume has no coloured outline" in found["volume.npy"]


def test_too_many_rejects_leave_no_marker(tmp_path: Path, raw: Path) -> None:
    names = [*write_volumes(raw, 8), "bad.npy", "worse.npy"]
    (raw / "bad.npy").write_bytes(b"x")
    (raw / "worse.npy").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"2 of 10 clips were rejected.*is 0.1; .*bad.npy"):
        make(tmp_path, names, max_rejected=0.1)
    store = tmp_path / "store"
    assert not (store / MARKER).exists()
    assert rejected(store).keys() == {"bad.npy", "worse.npy"}
    before = stamps(store)
    assert Store(make(tmp_path, names, max_rejected=0.2)).info["clips"] == 8
    assert stamps(store) == before
    with pytest.raises(StoreError, match="2 of 2 clips were rejected"):
        make(tmp_path, names[8:], "nothing left", max_rejected=1.0)


# Missing files.


def test_missing_files_are_rejects(tmp_path: Path, raw: Path) -> None:
    """They are counted before any work, named, and stored once they are there."""
    names = write_volumes(raw, 8)
    content = (raw / names[5]).read_bytes()
    (raw / names[5]).unlink()
    with pytest.raises(StoreError, match=r"missing \(1 of 8 files are: 1 positive\).*--where"):
        make(tmp_path, names)
    assert not (tmp_path / "store").exists()
    store = make(tmp_path, names, max_rejected=0.2)
    rejects = pd.read_csv(store / REJECTED)
    assert rejects.to_numpy().tolist() == [[names[5], "the file is missing", 1]]
    (raw / names[5]).write_bytes(content)
    assert len(Store(make(tmp_path, names)).table) == 8


def test_a_file_of_nearly_that_name_is_named(tmp_path: Path, raw: Path) -> None:
    names = ["Clip000.npy", *write_volumes(raw, 2)[1:]]
    with pytest.raises(StoreError, match=r"It exists as 'clip000\.npy'\. The manifest must"):
        make(tmp_path, names)


def test_a_shard_may_have_no_file_that_is_there(tmp_path: Path, raw: Path) -> None:
    """In a part, and in a run that goes on; a wrong folder is refused by both."""
    names = [*write_volumes(raw, 4), "gone1.npy", "gone2.npy"]
    manifest = write_manifest(tmp_path / "clips.csv", names)
    settings = PrepareSettings(roi="none", shard_clips=2)
    parts = tmp_path / "parts"
    with pytest.raises(StoreError, match="2 of 2 files are"):
        prepare_part(manifest, tmp_path, parts, settings, Part(3, 3), workers=1)
    for number in (1, 2, 3):
        prepare_part(manifest, raw, parts, settings, Part(number, 3), workers=1)
    assert finalize(parts, max_rejected=0.5)["clips"] == 4
    store = make(tmp_path, names, settings=settings, max_rejected=0.5)
    whole = contents(store)
    for name in (MARKER, f"{SHARDS}/{shard_name(2)}"):
        (store / name).unlink()
    make(tmp_path, names, settings=settings, max_rejected=0.5)
    assert contents(store) == whole == contents(parts)


def test_files_of_a_new_mount_are_stored(tmp_path: Path, raw: Path) -> None:
    """Their own times are older than the store."""
    names = [*write_volumes(raw, 2), "d/late.npy"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    np.save(elsewhere / "late.npy", np.zeros((2, 4, 4), np.uint8))
    store = make(tmp_path, names, max_rejected=0.5)
    assert list(rejected(store)) == ["d/late.npy"]
    elsewhere.rename(raw / "d")
    assert len(Store(make(tmp_path, names)).table) == 3


# Mended files.


@pytest.fixture
def good(tmp_path: Path, raw: Path) -> bytes:
    """The good content of a file that a store of ten clips has rejected."""
    names = write_volumes(raw, 10)
    content = (raw / names[5]).read_bytes()
    (raw / names[5]).write_bytes(b"x")
    assert Store(make(tmp_path, names, max_rejected=0.1)).info["clips"] == 9
    return content


NAMES = [f"clip{i:03d}.npy" for i in range(10)]


@pytest.mark.parametrize("old", [False, True], ids=["new file", "moved here, with an old time"])
def test_a_mended_file_is_stored(tmp_path: Path, raw: Path, good: bytes, old: bool) -> None:
    store = tmp_path / "store"
    before = stamps(store)
    mended = tmp_path / "mended.npy"
    mended.write_bytes(good)
    if old:
        os.utime(mended, (1e9, 1e9))
    mended.rename(raw / NAMES[5])
    make(tmp_path, NAMES)
    assert rejected(store) == {}
    changed = {name for name, stamp in stamps(store).items() if stamp != before[name]}
    assert changed == {shard_name(1)}
    assert contents(store) == contents(make(tmp_path, NAMES, "straight"))


def test_a_mended_file_costs_no_clip_that_was_stored(
    tmp_path: Path, raw: Path, good: bytes
) -> None:
    """The other clips of its shard are kept, whatever became of their files."""
    before = Store(tmp_path / "store")
    kept = {key: before.read(clip) for clip, key in enumerate(before.table["key"])}
    (raw / NAMES[5]).write_bytes(good)
    (raw / NAMES[6]).write_bytes(b"x")
    (raw / NAMES[7]).write_bytes(good)
    after = Store(make(tmp_path, NAMES))
    assert len(after.table) == 10
    for key, pixels in kept.items():
        np.testing.assert_array_equal(after.read(after.clip_of(key)), pixels)


@pytest.mark.parametrize("name", [shard_name(1), shard_name(1).replace(".tar", ".rejected.csv")])
def test_a_mended_file_is_not_lost_by_a_kill(
    tmp_path: Path, raw: Path, good: bytes, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A kill comes before the rename of the new shard, or of its new list of rejects."""
    store = tmp_path / "store"
    (raw / NAMES[5]).write_bytes(good)
    rename = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if target.name == name:
            raise KeyboardInterrupt
        return rename(path, target)

    job = read_job(store)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_task(new_task(job, job.shards(store)[1], open_source(raw)), UNWATCHED)
    make(tmp_path, NAMES)
    assert contents(store) == contents(make(tmp_path, NAMES, "straight"))


def test_a_failure_half_way_leaves_the_old_shard_with_its_list(
    tmp_path: Path, raw: Path, good: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    (raw / NAMES[5]).write_bytes(good)
    shards = {name: content for name, content in contents(store).items() if name.startswith(SHARDS)}

    def fail(*_: object) -> None:
        raise StoreError("the server is down")

    job = read_job(store)
    monkeypatch.setattr("dist_train.data.store.shard_task.read_clip", fail)
    with pytest.raises(StoreError, match="the server is down"):
        write_task(new_task(job, job.shards(store)[1], open_source(raw)), UNWATCHED)
    assert shards.items() <= contents(store).items()


# Real clips.


@pytest.mark.slow
def test_real_ultrasound_clips(tmp_path: Path, real_data: Path) -> None:
    """Each is stored with the frames that truly decode, or rejected with a reason; none is lost."""
    source = real_data / "lung_ultrasound"
    with (source / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    table = "".join(f"{row['filename']},{row['label']},{row['patient']}\n" for row in rows)
    (tmp_path / "clips.csv").write_text(f"filename,label,group\n{table}")
    manifest = read_manifest(tmp_path / "clips.csv")
    prepare(manifest, source, tmp_path / "store", WHOLE, workers=2, max_rejected=0.5)
    store = Store(tmp_path / "store")
    clips = dict(zip(store.table["filename"], range(len(store.table)), strict=True))
    reasons = rejected(tmp_path / "store")
    assert clips.keys() | reasons.keys() == {row["filename"] for row in rows}
    assert not clips.keys() & reasons.keys()
    for row in rows:
        name = row["filename"]
        if name in clips:
            with av.open(str(source / name)) as container:
                (shape,) = {(f.height, f.width) for f in container.decode(video=0)}
            assert store.read(clips[name]).shape == (int(row["frames"]), *shape)
        else:
            assert re.search(r"stops after \d+ of \d+ declared|changes size", reasons[name])
    assert len(clips) > 0.5 * len(rows)
