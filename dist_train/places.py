"""Where stores and files lie: a local path, or a URL."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

#: pathlib makes one slash of two, so a URL stays text.
Location = Path | str
#: Names the folder of ``user_cache``.
CACHE = "DIST_TRAIN_CACHE"
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


def user_cache() -> Path:
    """The user's folder for what can be made again: ``$DIST_TRAIN_CACHE``, or ``dist_train`` in
    ``$XDG_CACHE_HOME`` or ``~/.cache``, or in the temporary folder of a user without a home."""
    if given := os.environ.get(CACHE):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(base or Path.home() / ".cache") / "dist_train"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "dist_train"
