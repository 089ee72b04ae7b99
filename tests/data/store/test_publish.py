"""A store written behind a URL, shard by shard, is the one that a folder gets."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fsspec import AbstractFileSystem
from helpers import contents, dist_train, environment, refused, run_well
from make_media import write_manifest, write_volumes

from dist_train.data.raw.clip import PrepareSettings
from dist_train.data.store.build import finalize, prepare, prepare_part
from dist_train.data.store.build_spec import Part, as_in
from dist_train.data.store.publish import folder_of, hollow
from dist_train.data.store.reader import Store
from dist_train.data.store.shards import read_records
from dist_train.data.table.manifest import Manifest
from dist_train.errors import StoreError

URL = "s3://lab/store"
SETTINGS = PrepareSettings(roi="none", shard_clips=3)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_volumes(tmp_path / "raw", 10)
    (tmp_path / "raw/clip004.npy").write_bytes(b"damaged")
    return tmp_path / "raw"


@pytest.fixture
def manifest(tmp_path: Path, raw: Path) -> Manifest:
    return write_manifest(tmp_path / "t.csv", sorted(path.name for path in raw.iterdir()))


@pytest.fixture
def local(tmp_path: Path, raw: Path, manifest: Manifest) -> dict[str, bytes]:
    """The files of the same store in a folder."""
    prepare(manifest, raw, tmp_path / "local", SETTINGS, max_rejected=0.5)
    return files(contents(tmp_path / "local"))


def files(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in found.items() if ".lock" not in name}


def there(bucket: AbstractFileSystem) -> dict[str, bytes]:
    prefix = "lab/store/"
    return {name.removeprefix(prefix): bucket.cat(name) for name in bucket.find(prefix)}


def machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this process is on another machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))


def test_every_byte_is_that_of_a_local_store(
    tmp_path: Path, raw: Path, manifest: Manifest, local: dict[str, bytes],
    bucket: AbstractFileSystem, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    machine(tmp_path / "one", monkeypatch)
    prepare(manifest, raw, URL, SETTINGS, max_rejected=0.5)
    assert there(bucket) == local
    opened, same = Store(URL), Store(tmp_path / "local")
    for clip in range(9):
        np.testing.assert_array_equal(opened.read(clip), same.read(clip))
    # Nothing is done twice; other settings are refused, on another machine too.
    shards = bucket.find("lab/store/shards")
    for name in shards:
        bucket.setxattr(name, mark="kept")
    prepare(manifest, raw, URL, SETTINGS, max_rejected=0.5)
    machine(tmp_path / "two", monkeypatch)
    prepare(manifest, raw, URL, SETTINGS, max_rejected=0.5)
    assert all(bucket.getxattr(name, "mark") == "kept" for name in shards)
    assert there(bucket) == local
    with pytest.raises(StoreError, match=rf"^{URL}/: the store was made with other settings"):
        prepare(manifest, raw, URL, PrepareSettings(roi="none", shard_clips=4))


def test_parts_of_several_machines(
    tmp_path: Path, raw: Path, manifest: Manifest, local: dict[str, bytes],
    bucket: AbstractFileSystem, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for number in (1, 2):
        machine(tmp_path / f"machine{number}", monkeypatch)
        prepare_part(manifest, raw, URL, SETTINGS, Part(number, 2))
    assert "store.json" not in there(bucket)
    machine(tmp_path / "third", monkeypatch)
    finalize(URL, max_rejected=0.5)
    assert there(bucket) == local


KILLED = """
import os, signal, sys
from dist_train.data.raw.clip import PrepareSettings
from dist_train.data.store import publish
from dist_train.data.store.build import prepare
from dist_train.data.store import build
from dist_train.data.table.manifest import read_manifest
from dist_train.system.supervised_pool import UNWATCHED
from pathlib import Path

put, table, raw, url, last = publish.Objects.put, *sys.argv[1:]

def killed(self, name, content):
    if name.endswith(last):
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, name, content)

def here(function, tasks, without, limits=None, workers=None):
    return (function(task, UNWATCHED) for task in tasks)

publish.Objects.put, build.supervised = killed, here
prepare(
    read_manifest(Path(table)), Path(raw), url,
    PrepareSettings(roi="none", shard_clips=3), max_rejected=0.5,
)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "last", ["000001.tar", "000001.rejected.csv", "clips.safetensors", "store.json"]
)
def test_a_killed_upload_goes_on(
    tmp_path: Path, raw: Path, manifest: Manifest, local: dict[str, bytes], last: str,
    bucket: AbstractFileSystem, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    machine(tmp_path / "one", monkeypatch)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "t.csv"), str(raw), URL, last]
    ended = subprocess.run(command, env=environment(), check=False)
    assert ended.returncode == -signal.SIGKILL
    assert "store.json" not in there(bucket)
    if last == "000001.tar":
        machine(tmp_path / "two", monkeypatch)
    prepare(manifest, raw, URL, SETTINGS, max_rejected=0.5)
    assert there(bucket) == local


def test_errors_name_the_url(
    tmp_path: Path, raw: Path, manifest: Manifest,
    bucket: AbstractFileSystem, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    machine(tmp_path / "one", monkeypatch)
    with pytest.raises(StoreError, match=rf"^{URL}/job\.json: cannot be read"):
        finalize(URL)
    with pytest.raises(StoreError, match=rf"^{URL}/rejected\.csv: 1 of 10 clips were rejected"):
        prepare(manifest, raw, URL, SETTINGS)
    assert b"clip004.npy" in bucket.cat("lab/store/rejected.csv")
    bucket.pipe("lab/store/shards/shard-000001.rejected.csv", b"damaged")
    with pytest.raises(StoreError, match=rf"^{URL}/shards/.*its list there, and run") as caught:
        finalize(URL, max_rejected=0.5)
    assert "--repair" not in str(caught.value)


@pytest.mark.slow
def test_from_a_bucket_to_a_bucket(
    tmp_path: Path, raw: Path, manifest: Manifest, local: dict[str, bytes],
    bucket: AbstractFileSystem, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    machine(tmp_path / "one", monkeypatch)
    bucket.pipe({f"lab/raw/{path.name}": path.read_bytes() for path in raw.iterdir()})
    paths = ("--manifest", tmp_path / "t.csv", "--source", "s3://lab/raw", "--out", URL)
    more = ("--roi", "none", "--shard-clips", 3, "--max-rejected", "50%")
    printed = run_well(dist_train("prepare", *paths, *more))
    assert f"9 clips in {URL}" in printed
    assert there(bucket) == local
    assert "is a URL" in refused("prepare-npz", tmp_path / "t.csv", "--out", URL)


def test_an_uploaded_shard_takes_no_room(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "raw").mkdir()
    for number in range(3):
        np.save(tmp_path / f"raw/{number}.npy", rng.integers(0, 256, (40, 100, 100), np.uint8))
    table = write_manifest(tmp_path / "t.csv", [f"{n}.npy" for n in range(3)])
    prepare(table, tmp_path / "raw", tmp_path / "s", SETTINGS)
    shard = tmp_path / "s/shards/shard-000000.tar"
    records, size = list(read_records(shard)), shard.stat().st_size
    hollow(shard)
    assert list(read_records(shard)) == records
    assert shard.stat().st_size == size > 1_000_000
    assert shard.stat().st_blocks * 512 < size / 10


def test_the_web_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(tmp_path, monkeypatch)
    with pytest.raises(StoreError, match="the web cannot be written to"):
        finalize("https://example.org/store")
    assert folder_of("https://example.org/store").is_relative_to(tmp_path)


def test_the_server_decides_what_is_written(
    tmp_path: Path, raw: Path, manifest: Manifest, local: dict[str, bytes],
    bucket: AbstractFileSystem, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What a machine wrote earlier counts only if it is still there."""
    machine(tmp_path / "one", monkeypatch)
    prepare(manifest, raw, URL, SETTINGS, max_rejected=0.5)
    bucket.rm("lab/store", recursive=True)
    prepare(manifest, raw, URL, SETTINGS, max_rejected=0.5)
    assert there(bucket) == local
    # Another machine has the file of a rejected clip mended, and rewrites its shard.
    (raw / "clip004.npy").write_bytes((raw / "clip005.npy").read_bytes())
    machine(tmp_path / "two", monkeypatch)
    prepare(manifest, raw, URL, SETTINGS)
    mended = there(bucket)
    assert mended != local
    machine(tmp_path / "one", monkeypatch)
    finalize(URL)
    assert there(bucket) == mended
    # The first machine's own settings are not those of the store that is there now.
    bucket.rm("lab/store", recursive=True)
    machine(tmp_path / "two", monkeypatch)
    prepare(manifest, raw, URL, PrepareSettings(roi="none", shard_clips=4))
    other = there(bucket)
    machine(tmp_path / "one", monkeypatch)
    with pytest.raises(StoreError, match="made with other settings"):
        prepare(manifest, raw, URL, SETTINGS)
    assert there(bucket) == other


def test_good_clips_of_a_rewritten_shard_are_kept(
    tmp_path: Path, raw: Path, manifest: Manifest,
    bucket: AbstractFileSystem, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    machine(tmp_path / "one", monkeypatch)
    prepare(manifest, raw, URL, SETTINGS, max_rejected=0.5)
    (raw / "clip004.npy").write_bytes((raw / "clip005.npy").read_bytes())
    # Its neighbour in the shard is gone, and stays in the store.
    (raw / "clip003.npy").unlink()
    prepare(manifest, raw, URL, SETTINGS, max_rejected=0.5)
    assert len(Store(URL).table) == 10


def test_a_damaged_shard_is_told(
    tmp_path: Path, raw: Path, manifest: Manifest,
    bucket: AbstractFileSystem, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    machine(tmp_path / "one", monkeypatch)
    prepare(manifest, raw, URL, SETTINGS, max_rejected=0.5)
    name = "lab/store/shards/shard-000001.tar"
    bucket.pipe(name, bucket.cat(name)[:700])
    machine(tmp_path / "two", monkeypatch)
    with pytest.raises(StoreError, match=r"shard-000001\.tar: is not a readable shard"):
        finalize(URL, max_rejected=0.5)


def test_settings_are_those_of_a_store_behind_a_url_or_in_a_folder(
    tmp_path: Path, raw: Path, manifest: Manifest, bucket: AbstractFileSystem
) -> None:
    made = replace(SETTINGS, bits=12, record_version=1)
    for out in (URL, tmp_path / "store"):
        prepare(manifest, raw, out, made, max_rejected=0.5)
        assert as_in(out, replace(SETTINGS, clip_memory=99)) == replace(made, clip_memory=99)
    for place in (URL + "2", tmp_path / "stroe"):
        with pytest.raises(StoreError, match=r"there is no store here.*check the path"):
            as_in(place, SETTINGS)


def test_settings_are_not_those_of_a_store_that_this_release_makes_otherwise(
    tmp_path: Path, raw: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    later, store = replace(SETTINGS, record_version=99), tmp_path / "store"
    prepare(manifest, raw, tmp_path / "later", later, max_rejected=0.5)
    with pytest.raises(StoreError, match="records of version 99, this release writes"):
        as_in(tmp_path / "later", SETTINGS)
    prepare(manifest, raw, store, SETTINGS, max_rejected=0.5)
    monkeypatch.setattr("dist_train.data.store.build_spec.pixels_version", lambda *_, **__: 99)
    with pytest.raises(StoreError, match="made by version 4 of the decoder path, this is version"):
        as_in(store, SETTINGS)
