"""Move what a run no longer needs to ``superseded/`` in its folder, rather than delete it.

When a run goes back to an earlier step, these are lines of ``metrics.jsonl`` and snapshots; also
checkpoints of another run whose name is needed, and the best one if it is damaged. Nothing reads
that folder; the user may delete it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import count
from pathlib import Path

from dist_train.files import plain_descriptor, sync_folder

SUPERSEDED = "superseded"


def set_aside(run: Path, path: Path) -> Path:
    """Move a file or folder of ``run`` to ``superseded/``, under a name that is free there.

    Raises:
        OSError: it cannot be moved.
    """
    folder = run / SUPERSEDED
    folder.mkdir(exist_ok=True)
    name, dot, suffix = path.name.partition(".")
    names = (f"{name}{f'-{number}' if number > 1 else ''}{dot}{suffix}" for number in count(1))
    # Only one training works in the folder, so a free name stays free.
    free = next(folder / name for name in names if not os.path.lexists(folder / name))
    path.rename(free)
    sync_folder(folder)
    sync_folder(path.parent)
    return free


def append_aside(run: Path, name: str, lines: Iterable[bytes]) -> None:
    """Add lines to the file ``name`` in ``superseded/``, and put them on the disk.

    Raises:
        OSError: they cannot be written.
    """
    content = b"".join(line if line.endswith(b"\n") else line + b"\n" for line in lines)
    if not content:
        return
    folder = run / SUPERSEDED
    folder.mkdir(exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    with os.fdopen(plain_descriptor(folder / name, flags), "ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)
