"""The format of sharded checkpoints, which are complete or absent, and how they are read.

``step-N/`` holds one ``rank-RRRRR.safetensors`` a rank, each with the tensors that are assigned to
that rank, by parameter name, and ``checkpoint.json``: the facts of the run, name, size and crc32c
of every file, and a crc32c of its own. As full tensors are kept by name, a checkpoint can be read
at any world size and by any backend. ``writer.py`` writes them.
"""

from __future__ import annotations

import errno
import heapq
import logging
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dist_train.checkpoint.tensor_file import sum_of_file
from dist_train.errors import CheckpointError, FileError
from dist_train.files import MIB, parse_object, read_plain, sealed
from dist_train.system.advice import blame_machine

MARKER = "checkpoint.json"
#: A disk that cannot read one checkpoint may well read an older one.
DAMAGE = (errno.EIO,)
MOST_OF_MARKER = 64 * MIB
log = logging.getLogger(__name__)


def assign_tensors(sizes: Mapping[str, int], rank: int, world: int) -> Callable[[str], bool]:
    """Which tensors ``rank`` writes: each is written once, and all ranks write about as much.

    The largest goes first, to the rank that has least (Graham 1969).

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
    """The last checkpoint whose files are all there and unharmed; None where there is none at all.

    Others are skipped with a line in the log.

    Args:
        before: of the checkpoints of earlier steps than this.

    Raises:
        CheckpointError: there are checkpoints, and none of them is whole.
    """
    found = [path for step, path in by_step(folder) if before is None or step < before]
    for path in reversed(found):
        try:
            _check(path)
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
        rank, world: only the files that ``rank`` of so many ranks reads; all of them by default.

    Raises:
        CheckpointError: it is missing, torn or damaged.
    """
    marker = _check(path, rank, world)
    tensors: dict[str, Tensor] = {}
    for entry in marker["files"][rank::world]:
        try:
            # safetensors says of any file that it cannot open that it is not there.
            with (path / entry["name"]).open("rb"):
                tensors |= load_file(path / entry["name"])
        except (OSError, SafetensorError) as error:
            blame_machine(error, path / entry["name"])
            raise CheckpointError(f"cannot be read ({error})", where=path / entry["name"]) from None
    return tensors, marker


def by_step(folder: Path, suffix: str = "") -> list[tuple[int, Path]]:
    """(N, path) of each finished ``step-N<suffix>`` in ``folder``, ascending."""
    form = re.compile(rf"step-([0-9]+){re.escape(suffix)}")
    named = [(form.fullmatch(path.name), path) for path in folder.glob("step-*")]
    return sorted((int(match[1]), path) for match, path in named if match)


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def read_marker(path: Path) -> dict[str, Any]:
    """The marker of a checkpoint, whose files are not looked at.

    Raises:
        CheckpointError: it is missing, damaged or foreign.
    """
    try:
        text = read_plain(path / MARKER, most_bytes=MOST_OF_MARKER, but=DAMAGE).decode()
        marker = parse_object(text)
        if sealed(_without_checksum(marker)) != text:
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
    return _without_checksum(marker)


def _without_checksum(marker: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in marker.items() if name != "crc32c"}


def _check(path: Path, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Check which files there are, and every byte of those that ``rank`` reads; the marker."""
    marker = read_marker(path)
    expected = {entry["name"] for entry in marker["files"]} | {MARKER}
    try:
        # File systems and desktops leave hidden files of their own (.nfs0001, .DS_Store).
        there = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
        if there != expected:
            odd = ", ".join(sorted(there ^ expected))
            raise CheckpointError(f"the checkpoint is not whole ({odd})", where=path)
        for entry in marker["files"][rank::world]:
            _check_file(path / entry["name"], entry)
    except (OSError, KeyError, TypeError) as error:
        blame_machine(error, path, but=DAMAGE)
        raise CheckpointError(f"the checkpoint is not whole ({error})", where=path) from None
    return marker


def _check_file(file: Path, entry: Mapping[str, Any]) -> None:
    facts = file.stat()
    # The size first: a torn file is known without reading it.
    fine = stat.S_ISREG(facts.st_mode) and facts.st_size == entry["size"]
    if not fine or sum_of_file(file) != (entry["size"], entry["crc32c"]):
        raise CheckpointError("the file is damaged", where=file)
