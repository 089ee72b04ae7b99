"""The state that a run continues from after any interruption, and how it is saved and restored.

Augmentation and dropout are keyed by epoch and step, and the learning rate is a function of the
step, so besides weights and moments little more than the step is saved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

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
#: Names of the epoch's training predictions so far, which its metrics need.
EPOCH = ("epoch/logits", "epoch/labels")
#: Prefix of BatchNorm statistics of the validation, if those are not the running ones.
EVALUATED = "judged/"
#: Optimizer of checkpoints that do not name one.
ADAMW = "adamw"
#: Steps done, and the logits and labels of the epoch so far, float32.
Restored = tuple[int, np.ndarray, np.ndarray]


class Resumable(Protocol):
    """Something else that a run goes on with.

    ``state`` returns JSON types, the same on all ranks, or None if there is nothing to save;
    ``load`` takes what it returned, or None to begin anew.
    """

    def state(self) -> Any: ...
    def load(self, state: Any) -> None: ...


class RunState:
    """Saves and restores one run's state under ``folder``.

    Args:
        plan_at: gives the plan of a step.
        model: metadata that the weights depend on, as JSON types.
        target: ``target_metadata``.
        store, content: fingerprint of the store, and digest of what it holds.
        optimizer: its name, as the moments of one say nothing to another.
        parts: what else is saved and restored, by name.
        completed: called on rank 0 once there is a checkpoint.
        committed: called on rank 0 after each checkpoint.
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
        target: dict[str, Any] | None = None,
        optimizer: str = ADAMW,
        parts: Mapping[str, Resumable] = MappingProxyType({}),
        completed: Callable[[], None] = lambda: None,
        committed: Callable[[Path], None] = lambda path: None,
    ) -> None:
        self.folder, self.backend, self.settings = folder, backend, settings
        self.ema = ema
        self.plan_at = plan_at
        self.seed, self.model, self.store, self.content = seed, model, store, content
        self.target = target or {}
        self.optimizer, self.parts = optimizer, parts
        self.writer = CheckpointWriter(folder, backend, keep=retention(settings))
        self.saved_at: int | None = None
        self._failures, self._has_one = 0, False
        self._completed: Callable[[], None] | None = completed if backend.is_main else None
        self._committed = committed if backend.is_main else lambda path: None

    def save(
        self,
        step: int,
        logits: np.ndarray,
        labels: np.ndarray,
        metrics: Mapping[str, float | None],
        statistics: Mapping[str, Tensor],
    ) -> None:
        """Begin the checkpoint after ``step`` steps; ``commit`` completes it. A collective call.

        Args:
            logits, labels: this epoch's training predictions of all ranks, float32.
            metrics: metrics of these weights, if they were validated.
            statistics: BatchNorm statistics of that validation by buffer name, if those are not the
                running ones; the same on all ranks. Training does not continue from them.
        """
        self.commit()
        judged = {EVALUATED + name: tensor for name, tensor in statistics.items()}
        sizes = self.backend.sizes() | self.ema.sizes() | dict.fromkeys(EPOCH, len(logits))
        sizes |= {name: tensor.numel() for name, tensor in judged.items()}
        mine = assign_tensors(sizes, self.backend.rank, self.backend.world)
        tensors = self.backend.state(mine) | self.ema.state(mine)
        tensors |= {name: tensor for name, tensor in judged.items() if mine(name)}
        for name, values in zip(EPOCH, (logits, labels), strict=True):
            if mine(name):
                tensors[name] = torch.from_numpy(values.astype(np.float32))
        plan = self.plan_at(step - 1)
        metadata = {
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
            **({"target": self.target} if self.target else {}),
            "loss_scale": self.backend.scaler_state(),
            "metrics": dict(metrics),
        }
        if self.optimizer != ADAMW:
            metadata["optimizer"] = self.optimizer
        states = {name: part.state() for name, part in self.parts.items()}
        metadata |= {name: state for name, state in states.items() if state is not None}
        self.writer.save(step, tensors, metadata)
        self.saved_at = step

    def commit(self) -> None:
        """Complete the checkpoint that ``save`` began, within ``failures_survived``. A collective
        call."""
        with self.failures_survived():
            if (path := self.writer.commit()) is not None:
                self._note_completed(path)

    def finish(self) -> None:
        """Complete the checkpoint that ``save`` began, and remove older ones. A collective call.
        CheckpointError if it cannot be written."""
        if (path := self.writer.finish()) is not None:
            self._note_completed(path)

    def _note_completed(self, path: Path) -> None:
        self._failures, self._has_one = 0, True
        if self._completed is not None:
            try:
                self._completed()
            except OSError as error:
                # The checkpoint is in place, so the run can go on; the next one tries again.
                log.warning("the first checkpoint is not noted in the run's record: %s", error)
            else:
                self._completed = None
        self._committed(path)

    @contextmanager
    def failures_survived(self) -> Iterator[None]:
        """Only warn of a failure to save, as by the next checkpoint there may be room again.

        Raises:
            CheckpointError: there is no older checkpoint, or more than ``checkpoint.max_failures``
                failed in a row.
        """
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
                    error, self.settings.max_failures, self._failures,
                )  # fmt: skip

    def restore(self) -> Restored | None:
        """Load the newest valid checkpoint of this run. A collective call.

        Rank 0 chooses for all. Checkpoints of another model, store or plan are skipped with a
        warning, and not removed.

        Returns:
            Steps done, and the epoch's logits and labels so far (on rank 0; empty on the others);
            None if there is no checkpoint.

        Raises:
            CheckpointError: none is valid and of this run, or a rank cannot read the chosen one.
        """
        refused: CheckpointError | None = None
        before: int | None = None
        while (path := self._latest(before, refused)) is not None:
            tensors, marker = self._read(path)
            step, metadata = int(marker["step"]), marker["facts"]
            try:
                self._check(path, metadata, self.plan_at(step - 1))
                self._check_names(path, tensors)
            except (CheckpointError, KeyError, TypeError, AttributeError) as found:
                error = (
                    found
                    if isinstance(found, CheckpointError)
                    else CheckpointError(
                        f"its facts are not those of a run ({found!r})", where=path
                    )
                )
                if self.backend.is_main:
                    log.warning("skipped a checkpoint: %s", error)
                self.writer.spared.add(step)
                before, refused = step, refused or error
                continue
            self.backend.load_state(tensors, updates=step)
            self.ema.load(tensors)
            self.backend.load_scaler_state(metadata.get("loss_scale"))
            for name, part in self.parts.items():
                part.load(metadata.get(name))
            # A collective call, so every rank looks them up.
            logits, labels = (tensors[name].cpu().numpy() for name in EPOCH)
            if not self.backend.is_main:
                logits = labels = np.empty(0, np.float32)
            self._has_one = True
            return step, logits, labels
        if refused is not None:
            raise refused
        return None

    def _latest(self, before: int | None, refused: CheckpointError | None) -> Path | None:
        """Return the checkpoint that rank 0 chooses, of steps before ``before``. Raise ``refused``,
        why a later one was skipped, if all these are damaged."""
        try:
            chosen = on_main(self.backend, lambda: latest_valid(self.folder, before=before))
        except CheckpointError as error:
            raise (refused or error) from None
        return None if chosen is None else self.folder / chosen.name

    def _read(self, path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        """Read and check each file on one rank. A collective call."""
        backend = self.backend
        read: list[tuple[dict[str, Tensor], dict[str, Any]]] = []
        try:
            run_on_all_ranks(
                backend, lambda: read.append(load_checkpoint(path, backend.rank, backend.world))
            )
        except OfSomeRankError as error:
            raise CheckpointError(
                f"process 0 chose this checkpoint, and another cannot read it ({error})",
                where=path,
                fix="Give 'out' on a disk that all machines share, and see that it is mounted.",
            ) from error.__cause__
        own, marker = read[0]
        return SharedTensors(backend, own), marker

    def begin_anew(self, model: nn.Module) -> None:
        """Load the weights of a fresh model, and moments of zero. A collective call."""
        state = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
        for name in self.backend.state_names():
            if name not in state:
                state[name] = torch.zeros_like(state[f"model/{name.partition('/')[2]}"])
        self.backend.load_state(state, updates=0)
        self.ema.load(state)
        for part in self.parts.values():
            part.load(None)

    def _check(self, path: Path, metadata: dict[str, Any], plan: Plan) -> None:
        """Raise unless a checkpoint is of this model, optimizer, store and order."""
        if changes := model_changes(metadata["model"], self.model):
            raise CheckpointError(
                f"this is a checkpoint of another model ({changes})",
                where=path,
                fix="Use the same model settings, or choose another 'out'.",
            )
        if (there := metadata.get("target", {})) != self.target:
            raise CheckpointError(
                f"this is a checkpoint of another target ({_differences(there, self.target)})",
                where=path,
                fix="Use the same target settings, or choose another 'out'.",
            )
        optimizer = metadata.get("optimizer", ADAMW)
        if optimizer != self.optimizer:
            raise CheckpointError(
                f"its moments are of optim.name: {optimizer}, and the run has {self.optimizer}",
                where=path,
                fix="Use the same optim.name, or begin a new run with these weights by model.init.",
            )
        # Checkpoints of earlier versions do not say what the store held.
        content = metadata.get("content", self.content)
        other_store = metadata["store"] != self.store or content != self.content
        if not other_store and metadata["sampler"]["fingerprint"] == plan.fingerprint:
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

    def _check_names(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Raise unless a checkpoint has all tensors that this run trains on with."""
        lacking = [name for name in self.backend.state_names() if name not in tensors]
        if lacking:
            raise CheckpointError(
                f"the checkpoint has no {lacking[0]}, as that was not trained",
                where=path,
                fix="Use the same finetune.freeze, or begin a new run with this one's weights by "
                "model.init.",
            )


def retention(settings: CheckpointSettings) -> RetentionPolicy:
    return RetentionPolicy(settings.keep_last, settings.keep_every, settings.best)


def model_changes(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Return how the metadata of two models differs, in words; empty if it does not."""
    return "; ".join(
        f"model.{name} is {was} there and {now} here"
        for name, was, now in metadata_differences(there, here)
    )


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    return "; ".join(
        f"target.{name} is {there.get(name)} there and {here.get(name)} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    )


def evaluated_weights(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return the weights that a checkpoint was validated by: their average if there is one, with
    the statistics of that validation if there were some, else the running ones."""
    weights = averaged(state, names)
    return {name: state.get(EVALUATED + name, weights[name]) for name in weights}
