"""Write checkpoints while training goes on.

A step waits only for a copy of its tensors into host memory. A thread of each rank writes that copy
to ``step-N.partial/``; when all ranks have written, rank 0 adds the marker and renames the folder.
The threads make no collective calls.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dist_train.checkpoint.format import MARKER, by_step, rank_file, read_marker
from dist_train.checkpoint.host_buffers import HostBuffers
from dist_train.checkpoint.retention import Metrics, RetentionPolicy, to_remove
from dist_train.checkpoint.superseded import set_aside
from dist_train.checkpoint.tensor_file import write_tensors
from dist_train.distributed.collectives import OfSomeRankError, run_on_all_ranks
from dist_train.distributed.process_group import ProcessGroup
from dist_train.errors import CheckpointError
from dist_train.files import PARTIAL, aside_for, sealed, sync_folder, write_whole

log = logging.getLogger(__name__)

#: Files of a checkpoint. File systems leave hidden ones (.nfs0001).
OWN = re.compile(r"rank-[0-9]+\.safetensors|checkpoint\.json(\.partial)?|\..*")


class _Pending(NamedTuple):
    """A checkpoint that is being written, and this rank's entry in its marker."""

    step: int
    facts: dict[str, Any]
    entry: Future[dict[str, Any]]


class CheckpointWriter:
    """Writes the checkpoints of a run, at most one at a time; used by every rank.

    Between ``save`` and ``commit`` the checkpoint does not exist: a killed run resumes from the one
    before. Each rank holds host memory of the size of the tensors that it writes.

    Args:
        folder: the parent of ``step-N``.
        keep: which checkpoints stay when a new one is committed.

    Attributes:
        spared: steps of checkpoints of other runs, which stay too.
    """

    def __init__(self, folder: Path, group: ProcessGroup, *, keep: RetentionPolicy) -> None:
        self._folder, self._group, self._keep = folder, group, keep
        self._buffers = HostBuffers()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._pruned: Future[None] | None = None
        self.spared: set[int] = set()
        # Steps whose folders hold foreign files, which the log has already.
        self._mixed: set[int] = set()

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Begin the checkpoint of step ``step``; a collective call, which commits the one before.

        Args:
            tensors: those assigned to this rank, on any device; the caller may change them later.
            facts: JSON types, the same on every rank. ``RetentionPolicy.best`` names one of
                ``facts["metrics"]``.

        Raises:
            CheckpointError: the one before could not be written; this one was not begun.
        """
        self.commit()
        # A copy, as the caller may change them, and with JSON's types, as they will be read.
        copied_facts = json.loads(json.dumps(dict(facts)))
        copies = self._buffers.copy(tensors)
        aside = self._folder / f"step-{step}{PARTIAL}"
        entry = self._thread.submit(_write_file, aside, self._group.rank, copies)
        self._pending = _Pending(step, copied_facts, entry)

    @property
    def ready(self) -> bool:
        """Whether a checkpoint waits for ``commit``, and this rank has written its file or has
        failed to."""
        return self._pending is not None and self._pending.entry.done()

    def commit(self) -> Path | None:
        """Finish the checkpoint that ``save`` began; a collective call. Waits for all ranks.

        Returns:
            The checkpoint; None if none was begun.

        Raises:
            CheckpointError: a rank could not write; no incomplete checkpoint is left.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        final = self._folder / f"step-{pending.step}"
        aside = self._folder / f"step-{pending.step}{PARTIAL}"
        try:
            files = run_on_all_ranks(self._group, pending.entry.result)
            marker = {"step": pending.step, "facts": pending.facts, "files": files}
            run_on_all_ranks(self._group, lambda: self._publish(aside, final, marker))
        except OfSomeRankError as error:
            if self._group.rank == 0:
                _clear(aside)
            # No rank begins to write there again while it is removed.
            self._group.gather(None)
            raise CheckpointError(
                f"the checkpoint cannot be written ({error})",
                where=final,
                fix=f"{error.fix or 'Look after its disk.'} The run goes on from the checkpoint "
                "before.",
            ) from error.__cause__
        if self._group.rank == 0:
            self._pruned = self._thread.submit(self._prune, pending.step)
        return final

    def finish(self) -> Path | None:
        """``commit``, and wait until older checkpoints are removed; a collective call."""
        path = self.commit()
        if self._pruned is not None:
            self._pruned.result()
        return path

    def _publish(self, aside: Path, final: Path, marker: Mapping[str, Any]) -> None:
        """Write the marker and rename the folder: on rank 0, while no other rank writes."""
        if self._group.rank != 0:
            return
        for entry in marker["files"]:
            _check_seen(aside / entry["name"], entry["size"])
        write_whole(aside / MARKER, sealed(marker))
        written = {MARKER, *(entry["name"] for entry in marker["files"])}
        for path in aside.iterdir():
            if path.name in written or path.name.startswith("."):
                continue
            if not _is_own(path):
                raise CheckpointError(f"{path.name} is no file of a checkpoint", fix="Move it")
            # A killed session of more processes left it.
            path.unlink()
        _make_way(final, foreign=marker["step"] in self.spared)
        aside.rename(final)
        sync_folder(self._folder)
        for _, left in by_step(self._folder, PARTIAL):
            _clear(left)

    def _prune(self, newest: int) -> None:
        """Remove checkpoints by the policy, but no folder that holds a foreign file."""
        found = {step: path for step, path in by_step(self._folder) if step not in self.spared}
        saved = {step: _metrics(path) for step, path in found.items()}
        for step in to_remove(saved, newest, self._keep):
            try:
                if _is_ours(found[step]):
                    shutil.rmtree(found[step])
                elif step not in self._mixed:
                    self._mixed.add(step)
                    log.warning("%s holds files of no checkpoint, so it stays", found[step])
            except OSError as error:
                log.warning("an old checkpoint cannot be removed: %s", error)


def _write_file(aside: Path, rank: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write this rank's file; its entry in the marker."""
    aside.mkdir(parents=True, exist_ok=True)
    if aside.is_symlink():
        raise CheckpointError("is a link to a folder elsewhere", where=aside, fix="Remove it")
    path = aside / rank_file(rank)
    written = write_tensors(path, tensors)
    return {"name": path.name, **written._asdict()}


def _check_seen(file: Path, size: int) -> None:
    """Raise unless this rank sees the file of another. It is opened, as network file systems ask
    their server only then."""
    try:
        with file.open("rb") as opened:
            there = os.fstat(opened.fileno()).st_size
    except FileNotFoundError:
        there = None
    if there != size:
        raise CheckpointError(
            f"{file.name} was written by another process, and is not there for process 0",
            fix="Give 'out' on a disk that all machines share",
        )


def _make_way(final: Path, *, foreign: bool) -> None:
    """Free the name of a checkpoint: one of another run is moved aside, a damaged one removed."""
    if not os.path.lexists(final):
        return
    if foreign or not _is_ours(final):
        log.warning("%s is moved to %s", final, set_aside(final.parents[1], final))
    else:
        shutil.rmtree(final, ignore_errors=True)


def _is_ours(path: Path) -> bool:
    """Whether it is a folder of nothing but files of a checkpoint."""
    return path.is_dir() and all(map(_is_own, path.iterdir()))


def _is_own(path: Path) -> bool:
    """Whether it is a file of a checkpoint, or an unfinished marker."""
    return bool(OWN.fullmatch(path.name)) or aside_for(path) == MARKER


def _clear(aside: Path) -> None:
    """Remove an unfinished checkpoint, but no foreign file in it."""
    with suppress(OSError):
        if aside.is_symlink() or not aside.is_dir():
            return
        for path in filter(_is_own, aside.iterdir()):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        aside.rmdir()


def _metrics(path: Path) -> Metrics:
    """The metrics saved with a checkpoint; none if it is damaged, so that it is not the best."""
    try:
        metrics = read_marker(path)["facts"].get("metrics", {})
    except CheckpointError:
        return {}
    return metrics if isinstance(metrics, dict) else {}
