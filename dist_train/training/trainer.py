"""Training: for each planned step, update the weights; validate, save and log where it is due."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property

import numpy as np
import torch
from torch import nn

from dist_train.config import Config
from dist_train.data.loading.collate import Batch
from dist_train.data.loading.prefetch import on_device
from dist_train.distributed.backends.base import Backend
from dist_train.distributed.collectives import on_main
from dist_train.distributed.watchdog import Watchdog
from dist_train.models.fused_norm import check_compiler
from dist_train.models.norm import set_momentum, share_statistics
from dist_train.progress import Progress
from dist_train.run.data import open_data
from dist_train.run.folder import CHECKPOINTS
from dist_train.run.model import as_input, model_metadata
from dist_train.run.record import note_checkpoint
from dist_train.training.batches import Batches
from dist_train.training.ema import Ema
from dist_train.training.introduction import Speed, visits_of
from dist_train.training.metrics_log import EventWriter
from dist_train.training.micro_batch import MicroBatches
from dist_train.training.optimizer import Schedule, make_optimizer
from dist_train.training.recovery import Recovery
from dist_train.training.run_state import RunState
from dist_train.training.small_sets import with_batch_that_fits
from dist_train.training.step import BadStepError, OptimizerStep, ShortMemoryError
from dist_train.training.tensorboard_writer import TensorBoardWriter
from dist_train.training.validation import EpochPredictions, Validator, Values

BeforeStep = Callable[["Trainer", int], None]
Say = Callable[[str], None]


class Trainer:
    """One session of a run, in one of its processes. Making one is a collective call.

    Attributes:
        done: steps that are done.
        first_step: steps that were done when the session began.
        steps: steps of the whole run.
        say: called on rank 0 with lines for the user.
    """

    def __init__(self, config: Config, backend: Backend) -> None:
        self.data = with_batch_that_fits(
            open_data(config, training=True), world=backend.world, tell=backend.rank == 0
        )
        self.config = config = self.data.config
        self.backend = backend
        if config.norm.fused:
            check_compiler(backend.device)
        # Weights of negatives change the plan within epochs only, not where epochs begin.
        self.plan = self.data.plan()
        self.steps = self.plan.first_step(config.train.epochs)
        self.done = self.first_step = 0
        self.micro = MicroBatches(config, self.data, self.plan, backend)
        self.batches = Batches(config, self.data, self.plan, self.micro, backend)
        self.schedule = Schedule(config.schedule, config.optim.lr, self.steps, config.train.epochs)
        self._wrap(self.micro.make_model())
        self.ema = Ema(backend, config.optim.ema)
        self.predictions = EpochPredictions(backend)
        self.step = OptimizerStep(
            config, backend, self.plan, self.schedule, self.micro, self.batches.config_at,
            self.predictions,
        )  # fmt: skip
        # It reports a hang before the other processes time out.
        hang = config.train.hang_timeout
        self.watchdog = Watchdog(
            None if hang is None else min(hang, 0.75 * config.train.timeout), backend.rank
        )
        self.validator = Validator(
            config, self.data, self.batches, backend, self.ema, beat=self.watchdog.beat
        )
        self.state = RunState(
            config.out / CHECKPOINTS, backend, self.ema, self.batches.plan_at, config.checkpoint,
            seed=config.seed,
            model=model_metadata(config),
            store=self.data.store.fingerprint,
            content=self.data.store.content,
            completed=lambda: note_checkpoint(config.out),
        )  # fmt: skip
        self.recovery = Recovery(config, backend, self.state, self.micro)
        self.events: EventWriter | None = None
        self.say: Say | None = None
        self._speed = Speed(visits_of(config, self.plan))
        self._last_batch: Batch | None = None

    def fit(self, progress: Progress | None = None, before_step: BeforeStep | None = None) -> None:
        """Train to the end of the run. A bad step, or one that memory did not suffice for, is
        repeated."""
        with self.watchdog, self._checkpoint_completed():
            while self.done < self.steps:
                short = None
                try:
                    self._train(progress, before_step)
                except BadStepError as bad:
                    self.restore_progress(*self.recovery.go_back(bad))
                except ShortMemoryError as error:
                    short = str(error)
                # Outside of the handler: the error's traceback keeps tensors alive.
                if short is not None:
                    self.recovery.halve_micro_batches(short)
                    self.step.forget_graphs()
                    self._set_momentum(self.backend.module)

    def _train(self, progress: Progress | None, before_step: BeforeStep | None) -> None:
        """Train until the end of the run, or until a step has to be repeated."""
        config, plan, began = self.config, self.plan, self.done
        batches, held_out = self._training_batches(), self.batches.held_out()
        self.backend.model.train()
        with self._events():
            for step in range(self.done, self.steps):
                if before_step is not None:
                    before_step(self, step)
                skip = self.recovery.is_skipped(step)
                is_checked = step < self.first_step + config.train.check_steps
                values = self.step.take(step, batches, skip=skip, check_ranks=is_checked)
                if not skip:
                    self.ema.update(step)
                self.done = step + 1
                self.watchdog.beat()
                epoch_ends = self.done == plan.first_step(plan.epoch_of(step) + 1)
                validated = self._validate(held_out, epoch_ends=epoch_ends)
                values |= validated
                if self.events is not None:
                    if step == began:
                        self._show_clips(self.events.tensorboard)
                    # The clock is for display alone: it can jump.
                    self.events.write(self.done, plan.epoch_of(step), time.time(), values)
                self._save_if_due(validated, epoch_ends=epoch_ends)
                self._report(values, progress)
                self._sync_ranks()
                if epoch_ends and config.plan.weights is not None and self.done < self.steps:
                    # The next epoch reads its own weights of negatives.
                    batches = self._training_batches()

    def _validate(self, held_out: Iterable[Batch], *, epoch_ends: bool) -> Values:
        """At the end of an epoch, metrics of its training batches and of the val split; after the
        steps of ``snapshots.at``, a snapshot. A collective call."""
        is_snapshot = self.done in self.snapshot_steps
        if not (epoch_ends or is_snapshot):
            return {}
        values: Values = {}
        with self.validator.judged_weights(self.done):
            if epoch_ends:
                assert self._last_batch is not None
                values |= self.validator.of_training(self.predictions)
                self.predictions.cut(0)
                metrics, labels, scores = self.validator.of_held_out(held_out)
                values |= metrics
                if self.events is not None and len(labels):
                    self.events.tensorboard.pr_curve(self.done, labels, scores)
                values |= self.validator.norm_gap(self._last_batch, self.done - 1)
            if is_snapshot:
                self.validator.save_snapshot(self.done)
        return values

    def _show_clips(self, tensorboard: TensorBoardWriter) -> None:
        """The middle frames of the last micro-batch, as the model saw them."""
        batch = self._last_batch
        assert batch is not None
        volumes = as_input(batch.volumes, self.batches.config_at(self.done - 1))
        count, _, depth, *_ = volumes.shape
        middle = torch.full((count,), depth) if batch.frames is None else batch.frames
        frames = volumes[torch.arange(count), 0, (middle // 2).cpu()].mul(255).byte()
        tensorboard.clips(self.done, frames.cpu().numpy(), batch.labels.cpu().numpy())

    def _report(self, values: Values, progress: Progress | None) -> None:
        """Tell the user of the step that was done."""
        if progress is not None:
            progress(self.done, self.steps, self._headline(values))
        line = self._speed.after_step(self.plan.clips_at(self.done - 1))
        if line is not None and self.say is not None:
            self.say(line)

    def _save_if_due(self, validated: Values, *, epoch_ends: bool) -> None:
        """Begin a checkpoint if one is due. A collective call."""
        settings = self.config.checkpoint
        if self.done == self.steps:
            self._save(validated)
        elif self.done % settings.every_steps == 0 or (epoch_ends and settings.best is not None):
            with self.state.failures_survived():
                self._save(validated)

    def _save(self, validated: Values) -> None:
        def flush() -> None:
            if self.events is not None:
                self.events.flush()

        on_main(self.backend, flush)
        # The statistics that the weights were validated with, where they were.
        statistics = self.validator.statistics if validated else {}
        self.state.save(self.done, *self.predictions.gathered(), validated, statistics)

    def _sync_ranks(self) -> None:
        """Exchange once a step whether a rank was told to stop, and how many have written their
        part of the checkpoint. A collective call.

        Raises:
            StoppedError: a rank was told to stop; the run is saved.
        """
        stop = self.recovery.stop
        terminate, interrupt, written = self.backend.sums(
            [stop.terminate, stop.interrupt, self.state.ready]
        )
        if written == self.backend.world:
            self.state.commit()
        if (terminate or interrupt) and self.done < self.steps:
            if self.state.saved_at != self.done:
                self._save({})
            self.state.finish()
            raise self.recovery.stopped(interrupted=bool(interrupt), done=self.done)

    def restore_progress(self, done: int, logits: np.ndarray, labels: np.ndarray) -> None:
        """Go on after ``done`` steps.

        Args:
            logits, labels: predictions of the epoch so far, float32 [N], on rank 0.
        """
        self.done = done
        self.predictions.begin(logits, labels)

    @cached_property
    def snapshot_steps(self) -> set[int]:
        """Numbers of done steps after which the weights are kept for prediction."""
        at = self.config.snapshots.at
        if at == "minima":
            return {step + 1 for step in self.schedule.minima()}
        return {self.plan.first_step(epoch) for epoch in at}

    def _wrap(self, model: nn.Module) -> None:
        config, backend = self.config, self.backend
        is_shared = config.norm.shared and backend.world > 1
        share_statistics(model, backend.all_reduce if is_shared else None)
        self._set_momentum(model)
        backend.wrap(model, lambda wrapped: make_optimizer(wrapped, config.optim))

    def _set_momentum(self, model: nn.Module) -> None:
        # A step moves running statistics as far, however many micro-batches it is cut into.
        set_momentum(model, 1 - (1 - self.config.norm.momentum) ** (1 / self.micro.accumulate))

    def _training_batches(self) -> Iterator[Batch]:
        for batch in on_device(self.batches.from_step(self.done), self.backend.device):
            self._last_batch = batch
            yield batch

    @contextmanager
    def _checkpoint_completed(self) -> Iterator[None]:
        """On exit, complete the checkpoint in flight. After an error, do so only in a single
        process: other ranks may be gone, and completing waits for them."""
        try:
            yield
        except Exception:
            if self.backend.world == 1:
                self.state.finish()
            raise
        self.state.finish()

    @contextmanager
    def _events(self) -> Iterator[None]:
        """Within it, rank 0 has ``events``. A collective call."""
        with ExitStack() as opened:

            def begin() -> None:
                settings = self.config.model_dump(mode="json")
                writer = EventWriter(self.config.out, settings, after=self.done)
                self.events = opened.enter_context(writer)

            on_main(self.backend, begin)
            yield

    def _headline(self, values: Values) -> str:
        epoch = self.plan.epoch_of(self.done - 1) + 1
        text = (
            f"epoch {epoch}/{self.config.train.epochs}  loss {values['train/loss'] or 0:.3f}  "
            f"{values.get('speed/clips_per_second') or 0:.1f} clips/s"
        )
        mcc = values.get("val/mcc@0.5")
        return text if mcc is None else f"{text}  val MCC {mcc:.3f}"
