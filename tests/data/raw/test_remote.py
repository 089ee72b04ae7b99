"""Files from S3, the web and other places: whole, or an error with the right consequence."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from helpers import ROOT, contents, dist_train, environment, run_well, said
from make_media import grey_frames, write_video
from moto.server import ThreadedMotoServer
from web_server import Answer, WebServer, s3_error, web_server

from dist_train.data.raw import remote
from dist_train.data.raw.remote import RemoteFolder, UrlTable, manifest_source, open_source
from dist_train.data.raw.source import LocalFolder, Source
from dist_train.data.table.manifest import read_manifest
from dist_train.errors import DecodeError, ManifestError, StoreError

NOISE = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()
FILES = {
    "a.bin": NOISE,
    "b.bin": b"other bytes",
    "empty.bin": b"",
    "sub/c.bin": b"in a folder",
    "odd name #1%20?.bin": b"letters like others",
}
KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    # Without keys, the library would look for those of a machine at Amazon.
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


@pytest.fixture(scope="module")
def server() -> Iterator[WebServer]:
    with web_server() as server:
        yield server


@pytest.fixture
def s3(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> WebServer:
    """A server that fsspec takes for S3, with ``FILES`` in a bucket."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "_failed", set())
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": server.url})
    server.faults.clear()
    server.seen.clear()
    server.half_sent.clear()
    server.files = {f"bucket/train/{name}": content for name, content in FILES.items()}
    server.files["bucket/train/private.bin"] = Answer(b"private", private=True)
    return server


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, empty. Its path is short, as those of sockets must be."""
    folder = tmp_path_factory.mktemp("t")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    system = fsspec.filesystem("memory")
    for name, content in FILES.items():
        system.pipe(f"/place/{name}", content)
    yield system
    system.rm("/place", recursive=True)


def quick(source: Source) -> Source:
    return replace(source, first_wait=0.001, tries=2)


def content_of(source: Source, name: str) -> bytes:
    with source.fetched(name) as path:
        return path.read_bytes()


def test_fetched_equals_what_is_there(s3: WebServer, temporary: Path) -> None:
    source = open_source("s3://bucket/train/")
    for name, content in FILES.items():
        with source.fetched(name) as path:
            assert path.read_bytes() == content
            copy = path.stat()
            assert copy.st_nlink == 0
        assert not list(temporary.iterdir())
        still_open = [link.stat() for link in Path("/proc/self/fd").iterdir() if link.exists()]
        assert not any(os.path.samestat(copy, other) for other in still_open)
    # One request a file: no listing, no asking for the size first.
    assert len(s3.seen) == len(FILES)


def test_a_bad_spell_is_waited_out(s3: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("dist_train.data.raw.remote.time.sleep", waits.append)
    s3.faults = [s3_error(503, "SlowDown"), s3_error(500, "InternalError"), "cut", "cut"]
    assert content_of(open_source("s3://bucket/train"), "a.bin") == NOISE
    assert waits == [0.5, 1, 2, 4]
    assert len(s3.seen) == 5


@pytest.mark.parametrize("fault", [s3_error(503, "SlowDown"), "refuse"], ids=["503", "refuse"])
def test_an_outage_ends_the_run(s3: WebServer, temporary: Path, fault: Answer) -> None:
    """One file that does not come is a reject; for five in a row the network is at fault."""
    s3.faults = [fault] * 1000
    source = quick(open_source("s3://bucket/train"))
    for name in ("a.bin", "b.bin", "sub/c.bin", "a.bin", "odd name #1%20?.bin"):
        with pytest.raises(DecodeError, match=r"fetched, after 2 tries \(.+\)$") as raised:
            content_of(source, name)
        assert raised.value.where == f"s3://bucket/train/{name}"
        assert "it is" not in raised.value.reason, "words of the server"
    # The HTTP client itself asks again when it finds an old connection closed.
    assert len(s3.seen) == 10 or fault == "refuse"
    with pytest.raises(StoreError, match=r"as were the 4 files before\. Check the network"):
        content_of(source, "private.bin")
    s3.faults.clear()
    assert content_of(source, "b.bin") == FILES["b.bin"]
    # A success resets the count.
    s3.faults = [fault] * 1000
    with pytest.raises(DecodeError):
        content_of(source, "a.bin")
    assert not list(temporary.iterdir())


def test_no_server_at_all(monkeypatch: pytest.MonkeyPatch, s3: WebServer) -> None:
    # Port 9 discards, and is closed nearly everywhere.
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": "http://127.0.0.1:9"})
    with pytest.raises(StoreError, match=r"after 2 tries .*127\.0\.0\.1:9"):
        content_of(quick(open_source("s3://bucket/train")), "a.bin")


S3_REFUSALS = {
    (404, "NoSuchKey"): (DecodeError, "the file is missing$"),
    # Amazon's answer to a long name.
    (400, "KeyTooLongError"): (DecodeError, "the file is missing$"),
    (403, "AccessDenied"): (DecodeError, r"access is denied\. .*FSSPEC_S3_ANON"),
    (403, "ExpiredToken"): (StoreError, r"credentials are missing or wrong \(ExpiredToken\)"),
    (404, "NoSuchBucket"): (StoreError, "there is no such bucket"),
}


@pytest.mark.parametrize("refusal", S3_REFUSALS)
def test_refusals_of_one_file_and_of_all(s3: WebServer, refusal: tuple[int, str]) -> None:
    error, message = S3_REFUSALS[refusal]
    s3.faults = [s3_error(*refusal)]
    with pytest.raises(error, match=message) as raised:
        content_of(open_source("s3://bucket/train"), "a.bin")
    assert raised.value.where == "s3://bucket/train/a.bin"
    # Another try would not help.
    assert len(s3.seen) == 1


def test_no_credentials_end_the_run_at_once(s3: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    # Another instance than the one that has found its keys.
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": s3.url, "use_ssl": False})
    with pytest.raises(StoreError, match=r"credentials are missing or wrong \(Unable to"):
        content_of(open_source("s3://bucket/train"), "a.bin")
    assert not s3.seen


@pytest.mark.parametrize("more", [-1, 1])
def test_another_size_than_declared_is_refused(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    declared = len(NOISE) + more
    monkeypatch.setattr(MemoryFile, "size", property(lambda _: declared))
    with pytest.raises(DecodeError, match=f"3000000 of {declared} bytes came"):
        content_of(quick(open_source("memory://place")), "a.bin")


# Fetches a file in a process of its own, and prints its length.
FETCH = """
import sys
from dist_train.data.raw.remote import open_source
with open_source("s3://bucket/train").fetched(sys.argv[1]) as path:
    print(len(path.read_bytes()))
"""


def own_process(
    temporary: Path, prelude: str = "", name: str = "a.bin", **env: str
) -> subprocess.Popen[str]:
    inherited = {k: v for k, v in environment().items() if not k.startswith(("AWS_", "FSSPEC_"))}
    # No settings or credentials of whoever runs the test.
    settings = {"HOME": str(temporary.parent), "TMPDIR": str(temporary)}
    return subprocess.Popen(
        [sys.executable, "-c", prelude + FETCH, name],
        env=inherited | settings | env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_sigkill_leaves_nothing_behind(s3: WebServer, temporary: Path) -> None:
    s3.faults = ["hang"]
    child = own_process(temporary, FSSPEC_S3_ENDPOINT_URL=s3.url, **KEYS)
    assert s3.half_sent.wait(60), child.communicate()
    copies = [link.readlink() for link in Path(f"/proc/{child.pid}/fd").iterdir()]
    assert any(temporary in copy.parents for copy in copies), "it was not under way"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert not list(temporary.iterdir())


def test_public_bucket_by_fsspecs_own_settings(s3: WebServer, temporary: Path) -> None:
    anonymous = {"FSSPEC_S3_ANON": "true", "FSSPEC_S3_ENDPOINT_URL": s3.url}
    output, errors = own_process(temporary, **anonymous).communicate(timeout=60)
    assert output == f"{len(NOISE)}\n", errors
    child = own_process(temporary, name="private.bin", **anonymous)
    assert "private.bin: access is denied" in child.communicate(timeout=60)[1]
    # With keys, the request is signed.
    assert content_of(open_source("s3://bucket/train"), "private.bin") == b"private"


def test_no_room_for_the_copy(s3: WebServer, temporary: Path) -> None:
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
    child = own_process(temporary, full, FSSPEC_S3_ENDPOINT_URL=s3.url, **KEYS)
    message = child.communicate(timeout=60)[1].strip().splitlines()[-1]
    assert f"StoreError: {temporary}: no room for a copy of s3://bucket/train/a.bin" in message
    assert "TMPDIR" in message
    # A full disk does not get emptier by asking the server again.
    assert len(s3.seen) == 1


@pytest.mark.parametrize(
    "name", ["../place/b.bin", "/place/b.bin", "sub/../../place/b.bin", "../b.bin::memory://place"]
)
def test_names_stay_inside_the_place(memory: MemoryFileSystem, name: str) -> None:
    source = open_source("memory://place")
    with pytest.raises(DecodeError, match="is not the name of a file in there"):
        content_of(source, name)
    assert not source.changed_since(name, 0)


def test_an_array_in_a_file(memory: MemoryFileSystem) -> None:
    source = open_source("memory://place")
    assert content_of(source, "b.bin::t0/raw") == content_of(source, "b.bin")
    # What follows the file's name is no place.
    assert content_of(source, "b.bin::memory://other") == content_of(source, "b.bin")
    assert source.where("b.bin::t0/raw") == "memory://place/b.bin::t0/raw"


def test_folders_are_refused(memory: MemoryFileSystem) -> None:
    memory.pipe("/place/scan/1.dcm", b"x")
    with pytest.raises(DecodeError, match="scan: is a folder, and folders are read on a local"):
        content_of(open_source("memory://place"), "scan")
    with pytest.raises(DecodeError, match="the file is missing"):
        content_of(open_source("memory://place"), "scan2")


def test_a_web_server(s3: WebServer) -> None:
    """Plain GETs, and names that need quoting. A source may be at a private address."""
    source = open_source(f"{s3.url}/bucket/train")
    for name in ("a.bin", "odd name #1%20?.bin"):
        assert content_of(source, name) == FILES[name]
    assert {headers["Accept-Encoding"] for headers in s3.seen} == {"identity"}
    with pytest.raises(DecodeError, match="is missing"):
        content_of(source, "nothing.bin")
    with pytest.raises(DecodeError, match="denied"):
        content_of(source, "private.bin")
    s3.faults = [Answer(status=401)]
    with pytest.raises(StoreError, match=r"credentials are missing or wrong \(HTTP 401"):
        content_of(source, "a.bin")
    s3.faults = [Answer(status=429), "cut"]
    assert content_of(replace(source, first_wait=0.001), "a.bin") == NOISE
    # The web tells no time of change.
    assert not source.changed_since("b.bin", 0)


def test_messages_keep_secrets() -> None:
    table = UrlTable({"a": "https://h/a?Signature=secret", "b": "ftp://me:secret@h/b"})
    assert table.where("a") == "https://h/a"
    assert table.where("b") == "ftp://h/b"
    assert "secret" not in repr(table)


def test_remote_change(s3: WebServer) -> None:
    source = open_source("s3://bucket/train")
    modified = 2 * 24 * 3600
    assert source.changed_since("b.bin", modified - 1)
    # The server rounds down.
    assert source.changed_since("b.bin", modified + 0.5)
    assert not source.changed_since("b.bin", modified + 1)
    assert not source.changed_since("nothing.bin", 0)
    assert source.missing(["b.bin", "nothing.bin"]) == []


def manifest_with(tmp_path: Path, url: Callable[[str], str]) -> Source:
    path = tmp_path / "clips.csv"
    lines = [f"{name},{i % 2},{url(name)}" for i, name in enumerate(("a.bin", "b.bin"))]
    path.write_text("\n".join(["filename,label,url", *lines]) + "\n")
    return manifest_source(read_manifest(path))


def test_urls_of_the_manifest(s3: WebServer, memory: MemoryFileSystem, tmp_path: Path) -> None:
    urls = {"a.bin": "s3://bucket/train/sub/c.bin", "b.bin": "memory://place/b.bin"}
    source = manifest_with(tmp_path, urls.__getitem__)
    assert source.where("a.bin") == urls["a.bin"]
    assert content_of(source, "a.bin") == FILES["sub/c.bin"]
    assert content_of(source, "b.bin") == FILES["b.bin"]
    memory.rm("/place/b.bin")
    with pytest.raises(DecodeError, match=r"memory://place/b\.bin: the file is missing"):
        content_of(source, "b.bin")


def test_two_arrays_of_one_url(memory: MemoryFileSystem, tmp_path: Path) -> None:
    path = tmp_path / "clips.csv"
    rows = ["b.bin::x,0,memory://place/b.bin", "b.bin::y,1,memory://place/b.bin"]
    path.write_text("\n".join(["filename,label,url", *rows]) + "\n")
    source = manifest_source(read_manifest(path))
    assert content_of(source, "b.bin::y") == FILES["b.bin"]
    path.write_text("\n".join(["filename,label,url", rows[0], f"c{rows[0]}"]) + "\n")
    with pytest.raises(ManifestError, match="have the same url"):
        manifest_source(read_manifest(path))


def test_manifest_without_usable_urls(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"url of 'b\.bin' is '', not .*\(line 3"):
        manifest_with(tmp_path, lambda name: "memory://place/a" if name == "a.bin" else "")
    with pytest.raises(StoreError, match="'s4://' is not known"):
        manifest_with(tmp_path, lambda name: f"{'s3' if name == 'a.bin' else 's4'}://x/y")
    chained = manifest_with(tmp_path, lambda name: f"memory://{name}" + "::x" * (name == "a.bin"))
    with pytest.raises(DecodeError, match="is not the URL of one place"):
        content_of(chained, "a.bin")


def test_every_source_travels_small() -> None:
    names = [f"{i}.mp4" for i in range(100_000)]
    table = UrlTable({name: f"s3://bucket/train/{name}" for name in names}, tries=3)
    narrow = table.narrowed(names[5:9])
    for source in (narrow, RemoteFolder("s3://bucket/train"), LocalFolder(Path("x"))):
        sent = pickle.dumps(source)
        assert len(sent) < 1000
        assert pickle.loads(sent) == source
    assert [narrow.where(name) for name in names[5:9]] == [table.where(name) for name in names[5:9]]
    with pytest.raises(KeyError):
        narrow.where(names[0])


def test_a_store_from_s3_is_that_of_the_files(
    s3: WebServer, temporary: Path, tmp_path: Path
) -> None:
    """By the place, and by the manifest's URLs, through a bad spell and with a bad file."""
    raw, videos = tmp_path / "raw", ["a.mp4", "b.mp4", "c.mp4", "broken.mp4", "d.mp4"]
    raw.mkdir()
    for number, name in enumerate(videos):
        write_video(raw / name, grey_frames(seed=number))
        if name == "broken.mp4":
            (raw / name).write_bytes(b"no video")
        s3.files[f"bucket/clips/{name}"] = (raw / name).read_bytes()
    rows = [f"{name},s3://bucket/clips/{name},{n % 2}" for n, name in enumerate(videos)]
    table = tmp_path / "clips.csv"
    table.write_text("\n".join(["filename,url,label", *rows]) + "\n")
    settings = {"HOME": str(tmp_path), "TMPDIR": str(temporary), **KEYS}

    def prepare(out: Path, *source: object) -> list[object]:
        options = ("--manifest", table, "--out", out, "--roi", "none", "--shard-clips", 2)
        return ["prepare", *options, "--max-rejected", "20%", *source]

    def store(name: str, *source: object) -> dict[str, bytes]:
        command = dist_train(*prepare(tmp_path / name, *source))
        run_well(command, FSSPEC_S3_ENDPOINT_URL=s3.url, **settings)
        assert not list(temporary.iterdir())
        return contents(tmp_path / name)

    said(*prepare(tmp_path / "here", "--source", raw))
    here = contents(tmp_path / "here")
    s3.faults = [s3_error(503, "SlowDown"), "cut", "refuse"]
    assert store("place", "--source", "s3://bucket/clips") == here
    assert store("urls") == here
    assert s3.faults == []
    repaired = tmp_path / "place"
    (repaired / "shards" / "shard-000001.tar").write_bytes(b"x")
    repair = dist_train("verify", repaired, "--repair", "s3://bucket/clips")
    run_well(repair, FSSPEC_S3_ENDPOINT_URL=s3.url, **settings)
    assert contents(repaired) == here


@pytest.mark.slow
def test_another_makers_s3_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        for name, value in KEYS.items():
            monkeypatch.setenv(name, value)
        url = "http://{}:{}".format(*server.get_host_and_port())
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": url})
        bucket = fsspec.filesystem("s3", endpoint_url=url)
        bucket.mkdir("lab")
        bucket.pipe({f"lab/train/{name}": content for name, content in FILES.items()})
        source = open_source("s3://lab/train")
        assert {name: content_of(source, name) for name in FILES} == FILES
        with pytest.raises(DecodeError, match="the file is missing"):
            content_of(source, "absent.bin")
    finally:
        server.stop()
