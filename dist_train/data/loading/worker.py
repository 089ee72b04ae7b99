"""Slots -> batch in a worker process, whose place is known when it dies."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import cv2
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from dist_train.data.augment.packed_clips import NativeClips
from dist_train.data.loading.collate import Batch, collate, fill, size_of
from dist_train.data.loading.dataset import ClipDataset
from dist_train.data.loading.sampler import Slot
from dist_train.data.loading.shared_buffer import Arena, lent_tensor
from dist_train.data.store.reader import SHARDS
from dist_train.data.store.shards import shard_name
from dist_train.errors import DistTrainError, StoreError
from dist_train.system.advice import first_line, lack_of_memory
from dist_train.system.main_guard import FIX, WHAT, were_unguarded
from dist_train.system.processes import end_with_parent

NOWHERE = -1
LESS_MEMORY = "Lower loader.workers, loader.prefetch or plan.batch, and run the command again."
# Of faulthandler, when the time is over.
GAVE_UP = 1


class WorkerStatus(ctypes.Structure):
    """Where a worker is: its process id; its clip, or ``NOWHERE``. For memory that outlives it."""

    _fields_ = (("pid", ctypes.c_int64), ("clip", ctypes.c_int64))


class BatchRequest(NamedTuple):
    """A batch to be made, and where in the arena; None: in memory of its own."""

    slots: list[Slot]
    offset: int | None


class Tasks(Sampler[BatchRequest]):
    """A sampler's batches, each with a region of the arena for its volumes."""

    def __init__(
        self, batches: Sampler[list[Slot]], clips: ClipDataset, arena: Arena | None
    ) -> None:
        self.batches, self.clips, self.arena = batches, clips, arena

    def __iter__(self) -> Iterator[BatchRequest]:
        for slots in self.batches:
            yield BatchRequest(slots, self._lent(slots))

    def _lent(self, slots: list[Slot]) -> int | None:
        return None if self.arena is None else self.arena.lend(size_of(self.clips, slots))


@dataclass(frozen=True)
class LentBatch:
    """A batch whose volumes are in the arena, on its way from a worker: the parent unpickles the
    ``Batch``."""

    batch: Batch
    arena: Arena
    offset: int

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[Any, ...]]:
        volumes, native = self.batch.volumes, None
        if isinstance(volumes, NativeClips):
            # Their pictures are few, if any.
            native = volumes.shapes, volumes.draws, volumes.pictures.numpy()
            volumes = volumes.pixels
        place = self.arena.number, self.offset, tuple(volumes.shape)
        # As arrays: a tensor would travel by a file descriptor of its own.
        others = (self.batch.frames, self.batch.labels, self.batch.clips)
        arrays = (None if each is None else each.numpy() for each in others)
        return _arrived, (place, native, *arrays)


def _arrived(place: tuple[int, int, tuple[int, ...]], native: Any, *others: Any) -> Batch:
    pixels = lent_tensor(*place)
    volumes: Tensor | NativeClips = pixels
    if native is not None:
        shapes, draws, pictures = native
        volumes = NativeClips(pixels, shapes, draws, torch.from_numpy(pictures))
    frames, labels, clips = (None if each is None else torch.from_numpy(each) for each in others)
    assert labels is not None
    assert clips is not None
    return Batch(volumes, frames, labels, clips)


@dataclass(frozen=True)
class BatchDataset(Dataset[Batch | LentBatch | DistTrainError]):
    """A ``DataLoader``'s dataset of whole batches.

    A user's error comes as a value: DataLoader would put the worker's traceback in its text.

    Args:
        clips: where the slots' clips come from.
        places: one for each worker, in shared memory; None if there are none.
        arena: where workers put volumes; None if there is none.
        patience: seconds for one clip, after which a worker ends itself.
    """

    clips: ClipDataset
    places: ctypes.Array[WorkerStatus] | None
    arena: Arena | None
    patience: float

    def __getitem__(self, task: BatchRequest) -> Batch | LentBatch | DistTrainError:
        worker = get_worker_info()
        if self.places is None or worker is None:
            return self.here(task.slots)
        try:
            return self._in_worker(task, self.places[worker.id])
        except DistTrainError as error:
            return error

    def here(self, slots: list[Slot]) -> Batch | DistTrainError:
        """Made in this process, in memory of its own."""
        try:
            return collate(self.clips, slots)
        except DistTrainError as error:
            return error

    def _in_worker(self, task: BatchRequest, place: WorkerStatus) -> Batch | LentBatch:
        try:
            before = partial(self._announce, place)
            size = size_of(self.clips, task.slots)
            if self.arena is None or task.offset is None:
                pixels = torch.empty(size, dtype=torch.uint8)
                # Else a thread of the queue would share it, and if it failed, the batch would never
                # come.
                return fill(pixels, self.clips, task.slots, before).share_memory()
            pixels = torch.from_numpy(self.arena.writable(task.offset, size))
            batch = fill(pixels, self.clips, task.slots, before)
            return LentBatch(batch, self.arena, task.offset)
        except (MemoryError, RuntimeError) as error:
            if lack_of_memory(error) is None:
                raise
            what = f"out of memory ({first_line(error)})"
            raise self._at(place.clip, what, LESS_MEMORY) from None
        finally:
            faulthandler.cancel_dump_traceback_later()
            place.clip = NOWHERE

    def _announce(self, place: WorkerStatus, slot: Slot) -> None:
        place.clip = slot.clip
        # By a thread in C: it ends the process also where a library never comes back.
        faulthandler.dump_traceback_later(self.patience, exit=True)

    def death(self, dead: Mapping[int | None, int | None]) -> StoreError:
        """What to tell of dead workers: process id -> exit code, negative for a signal.

        Of several it is one that was at a clip.
        """
        at = {place.pid: int(place.clip) for place in self.places or ()}
        pid = max(dead, key=lambda pid: at.get(pid, NOWHERE))
        clip, code = at.get(pid, NOWHERE), dead[pid] or 0
        if were_unguarded(dead.values()):
            return StoreError(WHAT, fix=FIX)
        if code == GAVE_UP and clip != NOWHERE:
            what = f"a loader worker gave up after {self.patience:g} s"
            return self._at(clip, what, "Check that the store's file system answers.")
        if code == -signal.SIGKILL:
            what = "a loader worker was killed (SIGKILL)"
            return self._at(clip, what, f"Memory probably ran out. {LESS_MEMORY}")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return self._at(
            clip,
            f"a loader worker died ({how})",
            "Its standard error says where in the code. Run the command again; if it dies at this "
            "clip again, leave the clip out of the manifest.",
        )

    def _at(self, clip: int, what: str, fix: str) -> StoreError:
        store = self.clips.store
        if clip == NOWHERE:
            return StoreError(f"{what} between two batches", where=store.folder, fix=fix)
        row = store.table.iloc[clip]
        shard = store.folder / SHARDS / shard_name(int(row["shard"]))
        return StoreError(f"{what} at clip '{row['key']}'", where=shard, fix=fix)


def begin_worker(worker: int) -> None:
    """The ``worker_init_fn`` of worker number ``worker``."""
    end_with_parent()
    # A terminal sends it to all; the parent ends its workers, or goes on with them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A crash then shows its Python stack.
    faulthandler.enable()
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, BatchDataset)
    assert info.dataset.places is not None
    place = info.dataset.places[worker]
    place.pid, place.clip = os.getpid(), NOWHERE
    # Parallelism is over clips, in processes.
    cv2.setNumThreads(1)
