"""Raw files behind a network: in one remote folder, or at a URL for each file.

fsspec opens them. It is configured by its own means: environment variables such as
``FSSPEC_S3_ENDPOINT_URL=https://minio.example.org`` or ``FSSPEC_S3_ANON=true`` (a public bucket),
files in ``~/.config/fsspec``, and the settings of a service's own library (``AWS_PROFILE``, ...).
"""

from __future__ import annotations

import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, TypeVar
from urllib.parse import quote, urlsplit

import fsspec
from fsspec.callbacks import Callback

from dist_train.data.raw.fetch_errors import (
    WEB,
    FolderError,
    ShortFileError,
    TooLargeError,
    is_unreachable,
    permanent_error,
    reason,
)
from dist_train.data.raw.formats import may_be_folder
from dist_train.data.raw.public_address import (
    PrivateAddressError,
    any_client,
    is_private,
    private_address_of,
    public_client,
)
from dist_train.data.raw.source import UNFETCHED, LocalFolder, Source, split_dataset
from dist_train.data.table.manifest import Manifest
from dist_train.errors import DecodeError, DistTrainError, ManifestError, StoreError
from dist_train.places import shown

Result = TypeVar("Result")

_S3 = ("s3", "s3a")
# Protocols whose URLs name any host.
_NAMES_HOST = frozenset((*WEB, "ftp", "hdfs", "sftp", "smb", "ssh", "webdav", "webhdfs"))
# Protocols that read nothing of this machine.
_NETWORK = _NAMES_HOST.union(
    (
        *("abfs", "abfss", "adl", "az", "dropbox", "gcs", "gdrive", "github", "gs", "hf"),
        *("memory", "oci", "oss", "s3", "s3a", "tos"),
    )
)
# After so many failed files in a row, the network is at fault.
OUTAGE = 5
# URLs that this process failed to fetch since the last success.
_failed: set[str] = set()


@dataclass(frozen=True)
class Access:
    """What may be fetched.

    Attributes:
        local: URLs that read this machine's own files.
        private: addresses outside the public internet, such as loopback.
        most_bytes: the largest size of a file.
        stalled: seconds in which a transfer must bring 64 KiB, or its request has failed.
    """

    local: bool = False
    private: bool = False
    most_bytes: int = 8 << 30
    stalled: float = 60.0


def open_source(place: str | Path, access: Access | None = None) -> Source:
    """Open a local folder, or a remote one by the URL that file names are added to.

    The user chose the place, so it may be at a private address.

    Raises:
        StoreError: the folder does not exist, or the library for such URLs is not installed.
    """
    url = str(place)
    protocol, mark, rest = url.partition("://")
    if mark and protocol not in ("file", "local"):
        if "::" in url or not rest.strip("/"):
            raise StoreError("is not the URL of one place", where=shown(url))
        _check_protocol(url)
        access = access or Access()
        host = _host(url) if protocol in _NAMES_HOST else None
        if protocol in _NAMES_HOST and not host:
            raise StoreError("is not the URL of one place", where=shown(url))
        if host and private_address_of(host):
            access = replace(access, private=True)
        return RemoteFolder(url.rstrip("/"), access=access)
    folder = Path(rest if mark else place)
    if not folder.is_dir():
        raise StoreError("the source folder does not exist", where=folder)
    return LocalFolder(folder)


def manifest_source(manifest: Manifest, access: Access | None = None) -> Source:
    """Return the files at the manifest's URLs.

    Raises:
        ManifestError: a file has no URL, or one that ``access`` does not allow.
        StoreError: the library for such URLs is not installed.
    """
    access = access or Access()
    urls = manifest.urls_by_name()
    checked = set()
    for row, (name, url) in enumerate(urls.items()):
        protocol, host = url.partition("://")[0].lower(), _host(url)
        if (protocol, host) in checked:
            continue
        checked.add((protocol, host))
        _check_protocol(url)
        fault = None
        if protocol not in _NETWORK and not access.local:
            fault, option = f"'{protocol}://' reads files of this machine", "--allow-local"
        elif protocol in _NAMES_HOST and not access.private and _plainly_private(host):
            fault, option = f"'{host}' is no public address", "--allow-private"
        if fault is not None:
            raise ManifestError(
                f"url of '{name}' ({manifest.line(row)}): {fault}",
                fix=f"If you trust the table, allow it with {option}.",
            )
    return UrlTable(urls, access=access)


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _plainly_private(host: str | None) -> bool:
    """Whether a host is seen to be private without resolving it, which happens at the fetch."""
    try:
        return host is not None and (host == "localhost" or is_private(host))
    except ValueError:
        return False


def _check_protocol(url: str) -> None:
    protocol = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        fix = "Run: pip install 'dist_train[s3]'." if protocol in _S3 else str(error)
        raise StoreError(
            f"the library for '{protocol}://' is not installed", where=shown(url), fix=fix
        ) from None
    except ValueError:
        raise StoreError(f"'{protocol}://' is not known", where=shown(url)) from None


@dataclass(frozen=True, kw_only=True)
class Remote(Source):
    """Files behind a network.

    Attributes:
        tries: requests for a file before it counts as failed.
        first_wait: seconds between the first two tries; each later wait is twice as long.
        one_server: all files are on one server.
    """

    tries: int = 5
    first_wait: float = 0.5
    access: Access = Access()
    one_server: ClassVar[bool] = True

    @abstractmethod
    def url(self, name: str) -> str:
        """The URL of a file. Raises DecodeError if ``name`` leads outside the source."""

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """Stream a file to the system's temporary folder (``TMPDIR``), and check its size.

        A file that cannot be fetched raises DecodeError; the fifth in a row raises StoreError. On
        Linux the copy has no name and ends with the process; elsewhere a killed process leaves it.
        """
        with _nameless_file() as path:
            self._request(name, lambda system, at: _download(system, at, path, self.access))
            yield path

    def changed_since(self, name: str, time: float) -> bool:
        """Whether the server's modification time is after ``time``; False if it gives none."""
        try:
            modified = self._request(name, lambda system, at: system.modified(at))
        except (DecodeError, NotImplementedError):
            return False
        if modified.tzinfo is None:
            modified = modified.replace(tzinfo=UTC)
        # Servers cut the time to a second, within which either may have come first.
        return bool(modified.timestamp() + 1 > time)

    def _request(self, name: str, ask: Callable[[Any, str], Result]) -> Result:
        """Call ``ask(file system, path there)`` until it succeeds.

        Raises:
            DecodeError, StoreError: see ``fetched``.
            NotImplementedError: this file system has no such request.
        """
        url = self.url(name)
        wait = self.first_wait
        for left in reversed(range(self.tries)):
            try:
                answer = ask(*_file_system(url, self.access))
            except (MemoryError, NotImplementedError):
                raise
            # Each file system raises its own library's errors, up to a bare Exception.
            except Exception as error:
                permanent = permanent_error(error, url, one_server=self.one_server)
                if permanent or not left:
                    raise permanent or self._given_up(error, url) from None
            else:
                _failed.clear()
                return answer
            time.sleep(wait)
            wait *= 2
        raise AssertionError("tries must be 1 or more")

    def _given_up(self, error: Exception, url: str) -> DistTrainError:
        _failed.add(url)
        what = f"{UNFETCHED}, after {self.tries} tries ({reason(error)})"
        if not is_unreachable(error, one_server=self.one_server):
            if len(_failed) < OUTAGE:
                return DecodeError(what, where=shown(url))
            what += f", as were the {OUTAGE - 1} files before"
        return StoreError(
            what,
            where=shown(url),
            fix="Check the network and the server, then run the command again: "
            "finished work is kept.",
        )


@dataclass(frozen=True)
class RemoteFolder(Remote):
    """Files whose URL is ``place``, a slash, and their name."""

    place: str

    def url(self, name: str) -> str:
        path = PurePosixPath(split_dataset(name)[0])
        if path.is_absolute() or ".." in path.parts:
            raise DecodeError("is not the name of a file in there", where=self.where(name))
        # Only on the web do '#', '?' and '%' have a meaning.
        return f"{self.place}/{quote(str(path)) if self.place.startswith(WEB) else path}"

    def where(self, name: str) -> str:
        return shown(f"{self.place}/{name}")


@dataclass(frozen=True)
class UrlTable(Remote):
    """Files at URLs of their own."""

    urls: Mapping[str, str] = field(repr=False)
    one_server = False

    def url(self, name: str) -> str:
        url = self.urls[name]
        # fsspec opens 'A::B' as B within the archive or cache A.
        if "::" in url:
            raise DecodeError("is not the URL of one place", where=self.where(name))
        return url

    def where(self, name: str) -> str:
        return shown(self.urls[name])

    def narrowed(self, names: Sequence[str]) -> Source:
        return replace(self, urls={name: self.urls[name] for name in names})


def _file_system(url: str, access: Access) -> tuple[Any, str]:
    """Return fsspec's object for a URL, which it caches for the process, and the path there.

    Raises:
        Exception: of the library, such as for missing credentials.
    """
    protocol = url.partition("://")[0]
    given = fsspec.config.conf.get(protocol, {})
    options: dict[str, Any] = {}
    if protocol in _S3:
        # Remote counts the tries. One stream: s3fs would hold parallel parts of 50 MB in memory.
        retries = {"retries": {"total_max_attempts": 1}}
        options["config_kwargs"] = retries | given.get("config_kwargs", {})
        options["max_concurrency"] = 1
    elif protocol in WEB:
        # A compressed answer would not have the size of the file.
        options["headers"] = {"Accept-Encoding": "identity"} | given.get("headers", {})
        options["get_client"] = any_client if access.private else public_client
        options["client_kwargs"] = {"stalled": access.stalled} | given.get("client_kwargs", {})
    elif protocol in _NAMES_HOST and not access.private:
        private = private_address_of(urlsplit(url).hostname or "")
        if private is not None:
            raise PrivateAddressError(private)
    system, path = fsspec.url_to_fs(url, **options)
    if protocol in _S3:
        system.retries = 1
    return system, path


def _download(system: Any, at: str, to: Path, access: Access) -> None:
    transfer = _Transfer(access)
    try:
        system.get_file(at, str(to), callback=transfer)
    except (FileNotFoundError, FileExistsError, IsADirectoryError):
        if may_be_folder(at) and _is_folder(system, at):
            raise FolderError from None
        raise
    received = to.stat().st_size
    transfer.check_size(received)
    if transfer.size is not None and received != transfer.size:
        raise ShortFileError(f"{received} of {transfer.size} bytes came")


def _is_folder(system: Any, at: str) -> bool:
    # The web has no folders, and every request of it would be answered in its own way.
    with suppress(Exception):
        return "http" not in system.protocol and bool(system.isdir(at))
    return False


class _Transfer(Callback):  # type: ignore[misc]
    """End a transfer that brings too much, or next to nothing."""

    def __init__(self, access: Access) -> None:
        super().__init__()
        self._access = access
        self._counted, self._since = 0, time.monotonic()

    def check_size(self, size: int) -> None:
        if size > self._access.most_bytes:
            raise TooLargeError(self._access.most_bytes)

    def set_size(self, size: int | None) -> None:
        super().set_size(size)
        self.check_size(size or 0)

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        self.check_size(self.value)
        now = time.monotonic()
        if self.value - self._counted >= 1 << 16:
            self._counted, self._since = self.value, now
        elif now - self._since > self._access.stalled and inc:
            raise ShortFileError(f"less than 64 KiB came in {self._access.stalled:g} s")


@contextmanager
def _nameless_file() -> Iterator[Path]:
    """Make an empty file that can be opened by its path and vanishes with the process."""
    descriptors = Path("/proc/self/fd")
    if descriptors.is_dir():
        with tempfile.TemporaryFile(prefix="dist_train-") as file:
            yield descriptors / str(file.fileno())
    else:
        with tempfile.NamedTemporaryFile(prefix="dist_train-") as file:
            yield Path(file.name)
