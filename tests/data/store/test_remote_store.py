"""A store behind a URL: the same clips, whatever happens to server, cache and process."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import fsspec
import numpy as np
import pytest
from helpers import ROOT, contents, environment, fails, losses_of, said, tiny_config, tiny_store
from make_media import write_manifest
from web_server import Answer, WebServer, s3_error, web_server

from dist_train import objects
from dist_train.config import CacheSettings, LoaderSettings
from dist_train.data.loading.dataset import ClipDataset
from dist_train.data.loading.loader import Loader, with_coming
from dist_train.data.loading.sampler import Slot
from dist_train.data.store import blocks, reader, remote_shards
from dist_train.data.store.build import PrepareSettings, prepare
from dist_train.data.store.clip_cache import UNIT, ClipCache
from dist_train.data.store.clip_table import TABLE
from dist_train.data.store.reader import INDEX, MARKER, Store
from dist_train.data.store.remote_shards import near
from dist_train.data.store.shard_bytes import Span
from dist_train.errors import ConfigError, DistTrainError, MachineError, RemoteError, StoreError

URL = "s3://bucket/store"
KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}
CLIPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local store: three shards of four clips of a hundred kilobytes."""
    raw = tmp_path_factory.mktemp("remote")
    rng = np.random.default_rng(0)
    for number in range(CLIPS):
        pixels = rng.integers(0, 256, (10, 100, 100 + number), dtype=np.uint8)
        np.save(raw / f"clip{number:03d}.npy", pixels)
    names = [f"clip{number:03d}.npy" for number in range(CLIPS)]
    manifest = write_manifest(raw / "clips.csv", names)
    prepare(manifest, raw, raw / "store", PrepareSettings(roi="none", shard_clips=4), workers=1)
    return raw / "store"


@pytest.fixture(scope="module")
def running() -> Iterator[WebServer]:
    with web_server() as server:
        yield server


@pytest.fixture
def server(
    running: WebServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> WebServer:
    """S3 with the store, for this process and its children. Tries follow each other at once."""
    given = KEYS | {"FSSPEC_S3_ENDPOINT_URL": running.url, "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": running.url})
    monkeypatch.setattr(objects, "FIRST_WAIT", 0.001)
    running.faults.clear()
    running.seen.clear()
    running.half_sent.clear()
    running.files = uploaded(folder)
    return running


def uploaded(folder: Path) -> dict[str, bytes | Answer]:
    return {f"bucket/store/{name}": content for name, content in contents(folder).items()}


@pytest.fixture
def cache(tmp_path: Path) -> CacheSettings:
    return CacheSettings(dir=tmp_path / "cache")


def assert_same(remote: Store, folder: Path) -> None:
    local = Store(folder)
    assert remote.table.frame().equals(local.table.frame())
    assert remote.content == local.content
    for clip in range(len(local.table)):
        np.testing.assert_array_equal(remote.read(clip), local.read(clip))


def shards_of(cache: CacheSettings) -> list[Path]:
    assert cache.dir is not None
    return sorted(cache.dir.glob("*/shards/*.tar"))


# --- the same clips -------------------------------------------------------------------------------


@pytest.mark.parametrize("web", [False, True], ids=["s3", "web"])
def test_clips_are_those_of_the_local_store(
    server: WebServer, folder: Path, cache: CacheSettings, web: bool
) -> None:
    url = f"{server.url}/bucket/store" if web else URL
    assert_same(Store(url, cache), folder)
    first = len(server.seen)
    # The marker alone comes again, from wherever.
    assert_same(pickle.loads(pickle.dumps(Store(URL, cache))), folder)
    assert len(server.seen) == first + 1


def test_a_batch_is_read_side_by_side_and_merged(
    server: WebServer, folder: Path, cache: CacheSettings
) -> None:
    store = Store(URL, cache)
    server.seen.clear()
    store.prefetch(range(CLIPS))
    store.prefetch(range(CLIPS))
    assert_same(store, folder)
    asked = [seen["range"] for seen in server.seen]
    # One request a shard: its clips lie side by side.
    assert len(asked) == 3
    store.prefetch(range(CLIPS))
    assert len(server.seen) == 3


def test_long_clips_come_in_pieces(
    server: WebServer, folder: Path, cache: CacheSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (objects, remote_shards):
        monkeypatch.setattr(module, "PIECE", 1 << 14)
    monkeypatch.setattr(remote_shards, "UNDER_WAY", 1 << 10)
    store = Store(URL, cache)
    store.prefetch(range(CLIPS))
    assert_same(store, folder)
    assert len(server.seen) > CLIPS * 6


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_losses_are_those_of_the_local_store(
    server: WebServer, store: Path, tmp_path: Path, workers: int
) -> None:
    from dist_train.training.train import train

    server.files = uploaded(store)
    how = ("train.epochs=2", "snapshots.at=[2]", f"loader.workers={workers}")
    train(tiny_config(store, tmp_path / "local", *how))
    train(tiny_config(Path(URL), tmp_path / "remote", *how, f"store={URL}"))
    assert losses_of(tmp_path / "remote") == losses_of(tmp_path / "local")
    # The run knows where its store is.
    assert "test: 10 clips" in said("predict", tmp_path / "remote") + said(
        "evaluate", tmp_path / "remote"
    )
    local = said("predict", tmp_path / "remote", "--store-path", store, "--out", tmp_path / "p")
    assert "predictions in" in local
    predicted = [path / "predictions.csv" for path in (tmp_path / "remote", tmp_path / "p")]
    assert predicted[0].read_bytes() == predicted[1].read_bytes()


def test_commands_take_a_url(server: WebServer, folder: Path) -> None:
    shown = said("info", URL)
    assert shown.startswith(URL)
    # All but the name and the size on the disk.
    local, remote = (
        [line for line in text.splitlines()[4:] if not line.startswith("shards")]
        for text in (said("info", folder), shown)
    )
    assert local == remote
    assert f"{URL} is whole" in said("verify", URL, "--workers", 1)
    assert "only read" in fails("verify", URL, "--salvage")


def test_verify_finds_what_is_wrong_behind_a_url(server: WebServer, folder: Path) -> None:
    shard = bytearray((folder / "shards/shard-000001.tar").read_bytes())
    shard[700] ^= 1
    server.files["bucket/store/shards/shard-000001.tar"] = bytes(shard)
    del server.files["bucket/store/shards/shard-000002.tar"]
    server.files["bucket/store/shards/foreign.tar"] = b""
    from dist_train.data.store.verify import verify

    message = fails("verify", URL, "--workers", 1)
    assert "3 faults. Download it, repair that copy, and upload" in message
    assert "--repair" not in message
    found = {(str(fault.where), fault.what) for fault in verify(URL, workers=1)}
    assert found == {
        (f"{URL}/shards/foreign.tar", "does not belong to the store; move it away"),
        (f"{URL}/shards/shard-000001.tar", "clip 'clip004' is missing or damaged"),
        (f"{URL}/shards/shard-000002.tar", "the shard is missing"),
    }
    del server.files["bucket/store/job.json"]
    with pytest.raises(StoreError, match=rf"^{URL}/job\.json: "):
        verify(URL)


# --- the server -----------------------------------------------------------------------------------

FAULTS = [s3_error(503, "SlowDown"), s3_error(500, "InternalError"), "cut", "refuse"]


def test_a_bad_spell_is_waited_out(server: WebServer, folder: Path, cache: CacheSettings) -> None:
    server.faults = [*FAULTS]
    store = Store(URL, cache)
    server.faults = [*FAULTS]
    store.prefetch(range(CLIPS))
    assert_same(store, folder)
    assert not server.faults


REFUSALS: dict[str, tuple[Any, str]] = {
    "denied": (s3_error(403, "AccessDenied"), "access is denied. Set the right ones"),
    "key": (s3_error(403, "InvalidAccessKeyId"), "missing or wrong (InvalidAccessKeyId)"),
    "expired": (s3_error(401, "ExpiredToken"), "missing or wrong (ExpiredToken)"),
    "bucket": (s3_error(404, "NoSuchBucket"), "there is no such bucket"),
    "missing": (s3_error(404, "NoSuchKey"), "is not there"),
    "bad": (s3_error(400, "BadDigest"), "the server refuses it (HTTP 400)"),
    "busy": (s3_error(503, "SlowDown"), "cannot be reached, after 5 tries (HTTP 503)"),
    "cut": ("cut", "cannot be reached, after 5 tries (the connection broke)"),
    "no ranges": (Answer(b"all of it"), "does not give parts of files (HTTP ranges)"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_come_ends_in_one_message(
    server: WebServer, cache: CacheSettings, name: str
) -> None:
    fault, message = REFUSALS[name]
    store = Store(URL, cache)
    server.faults = [fault] * 100
    with pytest.raises(RemoteError) as caught:
        store.read(5)
    assert str(caught.value).startswith(f"{URL}/shards/shard-000001.tar: ")
    assert message in str(caught.value)
    assert "it is" not in str(caught.value), "words of the server"
    server.faults.clear()
    store.read(5)


def test_no_server(monkeypatch: pytest.MonkeyPatch, server: WebServer) -> None:
    # Port 9 discards, and is closed nearly everywhere.
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": "http://127.0.0.1:9"})
    message = "store.json: cannot be reached, after 5 tries (the server cannot be reached)"
    assert message in fails("info", URL)


def test_no_store(server: WebServer) -> None:
    assert "there is no store here, or it is not finished" in fails("info", f"{URL}/deeper")
    server.files[f"bucket/store/{MARKER}"] = b"{}"
    message = f"{URL}/store.json: is not the marker of a store (it has no format)"
    assert message in fails("info", URL)
    server.files[f"bucket/store/{MARKER}"] = bytes(2 << 20)
    assert "is longer than 1048576 bytes" in fails("info", URL)


@pytest.mark.parametrize(
    "url", ["gopher://host/store", "s3://", "https://host/store?key=secret", "s3://a::s3://b"]
)
def test_what_is_no_place_of_a_store(server: WebServer, url: str) -> None:
    message = fails("info", url)
    assert "is not known" in message or "is not the URL of one folder" in message
    assert "secret" not in message


def test_without_its_library(monkeypatch: pytest.MonkeyPatch, server: WebServer) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    assert fails("info", URL) == (
        f"{URL}: obstore is not installed. Run: pip install 'dist_train[remote]'."
    )


def test_wrong_bytes_are_fetched_again(
    server: WebServer, folder: Path, cache: CacheSettings
) -> None:
    store = Store(URL, cache)
    length, first = math.prod(store.shape(5)), int(store.table["offset"][5])
    place = f"bytes {first}-{first + length - 1}/500000"
    wrong = Answer(bytes(length), 206, {"Content-Range": place})
    server.faults = [wrong]
    np.testing.assert_array_equal(store.read(5), Store(folder).read(5))
    for path in shards_of(cache):
        path.unlink()
    store = Store(URL, cache)
    server.faults = [wrong, wrong]
    with pytest.raises(StoreError, match=r"'clip005' cannot be read \(the bytes are not") as caught:
        store.read(5)
    assert caught.value.where == f"{URL}/shards/shard-000001.tar"
    # Nothing wrong was kept.
    np.testing.assert_array_equal(store.read(5), Store(folder).read(5))


def test_lists_of_another_store(server: WebServer, cache: CacheSettings) -> None:
    server.files[f"bucket/store/{INDEX}"] = b"another"
    server.seen.clear()
    store = Store(URL, cache)
    assert len(server.seen) == 2, "the marker and the table"
    with pytest.raises(StoreError, match=r"index\.lmdb: the file is not that of the store"):
        store.index()
    server.files[f"bucket/store/{TABLE}"] = b"another"
    Store(URL, cache)
    with pytest.raises(StoreError, match=r"clips\.safetensors: the file is not that of the store"):
        Store(URL, CacheSettings(dir=cache.dir / "new"))


def test_without_its_table_the_index_is_read(
    server: WebServer,
    folder: Path,
    cache: CacheSettings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(reader, "MANY", CLIPS)
    del server.files[f"bucket/store/{TABLE}"]
    store = Store(URL, cache)
    assert f"{URL} has no clip table ('{TABLE}'), so each process reads" in caplog.text
    assert_same(store, folder)
    assert_same(pickle.loads(pickle.dumps(store)), folder)


def test_a_table_that_comes_damaged_is_fetched_again(
    server: WebServer, folder: Path, cache: CacheSettings
) -> None:
    whole = (folder / TABLE).read_bytes()
    place = f"bytes 0-{len(whole) - 1}/{len(whole)}"
    server.faults = ["whole", Answer(whole[:-1] + b"?", 206, {"Content-Range": place})]
    assert_same(Store(URL, cache), folder)
    assert len(pickle.dumps(Store(URL, cache))) < 10_000


def test_a_store_that_was_replaced_is_read_anew(
    server: WebServer, folder: Path, cache: CacheSettings, tmp_path: Path
) -> None:
    assert_same(Store(URL, cache), folder)
    other = tiny_store(tmp_path / "other")
    server.files = uploaded(other)
    assert_same(Store(URL, cache), other)


# --- the cache ------------------------------------------------------------------------------------


def test_damage_of_the_cache_is_mended(
    server: WebServer, folder: Path, cache: CacheSettings
) -> None:
    assert_same(Store(URL, cache), folder)
    first, second, third = shards_of(cache)
    first.write_bytes(os.urandom(first.stat().st_size))
    os.truncate(second, 1000)
    third.unlink()
    for name in (INDEX, TABLE):
        (first.parents[1] / name).write_bytes(b"?")
    assert_same(Store(URL, cache), folder)
    Store(URL, cache).index()
    # Of a column's byte, its first use tells.
    table = first.parents[1] / TABLE
    content = table.read_bytes()
    table.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StoreError, match="Delete it: it is downloaded again"):
        Store(URL, cache).table.frame()


def test_the_cache_is_bounded(server: WebServer, folder: Path, tmp_path: Path) -> None:
    size = 800_000
    cache = CacheSettings(dir=tmp_path / "cache", size=size)
    for _ in range(3):
        assert_same(Store(URL, cache), folder)
    held = sum(path.stat().st_blocks * 512 for path in tmp_path.glob("cache/*/**/*"))
    # A clip may have been written since room was made.
    assert 200_000 < held < size + 2 * UNIT


def test_shards_of_other_stores_give_way_first(
    server: WebServer, folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "cache/other/shards/shard-000000.tar"
    other.parent.mkdir(parents=True)
    (other.parent.parent / MARKER).write_bytes(b"{}")
    other.write_bytes(bytes(1 << 20))
    for path in (other, other.parent.parent / MARKER):
        os.utime(path, (0, 0))
    assert_same(Store(URL, CacheSettings(dir=tmp_path / "cache", size=2_000_000)), folder)
    assert other.stat().st_size == 0
    assert all(path.stat().st_size for path in shards_of(CacheSettings(dir=tmp_path / "cache"))[:3])


@pytest.mark.parametrize("is_open", [True, False])
def test_files_beside_the_shards_of_an_open_store_stay(tmp_path: Path, is_open: bool) -> None:
    settings = CacheSettings(dir=tmp_path, size=1_000_000)
    first = ClipCache(settings)
    table = first.of_store("other") / TABLE
    shard = table.parent / "shards/shard-000000.tar"
    for path, when in ((table, 0), (shard, 9)):
        path.write_bytes(bytes(400_000))
        os.utime(path, (when, when))
    # A worker's copy counts as well.
    copy = pickle.loads(pickle.dumps(first)) if is_open else None
    del first
    own = ClipCache(settings)
    index = own.of_store("own") / INDEX
    index.write_bytes(bytes(100_000))
    growing = index.parent / "shards/shard-000000.tar"
    for number in range(20):
        own.write(growing, number << 17, memoryview(bytes(1 << 16)))
    assert shard.stat().st_size == 0
    assert table.exists() is (copy is not None)
    assert index.exists()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_blocks * 512 for path in files) < settings.size + 2 * UNIT


def test_a_store_is_used_when_it_is_opened(
    server: WebServer, folder: Path, cache: CacheSettings
) -> None:
    assert_same(Store(URL, cache), folder)
    for path in shards_of(cache):
        os.utime(path, (0, 0))
    Store(URL, cache)
    assert all(path.stat().st_mtime > 0 for path in shards_of(cache))


def test_a_full_disk_is_told_once(
    server: WebServer,
    folder: Path,
    cache: CacheSettings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stores = [Store(URL, cache), Store(URL, cache)]
    caplog.clear()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        for store in stores:
            store.prefetch(range(CLIPS))
            assert_same(store, folder)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "clips are read without being kept (No space left on device)" in line
    assert not any(path.stat().st_size for path in shards_of(cache))


def test_memory_is_bounded_without_a_cache(
    server: WebServer, folder: Path, cache: CacheSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClipCache, "write", lambda *_: False)
    for name in ("HELD", "HELD_ALONE"):
        monkeypatch.setattr(remote_shards, name, 250_000)
    store = Store(URL, cache)
    store.prefetch(range(CLIPS))
    for (future,) in store._bytes._coming.values():  # type: ignore[attr-defined]
        future.result()
    held = store._bytes._held  # type: ignore[attr-defined]
    assert 0 < sum(map(len, held.values())) <= 250_000
    assert_same(store, folder)
    assert not held


def test_a_folder_that_cannot_be_written(server: WebServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match=r"Choose another folder by cache\.dir"):
        Store(URL, CacheSettings(dir=tmp_path / "file" / "cache"))


# --- whole blocks ---------------------------------------------------------------------------------


@pytest.fixture
def blocked(server: WebServer, cache: CacheSettings, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store that is read by blocks of 128 KiB: clips lie across them."""
    monkeypatch.setattr(blocks, "BLOCK", 1 << 17)
    store = Store(URL, cache)
    store.expect(CLIPS)
    server.seen.clear()
    return store


def ranges(server: WebServer) -> list[str]:
    return [seen.get("range", "") for seen in server.seen]


def blocks_in(folder: Path) -> int:
    sizes = [path.stat().st_size for path in folder.glob("shards/*.tar")]
    return sum(-(-size // (1 << 17)) for size in sizes)


def test_most_clips_are_read_by_whole_blocks(
    server: WebServer, folder: Path, blocked: Store
) -> None:
    blocked.prefetch(range(CLIPS))
    blocked.prefetch(range(CLIPS))
    assert_same(blocked, folder)
    assert len(server.seen) == blocks_in(folder)
    assert all(int(each[6:].split("-")[0]) % (1 << 17) == 0 for each in ranges(server))
    copy = pickle.loads(pickle.dumps(blocked))
    copy.prefetch(range(CLIPS))
    assert_same(copy, folder)
    assert len(server.seen) == blocks_in(folder)


@pytest.mark.parametrize("clips", [CLIPS // 2, CLIPS])
def test_few_clips_and_small_caches_need_single_clips(
    server: WebServer, folder: Path, tmp_path: Path, clips: int
) -> None:
    size = 1_300_000 if clips == CLIPS else 1 << 30
    store = Store(URL, CacheSettings(dir=tmp_path / "cache", size=size))
    store.expect(clips)
    server.seen.clear()
    store.prefetch([5])
    np.testing.assert_array_equal(store.read(5), Store(folder).read(5))
    first, last = map(int, ranges(server)[0].removeprefix("bytes=").split("-"))
    assert last - first + 1 == math.prod(store.shape(5))


@pytest.mark.parametrize("fault", ["wrong", "full", "killed"])
def test_blocks_that_do_not_come_right_give_way_to_clips(
    server: WebServer,
    folder: Path,
    blocked: Store,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    def write(self: ClipCache, path: Path, offset: int, content: memoryview) -> bool:
        if fault == "full":
            self.is_full = True
            return False
        part = content[: len(content) // 2] if fault == "killed" else bytes(len(content))
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.pwrite(descriptor, part, offset)
        os.close(descriptor)
        return True

    with monkeypatch.context() as patch:
        patch.setattr(ClipCache, "write", write)
        blocked.prefetch(range(CLIPS))
        for future in blocked._bytes._blocks.values():  # type: ignore[attr-defined]
            future.result()
    assert_same(blocked, folder)


# Locks all blocks until it is killed.
LOCK = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, 2); print(); sys.stdin.read()"


def test_a_block_that_another_process_fetches_is_waited_for(
    server: WebServer, folder: Path, blocked: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", LOCK, str(blocked.folder / ".blocks")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        blocked.prefetch(range(CLIPS))
        for future in blocked._bytes._blocks.values():  # type: ignore[attr-defined]
            future.result()
        assert not server.seen
        # It takes too long.
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "PATIENCE", 0.02)
            np.testing.assert_array_equal(blocked.read(0), Store(folder).read(0))
        assert len(server.seen) == 1
        # It is killed while it is waited for.
        Timer(0.1, other.kill).start()
        np.testing.assert_array_equal(blocked.read(1), Store(folder).read(1))
    blocked.prefetch(range(CLIPS))
    assert_same(blocked, folder)


def test_without_locks_blocks_are_fetched_all_the_same(
    server: WebServer, folder: Path, blocked: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", none)
    blocked.prefetch(range(CLIPS))
    assert_same(blocked, folder)
    assert len(server.seen) == blocks_in(folder)


def test_the_budget_is_given_in_order() -> None:
    async def order() -> list[int]:
        budget, found = remote_shards._Budget(10), []

        async def take(size: int) -> None:
            async with budget.taken(size):
                found.append(size)
                await asyncio.sleep(0.001)

        await asyncio.gather(*map(take, (6, 50, 3, 7)))
        assert budget._left == 10
        return found

    assert asyncio.run(order()) == [6, 50, 3, 7]


# --- several processes ----------------------------------------------------------------------------

# Reads all clips, in an order of its own, and prints their sum.
READ = """
import sys
from pathlib import Path
import numpy as np
from dist_train.config import CacheSettings
from dist_train.data.store.reader import Store
store = Store("s3://bucket/store", CacheSettings(dir=Path(sys.argv[1]), size=int(sys.argv[2])))
store.expect(len(store.table))
total = 0
for _ in range(3):
    order = np.random.default_rng(int(sys.argv[3])).permutation(len(store.table)).tolist()
    store.prefetch(order)
    total += sum(int(store.read(clip).sum(dtype=np.int64)) for clip in order)
print(total)
"""


def reading(cache: Path, size: int, seed: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", READ, str(cache), str(size), str(seed)],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_processes_share_a_cache_that_is_too_small(
    server: WebServer, folder: Path, tmp_path: Path
) -> None:
    local = Store(folder)
    total = 3 * sum(int(local.read(clip).sum(dtype=np.int64)) for clip in range(CLIPS))
    children = [reading(tmp_path / "cache", 500_000, seed) for seed in range(3)]
    for child in children:
        output, errors = child.communicate(timeout=60)
        assert output == f"{total}\n", errors


@pytest.mark.slow
def test_processes_fetch_each_block_once(
    server: WebServer, folder: Path, cache: CacheSettings
) -> None:
    assert cache.dir is not None
    children = [reading(cache.dir, 1 << 30, seed) for seed in range(3)]
    for child in children:
        output, errors = child.communicate(timeout=60)
        assert output, errors
    assert ranges(server).count(f"bytes=0-{blocks.BLOCK - 1}") == 3


@pytest.mark.slow
def test_a_killed_process_leaves_a_good_cache(
    server: WebServer, folder: Path, cache: CacheSettings
) -> None:
    assert cache.dir is not None
    # The marker, and the index, come; of the first shard half.
    server.faults = ["whole", "whole", "hang"]
    child = reading(cache.dir, 1 << 30, 0)
    assert server.half_sent.wait(60), child.communicate()
    child.send_signal(signal.SIGKILL)
    child.communicate()
    server.faults.clear()
    assert_same(Store(URL, cache), folder)


@pytest.mark.slow
def test_a_killed_worker_is_named_and_the_next_run_goes_on(
    server: WebServer, folder: Path, cache: CacheSettings
) -> None:
    store = Store(URL, cache)
    clips = ClipDataset(store, size=(16, 16), max_frames=None, augment=None)
    slots = [[Slot(clip, 0)] for clip in range(CLIPS)] * 20
    loader = Loader(clips, slots, LoaderSettings(workers=1, prefetch=1))
    batches = iter(loader)
    loader.wait()
    (worker,) = loader._workers
    worker.kill()
    with pytest.raises(DistTrainError, match=r"killed \(SIGKILL\)"):
        list(batches)
    assert_same(Store(URL, cache), folder)


# --- the parts ------------------------------------------------------------------------------------


def test_near_spans_become_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_shards, "GAP", 10)
    monkeypatch.setattr(remote_shards, "PIECE", 50)
    spans = [
        *(Span(0, 0, 20, 0), Span(0, 29, 20, 0)),
        *(Span(0, 50, 20, 0),),
        *(Span(0, 80, 200, 0),),
        *(Span(1, 281, 1, 0),),
    ]
    groups = list(near(spans))
    assert groups == [spans[:2], spans[2:3], spans[3:4], spans[4:]]
    assert list(near([])) == []


def test_each_batch_comes_with_those_of_the_same_worker() -> None:
    batches = [[Slot(number, 0)] for number in range(7)]
    found = list(with_coming(iter(batches), [2, 4]))
    assert [now for now, _ in found] == batches
    assert [[clips[0].clip for clips in coming] for _, coming in found] == [
        *([2, 4], [3, 5], [4, 6]),
        *([5], [6], [], []),
    ]
    assert list(with_coming(iter(batches), [])) == [(batch, []) for batch in batches]


def test_a_url_in_the_settings(server: WebServer, tmp_path: Path) -> None:
    config = tiny_config(Path("x"), tmp_path, f"store={URL}")
    assert config.store == URL
    assert tiny_config(Path("x"), tmp_path, "store=file:///a/b").store == Path("/a/b")
    with pytest.raises(ConfigError, match="path or a URL"):
        tiny_config(Path("x"), tmp_path, "store=3")
