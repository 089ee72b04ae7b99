"""Raw files behind a network: a remote place, or a URL for each file.

Remote places are those of fsspec, set up by its own means: environment variables such as
``FSSPEC_S3_ENDPOINT_URL=https://minio.example.org`` or ``FSSPEC_S3_ANON=true`` (a public bucket),
files in ``~/.config/fsspec``, and what a service's own library reads (``AWS_PROFILE``, ...).
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, TypeVar
from urllib.parse import quote, urlsplit

import fsspec
from fsspec.callbacks import Callback

from dist_train.data.raw.source import MISSING, UNFETCHED, LocalFolder, Source
from dist_train.data.table.manifest import Manifest
from dist_train.errors import DecodeError, DistTrainError, ManifestError, StoreError

Result = TypeVar("Result")

_WEB = ("http", "https")
_S3 = ("s3", "s3a")
_FOLDERS = ("file", "local")
# File systems of fsspec that read nothing of this machine.
_NETWORK = frozenset(
    (
        *("abfs", "abfss", "adl", "az", "dropbox", "ftp", "gcs", "gdrive", "github", "gs", "hdfs"),
        *("hf", "http", "https", "memory", "oci", "oss", "s3", "s3a", "sftp", "smb", "ssh", "tos"),
        *("webdav", "webhdfs"),
    )
)
# Of these, those whose URLs name any host, and whose library looks at no address.
_ANY_HOST = frozenset(("ftp", "hdfs", "sftp", "smb", "ssh", "webdav", "webhdfs"))
# Refusals that S3 makes because of one object. Others (an unknown key, a wrong signature, a token
# that has expired) hold for all.
_ONE_OBJECT = {None, "AccessDenied", "403", "InvalidObjectState"}


# Files in a row that could not be fetched, in this process, after which the fault is the network's.
OUTAGE = 5


@dataclass(frozen=True)
class Access:
    """What may be fetched.

    ``local``: by URLs that read this machine's own files. ``private``: from addresses that are not
    of the public internet, such as loopback. ``most_bytes``: of one file. ``stalled``: seconds in
    which a file that comes brings less than 64 KiB, after which its request has failed.
    """

    local: bool = False
    private: bool = False
    most_bytes: int = 8 << 30
    stalled: float = 60.0


def open_source(place: str | Path, access: Access | None = None) -> Source:
    """A local folder, or a remote place given by the URL that the files' names are added to.

    The place is the user's own word: it may be at a private address.

    Raises:
        StoreError: no such folder, or no library for such URLs.
    """
    protocol, mark, rest = str(place).partition("://")
    if not mark or isinstance(place, Path):
        folder = Path(place)
    elif protocol in _FOLDERS:
        folder = Path(rest)
    else:
        _check_url(str(place))
        access = access or Access()
        host = urlsplit(str(place)).hostname if protocol in _ANY_HOST.union(_WEB) else None
        if host and private_address_of(host):
            access = replace(access, private=True)
        return RemoteFolder(str(place).rstrip("/"), access=access)
    if not folder.is_dir():
        raise StoreError("the source folder does not exist", where=folder)
    return LocalFolder(folder)


def manifest_source(manifest: Manifest, access: Access | None = None) -> Source:
    """The files at the URLs that the manifest gives for them.

    Raises:
        ManifestError: it gives none, or not for every file, or one that must be allowed.
        StoreError: no library for such URLs.
    """
    access = access or Access()
    urls = manifest.urls_by_name()
    first: dict[tuple[str, str | None], int] = {}
    for row, url in enumerate(urls.values()):
        try:
            parts = urlsplit(url)
            place = parts.scheme.lower(), parts.hostname
        except ValueError:
            place = url.partition("://")[0].lower(), None
        first.setdefault(place, row)
    names = list(urls)
    for row in {protocol: row for (protocol, _), row in first.items()}.values():
        _check_url(urls[names[row]])
    for (protocol, host), row in first.items():
        fault = None
        if protocol not in _NETWORK and not access.local:
            fault = f"'{protocol}://' reads files of this machine", "--allow-local"
        elif not access.private and protocol in _ANY_HOST.union(_WEB) and _plainly_private(host):
            fault = f"'{host}' is no public address", "--allow-private"
        if fault is not None:
            raise ManifestError(
                f"url of '{names[row]}' ({manifest.line(row)}): {fault[0]}",
                fix=f"If you trust the table, allow it with {fault[1]}.",
            )
    return UrlTable(urls, access=access)


def _plainly_private(host: str | None) -> bool:
    """What can be seen without asking for the host's address, which is done when it is fetched."""
    try:
        return host is not None and (host == "localhost" or is_private(host))
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class Remote(Source):
    """Files behind a network. ``tries``: requests for a file before it is given up;
    ``first_wait``: seconds between the first two, doubled each time."""

    tries: int = 5
    first_wait: float = 0.5
    access: Access = Access()
    one_place: ClassVar[bool] = True

    @abstractmethod
    def url(self, name: str) -> str:
        """Raises DecodeError if the name does not belong to the place."""

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """A copy in the system's temporary folder (``TMPDIR``), streamed there.

        Its size must be what the server declares, where it declares one. A file that cannot be had
        is a DecodeError, as others may come; the fifth in a row is a StoreError. On Linux the copy
        has no name, and ends with the process; elsewhere a killed process leaves it behind.
        """
        with _nameless_file() as path:
            self._request(name, lambda system, at: _download(system, at, path, self.access))
            yield path

    def missing(self, names: Sequence[str]) -> list[str]:
        """None: asking for half a million files takes hours, and is done when they are fetched."""
        return []

    def changed_since(self, name: str, time: float) -> bool:
        """As the server tells; False if it tells no time."""
        try:
            modified = self._request(name, lambda system, at: system.modified(at))
        except (DecodeError, NotImplementedError):
            return False
        if modified.tzinfo is None:
            modified = modified.replace(tzinfo=UTC)
        # Servers cut the time to a second: within it, either may have come first.
        return bool(modified.timestamp() + 1 > time)

    def _request(self, name: str, ask: Callable[[Any, str], Result]) -> Result:
        """``ask``, given the file system and the file's place there, until it succeeds.

        Raises:
            DecodeError, StoreError: see ``fetched``.
            NotImplementedError: this file system cannot do it.
        """
        url = self.url(name)
        wait = self.first_wait
        for left in reversed(range(self.tries)):
            try:
                answer = ask(*_file_system(url, self.access))
            except (MemoryError, NotImplementedError):
                raise
            # Each file system raises what its own library does, from OSError to bare Exception.
            except Exception as error:
                _raise_what_lasts(error, url, self.one_place)
                if not left:
                    raise self._given_up(error, url) from None
            else:
                _in_a_row.clear()
                return answer
            time.sleep(wait)
            wait *= 2
        raise AssertionError("tries must be 1 or more")

    def _given_up(self, error: Exception, url: str) -> DistTrainError:
        what = f"{UNFETCHED}, after {self.tries} tries ({_reason(error)})"
        _in_a_row.add(url)
        unreachable = type(error).__name__ in _UNREACHABLE[: None if self.one_place else 1]
        if not unreachable and len(_in_a_row) < OUTAGE:
            return DecodeError(what, where=_shown(url))
        others = "" if unreachable else f", as were the {OUTAGE - 1} files before"
        return StoreError(
            what + others,
            where=_shown(url),
            fix="Check the network and the server, then run the command again: "
            "finished work is kept.",
        )


# URLs that this process could not fetch since it last fetched one.
_in_a_row: set[str] = set()
# Errors of a server that cannot be reached at all. The first is of S3's library: its server is one
# for all files.
_UNREACHABLE = (
    "EndpointConnectionError",
    "ClientConnectorError",
    "ClientConnectorDNSError",
    "ConnectionRefusedError",
)


@dataclass(frozen=True)
class RemoteFolder(Remote):
    """Files whose URL is that of the place, a slash, and their name."""

    place: str

    def url(self, name: str) -> str:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "::" in name:
            raise DecodeError("is not the name of a file in there", where=self.where(name))
        joined = str(path)
        # Elsewhere than on the web '#', '?' and '%' are letters like others.
        return f"{self.place}/{quote(joined) if self.place.startswith(_WEB) else joined}"

    def where(self, name: str) -> str:
        return _shown(f"{self.place}/{name}")


@dataclass(frozen=True)
class UrlTable(Remote):
    """Files by a table of URLs."""

    urls: Mapping[str, str] = field(repr=False)
    one_place = False

    def url(self, name: str) -> str:
        url = self.urls[name]
        if "::" in url:
            raise DecodeError("is not the URL of one place", where=self.where(name))
        return url

    def where(self, name: str) -> str:
        return _shown(self.urls[name])

    def narrowed(self, names: Sequence[str]) -> Source:
        return replace(self, urls={name: self.urls[name] for name in names})


def _check_url(url: str) -> None:
    protocol, _, rest = url.partition("://")
    # fsspec takes what follows '::' for the place of an archive or cache that the first part names.
    if "::" in url or not rest.strip("/"):
        raise StoreError("is not the URL of one place", where=_shown(url))
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        extra = f"Run: pip install 'dist_train[{_S3[0]}]'." if protocol in _S3 else str(error)
        raise StoreError(
            f"the library for '{protocol}://' is not installed", where=_shown(url), fix=extra
        ) from None
    except ValueError:
        raise StoreError(f"'{protocol}://' is not known", where=_shown(url)) from None


def _file_system(url: str, access: Access) -> tuple[Any, str]:
    """fsspec's object for a URL, which fsspec keeps for later, one a process; and the path there.

    Raises:
        Exception: the library's own, as when credentials are asked for and not found.
    """
    protocol = url.partition("://")[0]
    given = fsspec.config.conf.get(protocol, {})
    options: dict[str, Any] = {}
    if protocol in _S3:
        # Tries are counted once, in Remote. A large file comes in one stream, since parts of 50 MB
        # would be held in memory.
        retries = {"retries": {"total_max_attempts": 1}}
        options["config_kwargs"] = retries | given.get("config_kwargs", {})
        options["max_concurrency"] = 1
    elif protocol in _WEB:
        # Compressed on the way, a file would not have the size that is declared.
        options["headers"] = {"Accept-Encoding": "identity"} | given.get("headers", {})
        options["get_client"] = any_client if access.private else public_client
        options["client_kwargs"] = {"stalled": access.stalled} | given.get("client_kwargs", {})
    elif protocol in _ANY_HOST and not access.private:
        private = private_address_of(urlsplit(url).hostname or "")
        if private is not None:
            raise PrivateAddressError(private)
    system, path = fsspec.url_to_fs(url, **options)
    if protocol in _S3:
        system.retries = 1
    return system, path


def _download(system: Any, at: str, to: Path, access: Access) -> None:
    progress = _Watched(access)
    system.get_file(at, str(to), callback=progress)
    received = to.stat().st_size
    if received > access.most_bytes:
        raise TooLargeError(access.most_bytes)
    if progress.size is not None and received != progress.size:
        raise ShortFileError(f"{received} of {progress.size} bytes came")


class TooLargeError(Exception):
    """A file is larger than what may be fetched."""

    def __init__(self, most: int) -> None:
        super().__init__(f"it is larger than {most / 2**20:g} MiB")


class ShortFileError(Exception):
    """Other bytes came than were declared, or none for a long time."""


class _Watched(Callback):  # type: ignore[misc]
    """Ends a transfer that brings too much, or next to nothing."""

    def __init__(self, access: Access) -> None:
        super().__init__()
        self.access = access
        self.received = self.counted = 0
        self.since = time.monotonic()

    def set_size(self, size: int | None) -> None:
        super().set_size(size)
        if size is not None and size > self.access.most_bytes:
            raise TooLargeError(self.access.most_bytes)

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        self.received += inc
        if self.received > self.access.most_bytes:
            raise TooLargeError(self.access.most_bytes)
        now = time.monotonic()
        if self.received - self.counted >= 1 << 16:
            self.counted, self.since = self.received, now
        elif now - self.since > self.access.stalled and inc:
            raise ShortFileError(f"less than 64 KiB came in {self.access.stalled:g} s")


@contextmanager
def _nameless_file() -> Iterator[Path]:
    """An empty file that others can open by the path given, and that vanishes with the process."""
    by_number = Path("/proc/self/fd")
    make = tempfile.TemporaryFile if by_number.is_dir() else tempfile.NamedTemporaryFile
    with make(prefix="dist_train-") as file:
        yield by_number / str(file.fileno()) if by_number.is_dir() else Path(file.name)


def _raise_what_lasts(error: Exception, url: str, one_place: bool) -> None:
    """Raise what another try would not mend, as DecodeError or StoreError; else return."""
    where = _shown(url)
    if isinstance(error, PrivateAddressError):
        raise DecodeError(
            f"leads to {error}, which is no public address",
            where=where,
            fix="If you trust the clip table, allow it with --allow-private.",
        ) from None
    if isinstance(error, TooLargeError):
        raise DecodeError(str(error), where=where, fix="--fetch-mib sets the limit.") from None
    if type(error).__name__ == "TooManyRedirects":
        raise DecodeError("its URL redirects without an end", where=where) from None
    response = getattr(error.__cause__, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    status = getattr(error, "status", None)
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise StoreError(
            f"no room for a copy of {where}",
            where=tempfile.gettempdir(),
            fix="Make room, or set TMPDIR to a folder that has it.",
        ) from None
    if code == "NoSuchBucket":
        raise StoreError("there is no such bucket", where=where) from None
    denied = isinstance(error, PermissionError)
    if (
        (denied and code not in _ONE_OBJECT)
        or (status == 401 and one_place)
        or type(error).__name__ == "NoCredentialsError"
    ):
        raise StoreError(
            f"the credentials are missing or wrong ({_reason(error)})",
            where=where,
            fix="Set the right ones; for a public S3 bucket, FSSPEC_S3_ANON=true.",
        ) from None
    if denied or status in (401, 403):
        raise DecodeError(
            "access is denied",
            where=where,
            fix="Check the credentials; for a public S3 bucket, set FSSPEC_S3_ANON=true.",
        ) from None
    if isinstance(status, int) and 400 <= status < 500 and status not in (404, 408, 425, 429):
        raise DecodeError(f"the server refuses it (HTTP {status})", where=where) from None
    if isinstance(error, FileNotFoundError | IsADirectoryError) or number == errno.ENAMETOOLONG:
        raise DecodeError(MISSING, where=where) from None


def _shown(url: str) -> str:
    """A URL without a password or a signed query."""
    if url.startswith(_WEB):
        url = url.partition("?")[0]
    return re.sub(r"//[^/@]*@", "//", url)


def _reason(error: Exception) -> str:
    """What a message may say of an error: nothing that a server chose the words of."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"HTTP {status}"
    response = getattr(error.__cause__, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    if isinstance(code, str) and re.fullmatch(r"[A-Za-z0-9]{1,64}", code):
        return code
    name = type(error).__name__
    # Of the words of these nothing comes from a server.
    if isinstance(error, ShortFileError) or name in (*_UNREACHABLE, "NoCredentialsError"):
        return " ".join(str(error).split()) or name
    return (error.strerror if isinstance(error, OSError) else None) or name


# Which addresses may be asked for files. A clip table may come from anybody. Its URLs must not make
# this machine fetch from services that only it, or its network, can reach: credentials of cloud
# machines at 169.254.169.254, databases on the loopback interface, and so on.


class PrivateAddressError(Exception):
    """A URL, or what it redirects to, leads to an address that is not public."""


def is_private(address: str) -> bool:
    """Whether an IP address is anything but one of the public internet."""
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None)
    return not (mapped or found).is_global or found.is_multicast


def private_address_of(host: str) -> str | None:
    """A private address that a host's name leads to; None if there is none, or no such host."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return None
    return next((str(a[4][0]) for a in found if is_private(str(a[4][0]))), None)


def _public_socket(info: Any) -> socket.socket:
    """A socket for an address that is about to be connected to: after the name was resolved, and
    for each redirection."""
    family, kind, protocol, _, address = info
    if is_private(str(address[0])):
        raise PrivateAddressError(str(address[0]))
    return socket.socket(family, kind, protocol)


async def any_client(*, stalled: float, **options: Any) -> Any:
    """The session of fsspec's HTTP file system, without a limit to the time that a file takes.

    Args:
        stalled: seconds without a byte after which a request has failed.
        options: of ``aiohttp.ClientSession``.
    """
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=stalled, sock_read=stalled)
    # Else a small answer could be unpacked to a large one.
    defaults: dict[str, Any] = {"timeout": timeout, "auto_decompress": False}
    return aiohttp.ClientSession(**(defaults | options))


async def public_client(*, stalled: float, **options: Any) -> Any:
    """The same; connections to private addresses raise ``PrivateAddressError``."""
    import aiohttp

    connector = aiohttp.TCPConnector(socket_factory=_public_socket)
    return await any_client(stalled=stalled, **options, connector=connector)
