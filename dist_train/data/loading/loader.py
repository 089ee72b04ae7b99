"""Batches from worker processes that live as long as their loader."""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader

from dist_train.config import LoaderSettings
from dist_train.data.loading.collate import Batch, size_of
from dist_train.data.loading.dataset import ClipDataset
from dist_train.data.loading.sampler import Slot
from dist_train.data.loading.shared_buffer import Arena, arena_of_memory
from dist_train.data.loading.worker import BatchDataset, BatchRequest, WorkerStatus, begin_worker
from dist_train.errors import DistTrainError, MachineError
from dist_train.system.advice import ADVICE, open_files
from dist_train.system.main_guard import end_if_run_again
from dist_train.system.processes import worker_context
from dist_train.system.shared_memory import within_open_files, workers_started

# Seconds for one clip. The other ranks wait meanwhile, and NCCL ends them after ten minutes by
# default, with an error that names no clip.
PATIENCE = 300.0
# Seconds within which the fork server reports a death, also on a busy machine.
REPORT_TIME = 5.0
# Batches of a remote store that each worker reads while it makes one.
AHEAD = 2
# Files that this process has open for each worker.
OPEN_FILES = 4

# A worker's ``LentBatch`` arrives as the ``Batch`` that it holds.
Fetched = Batch | DistTrainError


class Loader:
    """The batches of ``slots`` in their order, whatever the number of workers.

    Each iteration is a new pass by the same workers, and ends the pass before it. Each worker has
    at most ``settings.prefetch`` batches, requested or done. Workers take seconds to start; this
    process makes the first batches meanwhile. ``slots`` belong to this rank alone: never pass a
    loader through ``accelerator.prepare``, which would shard it again.

    Raises:
        MachineError: that many workers cannot be started here.
        DistTrainError: while iterating: a clip cannot be read, or a worker died, ran out of memory,
            or spent ``PATIENCE`` seconds on one clip. It names the clip.
    """

    def __init__(
        self, dataset: ClipDataset, slots: Iterable[list[Slot]], settings: LoaderSettings
    ) -> None:
        end_if_run_again()
        self._has_workers = settings.workers > 0
        fitting = within_open_files(settings.workers, OPEN_FILES)
        if self._has_workers and fitting < settings.workers:
            raise MachineError(
                f"{settings.workers} loader workers need more open files than the limit of "
                f"{open_files()}, which is enough for {fitting}",
                where="loader.workers",
                fix=ADVICE[errno.EMFILE],
            )
        with workers_started():
            context = _WorkerContext() if self._has_workers else None
            statuses = context.RawArray(WorkerStatus, settings.workers) if context else None
        arena = arena_of_memory() if self._has_workers else None
        self._batches = BatchDataset(dataset, statuses, arena, PATIENCE)
        self._requests = _Requests(slots, dataset, arena, settings.workers)
        self._workers = context.workers if context else []
        self._start: Future[Iterator[Fetched]] | None = None
        self._fetched = DataLoader(
            self._batches,
            sampler=self._requests,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=settings.workers,
            prefetch_factor=settings.prefetch if self._has_workers else None,
            persistent_workers=self._has_workers,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=context,
            worker_init_fn=begin_worker,
            # Each pass draws a seed, which must not change torch's global random state.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Batch]:
        if not self._has_workers:
            return self._raising(iter(self._fetched))
        if self._start is not None:
            with self._deaths_explained():
                self._start.result()
                return self._raising(iter(self._fetched))
        # Start the workers now, not when the first batch is asked for.
        self._requests.begin()
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        executor = ThreadPoolExecutor(1, "start of loader workers")
        self._start = executor.submit(self._started, device)
        executor.shutdown(wait=False)
        return self._raising(self._until_started(self._start))

    def wait(self) -> None:
        """Wait until the workers of the first pass have started."""
        if self._start is not None:
            with self._deaths_explained():
                self._start.result()

    def _started(self, device: int | None) -> Iterator[Fetched]:
        """Start the workers, in a thread."""
        if device is not None:
            # The current device belongs to a thread, and DataLoader pins memory for it.
            torch.cuda.set_device(device)
        with workers_started():
            return iter(self._fetched)

    def _until_started(self, start: Future[Iterator[Fetched]]) -> Iterator[Fetched]:
        for slots in self._requests.until_workers_ask():
            batch = self._batches.in_this_process(slots)
            if isinstance(batch, Batch) and torch.cuda.is_available():
                batch = batch.pin_memory()
            yield batch
        if not self._requests.used_up:
            yield from start.result()

    def _raising(self, batches: Iterator[Fetched]) -> Iterator[Batch]:
        while True:
            with self._deaths_explained():
                batch = next(batches, None)
            if batch is None:
                return
            if isinstance(batch, DistTrainError):
                try:
                    raise batch
                finally:
                    # The error's traceback holds this frame. If the frame held the error, only the
                    # garbage collector would free the loader, and DataLoader could not end its
                    # workers then.
                    del batch
            # Keep no reference, so that the caller alone decides when the memory is free.
            last_reference = [batch]
            del batch
            yield last_reference.pop()

    @contextmanager
    def _deaths_explained(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError, EOFError):
            # DataLoader notices a death after 5 s without a batch, or when it receives one.
            # The start of others may have failed, or is still to come.
            started = [worker for worker in list(self._workers) if worker.pid is not None]
            if started:
                wait([worker.sentinel for worker in started], REPORT_TIME)
            dead = {w.pid: w.exitcode for w in started if w.exitcode is not None}
            if not dead:
                raise
            raise self._batches.error_of_death(dead) from None


class _WorkerContext(ForkServerContext):
    """The context that DataLoader starts its workers from, which keeps them.

    ``multiprocessing.active_children`` forgets a worker that died at once.
    """

    def __init__(self) -> None:
        super().__init__()
        worker_context(__name__)
        self.workers: list[BaseProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> BaseProcess:  # type: ignore[override]  # noqa: N802
        self.workers.append(super().Process(*args, **kwargs))
        return self.workers[-1]


class _Requests:
    """The requests of each pass, each with a region of the arena.

    After ``begin`` the first batches of a pass go to ``until_workers_ask``, and the rest to the
    next iteration, in another thread.

    Attributes:
        used_up: ``until_workers_ask`` took all batches of the pass.
    """

    def __init__(
        self, slots: Iterable[list[Slot]], clips: ClipDataset, arena: Arena | None, workers: int
    ) -> None:
        self.used_up = False
        self._workers, self._ahead = workers, AHEAD if workers and clips.store.is_remote else 0
        self._slots, self._clips, self._arena = slots, clips, arena
        self._lock = threading.Lock()
        self._rest: Iterator[list[Slot]] | None = None

    def begin(self) -> None:
        self._rest = iter(self._slots)

    def until_workers_ask(self) -> Iterator[list[Slot]]:
        while True:
            with self._lock:
                if self._rest is None:
                    return
                slots = next(self._rest, None)
            if slots is None:
                self.used_up = True
                return
            yield slots

    def __iter__(self) -> Iterator[BatchRequest]:
        with self._lock:
            rest, self._rest = self._rest, None
        # Workers get the batches in turn.
        steps = [(number + 1) * self._workers for number in range(self._ahead)]
        for slots, coming in with_coming(self._slots if rest is None else rest, steps):
            offset = None if self._arena is None else self._arena.lend(size_of(self._clips, slots))
            yield BatchRequest(slots, offset, coming)


def with_coming(
    batches: Iterable[list[Slot]], steps: Sequence[int]
) -> Iterator[tuple[list[Slot], list[list[Slot]]]]:
    """Each batch, and those that come so many steps later, as far as there are any."""
    rest = iter(batches)
    window = deque(islice(rest, 1 + max(steps, default=0)))
    while window:
        yield window.popleft(), [window[step - 1] for step in steps if step <= len(window)]
        window.extend(islice(rest, 1))


def _unchanged(batch: Any) -> Any:
    return batch
