"""Folders that hold somebody's files: `prepare` takes nothing in them for its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import contents, ended, refused, said, tiny_npz
from make_media import write_volumes

from dist_train.data.store.build_spec import JOB
from dist_train.data.store.reader import MANIFEST, MARKER, SHARDS

TOKEN = "0123456789abcdef"
# A browser's download, a lock of another program, and files named almost as the store's own.
USERS = (
    "film.mp4.partial",
    "store.json.partial",
    f"notes.txt.{TOKEN}.partial",
    ".lock-mine",
    "deep/er/film.mp4.crdownload.partial",
    f"{SHARDS}/shard-000000.tar.partial",
    f"{SHARDS}/film.{TOKEN}.partial",
    f"{SHARDS}/.repair-originals/precious.tif",
)
OWN = (
    f"store.json.{TOKEN}.partial",
    f"{SHARDS}/shard-000001.tar.{TOKEN}.partial",
    f"{SHARDS}/.repair-abcd_123/shard-000001.tar",
    ".lock-1-of-2",
)


def put(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"all of {name}")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Four files, and a table of them beside their folder."""
    names = write_volumes(tmp_path / "raw", 4)
    table = "".join(f"{name},{number % 2}\n" for number, name in enumerate(names))
    (tmp_path / "clips.csv").write_text(f"filename,label\n{table}")
    return tmp_path / "raw"


def prepare(raw: Path, out: Path, *more: object) -> tuple[object, ...]:
    return (
        *("prepare", "--manifest", raw.parent / "clips.csv", "--source", raw, "--out", out),
        *("--roi", "none", "--shard-clips", 2, "--workers", 1, *more),
    )


@pytest.mark.parametrize("part", [(), ("--part", "1/2")], ids=["whole", "part"])
@pytest.mark.parametrize(
    "names",
    [
        USERS,
        ("manifest.csv",),
        ("raw/x",),
        # WebDataset's own tools give such names.
        (f"{SHARDS}/shard-000000.tar", f"{SHARDS}/shard-000001.tar"),
        # A damaged job.json of a store may be deleted; this one is the user's.
        ("job.json", f"{SHARDS}/part-1.tar"),
    ],
)
def test_a_folder_that_is_no_store_is_refused_and_left_as_it_is(
    tmp_path: Path, raw: Path, names: tuple[str, ...], part: tuple[str, ...]
) -> None:
    out = tmp_path / "downloads"
    put(out, names)
    before = contents(out), sorted(out.iterdir())
    line = refused(*prepare(raw, out, *part))
    assert f"{out}: the folder is not empty, and is no store ('" in line
    assert (contents(out), sorted(out.iterdir())) == before


def test_another_command_and_a_file(tmp_path: Path) -> None:
    npz = tiny_npz(tmp_path / "tiny.npz")
    assert "is not empty, and is no store" in refused("prepare-npz", npz, "--out", tmp_path)
    assert "is not a folder" in refused("prepare-npz", npz, "--out", npz)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.npz"]


def test_a_damaged_job_of_a_store(tmp_path: Path, raw: Path) -> None:
    said(*prepare(raw, tmp_path / "store"))
    (tmp_path / "store" / JOB).write_text("{")
    assert f"{JOB}: is not valid JSON" in refused(*prepare(raw, tmp_path / "store"))


def test_a_finished_store_stays_finished_where_a_command_is_refused(
    tmp_path: Path, raw: Path
) -> None:
    """Fewer rejects are allowed than the store was finished with."""
    store = tmp_path / "store"
    next(raw.glob("*")).write_bytes(b"junk")
    said(*prepare(raw, store, "--max-rejected", "25%"))
    before = contents(store)
    assert "1 of 4 clips were rejected" in refused(*prepare(raw, store, "--max-rejected", 0))
    assert "1 of 4 clips were rejected" in refused("finalize", store, "--max-rejected", 0)
    assert contents(store) == before
    said("info", store)


def test_the_folder_of_the_source(tmp_path: Path, raw: Path) -> None:
    before = contents(tmp_path)
    assert "is not empty, and is no store" in refused(*prepare(raw, raw))
    # A store around its source.
    assert "is not empty, and is no store" in refused(*prepare(raw, tmp_path))
    assert contents(tmp_path) == before
    # A store inside its source is a folder like any other.
    said(*prepare(raw, raw / "store"))
    said(*prepare(raw, raw / "store"))
    assert {name: contents(tmp_path)[name] for name in before} == before
    assert "is whole" in said("verify", raw / "store", "--workers", 1)


def test_only_its_own_leavings_are_removed_from_a_store(tmp_path: Path, raw: Path) -> None:
    """And nothing at all by a command that is refused."""
    store = tmp_path / "store"
    said(*prepare(raw, store))
    put(store, USERS + OWN)
    (store / f"index.lmdb.{TOKEN}.partial").symlink_to(raw.parent / "clips.csv")
    before = contents(store)
    assert "other settings" in refused(*prepare(raw, store, "--truncated", "keep"))
    assert contents(store) == before
    said("finalize", store)
    assert {name: contents(store)[name] for name in USERS} == {name: before[name] for name in USERS}
    assert not any((store / name).exists() for name in OWN)
    assert (store / f"index.lmdb.{TOKEN}.partial").is_symlink()


def test_an_empty_folder_and_what_a_killed_start_leaves(tmp_path: Path, raw: Path) -> None:
    (tmp_path / "empty").mkdir()
    said(*prepare(raw, tmp_path / "empty"))
    begun = tmp_path / "begun"
    put(begun, (".lock", ".lock-claim", ".lock-2-of-3", f"job.json.{TOKEN}.partial"))
    (begun / SHARDS).mkdir()
    said(*prepare(raw, begun))
    assert contents(begun) == contents(tmp_path / "empty") | {".lock": b"all of .lock"}


@pytest.mark.parametrize("kept", [MANIFEST, MARKER])
def test_a_store_without_its_job_is_known_by_what_is_left(
    tmp_path: Path, raw: Path, kept: str
) -> None:
    store = tmp_path / "store"
    said(*prepare(raw, store))
    before = contents(store)
    for name in {JOB, MANIFEST, MARKER} - {kept}:
        (store / name).unlink()
    code, _, err = ended(*prepare(raw, store))
    assert code == 0, err
    assert contents(store) == before
    # But not as the store of anything else.
    (store / JOB).unlink()
    (store / MANIFEST).unlink()
    assert json.loads((store / MARKER).read_bytes())
    assert "is no store" in refused(*prepare(raw, store, "--truncated", "keep"))
