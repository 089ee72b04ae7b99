"""Where stores and files lie: a local path, or a URL."""

from __future__ import annotations

import re
from pathlib import Path

#: pathlib makes one slash of two, so a URL stays text.
Location = Path | str
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(place: Location) -> bool:
    """Whether a place is behind a URL. ``file://`` URLs are local."""
    return bool(_URL.match(str(place))) and not str(place).startswith(("file://", "local://"))


def local_path(place: Location) -> Path:
    """The path of a place that is no URL."""
    return Path(str(place).removeprefix("file://").removeprefix("local://"))


def shown(url: str) -> str:
    """A URL without its password and signed query, for messages."""
    if url.startswith(("http://", "https://")):
        url = url.partition("?")[0]
    return re.sub(r"//[^/@]*@", "//", url)
