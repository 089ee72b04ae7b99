"""Sampler and dataset -> batches, by worker processes that live as long as the loader."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from dist_train.config import LoaderSettings
from dist_train.data.arena import arena_of_memory
from dist_train.data.collate import Batch
from dist_train.data.dataset import ClipDataset
from dist_train.data.fetch import Fetch, Place, Tasks, begin_worker
from dist_train.data.sampler import Slot
from dist_train.errors import DistTrainError

# Not fork: the parent holds threads (gloo, NCCL, OpenMP) and open files.
START_METHOD = "forkserver"
# Seconds for one clip. The other ranks wait for this one, and NCCL ends them after ten minutes by
# default, with an error that names no clip.
PATIENCE = 300.0
# Seconds within which the fork server tells of a death.
NEWS = 1.0


class Loader:
    """Batches in the sampler's order, whatever the number of workers.

    Each pass is a new one, by the same workers, and ends the pass before it. A worker holds at most
    ``settings.prefetch`` batches, to do or done. Never to be passed through
    ``accelerator.prepare``: the sampler knows its rank already.

    Raises:
        DistTrainError: while iterating: a clip cannot be read, or a worker died, found no memory,
            or spent ``PATIENCE`` seconds on one clip. It names the clip.
    """

    def __init__(
        self, dataset: ClipDataset, batches: Sampler[list[Slot]], settings: LoaderSettings
    ) -> None:
        many = settings.workers > 0
        context = multiprocessing.get_context(START_METHOD)
        # The server imports once what each worker would import anew.
        context.set_forkserver_preload([__name__])
        places = context.RawArray(Place, settings.workers) if many else None
        arena = arena_of_memory() if many else None
        self._fetch = Fetch(dataset, places, arena, PATIENCE)
        self._workers: list[BaseProcess] = []
        self._fetched = DataLoader(
            self._fetch,
            sampler=Tasks(batches, dataset, arena),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=settings.workers,
            prefetch_factor=settings.prefetch if many else None,
            persistent_workers=many,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=context if many else None,
            worker_init_fn=begin_worker,
        )

    def __iter__(self) -> Iterator[Batch]:
        # At once, not at the first batch: the workers start, and DataLoader draws a seed from
        # torch's generator, which the caller may set before each step.
        others = multiprocessing.active_children()
        with self._deaths_explained():
            batches = iter(self._fetched)
        if not self._workers:
            self._workers = [p for p in multiprocessing.active_children() if p not in others]
        return self._raised(batches)

    def _raised(self, batches: Iterator[Batch | DistTrainError]) -> Iterator[Batch]:
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
            yield batch

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
