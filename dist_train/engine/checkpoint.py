"""Sharded checkpoints that are whole or not there.

``step-N/`` holds one ``rank-RRRRR.safetensors`` a rank, each with its share of the training state
by parameter name, and ``checkpoint.json``: the facts of the run, and name, size and crc32c of every
file. All of it is written to ``step-N.partial/``, synced, then renamed by rank 0. As tensors are
kept by name and whole, a checkpoint can be read at any world size and by any backend.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dist_train.data.files import PARTIAL, crc32c, sync_folder, write_whole
from dist_train.errors import CheckpointError

MARKER = "checkpoint.json"
log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Group(Protocol):
    """What saving needs of the process group."""

    rank: int
    world: int

    def gather(self, value: Any) -> list[Any]: ...


def share(names: Sequence[str], rank: int, world: int) -> Callable[[str], bool]:
    """Which tensors ``rank`` writes: every ``world``-th name, so each is written once."""
    mine = set(names[rank::world])
    return lambda name: name in mine


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    group: Group,
    *,
    keep_last: int,
) -> Path:
    """Write ``folder/step-N`` from every rank's own tensors; a collective call.

    Older checkpoints beyond ``keep_last`` are removed once the new one is in place.

    Raises:
        CheckpointError: a rank could not write; nothing is left that looks whole.
    """
    final = folder / f"step-{step}"
    aside = folder / f"step-{step}{PARTIAL}"
    marker: dict[str, Any] = {"step": step, "facts": dict(facts)}

    def begin() -> None:
        if group.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def commit() -> None:
        if group.rank == 0:
            write_whole(aside / MARKER, json.dumps(marker, indent=2, sort_keys=True))
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            sync_folder(folder)
            _remove_others(folder, step, keep_last)

    try:
        _together(group, begin)
        marker["files"] = _together(group, lambda: _write_share(aside, group.rank, tensors))
        _together(group, commit)
    except OSError as error:
        if group.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint cannot be written ({error})",
            where=final,
            fix="Make room or mend the disk; the run goes on from the checkpoint before.",
        ) from None
    return final


def newest_whole(folder: Path) -> Path | None:
    """The last checkpoint whose files are all there and unharmed; None where there is none at all.

    Damaged ones are skipped with a line in the log.

    Raises:
        CheckpointError: there are checkpoints, and each of them is damaged.
    """
    found = [path for _, path in by_step(folder)]
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


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a checkpoint, on the host, and its marker (``step``, ``facts``, ``files``).

    Raises:
        CheckpointError: it is missing, torn or damaged.
    """
    marker = _check(path)
    tensors: dict[str, Tensor] = {}
    for entry in marker["files"]:
        try:
            tensors |= load_file(path / entry["name"])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot be read ({error})", where=path / entry["name"]) from None
    return tensors, marker


def by_step(folder: Path, suffix: str = "") -> list[tuple[int, Path]]:
    """(N, path) of each finished ``step-N<suffix>`` in ``folder``, ascending."""
    form = re.compile(rf"step-([0-9]+){re.escape(suffix)}")
    named = [(form.fullmatch(path.name), path) for path in folder.glob("step-*")]
    return sorted((int(match[1]), path) for match, path in named if match)


def _remove_others(folder: Path, step: int, keep_last: int) -> None:
    """Leave step ``step`` and the ``keep_last`` - 1 before it.

    Those after it are damaged: the run would have resumed from them.
    """
    found = by_step(folder)
    before = [path for number, path in found if number <= step]
    after = [path for number, path in found if number > step]
    for path in [*before[:-keep_last], *after]:
        shutil.rmtree(path, ignore_errors=True)


def _together(group: Group, act: Callable[[], Result]) -> list[Result]:
    """What ``act`` returns on each rank, on every rank. Where it fails on one, all raise OSError,
    rather than wait for that one."""
    outcome: Result | str
    try:
        outcome = act()
    except OSError as error:
        outcome = f"process {group.rank}: {error.strerror}"
    outcomes = group.gather(outcome)
    for failed in outcomes:
        if isinstance(failed, str):
            raise OSError(failed)
    return outcomes


def _write_share(aside: Path, rank: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """This rank's file, and its entry in the marker."""
    path = aside / f"rank-{rank:05d}.safetensors"
    content = save(dict(tensors))
    write_whole(path, content)
    return {"name": path.name, "size": len(content), "crc32c": crc32c(content)}


def _check(path: Path) -> dict[str, Any]:
    try:
        marker: dict[str, Any] = json.loads((path / MARKER).read_text(encoding="utf-8"))
        for entry in marker["files"]:
            content = (path / entry["name"]).read_bytes()
            if len(content) != entry["size"] or crc32c(content) != entry["crc32c"]:
                raise CheckpointError("the file is damaged", where=path / entry["name"])
        if not (isinstance(marker["step"], int) and isinstance(marker["facts"], dict)):
            raise ValueError(f"{MARKER} is not of this form")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint is not whole ({error})", where=path) from None
    return marker
