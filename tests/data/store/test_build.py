"""Stores: the same bytes whoever writes them and however often they are killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import tifffile
import webdataset
from helpers import contents, said
from make_media import (
    drifting,
    grey_frames,
    outlined_frames,
    write_manifest,
    write_video,
    write_volumes,
)
from stores import WHOLE, make, small_medmnist, stamps, start

from dist_train.data.raw.outline import Box, OutlineColour, crop_to_outline
from dist_train.data.raw.video import Video
from dist_train.data.store.build import PrepareSettings, prepare_npz
from dist_train.data.store.reader import INDEX, MARKER, SHARDS, Store
from dist_train.data.store.repair import repair
from dist_train.data.store.shards import shard_name
from dist_train.data.store.verify import verify
from dist_train.errors import ManifestError, StoreError

# What is stored.


def test_every_kind_of_file(tmp_path: Path, raw: Path) -> None:
    videos = {
        "a.mp4": {"pix_fmt": "yuv444p"},
        "b.mov": {"pix_fmt": "yuv444p"},
        "c.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "full_range": True},
        "d.gif": {"codec": "gif", "pix_fmt": "gray"},
        "e.mkv": {"codec": "ffv1"},
        "f.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}},
    }
    expected = {}
    for name, how in videos.items():
        path = write_video(raw / name, grey_frames(6, 47, 63), **how)
        expected[name] = np.stack([frame.luma for frame in Video(path)])
        assert expected[name].shape == (6, 47, 63)
    volume = np.random.default_rng(1).integers(0, 256, (5, 9, 11), dtype=np.uint8)
    np.save(raw / "h.npy", volume)
    np.savez(raw / "i.npz", volume)
    tifffile.imwrite(raw / "j.tif", volume, photometric="minisblack")
    tifffile.imwrite(raw / "k.tiff", volume.astype(np.uint16) * 257, photometric="minisblack")
    expected |= dict.fromkeys(("h.npy", "i.npz", "j.tif", "k.tiff"), volume)
    store = Store(make(tmp_path, list(expected)))
    assert store.table["filename"].tolist() == list(expected)
    for clip, pixels in enumerate(expected.values()):
        np.testing.assert_array_equal(store.read(clip), pixels)


def test_a_store_keeps_the_records_it_began_with(tmp_path: Path, raw: Path) -> None:
    """A store of an earlier release is continued and repaired to the same bytes."""
    for name in ("a.mp4", "b.mp4"):
        write_video(raw / name, grey_frames(3))
    settings = replace(WHOLE, shard_clips=1)
    old = make(tmp_path, ["a.mp4", "b.mp4"], settings=replace(settings, record_version=1))
    before = contents(old)
    assert b"record_version" not in before["job.json"]
    assert b"interval" not in before[f"{SHARDS}/{shard_name(0)}"]
    (old / SHARDS / shard_name(1)).unlink()
    make(tmp_path, ["a.mp4", "b.mp4"], settings=settings)
    assert contents(old) == before
    (old / SHARDS / shard_name(0)).write_bytes(b"")
    repair(old, raw, verify(old, workers=1), workers=1)
    assert contents(old) == before
    new = make(tmp_path, ["a.mp4", "b.mp4"], out="new", settings=settings)
    assert b'"interval": 0.05' in contents(new)[f"{SHARDS}/{shard_name(0)}"]


# webdataset 1.0 leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_crop_and_box(tmp_path: Path, raw: Path) -> None:
    path = write_video(raw / "a.mp4", outlined_frames(drifting(Box(20, 30, 70, 84), 6)))
    folder = make(tmp_path, ["a.mp4"], settings=PrepareSettings())
    expected, box = crop_to_outline(Video(path), OutlineColour())
    shard = str(folder / SHARDS / shard_name(0))
    (sample,) = webdataset.WebDataset(shard, shardshuffle=False).decode()
    np.testing.assert_array_equal(sample["npy"], expected)
    np.testing.assert_array_equal(Store(folder).read(0), expected)
    assert sample["json"]["filename"] == "a.mp4"
    assert sample["json"]["box"] == [box.top, box.left, box.bottom, box.right]


UNSAFE = ["../outside.npy", "a b.npy", "a.b.npy", "sub/a.b.npy", "größe.npy", "x" * 120 + ".npy"]


def test_unsafe_names_get_safe_keys(tmp_path: Path, raw: Path) -> None:
    (raw / "sub").mkdir()
    for i, name in enumerate(UNSAFE):
        np.save(raw / name, np.full((2, 3, 5), i, np.uint8))
    store = Store(make(tmp_path, UNSAFE))
    for clip, name in enumerate(store.table["filename"]):
        assert (store.read(clip) == UNSAFE.index(name)).all()
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", key) for key in store.table["key"])
    there = sorted(path.name for path in tmp_path.iterdir())
    assert there == ["clips.csv", "outside.npy", "raw", "store"]


def test_rows_are_chosen_on_the_command_line(tmp_path: Path, raw: Path) -> None:
    """Files of other rows need not exist; the store's own table holds the chosen rows only."""
    names = write_volumes(raw, 3)
    rows = [f"{name},{i % 2},True" for i, name in enumerate(names)] + ["elsewhere.npy,1,False"]
    table = tmp_path / "clips.csv"
    table.write_text("\n".join(["filename,label,nano", *rows]) + "\n")
    options = ("--source", raw, "--out", tmp_path / "store", "--roi", "none")
    assert "3 clips in" in said("prepare", "--manifest", table, "--where", "nano", *options)
    assert pd.read_csv(tmp_path / "store" / "manifest.csv")["filename"].tolist() == names


def test_a_medmnist_file(tmp_path: Path) -> None:
    path = small_medmnist(tmp_path / "small.npz")
    info = prepare_npz(path, tmp_path / "store", shard_clips=4)
    assert (info["clips"], info["shards"]) == (10, 3)
    store = Store(tmp_path / "store")
    with np.load(path) as arrays:
        for clip, row in store.table.frame().iterrows():
            split, number = row["key"].split("_")
            np.testing.assert_array_equal(store.read(clip), arrays[f"{split}_images"][int(number)])
            assert row["label"] == arrays[f"{split}_labels"][int(number), 0]
            assert row["split"] == split
    changed = small_medmnist(tmp_path / "b.npz", val_labels=np.ones((3, 1), np.uint8))
    with pytest.raises(StoreError, match=r"other settings \(manifest, npz changed\)"):
        prepare_npz(changed, tmp_path / "store", shard_clips=4)


# The same bytes.


def test_place_and_number_of_workers_do_not_matter(tmp_path: Path, raw: Path) -> None:
    names = [*write_volumes(raw, 44), "bad.npy"]
    (raw / "bad.npy").write_bytes(b"x")
    one = contents(make(tmp_path, names, max_rejected=0.1))
    assert INDEX in one
    shutil.copytree(raw, tmp_path / "elsewhere" / "raw")
    assert contents(make(tmp_path / "elsewhere", names, workers=5, max_rejected=0.1)) == one


def test_progress_counts_every_clip(tmp_path: Path, raw: Path) -> None:
    seen: list[tuple[int, int]] = []
    names = write_volumes(raw, 10)
    make(tmp_path, names, progress=lambda *counts: seen.append(counts))
    assert seen == [(0, 10), (4, 10), (8, 10), (10, 10)]
    seen.clear()
    make(tmp_path, names, progress=lambda *counts: seen.append(counts))
    assert seen == [(10, 10)]


def test_a_finished_store_is_not_touched(
    tmp_path: Path, raw: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If its raw files have changed, a warning says that the store keeps the old clips."""
    names = write_volumes(raw, 6)
    store = make(tmp_path, names)
    before, marker = stamps(store), (store / MARKER).stat().st_mtime_ns
    make(tmp_path, names)
    assert caplog.messages == []
    for name in names[1:3]:
        np.save(raw / name, np.load(raw / name) ^ 1)
    make(tmp_path, names)
    (message,) = caplog.messages
    assert re.match(rf"2 raw files were changed or moved .* first is {raw / names[1]}:", message)
    assert stamps(store) == before
    assert (store / MARKER).stat().st_mtime_ns == marker


def flip(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)


SHARD = f"{SHARDS}/{shard_name(1)}"


@pytest.mark.parametrize(
    ("name", "damage", "rewritten"),
    [
        (SHARD, Path.unlink, 1),
        (SHARD.replace(".tar", ".rejected.csv"), Path.unlink, 1),
        *((name, damage, 0) for name in (INDEX, MARKER) for damage in (Path.unlink, flip)),
    ],
)
def test_what_is_lost_is_written_again(
    tmp_path: Path, raw: Path, name: str, damage: Callable[[Path], None], rewritten: int
) -> None:
    names = write_volumes(raw, 10)
    store = make(tmp_path, names)
    before, shards = contents(store), stamps(store)
    damage(store / name)
    assert contents(store) != before
    make(tmp_path, names)
    assert contents(store) == before
    assert sum(stamps(store)[name] != stamp for name, stamp in shards.items()) == rewritten


def started(folder: Path, names: Sequence[str]) -> subprocess.Popen[str]:
    """A run of two workers that has just finished a shard."""
    write_manifest(folder / "clips.csv", names)
    process = start(folder)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) > 0:
            return process
    raise AssertionError("the run ended before it finished a shard")


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, raw: Path) -> None:
    names = [f"v{i:03d}.npy" for i in range(120)]
    for i, name in enumerate(names):
        np.save(raw / name, np.random.default_rng(i).integers(0, 256, (64, 96, 96), np.uint8))
    process = started(tmp_path, names)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    store = tmp_path / "store"
    kept = stamps(store)
    assert 0 < len(kept) < 30, "the kill came too late to be one"
    with pytest.raises(StoreError, match="not finished"):
        Store(store)
    make(tmp_path, names)
    assert {name: stamps(store)[name] for name in kept} == kept
    assert contents(store) == contents(make(tmp_path, names, "straight"))


@pytest.mark.parametrize("renames", range(13))
def test_a_kill_at_any_rename(tmp_path: Path, renames: int) -> None:
    """Each file appears by a rename. A process that ends at one of them leaves what it wrote."""
    npz, store = small_medmnist(tmp_path / "small.npz"), tmp_path / "store"
    prepare_npz(npz, tmp_path / "straight", shard_clips=4)
    rename, left = Path.replace, renames

    def killed(path: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            os._exit(9)
        return rename(path, target)

    child = os.fork()
    if child == 0:
        Path.replace = killed  # type: ignore[method-assign, assignment]
        prepare_npz(npz, store, shard_clips=4)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    # The job, the manifest, two files for each of three shards, rejects, index, table, marker.
    assert os.waitstatus_to_exitcode(status) == (9 if renames < 12 else 0)
    kept = stamps(store)
    prepare_npz(npz, store, shard_clips=4)
    assert stamps(store).items() >= kept.items()
    assert contents(store) == contents(tmp_path / "straight")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_at_once_with_their_parent(tmp_path: Path, raw: Path, number: int) -> None:
    """Otherwise they would write the same shards as the next run, which finds the lock free."""
    names = write_volumes(raw, 4)
    video = write_video(raw / "v00.mp4", grey_frames(120, 192, 256))
    for i in range(1, 41):
        names.append(f"v{i:02d}.mp4")
        shutil.copy(video, raw / names[-1])
    process = started(tmp_path, names)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3, "a fork server, two workers"
    process.send_signal(number)
    try:
        assert process.wait(timeout=20) != 0
    finally:
        process.kill()
        _, alive = psutil.wait_procs(children, timeout=20)
        for child in alive:
            child.kill()
        process.communicate()
    assert alive == []
    assert len(stamps(tmp_path / "store")) < 11
    assert not (tmp_path / "store" / MARKER).exists()


# What is refused.


def test_a_second_writer_is_refused(tmp_path: Path, raw: Path) -> None:
    names = write_volumes(raw, 5)
    refused: list[int] = []

    def another(done: int, total: int) -> None:
        with pytest.raises(StoreError, match="another process is writing this store"):
            make(tmp_path, names)
        refused.append(done)

    make(tmp_path, names, progress=another)
    assert refused == [0, 4, 5]
    make(tmp_path, names)


SETTINGS = {
    "settings.shard_clips": PrepareSettings(roi="none", shard_clips=5),
    "settings.colour.blue": PrepareSettings(
        roi="none", shard_clips=4, colour=OutlineColour(blue=(0, 90))
    ),
    "manifest": WHOLE,
}


@pytest.mark.parametrize("changed", SETTINGS)
def test_another_setting_is_named(tmp_path: Path, raw: Path, changed: str) -> None:
    names = write_volumes(raw, 5)
    before = contents(make(tmp_path, names))
    with pytest.raises(StoreError, match=rf"other settings \({changed} changed\)"):
        make(tmp_path, names[:: -1 if changed == "manifest" else 1], settings=SETTINGS[changed])
    assert contents(tmp_path / "store") == before


def test_a_missing_source_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="the source folder does not exist"):
        make(tmp_path, ["a.npy"])
    assert not (tmp_path / "store").exists()


def test_one_file_under_two_names(tmp_path: Path, raw: Path) -> None:
    names = write_volumes(raw, 3)
    message = r"'clip001\.npy' \(line 3\) and '\.\./raw/clip001\.npy' \(line 5\) are one file"
    with pytest.raises(ManifestError, match=message):
        make(tmp_path, [*names, "../raw/clip001.npy"])
    assert not (tmp_path / "store").exists()
