"""The format of sharded checkpoints, which are complete or absent, and how they are read.

``step-N/`` holds one ``rank-RRRRR.safetensors`` a rank with the tensors assigned to that rank, and
``checkpoint.json``, the marker: the facts of the run, name, size and crc32c of every file, and its
own crc32c. Tensors are full and stored by name, so a checkpoint can be read at any world size and
by any backend. ``writer.py`` writes them.
"""

from __future__ import annotations

import errno
import heapq
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dist_train.errors import CheckpointError, FileError
from dist_train.files import MOST_JSON, crc32c_of_file, parse_object, read_plain, sealed
from dist_train.system.advice import blame_machine

MARKER = "checkpoint.json"
#: A disk that cannot read one checkpoint may be able to read an older one.
DAMAGE = (errno.EIO,)
log = logging.getLogger(__name__)


def assign_tensors(sizes: Mapping[str, int], rank: int, world: int) -> Callable[[str], bool]:
    """Whether ``rank`` writes a tensor, by name: each is written once, and loads are balanced.

    The largest goes first, to the rank with the least load (Graham 1969).

    Args:
        sizes: elements of each tensor by name, the same on every rank.
    """
    loads = [(0, other) for other in range(world)]
    mine = set()
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, owner = loads[0]
        heapq.heapreplace(loads, (load + sizes[name], owner))
        if owner == rank:
            mine.add(name)
    return lambda name: name in mine


def latest_valid(folder: Path, *, before: int | None = None) -> Path | None:
    """The last checkpoint with all its files undamaged; None if there are no checkpoints.

    Damaged ones are skipped with a line in the log.

    Args:
        before: consider earlier steps than this only.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    found = [path for step, path in by_step(folder) if before is None or step < before]
    for path in reversed(found):
        try:
            check_checkpoint(path)
        except CheckpointError as error:
            log.warning("skipped a damaged checkpoint: %s", error)
        else:
            return path
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints is whole",
            where=folder,
            fix="Restore one from a copy, or start anew with another 'out'.",
        )
    return None


def load_checkpoint(
    path: Path, rank: int = 0, world: int = 1
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint, on the host, and its marker (``step``, ``facts``, ``files``).

    The files are read once for their checksums; the tensors are mapped, not read, until used.

    Args:
        rank, world: load only the files that ``rank`` of ``world`` ranks reads; by default all.

    Raises:
        CheckpointError: it is missing, torn or damaged.
    """
    marker = check_checkpoint(path, rank, world)
    tensors: dict[str, Tensor] = {}
    for entry in marker["files"][rank::world]:
        file = path / entry["name"]
        try:
            # safetensors reports every file that it cannot open as missing.
            with file.open("rb"):
                tensors |= load_file(file)
        except (OSError, SafetensorError) as error:
            blame_machine(error, file)
            raise CheckpointError(f"cannot be read ({error})", where=file) from None
    return tensors, marker


def by_step(folder: Path, suffix: str = "") -> list[tuple[int, Path]]:
    """(N, path) of each finished ``step-N<suffix>`` in ``folder``, ascending."""
    form = re.compile(rf"step-([0-9]+){re.escape(suffix)}")
    named = [(form.fullmatch(path.name), path) for path in folder.glob("step-*")]
    return sorted((int(match[1]), path) for match, path in named if match)


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def read_marker(path: Path) -> dict[str, Any]:
    """The marker of a checkpoint, without its checksum. Other files are not looked at.

    Raises:
        CheckpointError: it is missing, damaged or foreign.
    """
    try:
        text = read_plain(path / MARKER, most_bytes=MOST_JSON, but=DAMAGE).decode()
        marker = parse_object(text)
        marker.pop("crc32c", None)
        if sealed(marker) != text:
            raise ValueError(f"{MARKER} is damaged, or not of this form")
        if path.name != f"step-{marker['step']}":
            raise ValueError(f"{MARKER} is of step {marker['step']}")
        names = [entry["name"] for entry in marker["files"]]
        if not names or names != [rank_file(rank) for rank in range(len(names))]:
            raise ValueError(f"{MARKER} does not name one file of each process")
        if not isinstance(marker["facts"], dict):
            raise ValueError(f"{MARKER} has no facts")
    except (FileError, ValueError, KeyError, TypeError) as error:
        why = f"{MARKER} {error.what}" if isinstance(error, FileError) else error
        raise CheckpointError(f"the checkpoint is not whole ({why})", where=path) from None
    return marker


def check_checkpoint(path: Path, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Check that all files are there, and every byte of those that ``rank`` reads; the marker.

    Raises:
        CheckpointError: it is missing, torn or damaged.
    """
    marker = read_marker(path)
    expected = {entry["name"] for entry in marker["files"]} | {MARKER}
    try:
        # File systems and desktops leave hidden files of their own (.nfs0001, .DS_Store).
        there = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
        if there != expected:
            odd = ", ".join(sorted(there ^ expected))
            raise CheckpointError(f"the checkpoint is not whole ({odd})", where=path)
        for entry in marker["files"][rank::world]:
            file = path / entry["name"]
            # The size first: a torn file is known without reading it.
            if file.stat().st_size != entry["size"] or crc32c_of_file(file) != entry["crc32c"]:
                raise CheckpointError("the file is damaged", where=file)
    except (OSError, FileError, KeyError, TypeError) as error:
        blame_machine(error, path, but=DAMAGE)
        raise CheckpointError(f"the checkpoint is not whole ({error})", where=path) from None
    return marker
