"""Files of web servers that mean harm, or are broken: limits, redirections, private addresses."""

from __future__ import annotations

import gzip
import io
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import said

from dist_train import cli
from dist_train.data.raw import remote
from dist_train.data.raw.public_address import is_private
from dist_train.data.raw.remote import (
    Access,
    RemoteFolder,
    UrlTable,
    manifest_source,
    open_source,
)
from dist_train.data.store.build import PrepareSettings, prepare
from dist_train.data.store.reader import REJECTED, Store
from dist_train.data.table.manifest import read_manifest
from dist_train.errors import DecodeError, ManifestError

LIMIT = 1 << 20
SECRET = b"root:x:0:0"
BOMB = gzip.compress(bytes(20 * LIMIT), 1)


def clip() -> bytes:
    file = io.BytesIO()
    np.save(file, np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8))
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    elsewhere = ""

    def do_GET(self) -> None:
        name = self.path.strip("/").partition(".")[0]
        # The client may be gone before all is sent.
        with suppress(OSError):
            getattr(self, name)()

    def good(self) -> None:
        self.answer(clip())

    def error(self) -> None:
        self.answer(SECRET, status=500)

    def refused(self) -> None:
        self.answer(SECRET, status=410)

    def bomb(self) -> None:
        self.answer(BOMB, **{"Content-Encoding": "gzip"})

    def declared(self) -> None:
        self.answer(b"", length=LIMIT + 1)

    def loop(self) -> None:
        self.answer(b"", status=302, Location=self.path)

    def inward(self) -> None:
        self.answer(b"", status=302, Location=self.elsewhere)

    def to_a_file(self) -> None:
        self.answer(b"", status=302, Location="file:///etc/passwd")

    def text(self) -> None:
        self.answer(SECRET * 10)

    def endless(self) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        while True:
            self.wfile.write(bytes(1 << 16))

    def silent(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"x")
        self.wfile.flush()
        self.rfile.read(1)

    def drip(self) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        while True:
            self.wfile.write(b"x")
            self.wfile.flush()
            # Until the client goes, or for a moment.
            self.connection.settimeout(0.02)
            with suppress(TimeoutError):
                if not self.connection.recv(1):
                    return

    def answer(
        self, body: bytes, *, status: int = 200, length: int | None = None, **headers: str
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length or len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        if length is not None:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    place = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(Handler, "elsewhere", f"{place}/good.npy")
    monkeypatch.setattr(remote, "_failed", set())
    yield place
    server.shutdown()
    server.server_close()
    thread.join()


def fetched(url: str, **access: Any) -> bytes:
    allowed = {"private": True, "most_bytes": LIMIT, "stalled": 0.2} | access
    source = UrlTable({"a": url}, first_wait=0.001, tries=2, access=Access(**allowed))
    with source.fetched("a") as path:
        return path.read_bytes()


REASONS = {
    "error": r"cannot be fetched, after 2 tries \(HTTP 500\)$",
    "refused": r"the server refuses it \(HTTP 410\)$",
    "declared": r"it is larger than 1 MiB. --fetch-mib sets the limit",
    "endless": r"it is larger than 1 MiB",
    "loop": r"cannot be fetched, after 2 tries \(HTTP 302\)$",
    "to_a_file": r"cannot be fetched, after 2 tries \(NonHttpUrlRedirectClientError\)$",
    "silent": r"cannot be fetched, after 2 tries \(\w*Timeout\w*\)$",
    "drip": r"cannot be fetched, after 2 tries \(less than 64 KiB came in 0.2 s\)$",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_file_that_cannot_be_had_is_a_reject(server: str, kind: str) -> None:
    with pytest.raises(DecodeError, match=REASONS[kind]) as raised:
        fetched(f"{server}/{kind}")
    assert "root" not in str(raised.value), "words of the server"


def test_a_small_answer_is_not_unpacked_to_a_large_one(server: str) -> None:
    assert len(fetched(f"{server}/bomb")) < LIMIT


def test_no_limit_to_the_time_that_a_whole_file_takes(server: str) -> None:
    """Only to the time that it stands still; the library's own limit is five minutes a file."""
    source = UrlTable({"a": f"{server}/good"}, access=Access(private=True))
    with source.fetched("a"):
        system, _ = remote._file_system(f"{server}/good", source.access)
        assert system._session.timeout.total is None
        assert system._session.timeout.sock_read == 60


PRIVATE = {
    "http://127.0.0.1/a": "'127.0.0.1' is no public address. .*--allow-private",
    "http://localhost:1/a": "'localhost' is no public address",
    "http://169.254.169.254/latest/meta-data": "'169.254.169.254' is no public address",
    "http://10.1.2.3/a": "'10.1.2.3' is no public address",
    "ftp://me@192.168.0.1/a": "'192.168.0.1' is no public address",
    "file:///etc/passwd": "'file://' reads files of this machine. .*--allow-local",
    "local:///etc/passwd": "'local://' reads files of this machine",
    "zip:///tmp/a.zip": "'zip://' reads files of this machine",
}


@pytest.mark.parametrize("url", PRIVATE)
def test_private_places_in_a_table_are_refused(tmp_path: Path, url: str) -> None:
    rows = f"filename,label,url\na.npy,1,https://example.com/a.npy\nb.npy,0,{url}\n"
    (tmp_path / "clips.csv").write_text(rows)
    manifest = read_manifest(tmp_path / "clips.csv")
    with pytest.raises(ManifestError, match=rf"url of 'b\.npy' \(line 3\): {PRIVATE[url]}"):
        manifest_source(manifest)
    manifest_source(manifest, Access(local=True, private=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f.1"])
def test_an_address_is_looked_at_when_it_is_connected_to(server: str, host: str) -> None:
    """Whatever its name says, and however it is written."""
    port = server.rpartition(":")[2]
    with pytest.raises(DecodeError, match=r"leads to \S*127\S*1, which is no public"):
        fetched(f"http://{host}:{port}/good", private=False)
    assert not remote._failed


def test_a_redirection_to_a_private_address(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first server counts as public here: its connection alone is let through."""
    passed: list[str] = []

    def private_but_the_first(address: str) -> bool:
        passed.append(address)
        return len(passed) > 1

    monkeypatch.setattr("dist_train.data.raw.public_address.is_private", private_but_the_first)
    # Another address of the same server, so that the open connection is of no use.
    port = server.rpartition(":")[2]
    monkeypatch.setattr(Handler, "elsewhere", f"http://localhost:{port}/good.npy")
    with pytest.raises(DecodeError, match="which is no public address"):
        fetched(f"{server}/inward", private=False)
    assert len(passed) > 1


@pytest.mark.parametrize(
    ("address", "private"),
    [
        ("8.8.8.8", False),
        ("2001:4860:4860::8888", False),
        ("100.64.0.1", True),
        ("0.0.0.0", True),
        ("224.0.0.1", True),
        ("fe80::1%eth0", True),
        ("fd00::1", True),
        ("::ffff:10.0.0.1", True),
    ],
)
def test_which_addresses_are_private(address: str, private: bool) -> None:
    assert is_private(address) == private


def test_a_source_named_by_the_user_may_be_private(server: str) -> None:
    source = open_source(server)
    assert isinstance(source, RemoteFolder)
    with source.fetched("good.npy") as path:
        assert path.read_bytes() == clip()


def test_harmful_urls_on_the_command_line(
    server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each costs its own file; the list of rejects quotes nothing that came."""
    kinds = ["good", "refused", "declared", "loop", "text", "bomb"]
    rows = [f"{kind}.npy,{i % 2},{server}/{kind}.npy" for i, kind in enumerate(kinds)]
    table, out = tmp_path / "clips.csv", tmp_path / "store"
    table.write_text("\n".join(["filename,label,url", *rows]) + "\n")
    options = ("--manifest", table, "--out", out, "--roi", "none", "--fetch-mib", 1)
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["dist-train", "prepare", *map(str, options)])
        with pytest.raises(SystemExit):
            cli.main()
    assert "'127.0.0.1' is no public address. If you trust" in capsys.readouterr().err
    assert not out.exists()
    said("prepare", *options, "--allow-private", "--max-rejected", "90%", "--workers", 1)
    assert Store(out).table["filename"].tolist() == ["good.npy"]
    rejects = pd.read_csv(out / REJECTED).set_index("file")["reason"]
    assert set(rejects.index) == {f"{kind}.npy" for kind in kinds[1:]}
    assert "root" not in (out / REJECTED).read_text()


def test_what_could_not_be_fetched_is_tried_again(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reject that a bad spell of the server made does not last."""
    table, out = tmp_path / "clips.csv", tmp_path / "store"
    rows = [f"{name}.npy,{i},{server}/{name}.npy" for i, name in enumerate(("good", "error"))]
    table.write_text("\n".join(["filename,label,url", *rows]) + "\n")
    manifest = read_manifest(table)
    source = manifest_source(manifest, Access(private=True))
    assert isinstance(source, UrlTable)
    source, settings = replace(source, first_wait=0.001), PrepareSettings(roi="none")
    prepare(manifest, source, out, settings, workers=1, max_rejected=0.5)
    assert "cannot be fetched, after 5 tries (HTTP 500)" in (out / REJECTED).read_text()
    monkeypatch.setattr(Handler, "error", lambda self: self.answer(clip()[:-1] + b"x"))
    prepare(manifest, source, out, settings, workers=1)
    assert len(Store(out).table) == 2
