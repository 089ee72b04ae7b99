"""Sampler and dataset -> batches, by worker processes that live as long as the loader."""

from __future__ import annotations

import errno
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from dist_train.config import LoaderSettings
from dist_train.data.loading.collate import Batch
from dist_train.data.loading.dataset import ClipDataset
from dist_train.data.loading.sampler import HandedOver, Slot
from dist_train.data.loading.shared_buffer import arena_of_memory
from dist_train.data.loading.worker import BatchDataset, Tasks, WorkerStatus, begin_worker
from dist_train.errors import DistTrainError, MachineError
from dist_train.system.advice import ADVICE, open_files
from dist_train.system.main_guard import end_if_run_again
from dist_train.system.processes import worker_context
from dist_train.system.shared_memory import within_open_files, workers_started

# Seconds for one clip. The other ranks wait for this one, and NCCL ends them after ten minutes by
# default, with an error that names no clip.
PATIENCE = 300.0
# Seconds within which the fork server tells of a death.
NEWS = 1.0

# That this process has open for each worker.
OPEN_FILES = 4
WITHOUT = "set loader.workers=0"

# A ``LentBatch`` arrives as the ``Batch`` that it holds.
Fetched = Batch | DistTrainError
_starting = threading.Lock()


class Loader:
    """Batches in the sampler's order, whatever the number of workers.

    Each pass is a new one, by the same workers, and ends the pass before it. A worker holds at most
    ``settings.prefetch`` batches, to do or done. While workers start, which takes seconds, this
    process makes the first batches itself. Never to be passed through ``accelerator.prepare``: the
    sampler knows its rank already.

    Raises:
        MachineError: so many workers cannot be started here.
        DistTrainError: while iterating: a clip cannot be read, or a worker died, found no memory,
            or spent ``PATIENCE`` seconds on one clip. It names the clip.
    """

    def __init__(
        self, dataset: ClipDataset, batches: Sampler[list[Slot]], settings: LoaderSettings
    ) -> None:
        end_if_run_again()
        self._many = settings.workers > 0
        fitting = within_open_files(settings.workers, OPEN_FILES)
        if self._many and fitting < settings.workers:
            raise MachineError(
                f"{settings.workers} loader workers need more open files than the limit of "
                f"{open_files()}, which is enough for {fitting}",
                where="loader.workers",
                fix=ADVICE[errno.EMFILE],
            )
        with workers_started(WITHOUT):
            context = worker_context(__name__) if self._many else None
            places = context.RawArray(WorkerStatus, settings.workers) if context else None
        arena = arena_of_memory() if self._many else None
        self._fetch = BatchDataset(dataset, places, arena, PATIENCE)
        self._slots = HandedOver(batches)
        self._workers: list[BaseProcess] = []
        self._start: Future[Iterator[Fetched]] | None = None
        self._fetched = DataLoader(
            self._fetch,
            sampler=Tasks(self._slots, dataset, arena),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=settings.workers,
            prefetch_factor=settings.prefetch if self._many else None,
            persistent_workers=self._many,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=context,
            worker_init_fn=begin_worker,
            # Of its own: it draws a seed in each pass, when the caller may have set torch's.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Batch]:
        if not self._many:
            return self._raised(iter(self._fetched))
        if self._start is not None:
            with self._deaths_explained():
                self._start.result()
                return self._raised(iter(self._fetched))
        # At once, not at the first batch.
        self._slots.begin()
        self._start = _in_thread(self._started)
        return self._raised(self._until_started(self._start))

    def wait(self) -> None:
        """Wait until the workers of a pass that was begun are there."""
        if self._start is not None:
            self._start.result()

    def _started(self) -> Iterator[Fetched]:
        # One loader at a time, so that it knows its own workers.
        with _starting:
            others = multiprocessing.active_children()
            with workers_started(WITHOUT):
                batches: Iterator[Fetched] = iter(self._fetched)
            self._workers = [p for p in multiprocessing.active_children() if p not in others]
        return batches

    def _until_started(self, start: Future[Iterator[Fetched]]) -> Iterator[Fetched]:
        for slots in self._slots.taken():
            yield self._here(slots)
        if not self._slots.are_used_up:
            yield from start.result()

    def _here(self, slots: list[Slot]) -> Fetched:
        batch = self._fetch.here(slots)
        if isinstance(batch, Batch) and torch.cuda.is_available():
            return batch.pin_memory()
        return batch

    def _raised(self, batches: Iterator[Fetched]) -> Iterator[Batch]:
        while True:
            with self._deaths_explained():
                batch = next(batches, None)
            if batch is None:
                return
            if isinstance(batch, DistTrainError):
                try:
                    raise batch
                finally:
                    # The error refers to this frame. If the frame referred back, the workers would
                    # be left to the collector of cycles, under which DataLoader cannot end them.
                    del batch
            # Not kept here too: its memory is free again as soon as the caller lets go of it.
            handed = [batch]
            del batch
            yield handed.pop()

    @contextmanager
    def _deaths_explained(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError, EOFError):
            # DataLoader looks for the dead when nothing has come for 5 s. Or it fails before, as it
            # takes over a batch from one.
            if self._workers:
                wait([worker.sentinel for worker in self._workers], NEWS)
            dead = {w.pid: w.exitcode for w in self._workers if w.exitcode is not None}
            if not dead:
                raise
            raise self._fetch.death(dead) from None


def _as_it_is(batch: Any) -> Any:
    return batch


def _in_thread(function: Callable[[], Iterator[Fetched]]) -> Future[Iterator[Fetched]]:
    future: Future[Iterator[Fetched]] = Future()
    # The device is chosen for each thread, and DataLoader notes that of the thread it starts in.
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="start of loader workers").start()
    return future
