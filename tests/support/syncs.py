"""What a test's process asks the system to put on the disk, and when."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Sync:
    """An fsync: the path that the file or folder had at that time, and what was in it.

    ``size`` is of a file in bytes, ``names`` are of a folder.
    """

    path: Path
    size: int | None = None
    names: frozenset[str] = frozenset()


def record_syncs(monkeypatch: pytest.MonkeyPatch) -> list[Sync]:
    """A list that grows by each later fsync of this process. A killed process loses nothing that it
    wrote, so only this shows what would outlast a loss of power."""
    syncs: list[Sync] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_dir():
            syncs.append(Sync(path, names=frozenset(entry.name for entry in path.iterdir())))
        else:
            syncs.append(Sync(path, size=os.fstat(descriptor).st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    return syncs
