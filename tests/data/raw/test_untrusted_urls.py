"""URLs from a table of unknown origin: limits, redirections, private addresses."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest
from helpers import said
from web_server import Answer, WebServer, web_server

from dist_train import cli
from dist_train.data.raw import public_address, remote
from dist_train.data.raw.public_address import is_private
from dist_train.data.raw.remote import Access, UrlTable, manifest_source
from dist_train.data.store.build import PrepareSettings, prepare
from dist_train.data.store.reader import REJECTED, Store
from dist_train.data.table.manifest import read_manifest
from dist_train.errors import DecodeError, ManifestError

LIMIT = 1 << 20
SECRET = b"root:x:0:0"
BOMB = gzip.compress(bytes(20 * LIMIT), 1)


def clip(level: int = 7) -> bytes:
    file = io.BytesIO()
    np.save(file, np.full((4, 8, 8), level, dtype=np.uint8))
    return file.getvalue()


@pytest.fixture(scope="module")
def started() -> Iterator[WebServer]:
    with web_server() as server:
        yield server


@pytest.fixture
def server(started: WebServer, monkeypatch: pytest.MonkeyPatch) -> WebServer:
    monkeypatch.setattr(remote, "_failed", set())
    # Each test has its own sessions.
    fsspec.get_filesystem_class("http").clear_instance_cache()
    started.files = {
        "good": clip(),
        "error": Answer(SECRET, 500),
        "refused": Answer(SECRET, 410),
        "bomb": Answer(BOMB, headers={"Content-Encoding": "gzip"}),
        "declared": Answer(headers={"Content-Length": str(LIMIT + 1)}, end="cut"),
        "loop": Answer(status=302, headers={"Location": "/loop"}),
        "to_a_file": Answer(status=302, headers={"Location": "file:///etc/passwd"}),
        "text": SECRET * 10,
        "endless": Answer(end="endless"),
        "silent": Answer(bytes(100), end="hang"),
        "drip": Answer(end="drip"),
    }
    return started


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
    "loop": r"its URL redirects without an end$",
    "to_a_file": r"cannot be fetched, after 2 tries \(NonHttpUrlRedirectClientError\)$",
    "silent": r"cannot be fetched, after 2 tries \(\w*Timeout\w*\)$",
    "drip": r"cannot be fetched, after 2 tries \(less than 64 KiB came in 0.2 s\)$",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_file_that_cannot_be_fetched_is_a_reject(server: WebServer, kind: str) -> None:
    with pytest.raises(DecodeError, match=REASONS[kind]) as raised:
        fetched(f"{server.url}/{kind}")
    assert "root" not in str(raised.value), "words of the server"


def test_a_small_answer_is_not_unpacked_to_a_large_one(server: WebServer) -> None:
    assert len(fetched(f"{server.url}/bomb")) < LIMIT


def test_no_time_limit_for_a_whole_file(server: WebServer) -> None:
    """Only for the time without a byte; the library's own limit is five minutes a file."""
    source = UrlTable({"a": f"{server.url}/good"}, access=Access(private=True))
    with source.fetched("a"):
        system, _ = remote._file_system(f"{server.url}/good", source.access)
        assert system._session.timeout.total is None
        assert system._session.timeout.sock_read == 60


PRIVATE = {
    "http://127.0.0.1/a": "'127.0.0.1' is no public address. .*--allow-private",
    "http://localhost:1/a": "'localhost' is no public address",
    "http://169.254.169.254/latest/meta-data": "'169.254.169.254' is no public address",
    "ftp://me@192.168.0.1/a": "'192.168.0.1' is no public address",
    "file:///etc/passwd": "'file://' reads files of this machine. .*--allow-local",
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


@pytest.mark.parametrize("host", ["localhost", "0x7f.1"])
def test_an_address_is_checked_when_it_is_connected_to(server: WebServer, host: str) -> None:
    """Whatever name it has, and however it is written."""
    with pytest.raises(DecodeError, match=r"leads to \S*127\S*1, which is no public"):
        fetched(server.url.replace("127.0.0.1", host) + "/good", private=False)
    assert not remote._failed


def test_a_redirection_to_a_private_address(
    server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first server counts as public here: its connection alone is let through."""
    passed: list[str] = []

    def private_but_the_first(address: str) -> bool:
        passed.append(address)
        return len(passed) > 1

    monkeypatch.setattr(public_address, "is_private", private_but_the_first)
    # Another name of the same server, so that the open connection is not used again.
    inward = server.url.replace("127.0.0.1", "localhost") + "/good"
    server.files["inward"] = Answer(status=302, headers={"Location": inward})
    with pytest.raises(DecodeError, match="which is no public address"):
        fetched(f"{server.url}/inward", private=False)
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
        ("::ffff:10.0.0.1", True),
    ],
)
def test_which_addresses_are_private(address: str, private: bool) -> None:
    assert is_private(address) == private


def write_table(path: Path, server: WebServer, kinds: list[str]) -> Path:
    rows = [f"{kind}.npy,{i % 2},{server.url}/{kind}" for i, kind in enumerate(kinds)]
    path.write_text("\n".join(["filename,label,url", *rows]) + "\n")
    return path


def test_harmful_urls_on_the_command_line(
    server: WebServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each costs its own file; the list of rejects quotes nothing that came."""
    kinds = ["good", "refused", "declared", "text", "bomb"]
    table, out = write_table(tmp_path / "clips.csv", server, kinds), tmp_path / "store"
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


def test_what_could_not_be_fetched_is_tried_again(server: WebServer, tmp_path: Path) -> None:
    """A reject that a bad spell of the server made does not last."""
    table, out = write_table(tmp_path / "clips.csv", server, ["good", "error"]), tmp_path / "store"
    manifest = read_manifest(table)
    source = manifest_source(manifest, Access(private=True))
    source, settings = replace(source, first_wait=0.001), PrepareSettings(roi="none")
    prepare(manifest, source, out, settings, workers=1, max_rejected=0.5)
    assert "cannot be fetched, after 5 tries (HTTP 500)" in (out / REJECTED).read_text()
    server.files["error"] = clip(8)
    prepare(manifest, source, out, settings, workers=1)
    assert len(Store(out).table) == 2
