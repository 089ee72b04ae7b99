"""Make batches in worker processes, and explain the death of a worker."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import cv2
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from dist_train.data.augment.packed_clips import NativeClips
from dist_train.data.loading.collate import Batch, channels_first, collate, fill, size_of
from dist_train.data.loading.dataset import ClipDataset
from dist_train.data.loading.sampler import Slot
from dist_train.data.loading.shared_buffer import Arena, lent_tensor
from dist_train.errors import DistTrainError, StoreError
from dist_train.system.advice import first_line, lack_of_memory
from dist_train.system.main_guard import FIX, WHAT, were_unguarded
from dist_train.system.processes import end_with_parent

NO_CLIP = -1
LESS_MEMORY = "Lower loader.workers, loader.prefetch or plan.batch, and run the command again."
# Exit code of a process that faulthandler ends after its time limit.
TIMED_OUT = 1


class WorkerStatus(ctypes.Structure):
    """A worker's process id and current clip, in shared memory that outlives the worker."""

    _fields_ = (("pid", ctypes.c_int64), ("clip", ctypes.c_int64))


class BatchRequest(NamedTuple):
    """A batch to make.

    Attributes:
        offset: its place in the arena; None for memory of its own.
        coming: the batches that the same worker probably makes next, of a remote store.
    """

    slots: list[Slot]
    offset: int | None
    coming: list[list[Slot]]


@dataclass(frozen=True)
class LentBatch:
    """A batch whose volumes lie in the arena. It is unpickled as a ``Batch``."""

    batch: Batch
    arena: Arena
    offset: int

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[Any, ...]]:
        volumes, native = self.batch.volumes, None
        if isinstance(volumes, NativeClips):
            native = volumes.shapes, volumes.draws, volumes.pictures.numpy(), volumes.channels
            volumes = volumes.pixels
        else:
            volumes = volumes.permute(0, 2, 3, 4, 1)
        region = self.arena.number, self.offset, tuple(volumes.shape), volumes.dtype
        # As arrays, which are pickled: each tensor would take a file descriptor.
        others = (self.batch.frames, self.batch.labels, self.batch.clips)
        return _arrived, (region, native, *(None if t is None else t.numpy() for t in others))


def _arrived(
    region: tuple[int, int, tuple[int, ...], torch.dtype], native: Any, *others: Any
) -> Batch:
    pixels = lent_tensor(*region)
    volumes: Tensor | NativeClips
    if native is None:
        volumes = channels_first(pixels)
    else:
        shapes, draws, pictures, channels = native
        volumes = NativeClips(pixels, shapes, draws, torch.from_numpy(pictures), channels)
    frames, labels, clips = (None if each is None else torch.from_numpy(each) for each in others)
    assert labels is not None
    assert clips is not None
    return Batch(volumes, frames, labels, clips)


@dataclass(frozen=True)
class BatchDataset(Dataset[Batch | LentBatch | DistTrainError]):
    """A ``DataLoader``'s dataset of whole batches.

    A user's error is returned: if it was raised, DataLoader would add the worker's traceback to its
    text.

    Attributes:
        clips: reads the clips.
        statuses: one for each worker, in shared memory; None without workers.
        arena: shared memory for volumes; None if there is none.
        patience: seconds for one clip, after which a worker ends itself.
    """

    clips: ClipDataset
    statuses: ctypes.Array[WorkerStatus] | None
    arena: Arena | None
    patience: float

    def __getitem__(self, request: BatchRequest) -> Batch | LentBatch | DistTrainError:
        worker = get_worker_info()
        if self.statuses is None or worker is None:
            return self.in_this_process(request.slots)
        try:
            return self._in_worker(request, self.statuses[worker.id])
        except DistTrainError as error:
            return error

    def in_this_process(self, slots: list[Slot]) -> Batch | DistTrainError:
        """A batch in memory of its own."""
        try:
            return collate(self.clips, slots)
        except DistTrainError as error:
            return error

    def _in_worker(self, request: BatchRequest, status: WorkerStatus) -> Batch | LentBatch:
        try:
            slots, offset, coming = request
            for batch in (slots, *coming):
                self.clips.prefetch(batch)
            announce = partial(self._announce, status)
            size = size_of(self.clips, slots)
            if self.arena is None or offset is None:
                pixels = torch.empty(size, dtype=torch.uint8)
                # Otherwise DataLoader's thread would share it, and drop the batch if that failed.
                return fill(pixels, self.clips, slots, announce).share_memory()
            pixels = torch.from_numpy(self.arena.writable(offset, size))
            return LentBatch(fill(pixels, self.clips, slots, announce), self.arena, offset)
        except (MemoryError, RuntimeError) as error:
            if lack_of_memory(error) is None:
                raise
            what = f"out of memory ({first_line(error)})"
            raise self._error_at(status.clip, what, LESS_MEMORY) from None
        finally:
            faulthandler.cancel_dump_traceback_later()
            status.clip = NO_CLIP

    def _announce(self, status: WorkerStatus, slot: Slot) -> None:
        status.clip = slot.clip
        # A thread in C ends the process, even if a library never returns.
        faulthandler.dump_traceback_later(self.patience, exit=True)

    def error_of_death(self, dead: Mapping[int | None, int | None]) -> StoreError:
        """The error for dead workers, which names the clip of one of them.

        Args:
            dead: exit codes by process id, negative for a signal.
        """
        clips = {status.pid: int(status.clip) for status in self.statuses or ()}
        pid = max(dead, key=lambda pid: clips.get(pid, NO_CLIP))
        clip, code = clips.get(pid, NO_CLIP), dead[pid] or 0
        if were_unguarded(dead.values()):
            return StoreError(WHAT, fix=FIX)
        if code == TIMED_OUT and clip != NO_CLIP:
            what = f"a loader worker gave up after {self.patience:g} s"
            return self._error_at(clip, what, "Check that the store's file system answers.")
        if code == -signal.SIGKILL:
            what = "a loader worker was killed (SIGKILL)"
            return self._error_at(clip, what, f"Memory probably ran out. {LESS_MEMORY}")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return self._error_at(
            clip,
            f"a loader worker died ({how})",
            "Its standard error shows the place in the code. Run the command again; if it dies at "
            "this clip again, remove the clip from the manifest.",
        )

    def _error_at(self, clip: int, what: str, fix: str) -> StoreError:
        store = self.clips.store
        if clip == NO_CLIP:
            return StoreError(f"{what} between two batches", where=store.name, fix=fix)
        key = store.table.text("key", clip)
        return StoreError(f"{what} at clip '{key}'", where=store.where(clip), fix=fix)


def begin_worker(worker: int) -> None:
    """The ``worker_init_fn`` of worker number ``worker``."""
    end_with_parent()
    # Ctrl-C reaches all processes of a terminal; the parent ends its workers, or keeps them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A crash then shows its Python stack.
    faulthandler.enable()
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, BatchDataset)
    assert info.dataset.statuses is not None
    status = info.dataset.statuses[worker]
    status.pid, status.clip = os.getpid(), NO_CLIP
    # Workers, not threads, run in parallel.
    cv2.setNumThreads(1)
