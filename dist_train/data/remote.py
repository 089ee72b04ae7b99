"""Raw files behind a network: a remote place, or a URL for each file.

Remote places are those of fsspec, set up by its own means: environment variables such as
``FSSPEC_S3_ENDPOINT_URL=https://minio.example.org`` or ``FSSPEC_S3_ANON=true`` (a public bucket),
files in ``~/.config/fsspec``, and what a service's own library reads (``AWS_PROFILE``, ...).
"""

from __future__ import annotations

import errno
import re
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote

import fsspec
from fsspec.callbacks import Callback

from dist_train.data.manifest import Manifest
from dist_train.data.source import MISSING, LocalFolder, Source
from dist_train.errors import DecodeError, StoreError

Result = TypeVar("Result")

_WEB = ("http", "https")
_S3 = ("s3", "s3a")
_FOLDERS = ("file", "local")
# Refusals that S3 makes because of one object. Others (an unknown key, a wrong signature, a token
# that has expired) hold for all.
_ONE_OBJECT = {None, "AccessDenied", "403", "InvalidObjectState"}


def open_source(place: str | Path) -> Source:
    """A local folder, or a remote place given by the URL that the files' names are added to.

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
        return RemoteFolder(str(place).rstrip("/"))
    if not folder.is_dir():
        raise StoreError("the source folder does not exist", where=folder)
    return LocalFolder(folder)


def manifest_source(manifest: Manifest) -> Source:
    """The files at the URLs that the manifest gives for them.

    Raises:
        ManifestError: it gives none, or not for every file.
        StoreError: no library for such URLs.
    """
    urls = manifest.urls_by_name()
    for url in {url.partition("://")[0]: url for url in urls.values()}.values():
        _check_url(url)
    return UrlTable(urls)


@dataclass(frozen=True, kw_only=True)
class Remote(Source):
    """Files behind a network. ``tries``: requests for a file before the run is given up;
    ``first_wait``: seconds between the first two, doubled each time."""

    tries: int = 5
    first_wait: float = 0.5

    @abstractmethod
    def url(self, name: str) -> str:
        """Raises DecodeError if the name does not belong to the place."""

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """A copy in the system's temporary folder (``TMPDIR``), streamed there.

        Its size must be what the server declares, where it declares one. Elsewhere than on Linux a
        killed process leaves it behind; on Linux it has no name, and ends with the process.
        """
        with _nameless_file() as path:
            self._request(name, lambda system, at: _download(system, at, path))
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
                return ask(*_file_system(url))
            except (MemoryError, NotImplementedError):
                raise
            # Each file system raises what its own library does, from OSError to bare Exception.
            except Exception as error:
                _raise_what_lasts(error, url)
                if not left:
                    raise StoreError(
                        f"cannot be fetched, after {self.tries} tries ({_reason(error)})",
                        where=_shown(url),
                        fix="Check the network and the server, then run the command again: "
                        "finished work is kept.",
                    ) from None
            time.sleep(wait)
            wait *= 2
        raise AssertionError("tries must be 1 or more")


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


def _file_system(url: str) -> tuple[Any, str]:
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
    system, path = fsspec.url_to_fs(url, **options)
    if protocol in _S3:
        system.retries = 1
    return system, path


def _download(system: Any, at: str, to: Path) -> None:
    progress = Callback()
    system.get_file(at, str(to), callback=progress)
    received = to.stat().st_size
    if progress.size is not None and received != progress.size:
        raise OSError(f"{received} of {progress.size} bytes came")


@contextmanager
def _nameless_file() -> Iterator[Path]:
    """An empty file that others can open by the path given, and that vanishes with the process."""
    by_number = Path("/proc/self/fd")
    make = tempfile.TemporaryFile if by_number.is_dir() else tempfile.NamedTemporaryFile
    with make(prefix="dist_train-") as file:
        yield by_number / str(file.fileno()) if by_number.is_dir() else Path(file.name)


def _raise_what_lasts(error: Exception, url: str) -> None:
    """Raise what another try would not mend, as DecodeError or StoreError; else return."""
    where = _shown(url)
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
        or status == 401
        or type(error).__name__ == "NoCredentialsError"
    ):
        raise StoreError(
            f"the credentials are missing or wrong ({_reason(error)})",
            where=where,
            fix="Set the right ones; for a public S3 bucket, FSSPEC_S3_ANON=true.",
        ) from None
    if denied or status == 403:
        raise DecodeError(
            "access is denied",
            where=where,
            fix="Check the credentials; for a public S3 bucket, set FSSPEC_S3_ANON=true.",
        ) from None
    if isinstance(error, FileNotFoundError | IsADirectoryError) or number == errno.ENAMETOOLONG:
        raise DecodeError(MISSING, where=where) from None


def _shown(url: str) -> str:
    """A URL without a password or a signed query."""
    if url.startswith(_WEB):
        url = url.partition("?")[0]
    return re.sub(r"//[^/@]*@", "//", url)


def _reason(error: Exception) -> str:
    status = getattr(error, "status", None)
    if status is not None:
        return f"HTTP {status}"
    return " ".join(str(error).split()) or type(error).__name__
