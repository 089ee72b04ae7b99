"""Checkpoints written while training goes on.

A step waits only for a copy of its tensors into host memory. A thread of each rank writes that copy
to ``step-N.partial/``; when all ranks have, rank 0 adds the marker and renames the folder. No
thread talks to another process: what needs all ranks is done where all ranks call.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train.checkpoint.format import MARKER, by_step, rank_file, read_marker
from dist_train.checkpoint.retention import Metrics, RetentionPolicy, to_remove
from dist_train.checkpoint.superseded import set_aside
from dist_train.checkpoint.tensor_file import write_tensors
from dist_train.distributed.collectives import OfSomeRankError, run_on_all_ranks
from dist_train.distributed.process_group import ProcessGroup
from dist_train.errors import CheckpointError
from dist_train.files import PARTIAL, aside_for, sealed, sync_folder, write_whole

log = logging.getLogger(__name__)

#: Files of a checkpoint; hidden ones are those of file systems (.nfs0001).
OWN = re.compile(r"rank-[0-9]+\.safetensors|checkpoint\.json\.partial|\..*")


@dataclass(frozen=True)
class _Flight:
    """A checkpoint that is being written."""

    step: int
    facts: dict[str, Any]
    entry: Future[dict[str, Any]]


class CheckpointWriter:
    """Writes the checkpoints of a run, at most one at a time; used by every rank.

    Between ``save`` and ``commit`` the checkpoint does not exist: a killed run goes on from the one
    before. Each rank holds host memory of the size of the tensors that it writes.

    Args:
        folder: where ``step-N`` will be.
        keep: which checkpoints stay when a new one is committed.

    Attributes:
        spared: steps of checkpoints of other runs, which stay too.
    """

    def __init__(self, folder: Path, group: ProcessGroup, *, keep: RetentionPolicy) -> None:
        self._folder, self._group, self._keep = folder, group, keep
        self._buffers = HostBuffers()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._flight: _Flight | None = None
        self._pruned: Future[None] | None = None
        self.spared: set[int] = set()
        # Steps of folders that hold other files too, told of once.
        self._strange: set[int] = set()

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Begin the checkpoint of step ``step``; a collective call, which commits the one before.

        Args:
            tensors: those assigned to this rank, on any device; the caller may change them later.
            facts: JSON types, the same on every rank. ``facts["metrics"]``, by name, is what
                ``RetentionPolicy.best`` looks at.

        Raises:
            CheckpointError: the one before could not be written; this one was not begun.
        """
        self.commit()
        # As they will be read back: what the caller changes later has no part in them.
        kept_facts = json.loads(json.dumps(dict(facts)))
        copies = self._buffers.copy(tensors)
        aside = self._folder / f"step-{step}{PARTIAL}"
        entry = self._thread.submit(_write_file, aside, self._group.rank, copies)
        self._flight = _Flight(step, kept_facts, entry)

    @property
    def ready(self) -> bool:
        """Whether a checkpoint waits for ``commit``, and this rank has written its file or has
        failed to."""
        return self._flight is not None and self._flight.entry.done()

    def commit(self) -> Path | None:
        """Finish what ``save`` began; a collective call. It waits for ranks that are not ready.

        Returns:
            The checkpoint; None where none was begun.

        Raises:
            CheckpointError: a rank could not write; nothing is left that looks whole.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return None
        final = self._folder / f"step-{flight.step}"
        aside = self._folder / f"step-{flight.step}{PARTIAL}"
        try:
            files = run_on_all_ranks(self._group, flight.entry.result)
            marker = {"step": flight.step, "facts": flight.facts, "files": files}
            run_on_all_ranks(self._group, lambda: self._publish(aside, final, marker))
        except OfSomeRankError as error:
            # Together, so that no rank begins to write there again while it is removed.
            run_on_all_ranks(self._group, lambda: self._discard(aside))
            raise CheckpointError(
                f"the checkpoint cannot be written ({error})",
                where=final,
                fix=f"{error.fix or 'Look after its disk.'} The run goes on from the checkpoint "
                "before.",
            ) from error.__cause__
        if self._group.rank == 0:
            self._pruned = self._thread.submit(
                _prune, self._folder, flight.step, self._keep, frozenset(self.spared), self._strange
            )
        return final

    def finish(self) -> Path | None:
        """``commit``, and wait until older checkpoints are removed; a collective call."""
        path = self.commit()
        if self._pruned is not None:
            self._pruned.result()
        return path

    def _publish(self, aside: Path, final: Path, marker: Mapping[str, Any]) -> None:
        """On rank 0, while no other rank writes."""
        if self._group.rank != 0:
            return
        for entry in marker["files"]:
            _check_seen(aside / entry["name"], entry["size"])
        write_whole(aside / MARKER, sealed(marker))
        # A killed session may have left files of a larger world.
        for path in aside.iterdir():
            keep = {MARKER, *map(rank_file, range(self._group.world))}
            # File systems leave hidden files of their own (.nfs0001).
            if path.name not in keep and not path.name.startswith("."):
                if not _is_own(path):
                    raise CheckpointError(f"{path.name} is no file of a checkpoint", fix="Move it")
                path.unlink()
        _make_way(final, foreign=marker["step"] in self.spared)
        aside.rename(final)
        sync_folder(self._folder)
        for _, left in by_step(self._folder, PARTIAL):
            _clear(left)

    def _discard(self, aside: Path) -> None:
        if self._group.rank == 0:
            _clear(aside)


def _make_way(final: Path, *, foreign: bool) -> None:
    """Free the name of a checkpoint: one of another run is moved aside, a damaged one removed."""
    if not os.path.lexists(final):
        return
    if foreign or not _is_ours(final):
        log.warning("%s is moved to %s", final, set_aside(final.parents[1], final))
    else:
        shutil.rmtree(final, ignore_errors=True)


def _is_ours(path: Path) -> bool:
    """Whether a folder holds nothing but files that a checkpoint has."""
    return path.is_dir() and all(map(_is_own, path.iterdir()))


def _write_file(aside: Path, rank: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """This rank's file, and its entry in the marker."""
    aside.mkdir(parents=True, exist_ok=True)
    if aside.is_symlink():
        raise CheckpointError("is a link to a folder elsewhere", where=aside, fix="Remove it")
    path = aside / rank_file(rank)
    written = write_tensors(path, tensors)
    return {"name": path.name, **written._asdict()}


def _is_own(path: Path) -> bool:
    """Whether it is a file of a checkpoint, or a marker that was not finished."""
    return path.name == MARKER or bool(OWN.fullmatch(path.name)) or aside_for(path) == MARKER


def _clear(aside: Path) -> None:
    """Remove an unfinished checkpoint; files in it that are somebody else's stay."""
    if aside.is_symlink() or not aside.is_dir():
        return
    with suppress(OSError):
        for path in filter(_is_own, aside.iterdir()):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        aside.rmdir()


def _check_seen(file: Path, size: int) -> None:
    """What another rank wrote is here too. Opened, as only then network file systems look anew."""
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


def _prune(
    folder: Path, newest: int, keep: RetentionPolicy, spared: frozenset[int], strange: set[int]
) -> None:
    found = {step: path for step, path in by_step(folder) if step not in spared}
    saved = {step: _metrics(path) for step, path in found.items()}
    for step in to_remove(saved, newest, keep):
        try:
            if _is_ours(found[step]):
                shutil.rmtree(found[step])
            elif step not in strange:
                strange.add(step)
                log.warning("%s holds files of no checkpoint, so it stays", found[step])
        except OSError as error:
            log.warning("an old checkpoint cannot be removed: %s", error)


def _metrics(path: Path) -> Metrics:
    """As saved with a checkpoint; none where it is damaged, so that it is not the best."""
    try:
        metrics = read_marker(path)["facts"].get("metrics", {})
    except CheckpointError:
        return {}
    return metrics if isinstance(metrics, dict) else {}


# Host memory for copies of tensors, reused from one checkpoint to the next.


@dataclass
class HostBuffers:
    """Memory that the system hands out anew costs more than the copy into it: each page of it is
    cleared and mapped when it is first touched. So the buffers stay, as large as what they hold."""

    _held: dict[str, tuple[object, Tensor]] = field(default_factory=dict)

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors of any device, each in its own memory format.

        Returns:
            Host tensors by the same names, good until the next call. From CUDA they are in pinned
            memory, and all there: it waits for the device once, after the last of them.
        """
        before, self._held = self._held, {}
        devices = set()
        for name, tensor in tensors.items():
            form = (tensor.shape, tensor.stride(), tensor.dtype, tensor.is_cuda)
            held_form, buffer = before.pop(name, (None, tensor))
            if held_form != form:
                buffer = torch.empty_like(
                    tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False
                )
            self._held[name] = form, buffer
            buffer.copy_(tensor.detach(), non_blocking=True)
            if tensor.is_cuda:
                devices.add(tensor.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return {name: buffer for name, (_, buffer) in self._held.items()}
