"""A local S3 server of the files in a folder, as far away and as narrow as a real one.

It answers GET (with Range), HEAD and ListObjectsV2, and does not check signatures. Every bucket is
the folder. It prints its URL, and ends with its standard input.

    python tools/slow_s3.py FOLDER [--latency S] [--mb-s N] [--stream-mb-s N]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
from asyncio import StreamReader, StreamWriter
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from urllib.parse import parse_qs, unquote
from xml.sax.saxutils import escape

PIECE = 1 << 17
MOST_KEYS = 1000
_RANGE = re.compile(rb"\r\nrange: *bytes=(\d*)-(\d*)", re.IGNORECASE)
_WORDS = {200: "OK", 206: "Partial Content", 404: "Not Found", 416: "Range Not Satisfiable"}


@dataclass
class SlowServer:
    """
    Attributes:
        latency: seconds before each answer.
        rate, stream_rate: bytes a second of all connections, and of each.
    """

    folder: Path
    latency: float
    rate: float
    stream_rate: float
    # When all that was sent so far has passed the line.
    line_free: float = 0.0

    async def connected(self, reader: StreamReader, writer: StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await asyncio.sleep(self.latency)
                await self.answer(head, writer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            # The client is gone, or the server ends.
            pass
        finally:
            writer.close()

    async def answer(self, head: bytes, writer: StreamWriter) -> None:
        method, target, _ = head.split(b" ", 2)
        path, _, query = target.decode().partition("?")
        if method not in (b"GET", b"HEAD"):
            raise OSError("only reading is possible here")
        if "list-type=2" in query:
            xml = self.listed(path.strip("/").partition("/")[0], query).encode()
            writer.write(_head(200, len(xml), "Content-Type: application/xml") + xml)
            return
        file = self.folder / unquote(path).lstrip("/").partition("/")[2]
        if not file.is_file():
            xml = b"<Error><Code>NoSuchKey</Code></Error>"
            body = b"" if method == b"HEAD" else xml
            writer.write(_head(404, len(xml), "Content-Type: application/xml") + body)
            return
        with file.open("rb") as opened:
            found = os.fstat(opened.fileno())
            start, end, status = 0, found.st_size, 200
            more = [
                f"Last-Modified: {formatdate(found.st_mtime, usegmt=True)}",
                f'ETag: "{found.st_size:x}-{found.st_mtime_ns:x}"',
                "Accept-Ranges: bytes",
            ]
            if asked := _RANGE.search(head):
                first, last = asked.groups()
                start = int(first) if first else max(end - int(last), 0)
                end = min(end, int(last) + 1) if first and last else end
                status = 206 if start < end else 416
                more.append(f"Content-Range: bytes {start}-{end - 1}/{found.st_size}")
            writer.write(_head(status, max(end - start, 0), *more))
            if method == b"GET" and start < end:
                await self.send(writer, opened, start, end)

    async def send(self, writer: StreamWriter, file: object, start: int, end: int) -> None:
        loop = asyncio.get_running_loop()
        await writer.drain()
        stream_free = loop.time()
        while start < end:
            size = min(PIECE, end - start)
            now = loop.time()
            self.line_free = max(self.line_free, now) + size / self.rate
            stream_free = max(stream_free, now) + size / self.stream_rate
            if writer.transport.is_closing():
                raise ConnectionError("the client is gone")
            await loop.sendfile(writer.transport, file, start, size)  # type: ignore[arg-type]
            start += size
            # Sleeping is no more exact than a millisecond; what is slept too long is made up for.
            if (wait := max(self.line_free, stream_free) - loop.time()) > 1e-3:
                await asyncio.sleep(wait)

    def listed(self, bucket: str, query: str) -> str:
        asked = {name: values[0] for name, values in parse_qs(query).items()}
        prefix, after = asked.get("prefix", ""), asked.get("continuation-token", "")
        root, within = self.folder, self.folder / prefix.rpartition("/")[0]
        files = [path for path in within.rglob("*") if path.is_file()]
        sizes = {str(path.relative_to(root)): path.stat().st_size for path in files}
        keys = sorted(key for key in sizes if key.startswith(prefix) and key > after)
        folders = set()
        if delimiter := asked.get("delimiter"):
            rest = {key: key[len(prefix) :].split(delimiter) for key in keys}
            folders = {prefix + parts[0] + delimiter for parts in rest.values() if len(parts) > 1}
            keys = [key for key in keys if len(rest[key]) == 1]
        shown = keys[: int(asked.get("max-keys", MOST_KEYS))]
        is_cut = len(shown) < len(keys)
        token = (
            f"<NextContinuationToken>{escape(shown[-1])}</NextContinuationToken>" if is_cut else ""
        )
        entries = (
            f"<Contents><Key>{escape(key)}</Key><Size>{sizes[key]}</Size>"
            f"<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;0&quot;</ETag>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for key in shown
        )
        groups = (
            f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
            for folder in sorted(folders)
        )
        return (
            f"<ListBucketResult><Name>{escape(bucket)}</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<KeyCount>{len(shown)}</KeyCount><MaxKeys>{MOST_KEYS}</MaxKeys>"
            f"<IsTruncated>{str(is_cut).lower()}</IsTruncated>{token}"
            f"{''.join(entries)}{''.join(groups)}</ListBucketResult>"
        )


def _head(status: int, length: int, *more: str) -> bytes:
    lines = [f"HTTP/1.1 {status} {_WORDS[status]}", f"Content-Length: {length}", *more]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def serve(server: SlowServer) -> None:
    """Serve until standard input ends."""
    listening = await asyncio.start_server(server.connected, "127.0.0.1", 0, backlog=1024)
    host, port = listening.sockets[0].getsockname()
    print(f"http://{host}:{port}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency", type=float, default=0.02)
    parser.add_argument("--mb-s", type=float, default=1250.0, help="10^6 bytes/s of all")
    parser.add_argument("--stream-mb-s", type=float, default=80.0, help="and of a connection")
    given = parser.parse_args()
    server = SlowServer(given.folder, given.latency, given.mb_s * 1e6, given.stream_mb_s * 1e6)
    asyncio.run(serve(server))


if __name__ == "__main__":
    main()
