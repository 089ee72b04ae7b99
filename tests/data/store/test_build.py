"""Stores: the same bytes whoever writes them and however often they are killed; bad files named."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import pandas as pd
import psutil
import pytest
import tifffile
import webdataset
from helpers import LAUNCH, contents, run_well, said
from make_media import (
    drifting,
    grey_frames,
    outlined_frames,
    read_volume,
    union_of,
    write_manifest,
    write_video,
    write_volumes,
)

from dist_train import cli
from dist_train.data.raw import medmnist
from dist_train.data.raw.class_folders import manifest_from_folders
from dist_train.data.raw.outline import Box, OutlineColour, crop_to_outline
from dist_train.data.raw.remote import open_source
from dist_train.data.raw.video import Video
from dist_train.data.store.build import (
    PrepareSettings,
    finalize,
    new_task,
    prepare,
    prepare_npz,
    prepare_part,
)
from dist_train.data.store.build_spec import JOB, Part, read_job
from dist_train.data.store.reader import INDEX, MARKER, REJECTED, SHARDS, Store
from dist_train.data.store.shard_task import write_task
from dist_train.data.store.shards import shard_name
from dist_train.data.table.manifest import read_manifest
from dist_train.errors import ConfigError, MachineError, ManifestError, StoreError
from dist_train.system.supervised_pool import UNWATCHED

WHOLE = PrepareSettings(roi="none", shard_clips=4)
START = Box(20, 30, 70, 84)
# webdataset 1.0 leaves its files to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
NOISE = np.random.default_rng(0).integers(0, 255, (10, 48, 64, 3), dtype=np.uint8)


def make(folder: Path, names: Sequence[str], out: str = "store", **how: object) -> Path:
    """Prepare the files ``names`` of ``folder``/raw; returns the store's folder."""
    manifest = write_manifest(folder / "clips.csv", names)
    settings = how.pop("settings", WHOLE)
    how.setdefault("workers", 1)
    prepare(manifest, folder / "raw", folder / out, settings, **how)  # type: ignore[arg-type]
    return folder / out


def stamps(store: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every shard."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in (store / SHARDS).glob("*.tar")
    }


def rejected(store: Path) -> dict[str, str]:
    table = pd.read_csv(store / REJECTED, dtype=str)
    return dict(zip(table["file"], table["reason"], strict=True))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw"


# What is stored.


def test_every_kind_of_file(tmp_path: Path, raw: Path) -> None:
    frames = grey_frames(6, 47, 63)
    videos = {
        "a.mp4": {"pix_fmt": "yuv444p"},
        "b.mov": {"pix_fmt": "yuv444p"},
        "c.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "full_range": True},
        "d.gif": {"codec": "gif", "pix_fmt": "gray"},
        "e.mkv": {"codec": "ffv1"},
        "f.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}},
        "g.mp4": {"pix_fmt": "gray", "full_range": True},
    }
    for name, how in videos.items():
        write_video(raw / name, frames, **how)
    volume = np.random.default_rng(1).integers(0, 256, (5, 9, 11), dtype=np.uint8)
    np.save(raw / "h.npy", volume)
    np.savez(raw / "i.npz", volume)
    tifffile.imwrite(raw / "j.tif", volume, photometric="minisblack")
    tifffile.imwrite(raw / "k.tiff", volume.astype(np.uint16) * 257, photometric="minisblack")
    names = [*videos, "h.npy", "i.npz", "j.tif", "k.tiff"]
    store = Store(make(tmp_path, names))
    assert store.table["filename"].tolist() == names
    for clip, name in enumerate(names):
        if name in videos:
            expected = np.stack([frame.luma for frame in Video(raw / name)])
            assert expected.shape == (6, 47, 63)
        else:
            expected = volume
        np.testing.assert_array_equal(store.read(clip), expected)


def test_crop_and_box_are_stored(tmp_path: Path, raw: Path) -> None:
    boxes = drifting(START, 6)
    path = write_video(raw / "a.mp4", outlined_frames(boxes))
    folder = make(tmp_path, ["a.mp4"], settings=PrepareSettings())
    expected, box = crop_to_outline(Video(path), OutlineColour())
    np.testing.assert_array_equal(Store(folder).read(0), expected)
    (sample,) = _samples(folder)
    assert sample["json"]["box"] == [box.top, box.left, box.bottom, box.right]
    assert max(abs(np.subtract(sample["json"]["box"], _sides(union_of(boxes))))) <= 2


def _sides(box: Box) -> list[int]:
    return [box.top, box.left, box.bottom, box.right]


def _samples(folder: Path) -> list[dict[str, object]]:
    """What the plain webdataset library reads, shard by shard."""
    shards = [str(path) for path in sorted((folder / SHARDS).glob("*.tar"))]
    return list(webdataset.WebDataset(shards, shardshuffle=False).decode())


def test_plain_webdataset_reads_the_store(tmp_path: Path, raw: Path) -> None:
    names = write_volumes(raw, 10)
    samples = _samples(make(tmp_path, names))
    assert [sample["json"]["filename"] for sample in samples] == names
    for sample, name in zip(samples, names, strict=True):
        np.testing.assert_array_equal(sample["npy"], read_volume(raw / name))


UNSAFE = ["../outside.npy", "a b.npy", "a.b.npy", "sub/a.b.npy", "größe.npy", "x" * 120 + ".npy"]


def test_unsafe_names_get_safe_keys(tmp_path: Path, raw: Path) -> None:
    (raw / "sub").mkdir()
    for i, name in enumerate(UNSAFE):
        np.save(raw / name, np.full((2, 3, 5), i, np.uint8))
    store = Store(make(tmp_path, UNSAFE))
    by_name = dict(zip(store.table["filename"], range(len(UNSAFE)), strict=True))
    for i, name in enumerate(UNSAFE):
        assert (store.read(by_name[name]) == i).all()
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", key) for key in store.table["key"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "clips.csv",
        "outside.npy",
        "raw",
        "store",
    ]


def test_unlabelled_clips(tmp_path: Path, raw: Path) -> None:
    write_volumes(raw, 2)
    (tmp_path / "clips.csv").write_text("filename\nclip000.npy\nclip001.npy\n")
    manifest = read_manifest(tmp_path / "clips.csv", unlabelled=True)
    prepare(manifest, raw, tmp_path / "store", WHOLE, workers=1)
    assert Store(tmp_path / "store").table["label"].tolist() == [-1, -1]


def test_progress_counts_every_clip(tmp_path: Path, raw: Path) -> None:
    seen: list[tuple[int, int]] = []
    names = write_volumes(raw, 10)
    make(tmp_path, names, progress=lambda *counts: seen.append(counts))
    assert seen == [(0, 10), (4, 10), (8, 10), (10, 10)]
    seen.clear()
    make(tmp_path, names, progress=lambda *counts: seen.append(counts))
    assert seen == [(10, 10)]


# The same bytes.


@pytest.mark.parametrize("workers", [2, 8])
def test_many_workers_write_what_one_writes(tmp_path: Path, raw: Path, workers: int) -> None:
    names = write_volumes(raw, 44)
    (raw / "bad.npy").write_bytes(b"x")
    names.insert(5, "bad.npy")
    one = make(tmp_path, names, "one", workers=1, max_rejected=0.1)
    two = make(tmp_path, names, "many", workers=workers, max_rejected=0.1)
    assert contents(one) == contents(two)
    assert INDEX in contents(one)


def test_place_of_the_files_does_not_matter(tmp_path: Path, raw: Path) -> None:
    names = [*write_volumes(raw, 6), "bad.npy"]
    (raw / "bad.npy").write_bytes(b"x")
    first = contents(make(tmp_path, names, "first", max_rejected=0.2))
    shutil.copytree(tmp_path, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "elsewhere" / "first")
    assert contents(make(tmp_path / "elsewhere", names, "second", max_rejected=0.2)) == first


def test_finished_store_is_not_touched(tmp_path: Path, raw: Path) -> None:
    store = make(tmp_path, write_volumes(raw, 9))
    before, marker = stamps(store), (store / MARKER).stat().st_mtime_ns
    make(tmp_path, sorted(path.name for path in raw.iterdir()))
    assert stamps(store) == before
    assert (store / MARKER).stat().st_mtime_ns == marker


def test_files_that_changed_since_are_told(
    tmp_path: Path, raw: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = write_volumes(raw, 6)
    store = make(tmp_path, names)
    before = contents(store)
    make(tmp_path, names)
    assert caplog.messages == []
    for name in names[1:3]:
        np.save(raw / name, np.load(raw / name) ^ 1)
    make(tmp_path, names)
    (message,) = caplog.messages
    assert re.match(rf"2 raw files were changed or moved .* first is {raw / names[1]}:", message)
    assert contents(store) == before


@pytest.mark.parametrize("name", [INDEX, MARKER])
def test_a_finished_store_that_is_damaged_is_not_called_finished(
    tmp_path: Path, raw: Path, name: str
) -> None:
    names = write_volumes(raw, 6)
    store = make(tmp_path, names)
    before = contents(store)
    damaged = bytearray(before[name])
    damaged[len(damaged) // 2] ^= 1
    (store / name).write_bytes(damaged)
    make(tmp_path, names)
    assert contents(store) == before


def remove_shard(store: Path) -> None:
    (store / SHARDS / shard_name(1)).unlink()


def remove_index(store: Path) -> None:
    (store / INDEX).unlink()


def remove_marker(store: Path) -> None:
    (store / MARKER).unlink()


def remove_list(store: Path) -> None:
    (store / SHARDS / shard_name(1)).with_suffix(".rejected.csv").unlink()


@pytest.mark.parametrize(
    ("remove", "rewritten"),
    [(remove_shard, 1), (remove_index, 0), (remove_marker, 0), (remove_list, 1)],
)
def test_what_is_lost_is_written_again(
    tmp_path: Path, raw: Path, remove: Callable[[Path], None], rewritten: int
) -> None:
    names = write_volumes(raw, 10)
    store = make(tmp_path, names)
    before, shards = contents(store), stamps(store)
    remove(store)
    assert contents(store) != before
    make(tmp_path, names)
    assert contents(store) == before
    assert sum(stamps(store)[name] != stamp for name, stamp in shards.items()) == rewritten


RUN = """
import signal
import sys
from pathlib import Path
from dist_train.data.table.manifest import read_manifest
from dist_train.data.store.build import PrepareSettings, prepare

if __name__ == "__main__":
    # A shell starts what it runs in the background with Ctrl-C ignored, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = Path(sys.argv[1])
    prepare(
        read_manifest(folder / "clips.csv"), folder / "raw", folder / "store",
        PrepareSettings(roi="none", shard_clips=4), workers=2,
        progress=lambda done, total: print(done, flush=True),
    )
"""


def started(folder: Path, names: Sequence[str]) -> subprocess.Popen[str]:
    """A run of two workers, in a process group of its own, that has just finished a shard."""
    write_manifest(folder / "clips.csv", names)
    (folder / "run.py").write_text(RUN)
    process = subprocess.Popen(
        [sys.executable, str(folder / "run.py"), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) > 0:
            return process
    raise AssertionError("the run ended before it finished a shard")


def heavy_volumes(raw: Path, count: int) -> list[str]:
    for i in range(count):
        clip = np.random.default_rng(i).integers(0, 256, (64, 96, 96), dtype=np.uint8)
        np.save(raw / f"v{i:03d}.npy", clip)
    return [f"v{i:03d}.npy" for i in range(count)]


def test_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, raw: Path) -> None:
    names = heavy_volumes(raw, 120)
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
    straight = contents(make(tmp_path, names, "straight"))
    assert contents(store) == straight


def light_then_heavy(raw: Path, *, heavy: int) -> list[str]:
    """A first shard that is soon finished, and videos that keep the workers busy after it."""
    light = write_volumes(raw, 4)
    video = write_video(raw / "v00.mp4", grey_frames(120, 192, 256))
    names = [f"v{i:02d}.mp4" for i in range(1, heavy + 1)]
    for name in names:
        shutil.copy(video, raw / name)
    return [*light, *names]


def test_workers_end_with_their_parent(tmp_path: Path, raw: Path) -> None:
    """Else they would finish their shards while the next run, which finds the lock free, writes the
    same ones."""
    process = started(tmp_path, light_then_heavy(raw, heavy=16))
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3, "a fork server, two workers"
    process.kill()
    process.wait()
    kept = stamps(tmp_path / "store")
    _, alive = psutil.wait_procs(children, timeout=20)
    for child in alive:
        child.kill()
    process.communicate()
    assert alive == []
    assert stamps(tmp_path / "store") == kept
    assert len(kept) < 5


def test_interrupt_ends_all_at_once(tmp_path: Path, raw: Path) -> None:
    process = started(tmp_path, light_then_heavy(raw, heavy=40))
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
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


# Who may write where.


def test_second_writer_is_refused(tmp_path: Path, raw: Path) -> None:
    names = write_volumes(raw, 5)
    refused: list[str] = []

    def another(done: int, total: int) -> None:
        with pytest.raises(StoreError, match="another process is writing this store") as raised:
            make(tmp_path, names)
        refused.append(str(raised.value))

    make(tmp_path, names, progress=another)
    assert len(refused) == 3
    make(tmp_path, names)


SETTINGS = {
    "settings.shard_clips": PrepareSettings(roi="none", shard_clips=5),
    "settings.truncated": PrepareSettings(roi="none", shard_clips=4, truncated="keep"),
    "settings.roi": PrepareSettings(shard_clips=4),
    "settings.colour.blue": PrepareSettings(
        roi="none", shard_clips=4, colour=OutlineColour(blue=(0, 90))
    ),
}


@pytest.mark.parametrize("changed", SETTINGS)
def test_another_setting_is_named(tmp_path: Path, raw: Path, changed: str) -> None:
    names = write_volumes(raw, 5)
    before = contents(make(tmp_path, names))
    with pytest.raises(StoreError, match=rf"other settings \({changed} changed\)"):
        make(tmp_path, names, settings=SETTINGS[changed])
    assert contents(tmp_path / "store") == before


def test_another_manifest_is_named(tmp_path: Path, raw: Path) -> None:
    names = write_volumes(raw, 5)
    make(tmp_path, names)
    with pytest.raises(StoreError, match=r"other settings \(manifest changed\)"):
        make(tmp_path, names[::-1])


def test_no_source_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="the source folder does not exist"):
        make(tmp_path, ["a.npy"])
    assert not (tmp_path / "store").exists()


def test_missing_file_is_named_before_any_work(tmp_path: Path, raw: Path) -> None:
    names = [*write_volumes(raw, 3), "gone.npy", "lost.npy"]
    with pytest.raises(StoreError, match=r"gone.npy: the file is missing \(2 of 5 files are: 1 n"):
        make(tmp_path, names)
    assert not (tmp_path / "store").exists()


def test_missing_files_are_rejects(tmp_path: Path, raw: Path) -> None:
    """They are counted against --max-rejected, named, and taken in once they are there."""
    names = write_volumes(raw, 8)
    content = (raw / names[5]).read_bytes()
    (raw / names[5]).unlink()
    with pytest.raises(StoreError, match=r"missing \(1 of 8 files are: 1 positive\).*--where"):
        make(tmp_path, names)
    store = make(tmp_path, names, max_rejected=0.2)
    rejects = pd.read_csv(store / REJECTED)
    assert rejects.to_numpy().tolist() == [[names[5], "the file is missing", 1]]
    (raw / names[5]).write_bytes(content)
    assert len(Store(make(tmp_path, names)).table) == 8


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


def test_files_that_come_by_a_mount_are_taken_in(tmp_path: Path, raw: Path) -> None:
    """Their own times are older than the store."""
    names = [*write_volumes(raw, 2), "d/late.npy"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    np.save(elsewhere / "late.npy", np.zeros((2, 4, 4), np.uint8))
    store = make(tmp_path, names, max_rejected=0.5)
    assert list(rejected(store)) == ["d/late.npy"]
    elsewhere.rename(raw / "d")
    assert len(Store(make(tmp_path, names)).table) == 3


def test_a_folder_that_cannot_be_looked_into_is_no_missing_file(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may enter any folder, so the refusal is put in here."""
    names = [*write_volumes(raw, 2), "d/a.npy"]
    stat = Path.stat

    def refusing(path: Path, **how: bool) -> os.stat_result:
        if path.parent == raw / "d":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", refusing)
    with pytest.raises(MachineError, match=r"d/a.npy: cannot be read \(Permission d"):
        make(tmp_path, names, max_rejected=0.5)
    assert not (tmp_path / "store").exists()


def test_files_are_found_under_what_other_systems_call_them(tmp_path: Path, raw: Path) -> None:
    (raw / "d").mkdir()
    for number, name in enumerate(("d/M\u00e4us.npy", "Ma\u0308us.npy", "d/a.npy")):
        np.save(raw / name, np.full((2, 3, 5), number, np.uint8))
    names = ["d\\Ma\u0308us.npy", "M\u00e4us.npy", r"d\a.npy"]
    store = Store(make(tmp_path, names))
    by_name = dict(zip(store.table["filename"], range(3), strict=True))
    assert [store.read(by_name[name])[0, 0, 0] for name in names] == [0, 1, 2]


@pytest.mark.parametrize("name", ["Clip001.npy", "clip001", "clip001.NPY", "CLIP001"])
def test_a_file_of_nearly_that_name_is_named(tmp_path: Path, raw: Path, name: str) -> None:
    names = write_volumes(raw, 3)
    with pytest.raises(
        StoreError, match=r"missing \(1 of 3 .* It exists as 'clip001\.npy'\. The manifest must"
    ):
        make(tmp_path, [names[0], name, names[2]])
    store = make(tmp_path, [names[0], name, names[2]], max_rejected=0.4)
    reason = pd.read_csv(store / REJECTED)["reason"].iloc[0]
    assert reason == "the file is missing. It exists as 'clip001.npy'."


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("D/M\u00e4us.npy", "d/Ma\u0308us.npy"),
        ("d\\MA\u0308US", "d/Ma\u0308us.npy"),
        ("raw/clip001.npy", "clip001.npy"),
        (r"E:raw\CLIP001.avi", "clip001.npy"),
    ],
)
def test_a_file_in_nearly_that_folder_is_named(
    tmp_path: Path, raw: Path, name: str, there: str
) -> None:
    names = write_volumes(raw, 3)
    (raw / "d").mkdir()
    np.save(raw / "d" / "Ma\u0308us.npy", np.zeros((2, 4, 4), np.uint8))
    (raw / "gone.npy").symlink_to("nowhere.npy")
    with pytest.raises(StoreError, match=f"It exists as '{there}'. The manifest must"):
        make(tmp_path, [names[0], name])
    with pytest.raises(StoreError, match="is a link that leads nowhere"):
        make(tmp_path, [names[0], "gone.npy"])


@pytest.mark.parametrize("how", ["symbolic link", "hard link", "way round"])
def test_one_file_under_two_names_is_refused(tmp_path: Path, raw: Path, how: str) -> None:
    names = write_volumes(raw, 3)
    if how == "symbolic link":
        (raw / "other.npy").symlink_to(names[1])
    elif how == "hard link":
        (raw / "other.npy").hardlink_to(raw / names[1])
    other = f"../raw/{names[1]}" if how == "way round" else "other.npy"
    message = rf"'clip001\.npy' \(line 3\) and '{re.escape(other)}' \(line 5\) are one file"
    with pytest.raises(ManifestError, match=message):
        make(tmp_path, [*names, other])
    assert not (tmp_path / "store").exists()


def test_what_is_no_clip_is_named_with_how_to_convert_it(tmp_path: Path, raw: Path) -> None:
    names = [*write_volumes(raw, 2), "frames", "brain.nii.gz", "b.nii", "c.dcm", "d.png", "e.zip"]
    (raw / "frames").mkdir()
    for name in names[3:]:
        (raw / name).write_bytes(b"x")
    store = make(tmp_path, names, max_rejected=0.9)
    reasons = pd.read_csv(store / REJECTED).set_index("file")["reason"]
    assert reasons["frames"].startswith("is a folder, not a file. Make one file of it")
    assert reasons["brain.nii.gz"].startswith("unknown kind of file '.nii.gz'. Convert it to uint8")
    # What it says to do gives values that are taken.
    assert ".astype('uint8')" in reasons["brain.nii.gz"]
    for name, how in (("b.nii", "npy"), ("c.dcm", "pydicom"), ("d.png", "TIFF"), ("e.zip", "Unp")):
        assert how in reasons[name].partition("Known:")[0]


def test_rows_are_chosen_on_the_command_line(tmp_path: Path, raw: Path) -> None:
    """What is not chosen need not be there; the store's own table holds the chosen rows only."""
    names = write_volumes(raw, 3)
    rows = [f"{name},{i % 2},True" for i, name in enumerate(names)] + ["elsewhere.npy,1,False"]
    table = tmp_path / "clips.csv"
    table.write_text("\n".join(["filename,label,nano", *rows]) + "\n")
    options = ("--source", raw, "--out", tmp_path / "store", "--roi", "none")
    assert "3 clips in" in said("prepare", "--manifest", table, "--where", "nano", *options)
    assert pd.read_csv(tmp_path / "store" / "manifest.csv")["filename"].tolist() == names


def test_folders_of_classes(tmp_path: Path, raw: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_volumes(raw / "stalled", 2, seed=1)
    write_volumes(raw / "flowing" / "monday", 3, seed=2)
    write_volumes(raw / "unclear", 1, seed=3)
    (raw / "stalled" / "notes.txt").write_text("x")
    (raw / "stalled" / ".hidden.npy").write_text("x")
    options = ("--from-folders", raw, "--out", tmp_path / "store", "--roi", "none")
    assert "6 clips in" in said("prepare", *options, "--positive", "stalled")
    assert "positive clips are those of stalled (2)" in caplog.text
    assert "negative clips are those of flowing (3), unclear (1)" in caplog.text
    assert "1 files and links are left out" in caplog.text
    assert "The first is stalled/notes.txt" in caplog.text
    table = Store(tmp_path / "store").table
    assert table["label"].tolist() == [int(name[0] == "s") for name in table["filename"]]
    with pytest.raises(ManifestError, match=r"no folder 'stalls'. Did you mean 'stalled'?"):
        manifest_from_folders(raw, ["stalls"])
    with pytest.raises(ManifestError, match="there are no negative clips"):
        manifest_from_folders(raw, ["stalled", "flowing", "unclear"])


def test_nothing_in_folders_of_classes_is_left_out_in_silence(
    tmp_path: Path, raw: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_volumes(raw / "stalled", 1, seed=1)
    write_volumes(raw / "flowing", 1, seed=2)
    write_volumes(tmp_path / "elsewhere", 1, seed=3)
    write_volumes(raw, 1, seed=4)
    (raw / "stalled" / "monday").symlink_to(tmp_path / "elsewhere")
    (raw / "flowing" / "brain.nii.gz").write_bytes(b"x")
    assert len(manifest_from_folders(raw, ["stalled"]).table) == 2
    assert "3 files and links are left out" in caplog.text
    (raw / "clip000.npy").unlink()
    (raw / "stalled" / "clip000.npy").unlink()
    with pytest.raises(ManifestError, match=r"no positive clips \(stalled \(0\)\)"):
        manifest_from_folders(raw, ["stalled"])
    assert "The first is flowing/brain.nii.gz. Convert it to uint8 or uint16" in caplog.text
    scan = os.scandir

    def refusing(folder: str) -> object:
        # Root may look into any folder.
        if str(folder).endswith("flowing"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="flowing"):
        manifest_from_folders(raw, ["stalled"])


# In parts.


PART = """
import sys
from pathlib import Path
from dist_train.data.store.build_spec import Part
from dist_train.data.table.manifest import read_manifest
from dist_train.data.store.build import PrepareSettings, prepare_part

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    prepare_part(
        read_manifest(folder / "clips.csv"), folder / "raw", folder / "store",
        PrepareSettings(roi="none", shard_clips=4), Part.parse(sys.argv[2]), workers=1,
        progress=lambda done, total: (print(done, flush=True), sys.stdin.readline()),
    )
"""


def part_process(folder: Path, part: str) -> subprocess.Popen[str]:
    """A process that has claimed its part, and goes on at each line that it is sent."""
    (folder / "part.py").write_text(PART)
    process = subprocess.Popen(
        [sys.executable, str(folder / "part.py"), str(folder), part],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n"
    return process


def part_here(folder: Path, names: Sequence[str], part: str, out: str = "store") -> None:
    manifest = write_manifest(folder / "clips.csv", names)
    prepare_part(manifest, folder / "raw", folder / out, WHOLE, Part.parse(part), workers=1)


def written(store: Path) -> list[str]:
    return sorted(path.name for path in (store / SHARDS).glob("*.tar"))


def test_parts_of_three_processes_make_the_same_store(tmp_path: Path, raw: Path) -> None:
    """All three are at work at once, since each waits until all have claimed their part."""
    names = write_volumes(raw, 27)
    (raw / names[5]).write_bytes(b"x")
    plain = make(tmp_path, names, "plain", max_rejected=0.1)
    store = tmp_path / "store"
    processes = [part_process(tmp_path, f"{i}/3") for i in (1, 2, 3)]
    assert written(store) == []
    for process in processes:
        process.communicate("\n" * 9)
        assert process.returncode == 0
    assert written(store) == [shard_name(i) for i in range(7)]
    assert not any((store / name).exists() for name in (INDEX, MARKER, REJECTED))
    with pytest.raises(StoreError, match=r"not finished.*finalize"):
        Store(store)
    assert finalize(store, max_rejected=0.1)["clips"] == 26
    assert contents(store) == contents(plain)
    assert finalize(store, max_rejected=0.1)["clips"] == 26
    assert contents(store) == contents(plain)


def test_a_part_has_every_nth_shard(tmp_path: Path, raw: Path) -> None:
    names = write_volumes(raw, 27)
    part_here(tmp_path, names, "2/3")
    assert written(tmp_path / "store") == [shard_name(1), shard_name(4)]
    part_here(tmp_path, names, "9/9")
    assert written(tmp_path / "store") == [shard_name(1), shard_name(4)]


def test_a_part_needs_only_its_own_files(tmp_path: Path, raw: Path) -> None:
    names = write_volumes(raw, 8)
    (raw / names[0]).unlink()
    part_here(tmp_path, names, "2/2")
    part_here(tmp_path, names, "1/2")
    with pytest.raises(StoreError, match=r"1 of 8 clips were rejected \(1 neg.*clip000.*missing"):
        finalize(tmp_path / "store")
    # Nothing is written of a part for which nothing is there.
    with pytest.raises(StoreError, match=r"the file is missing \(4 of 4 files are"):
        part_here(tmp_path, [f"no-{name}" for name in names], "2/2", "other")
    assert not (tmp_path / "other").exists()


def test_a_whole_run_goes_on_from_parts(tmp_path: Path, raw: Path) -> None:
    names = write_volumes(raw, 12)
    part_here(tmp_path, names, "1/2")
    before = stamps(tmp_path / "store")
    make(tmp_path, names)
    assert {name: stamps(tmp_path / "store")[name] for name in before} == before
    assert contents(tmp_path / "store") == contents(make(tmp_path, names, "plain"))


def test_who_may_write_beside_a_part(tmp_path: Path, raw: Path) -> None:
    names = write_volumes(raw, 12)
    write_manifest(tmp_path / "clips.csv", names)
    running = part_process(tmp_path, "1/3")
    with pytest.raises(StoreError, match="another process is writing part 1 of this store"):
        part_here(tmp_path, names, "1/3")
    with pytest.raises(StoreError, match=r"is writing a part \(of 3\) of this store"):
        part_here(tmp_path, names, "2/2")
    with pytest.raises(StoreError, match="another process is writing this store"):
        make(tmp_path, names)
    with pytest.raises(StoreError, match="another process is writing this store"):
        finalize(tmp_path / "store")
    part_here(tmp_path, names, "2/3")
    running.kill()
    running.communicate()
    part_here(tmp_path, names, "1/2")
    make(tmp_path, names)


def test_no_part_beside_a_whole_run(tmp_path: Path, raw: Path) -> None:
    names = write_volumes(raw, 5)

    def another(done: int, total: int) -> None:
        with pytest.raises(StoreError, match="another process is writing this store"):
            part_here(tmp_path, names, "1/2")

    make(tmp_path, names, progress=another)


def test_part_of_other_settings_is_refused(tmp_path: Path, raw: Path) -> None:
    names = write_volumes(raw, 8)
    part_here(tmp_path, names, "1/2")
    with pytest.raises(StoreError, match=r"other settings \(manifest changed\)"):
        part_here(tmp_path, names[::-1], "2/2")


def test_finalize_names_what_is_missing(tmp_path: Path, raw: Path) -> None:
    names = write_volumes(raw, 27)
    part_here(tmp_path, names, "1/3")
    with pytest.raises(
        StoreError,
        match=r"4 of 7 shards are not written yet, the first is shard-000001.tar.*: 1, 2, 4, 5\)",
    ):
        finalize(tmp_path / "store")
    assert not (tmp_path / "store" / MARKER).exists()


def test_finalize_judges_the_rejects(tmp_path: Path, raw: Path) -> None:
    names = write_volumes(raw, 8)
    (raw / names[1]).write_bytes(b"x")
    part_here(tmp_path, names, "1/1")
    with pytest.raises(StoreError, match=r"1 of 8 clips were rejected \(1 positive\)"):
        finalize(tmp_path / "store")
    assert finalize(tmp_path / "store", max_rejected=0.2)["rejected"] == {"1": 1}


def test_finalize_of_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store here"):
        finalize(tmp_path)


def test_clips_lost_with_a_damaged_shard_are_not_lost_in_silence(tmp_path: Path, raw: Path) -> None:
    """Tar readers take a damaged header for the end of the archive."""
    store = make(tmp_path, write_volumes(raw, 8))
    path = store / SHARDS / shard_name(1)
    whole = bytearray(path.read_bytes())
    at = whole.index(b"clip006.npy")
    whole[at] ^= 1
    path.write_bytes(whole)
    (store / INDEX).unlink()
    with pytest.raises(StoreError, match=r"shard-000001.tar: is not a readable.*--repair"):
        finalize(store)


@pytest.mark.parametrize("text", ["", "1", "0/3", "4/3", "1/0", "-1/3", "1/3/5", "a/b", " 1/3"])
def test_not_a_part(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--part: '.*' is not a part"):
        Part.parse(text)


def test_commands_of_parts(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["dist-train", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 0
        return capsys.readouterr().out

    names = write_volumes(raw, 12)
    (raw / names[2]).write_bytes(b"x")
    (raw / names[7]).write_bytes(b"x")
    write_manifest(tmp_path / "clips.csv", names)
    store = tmp_path / "store"
    for part in ("2/2", "1/2"):
        command(
            "prepare", "--manifest", tmp_path / "clips.csv", "--source", raw, "--out", store,
            "--roi", "none", "--shard-clips", 4, "--workers", 1, "--part", part,
        )  # fmt: skip
    lines = command("finalize", store, "--max-rejected", 0.2).splitlines()
    assert lines == [
        f"10 clips in {store}",
        f"rejected: 2 (1 negative, 1 positive), see {store / REJECTED}",
    ]
    assert contents(store) == contents(make(tmp_path, names, "plain", max_rejected=0.2))


def test_slurm_array(tmp_path: Path, raw: Path) -> None:
    names = write_volumes(raw, 12)
    manifest, store = tmp_path / "clips.csv", tmp_path / "store"
    write_manifest(manifest, names)
    options = ("--manifest", manifest, "--source", raw, "--out", store, "--roi", "none")
    script = [LAUNCH / "prepare_slurm.sh", *options, "--shard-clips", "4"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for task in (2, 1):
        array = {"SLURM_ARRAY_TASK_ID": f"{task}", "SLURM_ARRAY_TASK_COUNT": "2"}
        run_well([*map(str, script)], PATH=path, SLURM_CPUS_PER_TASK="2", **array)
    said("finalize", store)
    assert contents(store) == contents(make(tmp_path, names, "plain"))


def test_a_folder_is_claimed_once_by_many(tmp_path: Path, raw: Path) -> None:
    """Parts that start together all write the same claim; none sees half of it."""
    names = write_volumes(raw, 4)
    write_manifest(tmp_path / "clips.csv", names)
    (tmp_path / "part.py").write_text(PART)
    command = [sys.executable, str(tmp_path / "part.py"), str(tmp_path)]
    processes = [
        subprocess.Popen([*command, f"{i}/4"], stdin=subprocess.DEVNULL) for i in range(1, 5)
    ]
    assert [process.wait() for process in processes] == [0, 0, 0, 0]
    finalize(tmp_path / "store")
    assert contents(tmp_path / "store") == contents(make(tmp_path, names, "plain"))


# Bad files.


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    return path


def test_every_bad_file_is_rejected_with_its_reason(tmp_path: Path, raw: Path) -> None:
    faststart = {"container_options": {"movflags": "faststart"}, "options": {"g": "1"}}
    cut(write_video(raw / "cut.mp4", NOISE, **faststart), 0.6)
    cut(write_video(raw / "no_header.mp4", NOISE), 0.6)
    (raw / "zero.mp4").touch()
    (raw / "zero.npy").touch()
    (raw / "garbage.mp4").write_bytes(b"garbage" * 99)
    (raw / "garbage.tif").write_bytes(b"garbage" * 99)
    (raw / "notes.txt").write_text("not a clip")
    np.save(raw / "float.npy", np.zeros((3, 4, 5), np.float32))
    np.save(raw / "object.npy", np.array([[[None]]]), allow_pickle=True)
    good = write_volumes(raw, 3)
    reasons = {
        "cut.mp4": r"the video stops after \d+ of 10 declared frames.*--truncated keep",
        "no_header.mp4": "cannot be opened",
        "zero.mp4": "cannot be opened",
        "zero.npy": "cannot be read",
        "garbage.mp4": "cannot be opened",
        "garbage.tif": "cannot be read",
        "notes.txt": r"unknown kind of file '.txt'.*Known: .avi",
        "float.npy": "holds float32 values",
        "object.npy": "cannot be read",
    }
    store = make(tmp_path, [*reasons, *good], max_rejected=0.8)
    found = rejected(store)
    assert found.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert re.match(reason, found[name]), found[name]
    assert Store(store).table["filename"].tolist() == sorted(good)
    # Labels alternate from 0, over nine bad files.
    assert Store(store).info["rejected"] == {"0": 5, "1": 4}


def test_truncated_video_can_be_kept(tmp_path: Path, raw: Path) -> None:
    faststart = {"container_options": {"movflags": "faststart"}, "options": {"g": "1"}}
    path = cut(write_video(raw / "cut.mp4", NOISE, **faststart), 0.6)
    settings = PrepareSettings(roi="none", truncated="keep")
    store = Store(make(tmp_path, ["cut.mp4"], settings=settings))
    decoded = np.stack([frame.luma for frame in Video(path)])
    assert 0 < len(decoded) < 10
    np.testing.assert_array_equal(store.read(0), decoded)


def test_clip_without_outline_is_rejected(tmp_path: Path, raw: Path) -> None:
    write_video(raw / "with.mp4", outlined_frames([START] * 4))
    write_video(raw / "without.mp4", outlined_frames([None] * 4))
    np.save(raw / "volume.npy", NOISE[..., 0])
    names = ["with.mp4", "without.mp4", "volume.npy"]
    store = make(tmp_path, names, settings=PrepareSettings(), max_rejected=0.7)
    found = rejected(store)
    assert found.keys() == {"without.mp4", "volume.npy"}
    assert "no outline found in any frame" in found["without.mp4"]
    assert "a volume has no coloured outline" in found["volume.npy"]


def test_too_many_rejected_fails_and_leaves_no_marker(tmp_path: Path, raw: Path) -> None:
    names = [*write_volumes(raw, 8), "bad.npy", "worse.npy"]
    (raw / "bad.npy").write_bytes(b"x")
    (raw / "worse.npy").write_bytes(b"x")
    with pytest.raises(
        StoreError, match=r"2 of 10 clips were rejected.*is 0.1; .*bad.npy"
    ) as error:
        make(tmp_path, names, max_rejected=0.1)
    assert error.value.exit_code != 0
    store = tmp_path / "store"
    assert not (store / MARKER).exists()
    assert rejected(store).keys() == {"bad.npy", "worse.npy"}
    before = stamps(store)
    assert Store(make(tmp_path, names, max_rejected=0.2)).info["clips"] == 8
    assert stamps(store) == before
    with pytest.raises(StoreError, match="were rejected"):
        make(tmp_path, names, max_rejected=0.1)
    # It was finished, and nothing of it has changed.
    assert Store(store).info["clips"] == 8


def test_nothing_left_is_an_error(tmp_path: Path, raw: Path) -> None:
    (raw / "bad.npy").write_bytes(b"x")
    with pytest.raises(StoreError, match="1 of 1 clips were rejected"):
        make(tmp_path, ["bad.npy"], max_rejected=1.0)


@pytest.mark.parametrize("old", [False, True], ids=["new file", "moved here, with an old time"])
def test_mended_file_is_taken_up(tmp_path: Path, raw: Path, old: bool) -> None:
    names = write_volumes(raw, 10)
    good = (raw / names[5]).read_bytes()
    (raw / names[5]).write_bytes(b"x")
    store = make(tmp_path, names, max_rejected=0.1)
    before = stamps(store)
    assert Store(store).info["clips"] == 9

    mended = tmp_path / "mended.npy"
    mended.write_bytes(good)
    if old:
        os.utime(mended, (1e9, 1e9))
    mended.rename(raw / names[5])
    make(tmp_path, names)
    assert Store(store).info["clips"] == 10
    assert rejected(store) == {}
    changed = {name for name, stamp in stamps(store).items() if stamp != before[name]}
    assert changed == {shard_name(1)}
    assert contents(store) == contents(make(tmp_path, names, "straight"))


def test_mended_file_costs_no_clip_that_was_stored(tmp_path: Path, raw: Path) -> None:
    """Those beside it in the shard are good, whatever became of their files."""
    names = write_volumes(raw, 10)
    good = (raw / names[5]).read_bytes()
    (raw / names[5]).write_bytes(b"x")
    store = make(tmp_path, names, max_rejected=0.1)
    before = Store(store)
    kept = {key: before.read(clip) for clip, key in enumerate(before.table["key"])}
    (raw / names[5]).write_bytes(good)
    (raw / names[6]).write_bytes(b"x")
    (raw / names[7]).write_bytes(good)
    make(tmp_path, names)
    after = Store(store)
    assert len(after.table) == 10
    for key, pixels in kept.items():
        np.testing.assert_array_equal(after.read(after.clip_of(key)), pixels)


def test_mended_file_is_not_lost_by_a_kill(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the worst moment: the new list of rejects is in place, the new shard is not yet."""
    names = write_volumes(raw, 10)
    good = (raw / names[5]).read_bytes()
    (raw / names[5]).write_bytes(b"x")
    store = make(tmp_path, names, max_rejected=0.1)
    (raw / names[5]).write_bytes(good)

    rename = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if target.name == shard_name(1):
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        job, source = read_job(store), open_source(raw)
        task = new_task(job, job.shards(store)[1], source)
        with pytest.raises(KeyboardInterrupt):
            write_task(task, UNWATCHED)
    make(tmp_path, names)
    assert Store(store).info["clips"] == 10


def test_job_tells_what_the_store_is_for(tmp_path: Path, raw: Path) -> None:
    store = make(tmp_path, write_volumes(raw, 2))
    job = json.loads((store / JOB).read_text())
    assert job["settings"]["roi"] == "none"
    assert job["fingerprint"] == Store(store).fingerprint


# MedMNIST, and real clips.


def small_medmnist(path: Path, **changed: np.ndarray) -> Path:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 5), ("val", 3), ("test", 2)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 4, 5, 6), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 2).astype(np.uint8)[:, None]
    np.savez(path, **{k: v for k, v in (arrays | changed).items() if v is not None})
    return path


def test_medmnist_form(tmp_path: Path) -> None:
    path = small_medmnist(tmp_path / "small.npz")
    info = prepare_npz(path, tmp_path / "store", shard_clips=4)
    assert (info["clips"], info["shards"]) == (10, 3)
    store = Store(tmp_path / "store")
    with np.load(path) as arrays:
        for clip, key in enumerate(store.table["key"]):
            split, number = key.split("_")
            np.testing.assert_array_equal(store.read(clip), arrays[f"{split}_images"][int(number)])
            assert store.table["label"].iloc[clip] == arrays[f"{split}_labels"][int(number), 0]
            assert store.table["split"].iloc[clip] == split


def test_medmnist_of_other_content_is_refused(tmp_path: Path) -> None:
    prepare_npz(small_medmnist(tmp_path / "a.npz"), tmp_path / "store")
    changed = small_medmnist(tmp_path / "b.npz", val_labels=np.ones((3, 1), np.uint8))
    with pytest.raises(StoreError, match=r"other settings \(manifest, npz changed\)"):
        prepare_npz(changed, tmp_path / "store")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"val_labels": None}, "val_labels"),
        ({"val_labels": np.full((3, 1), 2)}, "label 2 of val image 0 is not 0 or 1"),
        ({"test_labels": np.ones((9, 1))}, "test has 2 images, 9 labels"),
        ({"val_images": np.zeros((3, 4, 5), np.uint8)}, r"val_images are uint8 \[3, 4, 5\]"),
        ({"val_images": np.zeros((3, 4, 5, 6))}, "val_images are float64"),
        ({"val_images": np.array([None] * 3)}, "Object arrays cannot be loaded"),
        ({"val_labels": np.array(1)}, "val has 3 images, 1 labels"),
        ({"val_labels": np.array([[{}]])}, "Object arrays cannot be loaded"),
    ],
)
def test_not_the_medmnist_form(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    path = small_medmnist(tmp_path / "a.npz", **changed)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=rf"is not a MedMNIST file \(.*{message}"):
        prepare_npz(path, tmp_path / "store")


def test_a_medmnist_file_that_says_it_is_large(tmp_path: Path) -> None:
    """It is read by the command's own process, which must not take what the header says."""
    path = small_medmnist(tmp_path / "a.npz")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with np.load(path) as arrays:
        shape = str(arrays["val_images"].shape).encode()
    large = b"(10000000, 1000, 1000)"
    before, after = members["val_images.npy"].split(shape)
    # The header is filled up with blanks to a fixed length.
    members["val_images.npy"] = (
        before + large + after.replace(b" " * (len(large) - len(shape)), b"", 1)
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(StoreError, match=r"val_images: declares 10000000000000 bytes"):
        prepare_npz(path, tmp_path / "store")


def test_a_medmnist_file_that_unpacks_to_more_than_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own word, which is checked before anything is unpacked; and where that is a lie, no
    more is unpacked than it said."""
    path = small_medmnist(tmp_path / "a.npz")
    with monkeypatch.context() as little:
        little.setattr(medmnist, "usable_memory", lambda: 1000)
        with pytest.raises(StoreError, match="bytes, more than there is memory"):
            prepare_npz(path, tmp_path / "store")
    content = path.read_bytes()
    # The central directory's entry of val_images has its size unpacked 22 bytes before its name.
    place = content.rindex(b"val_images.npy") - 22
    assert content[place : place + 4] == (128 + 3 * 4 * 5 * 6).to_bytes(4, "little")
    path.write_bytes(content[:place] + (200).to_bytes(4, "little") + content[place + 4 :])
    with pytest.raises(
        StoreError, match=r"Bad CRC-32 for file|declares 360 bytes of values, holds 72"
    ):
        prepare_npz(path, tmp_path / "store")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for split in ("train", "val", "test"):
            with archive.open(f"{split}_images.npy", "w") as member:
                np.lib.format.write_array_header_1_0(
                    member, {"shape": (2**40, 4, 5, 6), "fortran_order": False, "descr": "|u1"}
                )
            archive.writestr(f"{split}_labels.npy", b"")
    with pytest.raises(StoreError, match="is not a MedMNIST file"):
        prepare_npz(path, tmp_path / "store")


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "npy", "half"])
def test_not_an_npz(tmp_path: Path, damage: str) -> None:
    path = small_medmnist(tmp_path / "a.npz")
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "npy":
        with path.open("wb") as file:
            np.save(file, NOISE)
    else:
        path.write_bytes(
            {"empty": b"", "garbage": b"PK\x03\x04" * 99, "half": whole[: len(whole) // 2]}[damage]
        )
    with pytest.raises(StoreError, match="is not a MedMNIST file"):
        prepare_npz(path, tmp_path / "store")


def test_vesselmnist3d(tmp_path: Path, real_data: Path) -> None:
    path = real_data / "vesselmnist3d.npz"
    info = prepare_npz(path, tmp_path / "store", shard_clips=512)
    assert (info["clips"], info["shards"], info["rejected"]) == (1908, 4, {})
    store = Store(tmp_path / "store")
    assert store.table["split"].value_counts().to_dict() == {"train": 1335, "val": 191, "test": 382}
    with np.load(path) as arrays:
        for split in ("train", "val", "test"):
            rows = store.table[store.table["split"] == split]
            images = np.stack([store.read(clip) for clip in rows.index])
            np.testing.assert_array_equal(images, arrays[f"{split}_images"])
            np.testing.assert_array_equal(rows["label"], arrays[f"{split}_labels"].ravel())


@pytest.mark.slow
def test_real_ultrasound_clips(tmp_path: Path, real_data: Path) -> None:
    """Each is stored with the frames that truly decode, or rejected with a reason; none is lost."""
    source = real_data / "lung_ultrasound"
    with (source / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (tmp_path / "clips.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("filename", "label", "group"))
        writer.writerows((row["filename"], row["label"], row["patient"]) for row in rows)
    manifest = read_manifest(tmp_path / "clips.csv")
    settings = PrepareSettings(roi="none", shard_clips=8)
    prepare(manifest, source, tmp_path / "store", settings, workers=2, max_rejected=0.5)
    store = Store(tmp_path / "store")
    frames = dict(zip(store.table["filename"], store.table["frames"], strict=True))
    reasons = rejected(tmp_path / "store")
    assert frames.keys() | reasons.keys() == {row["filename"] for row in rows}
    assert not frames.keys() & reasons.keys()
    for row in rows:
        with av.open(str(source / row["filename"])) as container:
            shapes = {(f.height, f.width) for f in container.decode(video=0)}
        if row["filename"] in frames:
            assert frames[row["filename"]] == int(row["frames"])
            clip = store.clip_of(
                store.table["key"][store.table["filename"] == row["filename"]].item()
            )
            assert {store.read(clip).shape[1:]} == shapes
        else:
            assert re.search(
                r"stops after \d+ of \d+ declared|changes size", reasons[row["filename"]]
            )
    assert len(frames) > 0.5 * len(rows)
