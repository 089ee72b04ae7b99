"""The mean scores of clips over a run's snapshots, computed by all processes of a launch.

Only one model is in memory at a time. Clips are read once: as many batches as fit into ``HELD``
bytes stay on the host while each snapshot in turn predicts them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dist_train.config import Config
from dist_train.data.loading.collate import Batch
from dist_train.data.loading.loader import Loader
from dist_train.data.loading.sampler import dealt_batches
from dist_train.data.store.reader import Store
from dist_train.distributed.backends.base import autocast
from dist_train.distributed.out_of_memory import free_cache, is_out_of_memory
from dist_train.distributed.process_group import ProcessGroup
from dist_train.errors import RunError
from dist_train.evaluation.flips import Tta, View, Viewed, views_of
from dist_train.progress import Progress
from dist_train.run.data import clip_dataset, frames_of
from dist_train.run.model import held_out_logits, make_model, target_of
from dist_train.run.snapshots import load_into
from dist_train.system.advice import first_line

log = logging.getLogger(__name__)

#: Bytes of pixels that a process keeps on the host.
HELD = 2**30


def mean_scores(
    config: Config,
    snapshots: Sequence[Path],
    store: Store,
    clips: pd.DataFrame,
    record: Mapping[str, Any],
    group: ProcessGroup,
    *,
    batch: int,
    tta: Tta = "none",
    progress: Progress | None = None,
) -> np.ndarray:
    """Mean over the snapshots of each clip's ``Target.scores``: float64 [N] or [N, ...], in the
    order of ``clips``, on every rank. A collective call.

    The number of processes does not change which clips share a batch, nor the values, unless memory
    runs out and a process has to cut its batches.

    Args:
        snapshots: safetensors files of the run's model.
        clips: rows of the store's table; their index is the clip number.
        record: the content of the run's ``run.json``.
        batch: clips predicted at once; halved when memory runs out.
        tta: the views of each clip over which its probability is averaged, too.
        progress: called with (clips done, clips in all) over all snapshots, extrapolated from the
            clips of this process to those of all.

    Raises:
        RunError: a snapshot does not fit the run or gives an output that is not finite, or memory
            does not suffice for a single clip.
        StoreError: a clip cannot be read.
    """
    batches = dealt_batches(
        clips.index,
        frames_of(store, config.clip)[clips.index],
        rank=group.rank,
        world=group.world,
        batch=batch,
    )
    store.expect(len(clips))
    loader = Loader(clip_dataset(config, store, augment=None), batches, config.loader)
    total, own = len(clips) * len(snapshots), sum(map(len, batches)) * len(snapshots)
    finished = 0
    predictor = _Predictor(config, record, group, batch, views_of(tta, config.augment))
    target = predictor.target
    sums = np.zeros((len(clips), *(() if target.kind == "binary" else (len(target.classes),))))
    place = pd.Series(np.arange(len(clips)), index=clips.index)
    for held in _rounds(loader):
        for snapshot in snapshots:
            predictor.load(snapshot)
            for one in held:
                sums[place[one.clips.numpy()]] += predictor.scores(one)
                finished += len(one.clips)
                if progress is not None:
                    progress(finished * total // own, total)
    # Each clip is zero on all ranks but one, so the sum over the ranks is exact.
    mean: np.ndarray = np.sum(group.gather(sums), axis=0) / len(snapshots)
    return mean


def _rounds(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Group batches into lists that fit into ``HELD`` bytes, with at least one batch each."""
    held: list[Batch] = []
    size = 0
    for batch in batches:
        held.append(batch)
        size += sum(tensor.nbytes for tensor in batch.pixels)
        if size >= HELD:
            yield held
            held, size = [], 0
    if held:
        yield held


class _Predictor:
    """The run's model on this process's device, with the weights of one snapshot at a time."""

    def __init__(
        self,
        config: Config,
        record: Mapping[str, Any],
        group: ProcessGroup,
        batch: int,
        views: Sequence[View],
    ) -> None:
        self._config, self._record = config, record
        self.target = target_of(config.target)
        self._device, self._most = group.device, batch
        self._snapshot = Path()
        self._model = make_model(config).to(group.device).eval()
        self._views = [self._model] if len(views) == 1 else [Viewed(self._model, v) for v in views]

    def load(self, snapshot: Path) -> None:
        self._snapshot = snapshot
        load_into(self._model, snapshot, self._config, self._record)

    def scores(self, batch: Batch) -> np.ndarray:
        """``Target.scores`` of the clips of a batch, the mean over their views: float64 [B] or
        [B, ...]."""
        found: list[np.ndarray] = []
        start = 0
        while start < len(batch.clips):
            piece = batch.part(start, start + self._most)
            reason = None
            try:
                with autocast(self._config.train.precision, self._device):
                    of_views = [
                        held_out_logits(model, [piece], self._config, self._device)[1]
                        for model in self._views
                    ]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            # Outside of the except block, because the traceback keeps tensors alive.
            if reason is not None:
                self._halve(len(piece.clips), reason)
                continue
            logits = np.stack(of_views)
            self._check_finite(logits)
            of_each = [self.target.scores(one.astype(np.float64)) for one in logits]
            found.append(np.mean(of_each, axis=0))
            start += len(piece.clips)
        return np.concatenate(found)

    def _halve(self, clips: int, reason: str) -> None:
        if clips == 1:
            raise RunError(
                f"memory does not suffice to predict a single clip ({reason})",
                fix="Free memory on the device, or predict on one that has more.",
            )
        free_cache(self._device)
        self._most = clips // 2
        log.warning("%s; from now on %d clips are predicted at once", reason, self._most)

    def _check_finite(self, logits: np.ndarray) -> None:
        if bad := int((~np.isfinite(logits)).sum()):
            raise RunError(
                f"the snapshot gives {bad} of {logits.size} outputs that are not finite",
                where=self._snapshot,
                fix="Move the file away, or set train.precision: fp32; nothing was written",
            )
