"""Record the fsyncs of this process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Sync:
    """An fsync: the path at that time, the size of a file in bytes, and the names in a folder."""

    path: Path
    size: int | None = None
    names: frozenset[str] = frozenset()


def record_syncs(monkeypatch: pytest.MonkeyPatch) -> list[Sync]:
    """A list that grows by each later fsync. Only this shows what would survive a loss of power: a
    killed process loses nothing that it wrote."""
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
