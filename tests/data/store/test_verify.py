"""Verify: every kind of damage is named, sound clips are not; repair gives back the same bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import contents, ended, fails, said
from make_media import write_volumes
from stores import make, rejected, small_medmnist

from dist_train.data.store.build import PrepareSettings, prepare, prepare_npz
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
from dist_train.errors import StoreError
from dist_train.files import sealed

SHARD = f"{SHARDS}/{shard_name(1)}"
LIST = SHARD.replace(".tar", ".rejected.csv")
THREES = PrepareSettings(roi="none", shard_clips=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve files in four shards. The second has clips 3 and 5; file 4 is bad."""
    folder = tmp_path_factory.mktemp("verify")
    names = write_volumes(folder / "raw", 12)
    (folder / "raw" / names[4]).write_bytes(b"x")
    make(folder, names, settings=THREES, max_rejected=0.1)
    return folder


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged; the raw files are beside it."""
    shutil.copytree(made / "raw", tmp_path / "raw", copy_function=shutil.copy2)
    shutil.copytree(made / "store", tmp_path / "store")
    return tmp_path / "store"


def faults_of(store: Path, workers: int = 1) -> list[str]:
    """The faults, without the folder's name."""
    return [str(fault).removeprefix(f"{store}/") for fault in verify(store, workers=workers)]


def mend(store: Path, source: Path | None, *, salvage: bool = False) -> None:
    repair(store, source, verify(store, workers=1), salvage=salvage, workers=1)


def flip(path: Path, offset: int, bit: int = 1) -> None:
    whole = bytearray(path.read_bytes())
    whole[offset] ^= bit
    path.write_bytes(whole)


def replace_in(path: Path, old: bytes, new: bytes) -> None:
    whole = path.read_bytes()
    assert old in whole
    path.write_bytes(whole.replace(old, new, 1))


def record_of(store: Path, key: str) -> dict[str, Any]:
    return dict(read_index(store / INDEX))[key]


def flip_pixel(store: Path) -> None:
    flip(store / SHARD, record_of(store, "clip005")["offset"] + 7)


def flip_header(store: Path) -> None:
    """After it, nothing more can be read of the shard."""
    flip(store / SHARD, record_of(store, "clip003")["offset"] - 128 - 512)


def change_declared(store: Path) -> None:
    """Only the index shows this."""
    replace_in(store / SHARD, b'"frames_declared": 4', b'"frames_declared": 6')


def truncate(store: Path) -> None:
    path = store / SHARD
    path.write_bytes(path.read_bytes()[: record_of(store, "clip005")["offset"] + 9])


def remove(store: Path) -> None:
    (store / SHARD).unlink()


def garble_list(store: Path) -> None:
    (store / LIST).write_bytes(b"nothing")


def list_another_class(store: Path) -> None:
    replace_in(store / LIST, b",0\n", b",1\n")


def rewrite(store: Path, *keys: str) -> None:
    """A shard in perfect form, of other clips of the store."""
    whole = Store(store)
    added = ("shard", "offset", "length", "shape", "crc32c")
    samples = []
    for key in keys:
        record = {k: v for k, v in record_of(store, key).items() if k not in added}
        samples.append((key, whole.read(whole.clip_of(key)), record))
    write_shard(store / SHARD, samples)


def delete_clip(store: Path) -> None:
    rewrite(store, "clip005")


def copy_clip(store: Path) -> None:
    rewrite(store, "clip003", "clip005", "clip009")


THREE = f"{SHARD}: clip 'clip003' is missing or damaged"
FIVE = f"{SHARD}: clip 'clip005' is missing or damaged"
BYTES = f"{SHARD}: its bytes are not those of its clips"
# What verify says, and which clips are lost if the raw files are gone: headers, records and lists
# are also in the index and the manifest.
DAMAGE: dict[Callable[[Path], None], tuple[list[str], list[str]]] = {
    flip_pixel: ([FIVE], ["clip005.npy"]),
    flip_header: ([BYTES], []),
    change_declared: ([BYTES], []),
    truncate: ([FIVE], ["clip005.npy"]),
    remove: ([f"{SHARD}: the shard is missing"], ["clip003.npy", "clip005.npy"]),
    garble_list: (
        [f"{LIST}: the list of rejects cannot be read (its columns are not file, reason, class)"],
        [],
    ),
    list_another_class: ([f"{LIST}: the list names files that are not of this shard"], []),
    delete_clip: ([THREE], ["clip003.npy"]),
    copy_clip: ([BYTES], []),
}


def test_a_sound_store_has_no_faults(store: Path) -> None:
    before = contents(store)
    assert faults_of(store) == []
    assert contents(store) == before


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_named_and_repaired(
    made: Path, store: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (store / SHARDS).glob("*.tar")}
    damage(store)
    messages, losses = DAMAGE[damage]
    assert {fault.shard for fault in verify(store, workers=1)} == {1}
    assert faults_of(store) == messages
    damaged = shutil.copytree(store, tmp_path / "damaged")

    mend(store, made / "raw")
    assert contents(store) == contents(made / "store")
    for path in (store / SHARDS).glob("*.tar"):
        assert (path.stat().st_mtime_ns == before[path.name]) == (path.name != shard_name(1))

    # Without the raw files, the good clips are salvaged.
    before_repair = contents(damaged)
    (tmp_path / "nothing").mkdir()
    if losses:
        message = rf"of {len(losses)} damaged clips are missing; the first: {losses[0]}"
        with pytest.raises(StoreError, match=message):
            mend(damaged, tmp_path / "nothing")
        assert contents(damaged) == before_repair
    mend(damaged, None, salvage=True)
    assert faults_of(damaged) == []
    assert lost_files(damaged) == losses
    whole, salvaged = Store(made / "store"), Store(damaged)
    assert salvaged.info["clips"] == len(salvaged.table) == 11 - len(losses)
    for clip, key in enumerate(salvaged.table["key"]):
        np.testing.assert_array_equal(salvaged.read(clip), whole.read(whole.clip_of(key)))
    mend(damaged, made / "raw")
    assert contents(damaged) == contents(made / "store")


def test_every_byte_counts(store: Path) -> None:
    """Any flipped bit of a shard, of the index and of each small file is found."""
    rng = np.random.default_rng(0)
    for name in (SHARD, LIST, INDEX, MARKER, REJECTED):
        path = store / name
        whole = path.read_bytes()
        for offset in rng.integers(0, len(whole), 60 if name == SHARD else 8):
            flip(path, int(offset), 1 << int(rng.integers(8)))
            assert faults_of(store) != [], (name, offset)
            path.write_bytes(whole)


def test_two_workers_find_what_one_finds(store: Path) -> None:
    flip_pixel(store)
    (store / SHARDS / shard_name(3)).unlink()
    assert len(faults_of(store)) == 2
    seen: list[tuple[int, int]] = []
    found = verify(store, workers=1, progress=lambda *counts: seen.append(counts))
    assert verify(store, workers=2) == found
    assert seen == [(3, 12), (6, 12), (9, 12), (12, 12)]


# What is not a shard.


def lose_index(store: Path) -> None:
    (store / INDEX).unlink()


def change_index(store: Path) -> None:
    """LMDB has no checksum."""
    replace_in(store / INDEX, b'"label": 1', b'"label": 0')


def garble_marker(store: Path) -> None:
    (store / MARKER).write_text("{")


def other_count(store: Path) -> None:
    (store / MARKER).write_text(sealed(read_marker(store) | {"clips": 12}))


def other_content(store: Path) -> None:
    (store / MARKER).write_text(sealed(read_marker(store) | {"content": "0" * 64}))


def lose_rejected(store: Path) -> None:
    (store / REJECTED).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_index, "index.lmdb: is not the index that was written"),
        (change_index, "index.lmdb: is not the index that was written"),
        (garble_marker, "store.json: is missing, or not the marker of a store"),
        (other_count, "store.json: does not say what the store holds"),
        (other_content, "store.json: does not say what the store holds"),
        (lose_rejected, "rejected.csv: is not the sum of the shards' lists of rejects"),
    ],
)
def test_index_and_summaries_are_rebuilt_from_the_shards_alone(
    made: Path, store: Path, damage: Callable[[Path], None], message: str
) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in (store / SHARDS).iterdir()}
    damage(store)
    assert faults_of(store) == [message]
    mend(store, store / "nowhere")
    assert contents(store) == contents(made / "store")
    assert {path: path.stat().st_mtime_ns for path in (store / SHARDS).iterdir()} == stamps


def test_foreign_files_are_named_and_left_alone(made: Path, store: Path) -> None:
    foreign = [store / SHARDS / "notes.txt", store / SHARDS / shard_name(9)]
    for path in foreign:
        path.write_bytes(b"mine")
    lines = faults_of(store)
    assert lines == [
        f"{SHARDS}/{path.name}: does not belong to the store; move it away" for path in foreign
    ]
    mend(store, made / "raw")
    assert faults_of(store) == lines
    for path in foreign:
        path.unlink()
    assert contents(store) == contents(made / "store")


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
    manifest = read_manifest(made / "clips.csv")
    prepare(manifest, made / "raw", store, THREES, workers=1, max_rejected=0.1)
    assert contents(store) == contents(made / "store")


# Repair that must not be done.


@pytest.mark.parametrize(
    ("index_is_lost", "raw_is_bad", "message"),
    [
        (False, False, "clip 'clip005' differs"),
        (True, False, "one or more of 2 damaged clips differ"),
        (True, True, "one or more of 2 damaged clips differ"),
    ],
)
def test_a_source_of_other_content_is_refused(
    made: Path, store: Path, index_is_lost: bool, raw_is_bad: bool, message: str
) -> None:
    """Without the index, the digest of the content tells."""
    raw = store.parent / "raw"
    np.save(raw / "clip005.npy", np.zeros((5, 12, 12), np.uint8))
    if raw_is_bad:
        (raw / "clip005.npy").write_bytes(b"x")
    remove(store)
    if index_is_lost:
        change_index(store)
    before = contents(store)
    # Also when it is tried twice: the store still knows what it lost.
    for _ in range(2):
        with pytest.raises(StoreError, match=rf"raw: does not hold the files.*{message}"):
            mend(store, raw)
        assert contents(store) == before
    mend(store, made / "raw")
    assert contents(store) == contents(made / "store")


def test_pixels_of_which_nothing_is_known_are_told(
    made: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remove(store)
    (store / MARKER).unlink()
    mend(store, made / "raw")
    assert "whether the raw files of 2 damaged clips are those" in caplog.text
    assert contents(store) == contents(made / "store")


def test_every_shard_is_bad(made: Path, store: Path) -> None:
    for path in (store / SHARDS).iterdir():
        path.unlink()
    before = contents(store)
    with pytest.raises(StoreError, match="no clip of the store is good"):
        mend(store, None, salvage=True)
    assert contents(store) == before
    mend(store, made / "raw")
    assert contents(store) == contents(made / "store")


def test_only_bad_clips_need_their_raw_files(made: Path, store: Path) -> None:
    raw = store.parent / "raw"
    for path in raw.iterdir():
        if path.name != "clip005.npy":
            path.unlink()
    flip_pixel(store)
    mend(store, raw)
    assert contents(store) == contents(made / "store")


@pytest.mark.parametrize("way", ["repair", "prepare"])
def test_lost_clips_come_back_one_by_one(made: Path, store: Path, way: str) -> None:
    raw = store.parent / "raw"
    remove(store)
    mend(store, None, salvage=True)
    (raw / "clip003.npy").rename(raw.parent / "clip003.npy")
    repair(store, raw, [], workers=1)
    assert lost_files(store) == ["clip003.npy"]
    assert rejected(store)["clip003.npy"].startswith("lost: ")
    assert faults_of(store) == []
    (raw.parent / "clip003.npy").rename(raw / "clip003.npy")
    if way == "repair":
        repair(store, raw, [], workers=1)
    else:
        manifest = read_manifest(made / "clips.csv")
        prepare(manifest, raw, store, THREES, workers=1, max_rejected=0.1)
    assert contents(store) == contents(made / "store")


def test_a_lost_clip_is_known_after_another_of_its_shard_came_back(made: Path, store: Path) -> None:
    raw = store.parent / "raw"
    (store / SHARD).write_bytes(b"x")
    mend(store, None, salvage=True)
    assert lost_files(store) == ["clip003.npy", "clip005.npy"]
    reason = rejected(store)["clip005.npy"]
    (raw / "clip005.npy").rename(raw.parent / "clip005.npy")
    manifest = read_manifest(made / "clips.csv")
    prepare(manifest, raw, store, THREES, workers=1, max_rejected=0.2)
    assert rejected(store)["clip005.npy"] == reason
    (raw.parent / "clip005.npy").rename(raw / "clip005.npy")
    mend(store, raw)
    assert contents(store) == contents(made / "store")


def test_another_clip_does_not_come_back(store: Path) -> None:
    raw = store.parent / "raw"
    flip_pixel(store)
    mend(store, None, salvage=True)
    np.save(raw / "clip005.npy", np.load(raw / "clip005.npy") ^ 1)
    before = contents(store)
    with pytest.raises(StoreError, match="clip 'clip005' differs"):
        repair(store, raw, [], workers=1)
    assert contents(store) == before


@pytest.mark.parametrize("renames", range(7))
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
            mend(store, made / "raw")
        except KeyboardInterrupt:
            assert renames < 6
    mend(store, made / "raw")
    assert contents(store) == contents(made / "store")


def test_another_version_of_the_decoder(
    made: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_pixel(store)
    monkeypatch.setattr("dist_train.data.store.build_spec.pixels_version", lambda *_, **__: 99)
    with pytest.raises(StoreError, match="this is version 99"):
        mend(store, made / "raw")


def test_repair_of_a_medmnist_store(tmp_path: Path) -> None:
    npz = small_medmnist(tmp_path / "a.npz")
    other = small_medmnist(tmp_path / "b.npz", val_images=np.zeros((3, 4, 5, 6), np.uint8))
    store = tmp_path / "store"
    prepare_npz(npz, store, shard_clips=4)
    before = contents(store)
    remove(store)
    with pytest.raises(StoreError, match="is not the file that the store was made from"):
        mend(store, other)
    mend(store, npz)
    assert contents(store) == before


def test_a_manifest_of_every_column_and_odd_names(tmp_path: Path) -> None:
    """The store's manifest is read back as the records were written."""
    names = ["a,b.npy", 'q"uote.npy', "line\nbreak.npy", "carriage\rreturn.npy", "NA.npy"]
    rows = "filename,label,group,weight,split,crowd_score,tier1\n"
    (tmp_path / "raw").mkdir()
    for i, name in enumerate(names):
        np.save(tmp_path / "raw" / name, np.full((2, 3, 4), i, np.uint8))
        quoted = name.replace('"', '""')
        rows += f'"{quoted}",{i % 2},00{i},{i / 3},train,{"" if i else 0.1},{i % 2}\n'
    (tmp_path / "clips.csv").write_bytes(rows.encode())
    manifest = read_manifest(tmp_path / "clips.csv")
    store = tmp_path / "store"
    prepare(manifest, tmp_path / "raw", store, THREES, workers=1)
    assert faults_of(store) == []
    before = contents(store)
    remove(store)
    lose_index(store)
    mend(store, tmp_path / "raw")
    assert contents(store) == before


def test_the_command(made: Path, store: Path) -> None:
    command = ("verify", store, "--workers", 1)
    assert f"{store} is whole" in said(*command)
    flip_pixel(store)
    (store / SHARDS / shard_name(3)).unlink()
    code, out, err = ended(*command)
    assert code == 1
    assert [line for line in out.splitlines() if line.startswith("bad: ")] == [
        f"bad: {store / SHARD}: clip 'clip005' is missing or damaged",
        f"bad: {store / SHARDS / shard_name(3)}: the shard is missing",
    ]
    assert err == (
        f"error: {store}: 2 faults. "
        "Run 'dist-train verify' with --repair and the folder of raw files.\n"
    )
    damaged = contents(store)
    for gone in (store / "nowhere", store / "shards", ""):
        assert "--salvage" in fails(*command, "--repair", gone)
        assert contents(store) == damaged
    out = said(*command, "--salvage")
    assert "rejected: 5 (2 negative, 3 positive)" in out
    assert [line.split(": ")[1] for line in out.splitlines() if line.startswith("lost: ")] == [
        "clip005.npy", "clip009.npy", "clip010.npy", "clip011.npy",
    ]  # fmt: skip
    assert f"{store} is whole" in out
    out = said(*command, "--repair", made / "raw")
    assert f"{store} is whole" in out
    assert "lost" not in out
    assert contents(store) == contents(made / "store")
    said(*command, "--repair", made / "raw")
