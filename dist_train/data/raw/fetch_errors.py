"""Errors of remote file systems -> messages for the user, without words that a server chose."""

from __future__ import annotations

import errno
import re
import tempfile

from dist_train.data.raw.public_address import PrivateAddressError
from dist_train.data.raw.source import MISSING
from dist_train.errors import DecodeError, DistTrainError, StoreError
from dist_train.places import shown

WEB = ("http", "https")
# S3 refuses one object by these codes. By others (an unknown key, a wrong signature, an expired
# token) it refuses all.
_ONE_OBJECT = {None, "AccessDenied", "403", "InvalidObjectState"}
# Errors of a server that cannot be reached, by S3's library and by that for the web.
_S3_UNREACHABLE = "EndpointConnectionError"
_UNREACHABLE = (
    _S3_UNREACHABLE,
    "ClientConnectorError",
    "ClientConnectorDNSError",
    "ConnectionRefusedError",
)


class TooLargeError(Exception):
    """A file is larger than allowed."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__(f"it is larger than {most_bytes / 2**20:g} MiB")


class FolderError(Exception):
    """A folder is there, not a file."""


class ShortFileError(Exception):
    """A file has another size than the server declared."""


def permanent_error(error: Exception, url: str, *, one_server: bool) -> DistTrainError | None:
    """Return the error to raise if another try cannot help, else None.

    Args:
        one_server: all files are on the server of ``url``, so its refusal of the user ends the run.

    Returns:
        A DecodeError if one file is at fault, a StoreError if no file can be fetched.
    """
    where, name = shown(url), type(error).__name__
    status, code = getattr(error, "status", None), _s3_code(error)
    number = error.errno if isinstance(error, OSError) else None
    denied = isinstance(error, PermissionError)

    def of_one_file(what: str, fix: str | None = None) -> DecodeError:
        return DecodeError(what, where=where, fix=fix)

    if isinstance(error, PrivateAddressError):
        return of_one_file(
            f"leads to {error}, which is no public address",
            "If you trust the clip table, allow it with --allow-private.",
        )
    if isinstance(error, TooLargeError):
        return of_one_file(str(error), "--fetch-mib sets the limit.")
    if isinstance(error, FolderError):
        return of_one_file(
            "is a folder, and folders are read on a local disk only",
            "Copy it there, or make one file of it.",
        )
    if name == "TooManyRedirects":
        return of_one_file("its URL redirects without an end")
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreError(
            f"no room for a copy of {where}",
            where=tempfile.gettempdir(),
            fix="Make room, or set TMPDIR to a folder that has it.",
        )
    if code == "NoSuchBucket":
        return StoreError("there is no such bucket", where=where)
    is_key_wrong = denied and code not in _ONE_OBJECT
    if is_key_wrong or (status == 401 and one_server) or name == "NoCredentialsError":
        return StoreError(
            f"the credentials are missing or wrong ({reason(error)})",
            where=where,
            fix="Set the right ones; for a public S3 bucket, FSSPEC_S3_ANON=true.",
        )
    if denied or status in (401, 403):
        return of_one_file(
            "access is denied",
            "Check the credentials; for a public S3 bucket, set FSSPEC_S3_ANON=true.",
        )
    if isinstance(status, int) and 400 <= status < 500 and status not in (404, 408, 425, 429):
        return of_one_file(f"the server refuses it (HTTP {status})")
    if isinstance(error, FileNotFoundError | IsADirectoryError) or number == errno.ENAMETOOLONG:
        return of_one_file(MISSING)
    return None


def is_unreachable(error: Exception, *, one_server: bool) -> bool:
    """Whether the server of all files cannot be reached. S3 has one server for all files."""
    name = type(error).__name__
    return name == _S3_UNREACHABLE or (one_server and name in _UNREACHABLE)


def reason(error: Exception) -> str:
    """Describe an error by its status, its code or its type, never by a server's own words."""
    status, code, name = getattr(error, "status", None), _s3_code(error), type(error).__name__
    if isinstance(status, int) and status:
        return f"HTTP {status}"
    if isinstance(code, str) and re.fullmatch(r"[A-Za-z0-9]{1,64}", code):
        return code
    # The texts of these errors are made on this machine.
    if isinstance(error, ShortFileError) or name in (*_UNREACHABLE, "NoCredentialsError"):
        return " ".join(str(error).split()) or name
    return (error.strerror if isinstance(error, OSError) else None) or name


def _s3_code(error: Exception) -> object:
    response = getattr(error.__cause__, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None
