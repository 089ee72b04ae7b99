"""Verify: every kind of damage is named, sound clips are not; repair gives back the same bytes."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from make_media import write_manifest, write_volumes

from dist_train import cli
from dist_train.data.store.build import PrepareSettings, finalize, prepare, prepare_npz
from dist_train.data.store.build_spec import JOB
from dist_train.data.store.index import read_index
from dist_train.data.store.reader import (
    INDEX,
    MANIFEST,
    MARKER,
    REJECTED,
    SHARDS,
    Store,
    read_marker,
)
from dist_train.data.store.repair import lost_files, repair
from dist_train.data.store.shards import shard_name, write_shard
from dist_train.data.store.verify import verify
from dist_train.data.table.manifest import read_manifest
from dist_train.errors import FileError, StoreError
from dist_train.files import sealed

SHARD = f"{SHARDS}/{shard_name(1)}"
LIST = SHARD.replace(".tar", ".rejected.csv")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve files, of which one is bad, in four shards; the second has clips 3, 5 of 3 to 5."""
    folder = tmp_path_factory.mktemp("verify")
    names = write_volumes(folder / "raw", 12)
    (folder / "raw" / names[4]).write_bytes(b"x")
    manifest = write_manifest(folder / "clips.csv", names)
    settings = PrepareSettings(roi="none", shard_clips=3)
    prepare(manifest, folder / "raw", folder / "store", settings, workers=1, max_rejected=0.1)
    return folder


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged; the raw files are beside it."""
    shutil.copytree(made / "raw", tmp_path / "raw", copy_function=shutil.copy2)
    shutil.copytree(made / "store", tmp_path / "store")
    return tmp_path / "store"


def content(store: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }


def said(store: Path, workers: int = 1) -> list[str]:
    """The faults, with the folder's name taken off."""
    return [str(fault).removeprefix(f"{store}/") for fault in verify(store, workers=workers)]


def flip(path: Path, offset: int, bit: int = 1) -> None:
    whole = bytearray(path.read_bytes())
    whole[offset] ^= bit
    path.write_bytes(whole)


def record_of(store: Path, key: str) -> dict[str, Any]:
    return dict(read_index(store / INDEX))[key]


def flip_pixel(store: Path) -> None:
    flip(store / SHARD, record_of(store, "clip005")["offset"] + 7)


def flip_header(store: Path) -> None:
    """After it, nothing more can be read of the shard."""
    flip(store / SHARD, record_of(store, "clip003")["offset"] - 128 - 512)


def flip_array_header(store: Path) -> None:
    flip(store / SHARD, record_of(store, "clip003")["offset"] - 2)


def flip_label(store: Path) -> None:
    """A record that is as good as any: its label is another one."""
    path = store / SHARD
    whole = path.read_bytes()
    assert whole.count(b'"label": 1') == 2
    path.write_bytes(whole.replace(b'"label": 1', b'"label": 0', 1))


def flip_declared(store: Path) -> None:
    """Of this the index alone tells."""
    path = store / SHARD
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"frames_declared": 4', b'"frames_declared": 6'))
    assert path.read_bytes() != whole


def flip_trailer(store: Path) -> None:
    flip(store / SHARD, -1)


def truncate(store: Path) -> None:
    path = store / SHARD
    path.write_bytes(path.read_bytes()[: record_of(store, "clip005")["offset"] + 9])


def empty(store: Path) -> None:
    (store / SHARD).write_bytes(b"")


def no_record(store: Path) -> None:
    (store / SHARD).write_bytes(_tar({"clip003.npy": b"x", "clip003.json": b"[]"}, store))


def _tar(members: dict[str, bytes], folder: Path) -> bytes:
    path = folder / "made.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            (folder / name).write_bytes(data)
            tar.add(folder / name, name)
            (folder / name).unlink()
    whole = path.read_bytes()
    path.unlink()
    return whole


def remove(store: Path) -> None:
    (store / SHARD).unlink()


def remove_list(store: Path) -> None:
    (store / LIST).unlink()


def garble_list(store: Path) -> None:
    (store / LIST).write_bytes(b"\xff\x00nothing")


def list_another_class(store: Path) -> None:
    path = store / LIST
    text = path.read_text()
    assert text.endswith(",0\n")
    path.write_text(text[:-2] + "1\n")


def rewrite(store: Path, number: int, keys: list[str]) -> None:
    """A shard in perfect form, of other clips of the store."""
    whole = Store(store)
    records = dict(read_index(store / INDEX))
    samples = []
    for key in keys:
        added = ("shard", "offset", "length", "shape", "crc32c")
        record = {name: value for name, value in records[key].items() if name not in added}
        samples.append((key, whole.read(whole.clip_of(key)), record))
    write_shard(store / SHARDS / shard_name(number), samples)


def delete_clip(store: Path) -> None:
    rewrite(store, 1, ["clip005"])


def swap_clips(store: Path) -> None:
    rewrite(store, 1, ["clip005", "clip003"])


def copy_clip(store: Path) -> None:
    rewrite(store, 1, ["clip003", "clip005", "clip009"])


def double_clip(store: Path) -> None:
    rewrite(store, 1, ["clip003", "clip005", "clip005"])


DAMAGE: dict[Callable[[Path], None], list[str]] = {
    flip_pixel: ["clip 'clip005': its pixels are not those that were stored"],
    flip_header: [
        "is not a readable shard (bad checksum)",
        "clip 'clip003' is missing, or cannot be reached",
        "clip 'clip005' is missing, or cannot be reached",
        "the bytes after its last readable clip are damaged",
    ],
    flip_array_header: ["clip 'clip003': its headers are damaged"],
    flip_label: ["clip 'clip003': its record is not that of the manifest"],
    flip_declared: ["clip 'clip005': its record is not that of the index"],
    flip_trailer: ["the bytes after its last readable clip are damaged"],
    truncate: ["clip 'clip005' is missing"],
    empty: ["clip 'clip003' is missing", "clip 'clip005' is missing"],
    no_record: ["clip 'clip003' is missing", "clip 'clip005' is missing"],
    remove: ["the shard is missing"],
    remove_list: [f"{LIST}: the list of rejects cannot be read"],
    garble_list: [f"{LIST}: the list of rejects cannot be read"],
    list_another_class: [f"{LIST}: the list names files that are not of this shard"],
    delete_clip: [
        "clip 'clip003' is missing",
        "clip 'clip005': its record is not that of the index",
    ],
    swap_clips: [
        "clip 'clip003': its record is not that of the index",
        "clip 'clip005': its record is not that of the index",
    ],
    copy_clip: ["clip 'clip009' does not belong to the shard"],
    double_clip: ["clip 'clip005': its headers are damaged"],
}


def test_a_sound_store_has_no_faults(store: Path) -> None:
    before = content(store)
    assert said(store) == []
    assert content(store) == before


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_named_and_repaired(
    made: Path, store: Path, damage: Callable[[Path], None]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (store / SHARDS).glob("*.tar")}
    damage(store)
    faults = verify(store, workers=1)
    lines = said(store)
    assert {fault.shard for fault in faults} == {1}
    for expected in DAMAGE[damage]:
        assert any(expected in line for line in lines), lines
    assert all(line.startswith((SHARD, LIST)) for line in lines)

    repair(store, made / "raw", faults, workers=1)
    assert content(store) == content(made / "store")
    assert said(store) == []
    for path in (store / SHARDS).glob("*.tar"):
        assert (path.stat().st_mtime_ns == before[path.name]) == (path.name != shard_name(1))


def test_every_byte_counts(store: Path) -> None:
    """Any flipped bit of a shard, of the index and of each small file is found."""
    rng = np.random.default_rng(0)
    files = [SHARD, LIST, INDEX, MARKER, REJECTED]
    for name in files:
        path = store / name
        whole = path.read_bytes()
        for offset in rng.integers(0, len(whole), 60 if name == SHARD else 8):
            flip(path, int(offset), 1 << int(rng.integers(8)))
            assert said(store) != [], (name, offset)
            path.write_bytes(whole)
    assert said(store) == []


def test_two_workers_find_what_one_finds(store: Path) -> None:
    flip_pixel(store)
    (store / SHARDS / shard_name(3)).unlink()
    assert said(store, workers=2) == said(store, workers=1)
    assert len(said(store)) == 2


def test_progress_counts_every_clip(store: Path) -> None:
    seen: list[tuple[int, int]] = []
    verify(store, workers=1, progress=lambda *counts: seen.append(counts))
    assert seen == [(3, 12), (6, 12), (9, 12), (12, 12)]


# What is not a shard.


def lose_index(store: Path) -> None:
    (store / INDEX).unlink()


def cut_index(store: Path) -> None:
    path = store / INDEX
    path.write_bytes(path.read_bytes()[:-4096])


def empty_index(store: Path) -> None:
    (store / INDEX).write_bytes(b"")


def flip_index(store: Path) -> None:
    """A label in the index: LMDB has no checksum."""
    path = store / INDEX
    whole = path.read_bytes()
    assert b'"label": 1' in whole
    path.write_bytes(whole.replace(b'"label": 1', b'"label": 0', 1))


@pytest.mark.parametrize("damage", [lose_index, cut_index, empty_index, flip_index])
def test_index_is_rebuilt_from_the_shards_alone(
    made: Path, store: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in (store / SHARDS).iterdir()}
    damage(store)
    faults = verify(store, workers=1)
    assert [str(fault) for fault in faults] == [
        f"{store / INDEX}: is not the index that was written"
    ]
    (tmp_path / "nothing").mkdir()
    repair(store, tmp_path / "nothing", faults)
    assert content(store) == content(made / "store")
    assert {path: path.stat().st_mtime_ns for path in (store / SHARDS).iterdir()} == stamps


def test_shard_and_index_at_once(made: Path, store: Path) -> None:
    flip_pixel(store)
    lose_index(store)
    repair(store, made / "raw", verify(store, workers=1), workers=1)
    assert content(store) == content(made / "store")


def lose_marker(store: Path) -> None:
    (store / MARKER).unlink()


def garble_marker(store: Path) -> None:
    (store / MARKER).write_text("{")


def other_marker(store: Path) -> None:
    (store / MARKER).write_text(sealed(read_marker(store) | {"clips": 12}))


def other_content(store: Path) -> None:
    (store / MARKER).write_text(sealed(read_marker(store) | {"content": "0" * 64}))


def lose_rejected(store: Path) -> None:
    (store / REJECTED).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_marker, "store.json: is missing, or not the marker of a store"),
        (garble_marker, "store.json: is missing, or not the marker of a store"),
        (other_marker, "store.json: does not say what the store holds"),
        (other_content, "store.json: does not say what the store holds"),
        (lose_rejected, "rejected.csv: is not the sum of the shards' lists of rejects"),
    ],
)
def test_summaries_are_written_again(
    made: Path, store: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(store)
    assert said(store) == [message]
    repair(store, made / "raw", verify(store, workers=1))
    assert content(store) == content(made / "store")


def test_foreign_files_are_named_and_left_alone(made: Path, store: Path) -> None:
    foreign = [store / SHARDS / "notes.txt", store / SHARDS / shard_name(9)]
    for path in foreign:
        path.write_bytes(b"mine")
    lines = said(store)
    assert lines == [
        f"{SHARDS}/{path.name}: does not belong to the store; move it away" for path in foreign
    ]
    repair(store, made / "raw", verify(store, workers=1))
    assert said(store) == lines
    for path in foreign:
        path.unlink()
    assert content(store) == content(made / "store")


@pytest.mark.parametrize("name", [JOB, MANIFEST])
@pytest.mark.parametrize("how", ["lost", "damaged"])
def test_what_the_store_is_for_is_needed(made: Path, store: Path, name: str, how: str) -> None:
    if how == "lost":
        (store / name).unlink()
    else:
        flip(store / name, 40)
    with pytest.raises(StoreError, match=rf"{name}: .*prepare' again with the same") as raised:
        verify(store)
    assert raised.value.where == store / name
    (store / name).unlink(missing_ok=True)
    settings = PrepareSettings(roi="none", shard_clips=3)
    manifest = read_manifest(made / "clips.csv")
    prepare(manifest, made / "raw", store, settings, workers=1, max_rejected=0.1)
    assert content(store) == content(made / "store")


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store here"):
        verify(tmp_path)


# Repair that must not be done.


def test_source_of_other_content_is_refused(made: Path, store: Path) -> None:
    """Also when it is tried twice: the store still knows what it lost."""
    raw = store.parent / "raw"
    np.save(raw / "clip005.npy", np.zeros((5, 12, 12), np.uint8))
    flip_pixel(store)
    for _ in range(2):
        with pytest.raises(
            StoreError, match=r"raw: does not hold the files.*clip 'clip005' differs"
        ):
            repair(store, raw, verify(store, workers=1), workers=1)
    repair(store, made / "raw", verify(store, workers=1), workers=1)
    assert content(store) == content(made / "store")


def test_every_shard_is_bad(made: Path, store: Path) -> None:
    """As the only one of a small store."""
    for path in (store / SHARDS).iterdir():
        path.unlink()
    faults = verify(store, workers=1)
    assert {fault.shard for fault in faults} == {0, 1, 2, 3}
    repair(store, made / "raw", faults, workers=1)
    assert content(store) == content(made / "store")


def test_what_is_no_plain_file_is_no_shard(store: Path) -> None:
    (store / SHARD).unlink()
    (store / SHARD).mkdir()
    with pytest.raises(StoreError, match=r"1 of 4 shards are not written yet, .*000001.tar"):
        finalize(store, max_rejected=0.1)


@pytest.mark.parametrize("lose", [remove, flip_pixel])
def test_source_of_other_content_is_refused_without_the_index(
    made: Path, store: Path, lose: Callable[[Path], None]
) -> None:
    """The digest of the content is what is left to tell."""
    raw = store.parent / "raw"
    np.save(raw / "clip005.npy", np.zeros((5, 12, 12), np.uint8))
    lose(store)
    flip(store / INDEX, 5000)
    before = content(store)
    with pytest.raises(StoreError, match=r"raw: does not hold the files.*damaged clips differ"):
        repair(store, raw, verify(store, workers=1), workers=1)
    assert content(store) == before
    repair(store, made / "raw", verify(store, workers=1), workers=1)
    assert content(store) == content(made / "store")


def test_pixels_that_nothing_tells_of_are_told(
    made: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remove(store)
    (store / MARKER).unlink()
    repair(store, made / "raw", verify(store, workers=1), workers=1)
    assert "whether the raw files of 2 damaged clips are those" in caplog.text
    assert content(store) == content(made / "store")


def test_repair_rejects_no_more_than_before(made: Path, store: Path) -> None:
    """With the index gone too, the counts in the marker are what is left to tell."""
    raw = store.parent / "raw"
    (raw / "clip005.npy").write_bytes(b"x")
    remove(store)
    lose_index(store)
    with pytest.raises(StoreError, match="damaged clips differ"):
        repair(store, raw, verify(store, workers=1), workers=1)
    repair(store, made / "raw", verify(store, workers=1), workers=1)
    assert content(store) == content(made / "store")


def test_missing_raw_file_is_named_before_any_work(store: Path) -> None:
    raw = store.parent / "raw"
    (raw / "clip005.npy").unlink()
    flip_pixel(store)
    before = content(store)
    with pytest.raises(StoreError, match=r"of 1 damaged clips are missing; the first: clip005.npy"):
        repair(store, raw, verify(store, workers=1), workers=1)
    assert content(store) == before


def lost(store: Path) -> dict[str, str]:
    """Rejects of the store that were clips, with their reasons."""
    table = pd.read_csv(store / REJECTED, dtype=str)
    rejects = dict(zip(table["file"], table["reason"], strict=True))
    return {name: reason for name, reason in rejects.items() if reason.startswith("lost: ")}


def test_only_bad_clips_need_their_raw_files(made: Path, store: Path) -> None:
    raw = store.parent / "raw"
    for path in raw.iterdir():
        if path.name != "clip005.npy":
            path.unlink()
    flip_pixel(store)
    repair(store, raw, verify(store, workers=1), workers=1)
    assert content(store) == content(made / "store")


# What is lost for good with each damage where the raw files are gone: headers, records and lists
# are in the index and the manifest too.
LOSES = {
    flip_pixel: ["clip005.npy"],
    flip_declared: [],
    flip_header: [],
    truncate: ["clip005.npy"],
    empty: ["clip003.npy", "clip005.npy"],
    no_record: ["clip003.npy", "clip005.npy"],
    remove: ["clip003.npy", "clip005.npy"],
    remove_list: [],
    garble_list: [],
    delete_clip: ["clip003.npy"],
    swap_clips: [],
    copy_clip: [],
}


@pytest.mark.parametrize("damage", LOSES, ids=lambda damage: damage.__name__)
def test_good_clips_are_salvaged_where_the_raw_files_are_gone(
    made: Path, store: Path, damage: Callable[[Path], None]
) -> None:
    damage(store)
    before = content(store)
    faults = verify(store, workers=1)
    if LOSES[damage]:
        with pytest.raises(StoreError, match=rf"of {len(LOSES[damage])} damaged clips are missing"):
            repair(store, None, faults, workers=1)
        assert content(store) == before
    repair(store, None, faults, workers=1, salvage=True)
    assert said(store) == []
    assert list(lost(store)) == LOSES[damage] == lost_files(store)
    assert Store(store).info["clips"] == len(Store(store).table) == 11 - len(LOSES[damage])
    whole = Store(made / "store")
    for clip, key in enumerate(Store(store).table["key"]):
        np.testing.assert_array_equal(Store(store).read(clip), whole.read(whole.clip_of(key)))

    # With the raw files again, all of it comes back.
    repair(store, made / "raw", verify(store, workers=1), workers=1)
    assert content(store) == content(made / "store")


@pytest.mark.parametrize("way", ["repair", "prepare"])
def test_lost_clips_come_back_one_by_one(made: Path, store: Path, way: str) -> None:
    raw = store.parent / "raw"
    remove(store)
    repair(store, None, verify(store, workers=1), salvage=True)
    (raw / "clip003.npy").rename(raw.parent / "clip003.npy")
    repair(store, raw, [], workers=1)
    assert list(lost(store)) == lost_files(store) == ["clip003.npy"]
    assert said(store) == []
    (raw.parent / "clip003.npy").rename(raw / "clip003.npy")
    if way == "repair":
        repair(store, raw, [], workers=1)
    else:
        manifest = read_manifest(made / "clips.csv")
        settings = PrepareSettings(roi="none", shard_clips=3)
        prepare(manifest, raw, store, settings, workers=1, max_rejected=0.1)
    assert content(store) == content(made / "store")


def test_another_clip_does_not_come_back(store: Path) -> None:
    raw = store.parent / "raw"
    flip_pixel(store)
    repair(store, None, verify(store, workers=1), salvage=True)
    np.save(raw / "clip005.npy", np.load(raw / "clip005.npy") ^ 1)
    before = content(store)
    with pytest.raises(StoreError, match="clip 'clip005' differs"):
        repair(store, raw, [], workers=1)
    assert content(store) == before


def test_no_clip_left_is_refused(store: Path) -> None:
    for path in (store / SHARDS).glob("*.tar"):
        path.unlink()
    before = content(store)
    with pytest.raises(StoreError, match="no clip of the store is good"):
        repair(store, None, verify(store, workers=1), salvage=True)
    assert content(store) == before


@pytest.mark.parametrize("renames", range(6))
def test_a_kill_of_a_repair_loses_nothing(
    made: Path, store: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """After each of the renames that put the new files in place."""
    flip_pixel(store)
    rename, left = Path.replace, renames

    def killed(path: Path, target: Path) -> Path:
        nonlocal left
        if path.parent.name.startswith(".repair-") or target.parent == store:
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        try:
            repair(store, made / "raw", verify(store, workers=1), workers=1)
        except KeyboardInterrupt:
            assert renames < 5
    repair(store, made / "raw", verify(store, workers=1), workers=1)
    assert said(store) == []
    assert content(store) == content(made / "store")


def test_shards_in_the_place_of_which_something_else_stands(store: Path) -> None:
    remove(store)
    os.mkfifo(store / SHARD)
    faults = verify(store, workers=1)
    assert "the shard is missing" in str(faults[0])
    with pytest.raises(FileError, match="is a FIFO, and would be replaced"):
        repair(store, store.parent / "raw", faults, workers=1)
    assert (store / MARKER).exists()


def test_other_version_of_the_decoder_path(
    made: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_pixel(store)
    monkeypatch.setattr("dist_train.data.store.build.PIXELS_VERSION", 99)
    with pytest.raises(StoreError, match="this is version 99"):
        repair(store, made / "raw", verify(store, workers=1))


def test_repair_of_a_medmnist_store(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 5), ("val", 3), ("test", 2)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 4, 5, 6), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 2)[:, None]
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez(tmp_path / "other.npz", **arrays | {"val_images": arrays["val_images"] ^ 1})
    store = tmp_path / "store"
    prepare_npz(tmp_path / "a.npz", store, shard_clips=4)
    before = content(store)
    remove(store)
    faults = verify(store, workers=1)
    with pytest.raises(StoreError, match="is not the file that the store was made from"):
        repair(store, tmp_path / "other.npz", faults)
    repair(store, tmp_path / "a.npz", faults)
    assert content(store) == before


def test_manifest_of_every_column_and_odd_names(tmp_path: Path) -> None:
    """What is read back of the manifest in the store is what the records were written from."""
    names = ["a,b.npy", 'q"uote.npy', "line\nbreak.npy", "carriage\rreturn.npy", "NA.npy"]
    rows = "filename,label,group,weight,split,crowd_score,tier1\n"
    (tmp_path / "raw").mkdir()
    for i, name in enumerate(names):
        np.save(tmp_path / "raw" / name, np.full((2, 3, 4), i, np.uint8))
        quoted = name.replace('"', '""')
        rows += f'"{quoted}",{i % 2},00{i},{i / 3},train,{"" if i else 0.1},{i % 2}\n'
    (tmp_path / "clips.csv").write_bytes(rows.encode())
    settings = PrepareSettings(roi="none", shard_clips=2)
    manifest = read_manifest(tmp_path / "clips.csv")
    store = tmp_path / "store"
    prepare(manifest, tmp_path / "raw", store, settings, workers=1)
    assert said(store) == []
    before = content(store)
    remove(store)
    lose_index(store)
    repair(store, tmp_path / "raw", verify(store, workers=1), workers=1)
    assert content(store) == before


# The command.


def test_command(
    made: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(*arguments: object) -> tuple[int, str, str]:
        argv = ["dist-train", "verify", str(store), "--workers", "1", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, *capsys.readouterr()  # type: ignore[return-value]

    code, out, _ = command()
    assert code == 0
    assert f"{store} is whole" in out
    flip_pixel(store)
    (store / SHARDS / shard_name(3)).unlink()
    code, out, err = command()
    assert code == 1
    assert [line for line in out.splitlines() if line.startswith("bad: ")] == [
        f"bad: {store / SHARD}: clip 'clip005': its pixels are not those that were stored",
        f"bad: {store / SHARDS / shard_name(3)}: the shard is missing",
    ]
    assert err == (
        f"error: {store}: 2 faults. "
        "Run 'dist-train verify' with --repair and the folder of raw files.\n"
    )
    damaged = content(store)
    for gone in (("--repair", store / "nowhere"), ("--repair", store / "shards"), ("--repair", "")):
        code, out, err = command(*gone)
        assert code == 1
        assert "--salvage" in err.splitlines()[-1]
        assert content(store) == damaged
    code, out, err = command("--salvage")
    assert (code, err) == (0, "")
    assert "rejected: 5 (2 negative, 3 positive)" in out
    assert [line.split(": ")[1] for line in out.splitlines() if line.startswith("lost: ")] == [
        "clip005.npy", "clip009.npy", "clip010.npy", "clip011.npy",
    ]  # fmt: skip
    assert f"{store} is whole" in out
    code, out, err = command("--repair", made / "raw")
    assert (code, err) == (0, "")
    assert f"{store} is whole" in out
    assert "lost" not in out
    assert content(store) == content(made / "store")
    assert command("--repair", made / "raw")[0] == 0
