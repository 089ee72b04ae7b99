"""Sampler and dataset -> batches, by worker processes that live as long as the loader."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable

import cv2
import torch
from torch.utils.data import DataLoader, Sampler

from dist_train.config import LoaderSettings
from dist_train.data.collate import Batch, collate
from dist_train.data.dataset import ClipDataset
from dist_train.data.sampler import Slot


def make_loader(
    dataset: ClipDataset, batches: Sampler[list[Slot]], settings: LoaderSettings
) -> Iterable[Batch]:
    """Batches in the sampler's order, whatever the number of workers.

    Never to be passed through ``accelerator.prepare``: the sampler knows its rank already.
    """
    many = settings.workers > 0
    # Not fork: the parent holds threads (gloo, NCCL, OpenMP) and open files. The server imports
    # once what each worker would import anew.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dist_train.data.collate"])
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=settings.workers,
        prefetch_factor=settings.prefetch if many else None,
        persistent_workers=many,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=context if many else None,
        worker_init_fn=_one_thread,
    )


def _one_thread(worker: int) -> None:
    """Parallelism is over clips, in processes."""
    cv2.setNumThreads(1)
