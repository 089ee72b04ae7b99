"""What a run must remember to go on after any interruption, and where it is kept.

Augmentation and dropout are keyed by epoch and step, and the learning rate is a function of the
step, so beside weights and moments the step itself is nearly all there is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.checkpoint.format import assign_tensors, latest_valid, load_checkpoint
from dist_train.checkpoint.retention import RetentionPolicy
from dist_train.checkpoint.shared_reader import SharedTensors
from dist_train.checkpoint.writer import CheckpointWriter
from dist_train.config import CheckpointSettings
from dist_train.data.plan.plan import Plan
from dist_train.distributed.backends.base import Backend
from dist_train.distributed.collectives import OfSomeRankError, on_main, run_on_all_ranks
from dist_train.errors import CheckpointError
from dist_train.run.model import metadata_differences
from dist_train.training.ema import Ema, averaged

log = logging.getLogger(__name__)

VERSION = 1
# The epoch's training outputs so far, which its metrics need at its end.
EPOCH = ("epoch/logits", "epoch/labels")
# BatchNorm statistics that held-out clips were judged by, beside the running ones.
JUDGED = "judged/"


class RunState:
    """Saves and restores one run's state under ``folder``.

    Args:
        plan_at: the plan that a step was, or is to be, made by.
        model: facts that the weights only mean the same with, as JSON types.
        store, content: fingerprint of the store, and identity of what it holds.
        completed: called on rank 0 after a checkpoint is in place, until it succeeds once.
    """

    def __init__(
        self,
        folder: Path,
        backend: Backend,
        ema: Ema,
        plan_at: Callable[[int], Plan],
        settings: CheckpointSettings,
        *,
        seed: int,
        model: dict[str, Any],
        store: str,
        content: str,
        completed: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.backend, self.settings = folder, backend, settings
        self.ema = ema
        self.plan_at = plan_at
        self.seed, self.model, self.store, self.content = seed, model, store, content
        keep = RetentionPolicy(settings.keep_last, settings.keep_every, settings.best)
        self.writer = CheckpointWriter(folder, backend, keep=keep)
        self.saved_at: int | None = None
        self._failures, self._has_one = 0, False
        self._completed: Callable[[], None] | None = completed if backend.is_main else None

    def save(
        self,
        step: int,
        logits: np.ndarray,
        labels: np.ndarray,
        metrics: Mapping[str, float | None],
        statistics: Mapping[str, Tensor],
    ) -> None:
        """Begin the checkpoint after ``step`` steps; a collective call. ``commit`` completes it.

        Args:
            logits, labels: float32 [N], this epoch's training outputs, of all ranks.
            metrics: of these weights, as far as they were judged.
            statistics: BatchNorm's by buffer name, alike on all ranks, that they were judged by,
                if those are not the running ones. Training does not go on from them.
        """
        self.commit()
        judged = {JUDGED + name: tensor for name, tensor in statistics.items()}
        sizes = self.backend.sizes() | self.ema.sizes() | dict.fromkeys(EPOCH, len(logits))
        sizes |= {name: tensor.numel() for name, tensor in judged.items()}
        mine = assign_tensors(sizes, self.backend.rank, self.backend.world)
        tensors = self.backend.state(mine) | self.ema.state(mine)
        tensors |= {name: tensor for name, tensor in judged.items() if mine(name)}
        for name, values in zip(EPOCH, (logits, labels), strict=True):
            if mine(name):
                tensors[name] = torch.from_numpy(values.astype(np.float32))
        plan = self.plan_at(step - 1)
        facts = {
            "model": self.model,
            "store": self.store,
            "content": self.content,
            "sampler": {
                "version": VERSION,
                "seed": self.seed,
                "epoch": plan.epoch_of(step),
                "step": step,
                "fingerprint": plan.fingerprint,
            },
            "loss_scale": self.backend.scaler_state(),
            "metrics": dict(metrics),
        }
        self.writer.save(step, tensors, facts)
        self.saved_at = step

    @property
    def ready(self) -> bool:
        """Whether ``commit`` need not wait for this rank."""
        return self.writer.ready

    def commit(self) -> None:
        """Complete what ``save`` began; a collective call.

        Raises:
            CheckpointError: it cannot be written, and there is no older one, or this has happened
                too many times in a row.
        """
        with self.failures_survived():
            if self.writer.commit() is not None:
                self._note_completed()

    def finish(self) -> None:
        """Complete what ``save`` began, and the removal of older ones; a collective call.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self.writer.finish() is not None:
            self._note_completed()

    def _note_completed(self) -> None:
        self._failures, self._has_one = 0, True
        if self._completed is not None:
            try:
                self._completed()
            except OSError as error:
                # The checkpoint is in place, so the run can go on; the next one tries again.
                log.warning("the first checkpoint is not noted in the run's record: %s", error)
            else:
                self._completed = None

    @contextmanager
    def failures_survived(self) -> Iterator[None]:
        """Within it, a failure to save, which all ranks see alike, is warned of only: an end would
        lose what was done since the last checkpoint, and by the next there may be room again."""
        try:
            yield
        except (CheckpointError, OSError) as error:
            self._failures += 1
            self.saved_at = None
            if not self._has_one or self._failures > self.settings.max_failures:
                raise
            if self.backend.is_main:
                log.warning(
                    "%s Training goes on; it ends if more than %d checkpoints in a row fail "
                    "(checkpoint.max_failures), and this is number %d.",
                    error,
                    self.settings.max_failures,
                    self._failures,
                )

    def restore(self) -> tuple[int, np.ndarray, np.ndarray] | None:
        """Take up the newest whole checkpoint of this run; a collective call. None where there is
        no checkpoint.

        Rank 0 chooses, and every rank follows, whatever it sees in the folder. Those of another
        model, store or plan are skipped with a line in the log, and not removed.

        Returns:
            Steps done, and the epoch's logits and labels so far (on rank 0; empty on the others).

        Raises:
            CheckpointError: none is whole and of this run, or a rank cannot read the chosen one.
        """
        foreign: CheckpointError | None = None
        before: int | None = None
        while (chosen := on_main(self.backend, partial(self._choose, before, foreign))) is not None:
            path = self.folder / chosen
            tensors, marker = self._read(path)
            step = int(marker["step"])
            try:
                self._check(path, marker["facts"], self.plan_at(step - 1))
            except CheckpointError as error:
                if self.backend.is_main:
                    log.warning("skipped a checkpoint: %s", error)
                self.writer.spared.add(step)
                before, foreign = step, foreign or error
                continue
            self.backend.load_state(tensors, updates=step)
            self.ema.load(tensors)
            self.backend.load_scaler_state(marker["facts"].get("loss_scale"))
            # A collective call, so every rank looks them up.
            epoch = [tensors[name].cpu().numpy() for name in EPOCH]
            if not self.backend.is_main:
                epoch = [np.empty(0, np.float32) for _ in EPOCH]
            logits, labels = epoch
            self._has_one = True
            return step, logits, labels
        if foreign is not None:
            raise foreign
        return None

    def _choose(self, before: int | None, foreign: CheckpointError | None) -> str | None:
        """The name of the newest whole one; on rank 0."""
        try:
            found = latest_valid(self.folder, before=before)
        except CheckpointError:
            # That those before it are damaged does not help: this one could be taken up.
            if foreign is not None:
                raise foreign from None
            raise
        return None if found is None else found.name

    def _read(self, path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        """Each file is read and checked by one rank; a collective call."""
        backend = self.backend
        read: list[tuple[dict[str, Tensor], dict[str, Any]]] = []

        def read_own() -> None:
            read.append(load_checkpoint(path, backend.rank, backend.world))

        try:
            run_on_all_ranks(backend, read_own)
        except OfSomeRankError as error:
            raise CheckpointError(
                f"process 0 chose this checkpoint, and another cannot read it ({error})",
                where=path,
                fix="Give 'out' on a disk that all machines share, and see that it is mounted.",
            ) from error.__cause__
        own, marker = read[0]
        return SharedTensors(backend, own), marker

    def begin_anew(self, model: nn.Module) -> None:
        """Put the weights of a fresh model in place, and moments of zero; a collective call."""
        state = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
        for name in self.backend.state_names():
            if name not in state:
                state[name] = torch.zeros_like(state[f"model/{name.partition('/')[2]}"])
        self.backend.load_state(state, updates=0)
        self.ema.load(state)

    def _check(self, path: Path, facts: dict[str, Any], plan: Plan) -> None:
        try:
            self._check_same(path, facts, plan)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"its facts are not those of a run ({error!r})", where=path
            ) from None

    def _check_same(self, path: Path, facts: dict[str, Any], plan: Plan) -> None:
        changed = [
            f"model.{name} is {was} there and {now} here"
            for name, was, now in metadata_differences(facts["model"], self.model)
        ]
        if changed:
            raise CheckpointError(
                f"this is a checkpoint of another model ({'; '.join(changed)})",
                where=path,
                fix="Use the same model settings, or choose another 'out'.",
            )
        # Checkpoints of earlier versions do not know the content.
        known = facts.get("content", self.content)
        other_store = facts["store"] != self.store or known != self.content
        if not other_store and facts["sampler"]["fingerprint"] == plan.fingerprint:
            return
        what = "store" if other_store else "selection, split, plan or seed"
        if not self.settings.accept_other_order:
            raise CheckpointError(
                f"this checkpoint was trained with another {what}, so the order of its clips "
                "cannot go on here",
                where=path,
                fix="Use the same settings and store, choose another 'out', or accept it by "
                "checkpoint.accept_other_order=true: training goes on at the same step of the new "
                "order.",
            )
        log.warning("%s was trained with another %s; accepted", path, what)


def judged_weights(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """What a checkpoint was judged by: the average of the weights, where there is one, with the
    statistics that were taken of it; the running ones, where none were."""
    weights = averaged(state, names)
    return {name: state.get(JUDGED + name, weights[name]) for name in weights}
