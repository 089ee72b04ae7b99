"""Which addresses may be asked for files, and how long a connection may be silent.

A clip table may come from anybody. Its URLs must not make this machine fetch from services that
only it, or its network, can reach: credentials of cloud machines at 169.254.169.254, databases on
the loopback interface, and so on.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any


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
