"""Which network addresses files may be fetched from.

A clip table may come from anybody. Its URLs must not make this machine fetch from services that
only it, or its network, can reach, such as the credentials of a cloud machine at 169.254.169.254.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any


class PrivateAddressError(Exception):
    """A URL, or a redirection, leads to an address outside the public internet."""


def is_private(address: str) -> bool:
    """Whether an IP address is outside the public internet."""
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None)
    return not (mapped or found).is_global or found.is_multicast


def private_address_of(host: str) -> str | None:
    """Return a private address of a host, None if it has none or cannot be resolved."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return None
    return next((str(a[4][0]) for a in found if is_private(str(a[4][0]))), None)


async def any_client(*, stalled: float, **options: Any) -> Any:
    """Return the session of fsspec's HTTP file system, without a time limit for a whole file.

    Args:
        stalled: seconds without a byte after which a request fails.
        options: of ``aiohttp.ClientSession``.
    """
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=stalled, sock_read=stalled)
    # Decompressed here, a small answer could become a large one.
    defaults: dict[str, Any] = {"timeout": timeout, "auto_decompress": False}
    return aiohttp.ClientSession(**(defaults | options))


async def public_client(**options: Any) -> Any:
    """Like ``any_client``; a connection to a private address raises PrivateAddressError."""
    import aiohttp

    connector = aiohttp.TCPConnector(socket_factory=_public_socket)
    return await any_client(**options, connector=connector)


def _public_socket(info: Any) -> socket.socket:
    """Open a socket for a resolved address; aiohttp calls this for each redirection as well."""
    family, kind, protocol, _, address = info
    if is_private(str(address[0])):
        raise PrivateAddressError(str(address[0]))
    return socket.socket(family, kind, protocol)
