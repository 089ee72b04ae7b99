"""Raw files from afar: a real S3 server, and a gateway before it that fails as networks do."""

from __future__ import annotations

import http.client
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from helpers import ROOT, contents, dist_train, environment, run_well, said
from make_media import grey_frames, read_volume, write_video
from moto.server import ThreadedMotoServer

from dist_train.data.raw.remote import RemoteFolder, UrlTable, manifest_source, open_source
from dist_train.data.raw.source import LocalFolder, Source
from dist_train.data.raw.video import Video
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
    # Else, where keys are missing, the library looks for those of a machine at Amazon.
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


def s3_error(status: int, code: str) -> tuple[int, bytes]:
    return status, f"<Error><Code>{code}</Code><Message>{code} it is</Message></Error>".encode()


@dataclass
class Gateway:
    """Passes requests on to S3, except those that ``faults`` are waiting for.

    ``faults``: for the next GETs, in turn: (status, body) to answer; "cut": half of the body comes,
    then the end; "hang": half of the body, then nothing until the client is gone; "refuse": the
    connection is closed without an answer.
    """

    url: str = ""
    faults: list[tuple[int, bytes] | str] = field(default_factory=list)
    seen: list[dict[str, str]] = field(default_factory=list)
    half_sent: threading.Event = field(default_factory=threading.Event)

    def always(self, fault: tuple[int, bytes] | str) -> None:
        self.faults = [fault] * 1000


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture(scope="module")
def gateway_before_s3(s3: str) -> Iterator[Gateway]:
    gateway = Gateway()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.pass_on(None)

        def do_GET(self) -> None:
            gateway.seen.append(dict(self.headers))
            fault = gateway.faults.pop(0) if gateway.faults else None
            if fault == "refuse":
                self.close_connection = True
            elif isinstance(fault, tuple):
                self.answer(fault[0], {"Content-Type": "application/xml"}, fault[1])
            else:
                self.pass_on(fault)

        def do_PUT(self) -> None:
            self.pass_on(None)

        def pass_on(self, fault: str | None) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            upstream = http.client.HTTPConnection(s3.removeprefix("http://"))
            upstream.request(self.command, self.path, content, dict(self.headers))
            answer = upstream.getresponse()
            self.answer(answer.status, dict(answer.headers), answer.read(), fault)
            upstream.close()

        def answer(
            self, status: int, headers: dict[str, str], body: bytes, fault: str | None = None
        ) -> None:
            self.send_response_only(status)
            if self.command != "HEAD":
                headers = headers | {"Content-Length": str(len(body))}
            for name, value in headers.items():
                if name.lower() not in ("transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.end_headers()
            self.close_connection = fault is not None
            try:
                self.wfile.write(body[: len(body) // 2] if fault else body)
                self.wfile.flush()
                if fault == "hang":
                    gateway.half_sent.set()
                    self.rfile.read(1)
            except OSError:
                # The client is gone.
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    gateway.url = "http://{}:{}".format(*server.server_address)
    yield gateway
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def gateway(gateway_before_s3: Gateway, monkeypatch: pytest.MonkeyPatch) -> Gateway:
    """What fsspec takes for S3 in this test: a server with a bucket that holds ``FILES``."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("dist_train.data.raw.remote._in_a_row", set())
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": gateway_before_s3.url})
    gateway_before_s3.faults.clear()
    gateway_before_s3.half_sent.clear()
    system = fsspec.filesystem("s3")
    if not system.exists("bucket"):
        system.mkdir("bucket")
        for name, content in FILES.items():
            system.pipe(f"bucket/train/{name}", content, ACL="public-read")
        system.pipe("bucket/train/private.bin", b"private")
    gateway_before_s3.seen.clear()
    return gateway_before_s3


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, empty. Its path is short, as those of sockets must be."""
    folder = tmp_path_factory.mktemp("t")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def quick(source: Source) -> Source:
    return replace(source, first_wait=0.001)


def content_of(source: Source, name: str) -> bytes:
    with source.fetched(name) as path:
        return path.read_bytes()


@pytest.mark.parametrize("name", FILES)
def test_fetched_equals_what_is_there(gateway: Gateway, temporary: Path, name: str) -> None:
    source = open_source("s3://bucket/train/")
    with source.fetched(name) as path:
        assert path.read_bytes() == FILES[name]
        assert not list(temporary.iterdir())
    assert not list(temporary.iterdir())
    # One request a file: no listing, no asking for the size first.
    assert len(gateway.seen) == 1


def test_the_copy_is_gone_with_its_context(gateway: Gateway) -> None:
    with open_source("s3://bucket/train").fetched("b.bin") as path:
        copy = path.stat()
        assert copy.st_nlink == 0
    still_open = [link.stat() for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert not any(os.path.samestat(copy, other) for other in still_open)


def test_a_bad_spell_is_waited_out(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("dist_train.data.raw.remote.time.sleep", waits.append)
    gateway.faults += [s3_error(503, "SlowDown"), s3_error(500, "InternalError"), "cut", "cut"]
    assert content_of(open_source("s3://bucket/train"), "a.bin") == NOISE
    assert waits == [0.5, 1, 2, 4]
    assert len(gateway.seen) == 5


@pytest.mark.parametrize(
    "fault", [s3_error(503, "SlowDown"), (502, b"<html>bad gateway"), "cut", "refuse"], ids=str
)
def test_an_outage_ends_the_run(
    gateway: Gateway, temporary: Path, fault: tuple[int, bytes] | str
) -> None:
    """A file that does not come is a reject; five in a row are the fault of the network."""
    gateway.always(fault)
    source = replace(quick(open_source("s3://bucket/train")), tries=2)
    for name in ("a.bin", "b.bin", "sub/c.bin", "a.bin", "odd name #1%20?.bin"):
        with pytest.raises(DecodeError, match=r"fetched, after 2 tries \(.+\)$") as raised:
            content_of(source, name)
        assert raised.value.where == f"s3://bucket/train/{name}"
        assert "it is" not in raised.value.reason, "words of the server"
    # The HTTP client itself asks again where an old connection is found closed.
    assert len(gateway.seen) == 10 or fault == "refuse"
    with pytest.raises(StoreError, match=r"as were the 4 files before\. Check the network"):
        content_of(source, "private.bin")
    gateway.faults.clear()
    assert content_of(source, "b.bin") == FILES["b.bin"]
    # One that comes begins the count anew.
    gateway.always(fault)
    with pytest.raises(DecodeError):
        content_of(source, "a.bin")
    assert not list(temporary.iterdir())


def test_no_server_at_all(monkeypatch: pytest.MonkeyPatch, gateway: Gateway) -> None:
    # Port 9 discards, and is closed nearly everywhere.
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": "http://127.0.0.1:9"})
    with pytest.raises(StoreError, match=r"after 2 tries .*127\.0\.0\.1:9"):
        content_of(replace(quick(open_source("s3://bucket/train")), tries=2), "a.bin")


@pytest.mark.parametrize("name", ["nothing.mp4", "sub", "x" * 1100])
def test_a_file_that_is_not_there_is_rejected(gateway: Gateway, name: str) -> None:
    if len(name) > 1024:
        # As Amazon's own server says.
        gateway.faults.append(s3_error(400, "KeyTooLongError"))
    source = open_source("s3://bucket/train")
    with pytest.raises(DecodeError, match="the file is missing") as raised:
        content_of(source, name)
    assert raised.value.where == f"s3://bucket/train/{name}"
    # One request: trying again would not bring it.
    assert len(gateway.seen) == 1


def test_a_file_that_may_not_be_read_is_rejected(gateway: Gateway) -> None:
    assert content_of(open_source("s3://bucket/train"), "private.bin") == b"private"
    gateway.faults.append(s3_error(403, "AccessDenied"))
    with pytest.raises(DecodeError, match=r"a.bin: access is denied\. .*FSSPEC_S3_ANON"):
        content_of(open_source("s3://bucket/train"), "a.bin")


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"])
def test_wrong_credentials_end_the_run_at_once(gateway: Gateway, code: str) -> None:
    gateway.faults.append(s3_error(403, code))
    with pytest.raises(StoreError, match=rf"credentials are missing or wrong \({code}\)"):
        content_of(open_source("s3://bucket/train"), "a.bin")
    assert len(gateway.seen) == 1


def test_no_credentials_end_the_run_at_once(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    # Another instance than the one that has found its keys.
    others = {"endpoint_url": gateway.url, "use_ssl": False}
    monkeypatch.setitem(fsspec.config.conf, "s3", others)
    with pytest.raises(StoreError, match=r"credentials are missing or wrong \(Unable to"):
        content_of(open_source("s3://bucket/train"), "a.bin")
    assert not gateway.seen


def test_a_bucket_that_is_not_there_ends_the_run(gateway: Gateway) -> None:
    with pytest.raises(StoreError, match="no such bucket"):
        content_of(open_source("s3://buckle/train"), "a.bin")


class LyingFile(MemoryFile):
    """Declares a size that is not its own."""

    @property
    def size(self) -> int:
        return int(super().size) + LyingFileSystem.more

    @size.setter
    def size(self, _: int) -> None:
        pass


class LyingFileSystem(MemoryFileSystem):
    protocol = "lying"
    more = 0

    def _open(self, path: str, *arguments: object, **options: object) -> MemoryFile:
        return LyingFile(data=super()._open(path, *arguments, **options).getvalue())


@pytest.mark.parametrize("more", [-1, 1])
def test_another_size_than_declared_is_refused(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("lying", LyingFileSystem, clobber=True)
    fsspec.filesystem("lying").pipe("lying://place/a.bin", NOISE)
    source = quick(open_source("lying://place"))
    assert content_of(source, "a.bin") == NOISE
    monkeypatch.setattr(LyingFileSystem, "more", more)
    with pytest.raises(DecodeError, match=f"3000000 of {3000000 + more} bytes came"):
        content_of(source, "a.bin")


# What a process of its own does: 'fetch' prints the content's length while the copy is there.
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


def test_sigkill_leaves_nothing_behind(gateway: Gateway, temporary: Path) -> None:
    gateway.always("hang")
    child = own_process(temporary, FSSPEC_S3_ENDPOINT_URL=gateway.url, **KEYS)
    assert gateway.half_sent.wait(60), child.communicate()
    copies = [link.readlink() for link in Path(f"/proc/{child.pid}/fd").iterdir()]
    assert any(temporary in copy.parents for copy in copies), "it was not under way"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert not list(temporary.iterdir())


def test_public_bucket_by_fsspecs_own_settings(gateway: Gateway, temporary: Path) -> None:
    anonymous = {"FSSPEC_S3_ANON": "true", "FSSPEC_S3_ENDPOINT_URL": gateway.url}
    child = own_process(temporary, **anonymous)
    output, errors = child.communicate(timeout=60)
    assert output == f"{len(NOISE)}\n", errors
    assert len(gateway.seen) == 1
    assert "Authorization" not in gateway.seen[0]
    child = own_process(temporary, name="private.bin", **anonymous)
    assert "private.bin: access is denied" in child.communicate(timeout=60)[1]


def test_requests_are_signed_where_there_are_keys(gateway: Gateway) -> None:
    content_of(open_source("s3://bucket/train"), "b.bin")
    assert all("Authorization" in headers for headers in gateway.seen)


def test_no_room_for_the_copy(gateway: Gateway, temporary: Path) -> None:
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
    child = own_process(temporary, full, FSSPEC_S3_ENDPOINT_URL=gateway.url, **KEYS)
    _, errors = child.communicate(timeout=60)
    message = errors.strip().splitlines()[-1]
    assert f"StoreError: {temporary}: no room for a copy of s3://bucket/train/a.bin" in message
    assert "TMPDIR" in message
    # A full disk does not get emptier by asking the server again.
    assert len(gateway.seen) == 1


def length_of(item: tuple[Source, str]) -> tuple[str, int]:
    source, name = item
    return name, len(content_of(source, name))


def test_worker_processes_fetch_after_their_parent_did(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec's event loop runs in a thread, which does not come along into another process."""
    source = open_source("s3://bucket/train")
    content_of(source, "b.bin")
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", gateway.url)
    names = ["a.bin", "b.bin", "sub/c.bin", "a.bin"]
    # Not of the fork server, which may be older than these settings.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        lengths = dict(pool.map(length_of, [(source, name) for name in names]))
    assert lengths == {name: len(FILES[name]) for name in names}


# Remote places other than S3, by what fsspec's own core can do.


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    system = fsspec.filesystem("memory")
    for name, content in FILES.items():
        system.pipe(f"/place/{name}", content)
    yield system
    system.rm("/place", recursive=True)


def test_any_file_system_of_fsspec(memory: MemoryFileSystem) -> None:
    source = open_source("memory://place")
    for name, content in FILES.items():
        assert content_of(source, name) == content
    with pytest.raises(DecodeError, match=r"memory://place/x\.mp4: the file is missing"):
        content_of(source, "x.mp4")


@pytest.mark.parametrize(
    "name", ["../place/b.bin", "/place/b.bin", "sub/../../place/b.bin", "b.bin::memory://place"]
)
def test_names_stay_inside_the_place(memory: MemoryFileSystem, name: str) -> None:
    source = open_source("memory://place")
    with pytest.raises(DecodeError, match="is not the name of a file in there"):
        content_of(source, name)
    assert not source.changed_since(name, 0)


def test_a_web_server(gateway: Gateway) -> None:
    """The same server without S3's language: plain GETs, and names that need quoting."""
    source = open_source(f"{gateway.url}/bucket/train")
    for name in ("a.bin", "odd name #1%20?.bin"):
        assert content_of(source, name) == FILES[name]
    assert {headers["Accept-Encoding"] for headers in gateway.seen} == {"identity"}
    gateway.faults.append((404, b""))
    with pytest.raises(DecodeError, match="is missing"):
        content_of(source, "a.bin")
    with pytest.raises(DecodeError, match="denied"):
        content_of(source, "private.bin")
    gateway.faults.append((401, b""))
    with pytest.raises(StoreError, match=r"credentials are missing or wrong \(HTTP 401"):
        content_of(source, "a.bin")
    gateway.faults += [(503, b""), (429, b""), "cut"]
    assert content_of(quick(source), "a.bin") == NOISE


def test_messages_keep_secrets() -> None:
    table = UrlTable({"a": "https://h/a?Signature=secret", "b": "ftp://me:secret@h/b"})
    assert table.where("a") == "https://h/a"
    assert table.where("b") == "ftp://h/b"
    assert "secret" not in repr(table)


# The rest of what a source answers.


@pytest.mark.parametrize("scheme", ["", "file://", "local://"])
def test_local_files_are_used_where_they_are(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "a.bin").write_bytes(b"here")
    source = open_source(f"{scheme}{tmp_path}")
    assert source == open_source(tmp_path) == LocalFolder(tmp_path)
    with source.fetched("a.bin") as path:
        assert path == tmp_path / "a.bin"
    assert source.missing(["a.bin", "b.bin", "c.bin"]) == ["b.bin", "c.bin"]
    assert source.where("b.bin") == str(tmp_path / "b.bin")
    assert source.narrowed(["a.bin"]) is source


def test_local_change_is_when_the_file_was_put_there(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"here")
    os.utime(tmp_path / "a.bin", (0, 0))
    changed = (tmp_path / "a.bin").stat().st_ctime
    source = open_source(tmp_path)
    assert source.changed_since("a.bin", changed - 1)
    assert not source.changed_since("a.bin", changed)
    assert not source.changed_since("b.bin", 0)


def test_remote_change(gateway: Gateway) -> None:
    source = open_source("s3://bucket/train")
    modified = fsspec.filesystem("s3").modified("bucket/train/b.bin").timestamp()
    assert source.changed_since("b.bin", modified - 1)
    # The server rounds down.
    assert source.changed_since("b.bin", modified + 0.5)
    assert not source.changed_since("b.bin", modified + 1)
    assert not source.changed_since("nothing.bin", 0)
    assert source.missing(["b.bin", "nothing.bin"]) == []


def test_a_server_that_tells_no_time(gateway: Gateway) -> None:
    assert not open_source(f"{gateway.url}/bucket/train").changed_since("b.bin", 0)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere", "nowhere: the source folder does not exist"),
        ("file:///nowhere", "/nowhere: the source folder does not exist"),
        ("s4://bucket/train", "s4://bucket/train: 's4://' is not known"),
        ("s3://", "is not the URL of one place"),
        ("zip://a::s3://bucket/a.zip", "is not the URL of one place"),
    ],
)
def test_no_such_source(place: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        open_source(place)


@pytest.mark.parametrize(
    ("url", "package", "fix"), [("s3://bucket", "s3fs", r"pip install 'dist_train\[s3\]'")]
)
def test_missing_library(monkeypatch: pytest.MonkeyPatch, url: str, package: str, fix: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    # As in a process that has not used it yet.
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(StoreError, match=f"the library for 's3://' is not installed. .*{fix}"):
        open_source(url)


def manifest_with(tmp_path: Path, rows: Callable[[str], str]) -> Source:
    path = tmp_path / "clips.csv"
    lines = [f"{name},{i % 2},{rows(name)}" for i, name in enumerate(("a.bin", "b.bin"))]
    path.write_text("\n".join(["filename,label,url", *lines]) + "\n")
    return manifest_source(read_manifest(path))


def test_urls_of_the_manifest(gateway: Gateway, memory: MemoryFileSystem, tmp_path: Path) -> None:
    urls = {"a.bin": "s3://bucket/train/sub/c.bin", "b.bin": "memory://place/b.bin"}
    source = manifest_with(tmp_path, urls.__getitem__)
    assert source.where("a.bin") == urls["a.bin"]
    assert content_of(source, "a.bin") == FILES["sub/c.bin"]
    assert content_of(source, "b.bin") == FILES["b.bin"]
    assert source.missing(["a.bin"]) == []


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
    assert narrow.tries == 3
    assert [narrow.where(name) for name in names[5:9]] == [table.where(name) for name in names[5:9]]
    with pytest.raises(KeyError):
        narrow.where(names[0])


MEDIA = {
    "mp4": {},
    "mov": {},
    "avi": {"codec": "mpeg4"},
    "mkv": {"codec": "ffv1"},
    "webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}},
    "gif": {"codec": "gif", "pix_fmt": "gray"},
    "mpeg": {"codec": "mpeg1video", "rate": 25},
}


@pytest.mark.parametrize("kind", [*MEDIA, "npy", "npz", "tif"])
def test_a_copy_without_a_name_decodes_alike(
    memory: MemoryFileSystem, tmp_path: Path, kind: str
) -> None:
    import tifffile

    path = tmp_path / f"clip.{kind}"
    frames = grey_frames()
    if kind in MEDIA:
        write_video(path, frames, **MEDIA[kind])
    elif kind == "tif":
        tifffile.imwrite(path, frames[..., 0], photometric="minisblack")
    else:
        (np.save if kind == "npy" else np.savez_compressed)(path, frames[..., 0])
    memory.pipe(f"/place/{path.name}", path.read_bytes())
    source = open_source("memory://place")
    with source.fetched(path.name) as copy:
        assert copy.suffix == ""
        if kind in MEDIA:
            # Twice, as the search for an outline may decode a file again.
            video = Video(copy, source.where(path.name))
            for _ in range(2):
                luma = np.stack([frame.luma for frame in video])
                expected = np.stack([frame.luma for frame in Video(path)])
                np.testing.assert_array_equal(luma, expected)
        else:
            volume = read_volume(copy, where=source.where(path.name), suffix=path.suffix)
            np.testing.assert_array_equal(volume, read_volume(path))


def test_a_store_from_s3_is_that_of_the_files(
    gateway: Gateway, temporary: Path, tmp_path: Path
) -> None:
    """By the place, and by the manifest's URLs; a bad spell and a bad file on the way."""
    raw, videos = tmp_path / "raw", ["a.mp4", "b.mp4", "c.mp4", "broken.mp4", "d.mp4"]
    raw.mkdir()
    system = fsspec.filesystem("s3")
    for number, name in enumerate(videos):
        write_video(raw / name, grey_frames(seed=number))
        if name == "broken.mp4":
            (raw / name).write_bytes(b"no video")
        system.pipe(f"bucket/clips/{name}", (raw / name).read_bytes())
    rows = [f"{name},s3://bucket/clips/{name},{n % 2}" for n, name in enumerate(videos)]
    table = tmp_path / "clips.csv"
    table.write_text("\n".join(["filename,url,label", *rows]) + "\n")
    settings = {"HOME": str(tmp_path), "TMPDIR": str(temporary), **KEYS}

    def prepare(out: Path, *source: object) -> list[object]:
        options = ("--manifest", table, "--out", out, "--roi", "none", "--shard-clips", 2)
        return ["prepare", *options, "--max-rejected", "20%", *source]

    def store(name: str, *source: object) -> dict[str, bytes]:
        command = dist_train(*prepare(tmp_path / name, *source))
        run_well(command, FSSPEC_S3_ENDPOINT_URL=gateway.url, **settings)
        assert not list(temporary.iterdir())
        return contents(tmp_path / name)

    said(*prepare(tmp_path / "here", "--source", raw))
    here = contents(tmp_path / "here")
    gateway.faults = [(503, b""), "cut", "refuse"]
    assert store("place", "--source", "s3://bucket/clips") == here
    assert store("urls") == here
    assert gateway.faults == []
    repaired = tmp_path / "place"
    (repaired / "shards" / "shard-000001.tar").write_bytes(b"x")
    repair = dist_train("verify", repaired, "--repair", "s3://bucket/clips")
    run_well(repair, FSSPEC_S3_ENDPOINT_URL=gateway.url, **settings)
    assert contents(repaired) == here


def test_a_link_that_leads_nowhere_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").symlink_to("gone")
    assert LocalFolder(tmp_path).hint("a.mp4") == "It is a link that leads nowhere."
