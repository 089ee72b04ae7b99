"""A server of files for the web and for S3, which fails as networks do."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import parse_qs, unquote

# How an answer ends: whole; not sent at all; after half of the body the connection is closed, or
# nothing more comes; 64 KiB at a time, or a byte at a time, without an end.
End = Literal["whole", "refuse", "cut", "hang", "endless", "drip"]


@dataclass(frozen=True)
class Answer:
    """An HTTP response. A private one is for signed requests alone."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    end: End = "whole"
    private: bool = False


def s3_error(status: int, code: str) -> Answer:
    text = f"<Error><Code>{code}</Code><Message>{code} it is</Message></Error>"
    return Answer(text.encode(), status, {"Content-Type": "application/xml"})


@dataclass
class WebServer:
    """Answers for each path, and what goes wrong with the next requests.

    Attributes:
        files: content, or answer, by path; "bucket" is the only bucket.
        faults: for the next GETs, in turn: another answer, or another end.
        seen: the headers of all GETs.
        half_sent: set when half of a body is sent and nothing more will come.
    """

    url: str = ""
    files: dict[str, bytes | Answer] = field(default_factory=dict)
    faults: list[Answer | End] = field(default_factory=list)
    seen: list[dict[str, str]] = field(default_factory=list)
    half_sent: threading.Event = field(default_factory=threading.Event)

    def answer(self, path: str, *, signed: bool) -> Answer:
        path, _, query = path.partition("?")
        path = unquote(path).strip("/")
        found = self.files.get(path)
        if path == "bucket":
            return self.listed(parse_qs(query).get("prefix", [""])[0])
        if found is None:
            return s3_error(404, "NoSuchKey" if path.startswith("bucket/") else "NoSuchBucket")
        answer = found if isinstance(found, Answer) else Answer(found)
        return s3_error(403, "AccessDenied") if answer.private and not signed else answer

    def listed(self, prefix: str) -> Answer:
        keys = sorted(name.removeprefix("bucket/") for name in self.files)
        when = "<LastModified>1970-01-03T00:00:00.000Z</LastModified>"
        entries = (
            f"<Contents><Key>{key}</Key><Size>1</Size>{when}</Contents>"
            for key in keys
            if key.startswith(prefix)
        )
        xml = f"<ListBucketResult>{''.join(entries)}</ListBucketResult>"
        return Answer(xml.encode(), headers={"Content-Type": "application/xml"})


def part_of(answer: Answer, asked: str) -> Answer:
    """The answer to a request for ``bytes=FIRST-LAST``."""
    first, last = (int(each) for each in asked.removeprefix("bytes=").split("-"))
    if first >= len(answer.body):
        return s3_error(416, "InvalidRange")
    body = answer.body[first : last + 1]
    where = f"bytes {first}-{first + len(body) - 1}/{len(answer.body)}"
    return replace(answer, body=body, status=206, headers={"Content-Range": where})


@contextmanager
def web_server() -> Iterator[WebServer]:
    """Run a server within the context."""
    web = WebServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_HEAD(self) -> None:
            self.send(web.answer(self.path, signed="Authorization" in self.headers))

        def do_GET(self) -> None:
            web.seen.append(dict(self.headers))
            fault = web.faults.pop(0) if web.faults else "whole"
            answer = web.answer(self.path, signed="Authorization" in self.headers)
            if "Range" in self.headers and answer.status == 200:
                answer = part_of(answer, self.headers["Range"])
            if isinstance(fault, Answer):
                answer = fault
            elif fault != "whole":
                answer = replace(answer, end=fault)
            # The client may be gone before all is sent.
            with suppress(OSError):
                self.send(answer)

        def send(self, answer: Answer) -> None:
            self.close_connection = answer.end != "whole"
            if answer.end == "refuse":
                return
            self.send_response(answer.status)
            length = {"Content-Length": str(len(answer.body))}
            if answer.end in ("endless", "drip"):
                length = {"Connection": "close"}
            modified = {"Last-Modified": "Sat, 03 Jan 1970 00:00:00 GMT"}
            for name, value in (length | modified | dict(answer.headers)).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            is_half = answer.end in ("cut", "hang")
            self.wfile.write(answer.body[: len(answer.body) // 2] if is_half else answer.body)
            if answer.end == "hang":
                web.half_sent.set()
                self.rfile.read(1)
            while answer.end == "endless":
                self.wfile.write(bytes(1 << 16))
            # A byte every 20 ms, until the client goes.
            while answer.end == "drip" and not select.select([self.connection], [], [], 0.02)[0]:
                self.wfile.write(b"x")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    web.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield web
    server.shutdown()
    server.server_close()
    thread.join()
