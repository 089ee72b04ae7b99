"""Sampler and dataset -> batches, by worker processes that live as long as the loader."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dist_train.config import LoaderSettings
from dist_train.data.collate import Batch, collate
from dist_train.data.dataset import ClipDataset
from dist_train.data.pool import end_with_parent
from dist_train.data.sampler import Slot
from dist_train.errors import DistTrainError


class Loader:
    """Batches in the sampler's order, whatever the number of workers; each pass is a new one.

    Never to be passed through ``accelerator.prepare``: the sampler knows its rank already.

    Raises:
        DistTrainError: while iterating: a clip cannot be read.
    """

    def __init__(
        self, dataset: ClipDataset, batches: Sampler[list[Slot]], settings: LoaderSettings
    ) -> None:
        many = settings.workers > 0
        # Not fork: the parent holds threads (gloo, NCCL, OpenMP) and open files. The server imports
        # once what each worker would import anew.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["dist_train.data.collate"])
        self._fetched = DataLoader(
            _Batches(dataset),
            sampler=batches,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=settings.workers,
            prefetch_factor=settings.prefetch if many else None,
            persistent_workers=many,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=context if many else None,
            worker_init_fn=_begin_worker,
        )

    def __iter__(self) -> Iterator[Batch]:
        # At once, not at the first batch: the workers start, and DataLoader draws a seed from
        # torch's generator, which the caller may set before each step.
        return _raised(iter(self._fetched))


def _raised(batches: Iterator[Batch | DistTrainError]) -> Iterator[Batch]:
    for batch in batches:
        if isinstance(batch, DistTrainError):
            raise batch
        yield batch


@dataclass(frozen=True)
class _Batches(Dataset[Batch | DistTrainError]):
    """A user's error comes as a value: DataLoader would put the worker's traceback in its text."""

    clips: ClipDataset

    def __getitem__(self, slots: list[Slot]) -> Batch | DistTrainError:
        try:
            return collate([self.clips[slot] for slot in slots])
        except DistTrainError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin_worker(worker: int) -> None:
    end_with_parent()
    # Parallelism is over clips, in processes.
    cv2.setNumThreads(1)
