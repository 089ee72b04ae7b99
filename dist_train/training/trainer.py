"""Training: take each planned step; at its end validate, save and report where that is due."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
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
from dist_train.run.mirror import Mirror
from dist_train.run.model import model_metadata, target_metadata
from dist_train.run.record import note_checkpoint
from dist_train.training.batches import Batches
from dist_train.training.class_rates import class_rates
from dist_train.training.early_stop import EarlyStop, keep_best
from dist_train.training.ema import Ema
from dist_train.training.epoch_predictions import EpochPredictions
from dist_train.training.inputs import MakeInputs
from dist_train.training.micro_batch import MicroBatches
from dist_train.training.noise_scale import NoiseScale
from dist_train.training.optimizer import make_optimizer
from dist_train.training.recovery import Recovery
from dist_train.training.reporting import Reporter
from dist_train.training.run_state import RunState
from dist_train.training.schedule import Schedule
from dist_train.training.small_sets import with_batch_that_fits
from dist_train.training.step import BadStepError, OptimizerStep, ShortMemoryError, Values
from dist_train.training.teacher import load_teacher
from dist_train.training.training_loss import make_training_loss
from dist_train.training.validation import Validator

BeforeStep = Callable[["Trainer", int], None]


class Trainer:
    """One session of a run, in one of its processes. Constructing it is a collective call.

    Args:
        mirror: of ``checkpoint.mirror``, on rank 0, once the run was brought from there.

    Attributes:
        done: steps done.
        first_step: steps done when the session began.
        steps: steps of the whole run; those done, once it has stopped early.
    """

    def __init__(self, config: Config, backend: Backend, mirror: Mirror | None = None) -> None:
        self.data = with_batch_that_fits(open_data(config, training=True), backend)
        self.config = config = self.data.config
        self.backend = backend
        if config.norm.fused:
            check_compiler(backend.device)
        # Weights of negatives change the plan within epochs, but not where epochs begin.
        self.plan = self.data.plan()
        self.steps = self.plan.first_step(config.train.epochs)
        self.done = self.first_step = 0
        self.rates = rates = class_rates(self.data)
        loss = make_training_loss(config.loss, backend.device, self.data.target, rates)
        self.teacher = load_teacher(config, self.data.target, backend.device)
        self.inputs = MakeInputs(
            self.data, rates, group=self.plan.ratio.group, teacher=self.teacher
        )
        self.micro = MicroBatches(config, self.data, self.plan, backend, self.teacher)
        self.batches = Batches(config, self.data, self.plan, self.micro, backend)
        self.schedule = Schedule(config.schedule, config.optim.lr, self.steps, config.train.epochs)
        self._wrap(self.micro.make_model())
        self.ema = Ema(backend, config.optim.ema)
        self.predictions = EpochPredictions(backend)
        self.early_stop = EarlyStop(config.stop)
        noise_scale = NoiseScale() if config.train.noise_scale else None
        self.step = OptimizerStep(
            config, backend, self.plan, self.schedule, self.micro, self.batches.config_at,
            self.predictions, loss, self.inputs, noise_scale,
        )  # fmt: skip
        # A hang is reported before the other processes time out.
        hang = config.train.hang_timeout
        limit = None if hang is None else min(hang, 0.75 * config.train.timeout)
        self.watchdog = Watchdog(limit, backend.rank)
        self.validator = Validator(
            config, self.data, self.batches, backend, self.ema, beat=self.watchdog.beat
        )
        self.mirror = mirror
        self.state = RunState(
            config.out / CHECKPOINTS, backend, self.ema, self.batches.plan_at, config.checkpoint,
            seed=config.seed,
            model=model_metadata(config),
            target=target_metadata(config),
            store=self.data.store.fingerprint,
            content=self.data.store.content,
            optimizer=config.optim.name,
            parts={"stop": self.early_stop}
            | ({} if noise_scale is None else {"noise_scale": noise_scale}),
            completed=lambda: note_checkpoint(config.out),
            committed=self._copy_to_mirror,
        )  # fmt: skip
        self.recovery = Recovery(config, backend, self.state, self.micro)
        self.reporter = Reporter(config, backend, self.plan, self.data.target)
        self._last_batch: Batch | None = None

    def fit(self, progress: Progress | None = None, before_step: BeforeStep | None = None) -> None:
        """Train to the end of the run. A step that is bad, or runs out of memory, is repeated."""
        with self.watchdog, self._checkpoint_completed():
            while self.done < self.steps:
                shortage = None
                try:
                    self._train(progress, before_step)
                except BadStepError as bad:
                    self.restore_progress(*self.recovery.go_back(bad))
                except ShortMemoryError as error:
                    shortage = str(error)
                # Not in the handler: the error's traceback keeps tensors alive.
                if shortage is not None:
                    # First, so that the memory of the graphs is freed too.
                    self.step.drop_graphs()
                    self.recovery.halve_micro_batches(shortage)
                    self._set_momentum(self.backend.module)

    def _train(self, progress: Progress | None, before_step: BeforeStep | None) -> None:
        """Train to the end of the run, or until it stops early, or a step has to be repeated."""
        config, plan, began = self.config, self.plan, self.done
        batches, held_out = self._training_batches(), self.batches.held_out()
        self.backend.model.train()
        with self.reporter.open_files(self.done):
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
                if step == began and self._last_batch is not None:
                    clip_settings = self.batches.config_at(step)
                    self.reporter.show_clips(self.done, self._last_batch, clip_settings)
                self.reporter.write(self.done, values)
                self._save_if_due(validated, epoch_ends=epoch_ends)
                self.reporter.tell(self.done, values, progress)
                self._sync_ranks()
                if self.stopped_early:
                    break
                if epoch_ends and config.plan.weights is not None and self.done < self.steps:
                    # The next epoch has its own weights of negatives.
                    batches = self._training_batches()

    def _validate(self, held_out: Iterable[Batch], *, epoch_ends: bool) -> Values:
        """At the end of an epoch, return metrics of its training batches and of the val split;
        after the steps of ``snapshots.at``, save a snapshot. A collective call."""
        is_snapshot = self.done in self.snapshot_steps
        if not (epoch_ends or is_snapshot):
            return {}
        values: Values = {}
        with self.validator.evaluated_weights(self.done):
            if epoch_ends:
                values |= self.validator.training_metrics(self.predictions)
                self.predictions.cut(0)
                metrics, labels, scores = self.validator.validate(held_out)
                values |= metrics
                self.reporter.show_curve(self.done, labels, scores)
                self.reporter.show_mistakes(self.done, self.data, labels, scores)
                assert self._last_batch is not None
                values |= self.validator.norm_gap(self._last_batch, self.done - 1)
                self._stop_if_due(values)
            if is_snapshot:
                self.validator.save_snapshot(self.done)
        return values

    def _stop_if_due(self, values: Values) -> None:
        """Let the run end if validation no longer improves, and save the best weights. A collective
        call, within ``evaluated_weights``."""
        metric = self.config.stop.metric
        if metric is None:
            return
        # Rank 0 decides: processors of another kind may round in another way.
        value = self.backend.gather(values.get(metric))[0]
        self.early_stop.after_epoch(self.done, value)
        if self.stopped_early:
            self.steps = self.done
            # The best checkpoint may still be on its way.
            self.state.commit()
            content = self.data.store.content
            if on_main(self.backend, lambda: keep_best(self.config, self.done, value, content)):
                self.validator.save_snapshot(self.done)

    @property
    def stopped_early(self) -> bool:
        """Whether the run has ended before its last epoch."""
        planned = self.plan.first_step(self.config.train.epochs)
        return self.early_stop.is_due and self.done < planned

    def _save_if_due(self, validated: Values, *, epoch_ends: bool) -> None:
        """Begin a checkpoint if one is due. A collective call."""
        settings = self.config.checkpoint
        if self.done == self.steps:
            self._save(validated)
        elif self.done % settings.every_steps == 0 or (epoch_ends and settings.best is not None):
            with self.state.failures_survived():
                self._save(validated)

    def _save(self, validated: Values) -> None:
        self.reporter.flush()
        # The statistics of the validation, if these weights were validated.
        statistics = self.validator.statistics if validated else {}
        self.state.save(self.done, *self.predictions.gathered(), validated, statistics)

    def _sync_ranks(self) -> None:
        """Exchange once per step whether a rank was told to stop, and how many have written their
        share of the checkpoint. A collective call.

        Raises:
            StoppedError: a rank was told to stop; the run is saved.
        """
        stop = self.recovery.stop
        terminate, interrupt, written = self.backend.sums(
            [stop.terminate, stop.interrupt, self.state.writer.ready]
        )
        if written == self.backend.world:
            self.state.commit()
        if (terminate or interrupt) and self.done < self.steps:
            if self.state.saved_at != self.done:
                self._save({})
            self.state.finish()
            raise self.recovery.stopped(interrupted=bool(interrupt), done=self.done)

    def restore_progress(self, done: int, logits: np.ndarray, labels: np.ndarray) -> None:
        """Continue after ``done`` steps, with the epoch's predictions so far, float32 on
        rank 0."""
        self.done = done
        if self.stopped_early:
            self.steps = done
        self.predictions.begin(logits, labels)

    @cached_property
    def snapshot_steps(self) -> set[int]:
        """Numbers of done steps after which a snapshot is saved."""
        at = self.config.snapshots.at
        if at == "minima":
            return {step + 1 for step in self.schedule.minima()}
        return {self.plan.first_step(epoch) for epoch in at}

    def _wrap(self, model: nn.Module) -> None:
        config, backend = self.config, self.backend
        is_shared = config.norm.shared and backend.world > 1
        share_statistics(model, backend.all_reduce if is_shared else None)
        self._set_momentum(model)
        backend.wrap(
            model,
            lambda wrapped: make_optimizer(
                wrapped, config.optim, config.finetune, backend.all_reduce
            ),
        )

    def _set_momentum(self, model: nn.Module) -> None:
        # A step moves running statistics equally far, however many micro-batches it is cut into.
        set_momentum(model, 1 - (1 - self.config.norm.momentum) ** (1 / self.micro.accumulate))

    def _training_batches(self) -> Iterator[Batch]:
        for batch in on_device(self.batches.from_step(self.done), self.backend.device):
            self._last_batch = batch
            yield batch

    def _copy_to_mirror(self, checkpoint: Path) -> None:
        if self.mirror is not None:
            self.mirror.add(checkpoint)

    @contextmanager
    def _checkpoint_completed(self) -> Iterator[None]:
        """On exit, complete the checkpoint in flight. After an error, do so in a single process
        only: completing waits for the other ranks, which may be gone."""
        try:
            yield
        except Exception:
            if self.backend.world == 1:
                self.state.finish()
            raise
        self.state.finish()
