"""What happens in folders, as the kernel tells it (inotify(7), Linux)."""

from __future__ import annotations

import ctypes
import os
import select
import struct
from pathlib import Path
from typing import NamedTuple

OPENED, CREATED, MOVED_IN = 0x20, 0x100, 0x80
_EVENT = struct.Struct("iIII")


class Event(NamedTuple):
    folder: Path
    name: str
    kind: int


class Watch:
    """Events of ``kinds`` (one of the constants, or several joined by |) in each folder."""

    def __init__(self, folders: dict[Path, int]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        assert self.descriptor >= 0, os.strerror(ctypes.get_errno())
        self.folders = {
            libc.inotify_add_watch(self.descriptor, os.fsencode(folder), kinds): folder
            for folder, kinds in folders.items()
        }
        assert -1 not in self.folders, os.strerror(ctypes.get_errno())

    def events(self, timeout: float) -> list[Event]:
        """Those since the last call; waits at most ``timeout`` seconds for one."""
        if not select.select([self.descriptor], [], [], timeout)[0]:
            return []
        content, found = os.read(self.descriptor, 1 << 20), []
        while content:
            watch, kind, _, length = _EVENT.unpack_from(content)
            name = content[_EVENT.size : _EVENT.size + length].rstrip(b"\0").decode()
            found.append(Event(self.folders[watch], name, kind))
            content = content[_EVENT.size + length :]
        return found

    def close(self) -> None:
        os.close(self.descriptor)
