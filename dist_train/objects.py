"""Objects behind a URL: S3, Google Cloud Storage, Azure or the web, by obstore.

obstore (Rust) reads three times as fast as s3fs and takes a third of its processor time. S3 is
configured as for raw files: by fsspec's settings (``FSSPEC_S3_ENDPOINT_URL``, ``FSSPEC_S3_ANON``)
and by those of Amazon's libraries (``AWS_PROFILE``, ...); Google's and Azure's by their own
environment variables.

Requests run in one thread of each process. It must not be carried over a fork.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import random
import re
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeVar

from dist_train.errors import MissingObjectError, RemoteError
from dist_train.places import shown

Result = TypeVar("Result")

TRIES = 5
#: Seconds before the second try. Each later wait is twice as long.
FIRST_WAIT = 0.5
#: Requests of a process at a time.
IN_FLIGHT = 32
#: Longer ranges are read in pieces of this size, side by side.
PIECE = 4 << 20
# All tries together end before a loader worker loses patience with a clip.
_TIMES = {
    "connect_timeout": timedelta(seconds=10),
    "read_timeout": timedelta(seconds=15),
    "timeout": timedelta(seconds=45),
}
_S3 = ("s3", "s3a")
_PROTOCOLS = (*_S3, "gs", "az", "abfs", "abfss", "http", "https")
# S3 refuses one object by these codes, and the user by all others.
_ONE_OBJECT = ("", "AccessDenied", "InvalidObjectState")
_VARIABLES = ("AWS_", "GOOGLE_", "AZURE_")
_CREDENTIALS = "Set the right ones; for a public S3 bucket, FSSPEC_S3_ANON=true."
_INSTALL = "Run: pip install 'dist_train[remote]'."


class Objects:
    """The objects whose URLs are ``url``, a slash and their name.

    Copies may be sent to other processes, which open connections of their own. They take along the
    settings of this one, which a fork server of an earlier time does not have.

    Raises:
        RemoteError: of any method: nothing can be read there.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        protocol, _, rest = url.partition("://")
        if protocol not in _PROTOCOLS:
            raise RemoteError(
                f"'{protocol}://' is not known", where=shown(url), fix=f"Known: {_known()}."
            )
        if not rest.strip("/") or "::" in url or "?" in url or "#" in url:
            raise RemoteError("is not the URL of one folder", where=shown(url))
        try:
            import obstore  # noqa: F401
        except ImportError:
            raise RemoteError("obstore is not installed", where=shown(url), fix=_INSTALL) from None
        self._settings = _settings() if protocol in _S3 else {}
        self._client: Any = None

    def where(self, name: str) -> str:
        """The URL of an object, for messages."""
        return shown(f"{self.url}/{name}")

    def get(self, name: str, *, most_bytes: int) -> bytes:
        """The content of an object.

        Raises:
            MissingObjectError: there is none.
            RemoteError: it is longer than ``most_bytes``.
        """
        return self.start(self._get(name, most_bytes)).result()

    def download(self, name: str, to: Path) -> None:
        """Write an object to an existing file."""
        self.start(self._download(name, to)).result()

    def remove(self, name: str) -> None:
        """Remove an object; nothing happens if there is none."""
        import obstore

        async def ask() -> None:
            await obstore.delete_async(self._opened(), name)

        with suppress(MissingObjectError):
            self.start(self._tried(name, ask)).result()

    def put(self, name: str, content: bytes | Path | IO[bytes]) -> None:
        """Write an object, which appears whole or not at all."""
        import obstore

        async def ask() -> object:
            if not isinstance(content, bytes | Path):
                content.seek(0)
            return await obstore.put_async(self._opened(), name, content)

        self.start(self._tried(name, ask)).result()

    def names(self, prefix: str) -> list[str] | None:
        """Names of all objects below a prefix; None on the web, which has no lists."""
        if self.url.startswith("http"):
            return None
        import obstore

        async def ask() -> list[str]:
            listed = obstore.list(self._opened(), prefix)
            return [each["path"] async for part in listed for each in part]

        return sorted(self.start(self._tried(prefix, ask)).result())

    def head(self, name: str) -> tuple[int, float]:
        """Number of bytes of an object, and when it was written (s since 1970)."""
        return self.start(self._head(name)).result()

    async def read(self, name: str, start: int, end: int, *, may_end: bool = False) -> memoryview:
        """The bytes of an object from ``start`` to ``end`` (excluded).

        Args:
            may_end: the object may end before; at most ``PIECE`` bytes are asked for.
        """
        if end - start <= PIECE:
            return await self._piece(name, start, end, may_end=may_end)
        content = memoryview(bytearray(end - start))

        async def fill(at: int) -> None:
            piece = await self._piece(name, at, min(at + PIECE, end))
            content[at - start : at - start + len(piece)] = piece

        await _all(fill(at) for at in range(start, end, PIECE))
        return content

    def start(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Run a coroutine in the thread of all requests."""
        return asyncio.run_coroutine_threadsafe(work, _background(os.getpid()).loop)

    async def _get(self, name: str, most_bytes: int) -> bytes:
        import obstore

        async def ask() -> bytes:
            found = await obstore.get_async(self._opened(), name)
            if found.meta["size"] > most_bytes:
                raise RemoteError(f"is longer than {most_bytes} bytes", where=self.where(name))
            return bytes(await found.bytes_async())

        return await self._tried(name, ask)

    async def _piece(self, name: str, start: int, end: int, *, may_end: bool = False) -> memoryview:
        import obstore

        async def ask() -> memoryview:
            found = await obstore.get_range_async(self._opened(), name, start=start, end=end)
            if len(found) != end - start and not may_end:
                raise EOFError(f"{len(found)} of {end - start} bytes came")
            return memoryview(found)

        return await self._tried(name, ask)

    async def _head(self, name: str) -> tuple[int, float]:
        import obstore

        async def ask() -> tuple[int, float]:
            found = await obstore.head_async(self._opened(), name)
            return int(found["size"]), found["last_modified"].timestamp()

        return await self._tried(name, ask)

    async def _download(self, name: str, to: Path) -> None:
        size, _ = await self._head(name)
        with to.open("r+b") as file:

            async def fill(at: int) -> None:
                piece = await self._piece(name, at, min(at + PIECE, size))
                os.pwrite(file.fileno(), piece, at)

            file.truncate(size)
            await _all(fill(at) for at in range(0, size, PIECE))

    async def _tried(self, name: str, ask: Callable[[], Awaitable[Result]]) -> Result:
        """Call ``ask`` until it succeeds."""
        from obstore.exceptions import BaseError

        slots, wait = _background(os.getpid()).slots, FIRST_WAIT
        for left in reversed(range(TRIES)):
            try:
                async with slots:
                    return await ask()
            except (BaseError, EOFError, FileNotFoundError) as error:
                final = _permanent(error, self.where(name))
                if final is None and not left:
                    final = RemoteError(
                        f"cannot be reached, after {TRIES} tries ({_reason(error)})",
                        where=self.where(name),
                        fix="Check the network and the server, then run the command again.",
                    )
                if final is not None:
                    raise final from None
            # Many processes that failed at once must not come back at once.
            await asyncio.sleep(wait * random.uniform(0.5, 1.5))
            wait *= 2
        raise AssertionError("TRIES must be 1 or more")

    def _opened(self) -> Any:
        if self._client is None:
            self._client = _open(self.url, self._settings)
        return self._client

    def __getstate__(self) -> dict[str, Any]:
        known = {name: os.environ[name] for name in os.environ if name.startswith(_VARIABLES)}
        return self.__dict__ | {"_client": None, "variables": known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        os.environ.update(state.pop("variables"))
        self.__dict__.update(state)


class _Background:
    """The thread of all requests of a process."""

    def __init__(self) -> None:
        # Rust's threads wait for the network most of the time. By default there is one per core, in
        # each worker of each rank.
        os.environ.setdefault("TOKIO_WORKER_THREADS", "2")
        self.slots = asyncio.Semaphore(IN_FLIGHT)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="objects", daemon=True)
        self._thread.start()
        atexit.register(self._stop)

    def _stop(self) -> None:
        """Stop before the interpreter ends: a request would wake a thread that is gone."""

        async def cancel() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            self.loop.stop()

        with suppress(RuntimeError):
            asyncio.run_coroutine_threadsafe(cancel(), self.loop)
        self._thread.join(5)


@cache
def _background(process: int) -> _Background:
    return _Background()


async def _all(works: Any) -> None:
    """Run coroutines side by side; the first error cancels the others, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


# --- opening --------------------------------------------------------------------------------------


def _known() -> str:
    return ", ".join(f"{protocol}://" for protocol in _PROTOCOLS)


def _settings() -> dict[str, Any]:
    """What fsspec was told about S3."""
    import fsspec

    return dict(fsspec.config.conf.get("s3", {}))


def _open(url: str, settings: dict[str, Any]) -> Any:
    """obstore's client for a URL."""
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    options = _s3_options(url, settings) if url.startswith(_S3) else {"config": {}}
    endpoint = str(options["config"].get("endpoint", url))
    options["retry_config"] = {"max_retries": 0}
    options["client_options"] = {
        **_TIMES,
        "allow_http": endpoint.startswith("http://"),
        "pool_max_idle_per_host": str(IN_FLIGHT),
    }
    try:
        return from_url(url, **options)
    except (BaseError, ValueError) as error:
        # The text is made on this machine.
        what = " ".join(str(error).partition("\n")[0].split())
        raise RemoteError(f"cannot be opened ({what})", where=shown(url)) from None


def _s3_options(url: str, given: dict[str, Any]) -> dict[str, Any]:
    """Amazon's settings, from where s3fs has them."""
    of_client = given.get("client_kwargs", {})
    found = {
        "endpoint": given.get("endpoint_url")
        or of_client.get("endpoint_url")
        or os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL"),
        "region": of_client.get("region_name"),
        "access_key_id": given.get("key"),
        "secret_access_key": given.get("secret"),
        "token": given.get("token"),
    }
    options: dict[str, Any] = {"config": {k: v for k, v in found.items() if v is not None}}
    if given.get("anon"):
        options["config"]["skip_signature"] = True
        return options
    try:
        from botocore.session import get_session  # type: ignore[import-untyped]
    except ImportError:
        # obstore itself reads environment variables, and asks the machine's own service.
        return options
    session = get_session()
    region = session.get_config_variable("region")
    if region is not None:
        options["config"].setdefault("region", region)
    if "access_key_id" in options["config"]:
        return options
    credentials = session.get_credentials()
    if credentials is None:
        raise RemoteError("the credentials are missing", where=shown(url), fix=_CREDENTIALS)

    def current() -> dict[str, Any]:
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + timedelta(minutes=10),
        }

    options["credential_provider"] = current
    return options


# --- errors ---------------------------------------------------------------------------------------


def _permanent(error: Exception, where: str) -> RemoteError | None:
    """The error to raise if another try cannot help, else None. It quotes no words of a server."""
    from obstore.exceptions import NotSupportedError, PermissionDeniedError, UnauthenticatedError

    text, status = str(error), _status(error)
    code = _first(r"<Code>([A-Za-z0-9]{1,64})</Code>", text)
    if code == "NoSuchBucket":
        return RemoteError("there is no such bucket", where=where)
    if isinstance(error, FileNotFoundError):
        return MissingObjectError("is not there", where=where)
    if isinstance(error, NotSupportedError) or "NotPartial" in text:
        return RemoteError("the server does not give parts of files (HTTP ranges)", where=where)
    denied = isinstance(error, PermissionDeniedError)
    if isinstance(error, UnauthenticatedError) or (denied and code not in _ONE_OBJECT):
        what = f"the credentials are missing or wrong ({code or f'HTTP {status}'})"
        return RemoteError(what, where=where, fix=_CREDENTIALS)
    if denied:
        return RemoteError("access is denied", where=where, fix=_CREDENTIALS)
    if status == 416:
        return RemoteError("is shorter than the index says", where=where)
    if "incorrectly configured region" in text or (status in (301, 307, 400) and "egion" in text):
        return RemoteError(
            "the bucket is in another region", where=where, fix="Set AWS_REGION to its region."
        )
    if 400 <= status < 500 and status not in (408, 425, 429):
        return RemoteError(f"the server refuses it (HTTP {status})", where=where)
    return None


def _reason(error: Exception) -> str:
    """Describe an error by its status or kind."""
    if isinstance(error, EOFError):
        return str(error)
    if status := _status(error):
        return f"HTTP {status}"
    kinds = re.findall(r"kind: (\w+)", str(error))
    if "Timeout" in kinds or "TimedOut" in str(error):
        return "it took too long"
    if "Connect" in kinds:
        return "the server cannot be reached"
    return "the connection broke" if kinds else type(error).__name__


def _status(error: Exception) -> int:
    return int(_first(r"status code: (\d{3})", str(error)) or 0)


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""
