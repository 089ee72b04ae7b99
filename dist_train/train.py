"""Training: walk the plan, step by step, and leave a run folder that can be resumed and judged."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from dist_train.batches import Batches
from dist_train.config import Config, changes, config_text
from dist_train.data.ahead import on_device
from dist_train.data.collate import Batch
from dist_train.data.files import write_whole
from dist_train.engine.backends import make_backend
from dist_train.engine.backends.base import Backend
from dist_train.engine.ema import Ema
from dist_train.engine.events import EventWriter
from dist_train.engine.graphs import make_micro_step
from dist_train.engine.lost_process import losses_explained
from dist_train.engine.optim import make_optimizer
from dist_train.engine.out_of_memory import is_out_of_memory
from dist_train.engine.pace import Pace
from dist_train.engine.sanity import check_agreement, check_weights
from dist_train.engine.schedule import Schedule
from dist_train.engine.stop import INTERRUPTED, TRY_AGAIN, StopSignals, leave
from dist_train.engine.together import OfSomeRankError, on_main, together
from dist_train.engine.watchdog import Watchdog
from dist_train.errors import ConfigError, RunError, StoppedError
from dist_train.initial_weights import SETTING, Source, initial_model
from dist_train.introduction import Speed, closing, idle_workers, opening, visits_of
from dist_train.judge import Judge, Values
from dist_train.main_guard import end_if_run_again
from dist_train.micro_batch import Buffers, MicroBatches, free_cache
from dist_train.models.fused_norm import check_compiler
from dist_train.models.norm import set_momentum, share_statistics
from dist_train.os_advice import first_line
from dist_train.outputs import EpochOutputs
from dist_train.run import (
    as_input,
    begin_session,
    check_same_data,
    completed_checkpoint,
    model_facts,
    note_checkpoint,
    only_session,
    open_data,
    read_record,
    read_settings,
    set_foreign_settings_aside,
    write_splits,
)
from dist_train.run_folder import (
    CHECKPOINTS,
    CONFIG,
    check_folders,
    refuse_existing,
    refuse_lost_checkpoints,
)
from dist_train.seen_before import held_out_seen, held_out_seen_by_init
from dist_train.small_sets import with_batch_that_fits
from dist_train.snapshots import set_snapshots_aside
from dist_train.state import RunState

log = logging.getLogger(__name__)

Resume = Literal["never", "auto"]
Progress = Callable[[int, int, str], None]
BeforeStep = Callable[["Trainer", int], None]
Say = Callable[[str], None]


class ShortMemoryError(Exception):
    """Memory did not suffice for a micro-batch; weights and moments are as before the step."""


class BadStepError(Exception):
    """The loss or the gradient norm of a step is not finite, on all ranks."""

    def __init__(self, step: int, loss: float, norm: float, ranks: list[int]) -> None:
        where = f", by process {', '.join(map(str, ranks))}" if ranks else ""
        super().__init__(
            f"at step {step + 1} the loss is {loss:g}{where} and the gradient norm {norm:g}"
        )
        self.step = step


def train(
    config: Config,
    *,
    resume: Resume = "never",
    progress: Progress | None = None,
    before_step: BeforeStep | None = None,
    say: Say | None = None,
) -> None:
    """Train one run to its end, in ``config.out``. Call it in every process of the launch.

    Args:
        resume: "auto" goes on from the newest whole checkpoint, or begins where no run is, or one
            that never completed a checkpoint; "never" refuses a folder that holds a run already.
        progress: called on rank 0 with (steps done, steps in all, a line of figures).
        before_step: called on every rank with the trainer and the step that comes, 0 the first.
        say: called on rank 0 with lines about the run, at its beginning and its end.

    Raises:
        StoppedError: SIGTERM or SIGINT came; a checkpoint was written.
        LostProcessError: another process has ended, or cannot be reached.
        DistTrainError: the settings, store, selection or checkpoints do not allow it.
    """
    end_if_run_again()
    with losses_explained():
        backend = make_backend(config.train, clip_norm=config.optim.clip_norm)
        try:
            trainer = Trainer(config, backend)
            with _only_session(config.out, backend), trainer.stop:
                trainer.begin(resume)
                if say is not None and backend.is_main:
                    trainer.introduce(say)
                trainer.fit(progress if backend.is_main else None, before_step)
                if say is not None and backend.is_main:
                    say(closing(trainer.config))
        except BaseException as error:
            # Others may be in a collective call, for whose end NCCL would wait before it leaves;
            # then nobody were told of the error. All ranks stop alike by a signal.
            if backend.world == 1 or isinstance(error, StoppedError):
                backend.close()
            raise
        backend.close()


@contextmanager
def _only_session(out: Path, backend: Backend) -> Iterator[None]:
    """Rank 0 holds the folder."""
    with ExitStack() as held:
        on_main(backend, lambda: held.enter_context(only_session(out)))
        yield


class Trainer:
    """One session of a run, in one of its processes."""

    def __init__(self, config: Config, backend: Backend) -> None:
        self.data = with_batch_that_fits(
            open_data(config, training=True), world=backend.world, tell=backend.rank == 0
        )
        self.config = config = self.data.config
        self.backend = backend
        if config.norm.fused:
            check_compiler(backend.device)
        # Only weights change it while it runs, and those do not change where epochs begin.
        self.plan = self.data.plan()
        self.micro = MicroBatches(config, self.data, self.plan, backend)
        self.batches = Batches(config, self.data, self.plan, self.micro, backend)
        self.steps = self.plan.first_step(config.train.epochs)
        self.schedule = Schedule(config.schedule, config.optim.lr, self.steps, config.train.epochs)
        model = self.micro.make_model()
        share_statistics(model, backend.all_reduce if self._shares_statistics() else None)
        self._set_momentum(model)
        backend.wrap(model, lambda wrapped: make_optimizer(wrapped, config.optim))
        self.micro_step = make_micro_step(backend, device_knows_frames=config.norm.fused)
        self.ema = Ema(backend, config.optim.ema)
        self.state = RunState(
            config.out / CHECKPOINTS,
            backend,
            self.ema,
            self.batches.plan_at,
            config.checkpoint,
            seed=config.seed,
            model=model_facts(config),
            store=self.data.store.fingerprint,
            content=self.data.store.content,
            completed=lambda: note_checkpoint(config.out),
        )
        self.done = self.first_step = 0
        self.buffers = Buffers(backend.module)
        self.outputs = EpochOutputs(backend)
        self.last_batch: Batch | None = None
        self.bad_steps: Counter[int] = Counter()
        self.stop = StopSignals()
        self.pace = Pace(backend, config.train.slow)
        self.events: EventWriter | None = None
        self.init: Source | None = None
        self._say: Say | None = None
        self._speed = Speed(visits_of(config, self.plan))
        # Before others give up on a process that hangs, it is to tell where.
        hang = config.train.hang
        self.watchdog = Watchdog(
            None if hang is None else min(hang, 0.75 * config.train.timeout), backend.rank
        )
        self.judge = Judge(
            config, self.data, self.batches, backend, self.ema, beat=self.watchdog.beat
        )

    def begin(self, resume: Resume) -> None:
        """Take up a checkpoint, or begin a new run; note it in the run's folder."""
        backend, out = self.backend, self.config.out
        found = None
        if resume == "auto":
            if not self.config.checkpoint.accept_other_order:
                on_main(backend, lambda: check_same_data(out, self.data))
            found = self.state.restore()
            if found is None:
                checkpointed = completed_checkpoint
                on_main(
                    backend, lambda: refuse_lost_checkpoints(out, checkpointed=checkpointed(out))
                )
        else:
            on_main(backend, lambda: refuse_existing(out))
        on_main(backend, lambda: check_folders(out))
        if found is not None:
            self._take_up(*found)
        else:
            self.batches.forget()
            if self.config.model.init is not None:
                self._begin_with_given_weights()
        check_agreement(
            backend,
            {
                "the step to begin with": self.done,
                "the store": (self.data.store.fingerprint, self.data.store.content),
                "the plan": self.plan.fingerprint,
            },
        )
        if self.done < self.steps:
            on_main(backend, lambda: self._note_session(self.done if found else None))
        self.first_step = self.done

    def _begin_with_given_weights(self) -> None:
        """Those that ``model.init`` names, with moments of zero and an average that begins anew."""
        backend, read = self.backend, []

        def load() -> str:
            read.append(initial_model(self.config))
            source = read[0][1]
            assert source is not None
            return source.sha256

        try:
            digests = together(backend, load)
        except OfSomeRankError as error:
            # What failed here too is told as it is.
            raise error.__cause__ or ConfigError(str(error), where=SETTING) from None
        check_agreement(backend, {"the weights of model.init": digests[backend.rank]})
        model, self.init = read[0]
        self.state.begin_anew(model)

    def _note_session(self, resumed_from: int | None) -> None:
        """On rank 0."""
        config, backend = self.config, self.backend
        changed = self._changed_settings() if os.path.lexists(config.out / CONFIG) else []
        seen = self._held_out_seen(resumed_from)
        set_snapshots_aside(config.out, after=self.done)
        self.micro.write_note()
        p, q = config.plan.ratio
        begin_session(
            config.out,
            {
                "model": config.model.name,
                "parameters": sum(backend.numels[name] for name, _ in backend.trained()),
                "positive_rate": {
                    "train_batches": p / (p + q),
                    "natural": self.data.natural_rate(),
                },
                "steps": self.steps,
                "checkpointed": resumed_from is not None,
                "settings": config.model_dump(mode="json"),
                "held_out_seen": seen,
            }
            | write_splits(config.out, self.data)
            | ({} if self.init is None else {"init": self.init._asdict()}),
            {
                "resumed_from_step": resumed_from,
                "world_size": backend.world,
                "backend": config.train.backend,
                "device": str(backend.device),
                "micro_batch": self.micro.facts(),
            }
            | ({"changed": changed} if changed else {}),
        )
        # Last: after a kill before it, the next session finds again what was changed.
        set_foreign_settings_aside(config.out)
        write_whole(config.out / CONFIG, config_text(config))

    def _held_out_seen(self, resumed_from: int | None) -> int:
        """Held-out clips that the weights were trained on before, for the record."""
        if resumed_from is not None:
            with suppress(RunError):
                before: int = read_record(self.config.out).get("held_out_seen", 0)
                return max(before, held_out_seen(self.data, self.config.out) or 0)
        elif self.init is not None:
            return held_out_seen_by_init(self.data, Path(self.init.path)) or 0
        return 0

    def _changed_settings(self) -> list[str]:
        """Against those of the session before, for the log and the record: what must not change is
        refused with the checkpoint, and the rest is the user's to change, but not unawares."""
        try:
            before = read_settings(self.config.out)
        except (ConfigError, RunError) as error:
            log.warning("the settings of the session before are not known: %s", error)
            return []
        changed = changes(before, self.config)
        if changed:
            log.warning("going on with other settings than before: %s", "; ".join(changed))
        return changed

    def introduce(self, say: Say) -> None:
        """Say what the run is, and later how long it takes."""
        self._say = say
        if warning := idle_workers(self.config):
            log.warning("%s", warning)
        for line in opening(self.config, self.backend, self.data, self.plan, self.done):
            say(line)

    def fit(self, progress: Progress | None = None, before_step: BeforeStep | None = None) -> None:
        """From where the run is to its end, going back and on again where a step was bad."""
        with self.watchdog, self._checkpoint_completed():
            while self.done < self.steps:
                short = None
                try:
                    self._walk(progress, before_step)
                except BadStepError as bad:
                    self._go_back(bad)
                except ShortMemoryError as error:
                    short = str(error)
                # Only here is what the error's traceback held let go of.
                if short is not None:
                    self._cut_smaller(short)

    @contextmanager
    def _checkpoint_completed(self) -> Iterator[None]:
        """At its end the checkpoint in flight is in place, after an error also, unless other ranks
        may not be there to complete it with."""
        try:
            yield
        except Exception:
            if self.backend.world == 1:
                self.state.finish()
            raise
        self.state.finish()

    def _walk(self, progress: Progress | None, before_step: BeforeStep | None) -> None:
        """The loop."""
        config, plan, snapshot_steps = self.config, self.plan, self.snapshot_steps()
        batches, held_out = self._training_batches(), self.batches.held_out()
        self.backend.model.train()
        with self._events():
            for step in range(self.done, self.steps):
                if before_step is not None:
                    before_step(self, step)
                self.pace.begin()
                values = self._step(step, batches)
                self.done = step + 1
                self.watchdog.beat()
                epoch_ends = self.done == plan.first_step(plan.epoch_of(step) + 1)
                judged: Values = {}
                is_snapshot = self.done in snapshot_steps
                if epoch_ends or is_snapshot:
                    with self.judge.judged_weights(self.done):
                        judged = self._judge_epoch(held_out) if epoch_ends else {}
                        if is_snapshot:
                            self.judge.save_snapshot(self.done)
                if self.events is not None:
                    now = time.time()  # for display alone: clocks jump
                    self.events.write(self.done, plan.epoch_of(step), now, values | judged)
                if self.done == self.steps:
                    self._save(judged)
                elif self._is_saved_after(epoch_ends):
                    with self.state.failures_survived():
                        self._save(judged)
                if progress is not None:
                    progress(self.done, self.steps, self._headline(values | judged))
                line = self._speed.after_step(plan.clips_at(step))
                if line is not None and self._say is not None:
                    self._say(line)
                self._heed_the_others()
                if epoch_ends and config.plan.weights is not None and self.done < self.steps:
                    batches = self._training_batches()

    def _heed_the_others(self) -> None:
        """What ranks tell each other once a step: signals, and shares of a checkpoint written."""
        ready = self.state.ready
        terminate, interrupt, written = self.backend.sums(
            [self.stop.terminate, self.stop.interrupt, ready]
        )
        if written == self.backend.world:
            self.state.commit()
        if (terminate or interrupt) and self.done < self.steps:
            if self.state.saved_at != self.done:
                self._save({})
            self.state.finish()
            raise StoppedError(
                f"stopped by {'SIGINT' if interrupt else 'SIGTERM'} after step {self.done}, "
                "which is saved",
                where=self.config.out,
                fix="Go on by --resume auto.",
                exit_code=INTERRUPTED if interrupt else TRY_AGAIN,
            )

    def _go_back(self, bad: BadStepError) -> None:
        """To the last checkpoint, for a fault that does not come again; where it does, the step is
        left out; and where too many are, the run ends."""
        self.bad_steps[bad.step] += 1
        left_out = sum(times > 1 for times in self.bad_steps.values())
        if left_out > self.config.train.max_skips:
            raise RunError(
                f"training diverged: {bad}, and {left_out - 1} steps were left out already",
                where=self.config.out,
                fix="Lower optim.lr, and go on from the checkpoint before by --resume auto.",
            )
        self.state.commit()
        found = self.state.restore()
        if found is not None:
            self._take_up(*found)
        else:
            self.state.begin_anew(initial_model(self.config)[0])
            self._take_up(0, *2 * [np.empty(0, np.float32)])
        on_main(self.backend, lambda: set_snapshots_aside(self.config.out, after=self.done))
        if self.backend.is_main:
            then = "the step is left out" if self.bad_steps[bad.step] > 1 else "it is tried again"
            log.warning("%s; back to step %d, and %s", bad, self.done, then)

    def _cut_smaller(self, short: str) -> None:
        """Be ready to repeat the step with smaller micro-batches.

        Where there are several processes, the others wait for this one in a collective call, which
        it cannot take part in any more, and leaving their group in order could wait for them. So it
        ends at once; its launcher ends them, and the next session reads the note.
        """
        backend = self.backend
        try:
            self.micro.halve(short)
        except RunError as error:
            if not backend.can_repeat:
                leave(str(error), backend.rank, error.exit_code)
            raise
        now = f"{short}; from now on micro-batches have {self.micro.clips} clips"
        if not backend.can_repeat:
            where = self.config.out
            leave(f"{where}: {now}. Go on by --resume auto.", backend.rank, TRY_AGAIN)
        log.warning("%s", now)
        self.micro_step.forget()
        free_cache(backend.device)
        self._set_momentum(backend.module)

    def _take_up(self, done: int, logits: np.ndarray, labels: np.ndarray) -> None:
        self.done = done
        self.outputs.begin(logits, labels)

    def _is_saved_after(self, epoch_ends: bool) -> bool:
        settings = self.config.checkpoint
        return self.done % settings.every_steps == 0 or (epoch_ends and settings.best is not None)

    def _save(self, judged: Values) -> None:
        """A collective call."""
        on_main(self.backend, self._flush_events)
        # Where these weights were judged, the statistics that they were judged by.
        statistics = self.judge.statistics if judged else {}
        self.state.save(self.done, *self.outputs.gathered(), judged, statistics)

    def _flush_events(self) -> None:
        if self.events is not None:
            self.events.flush()

    def _step(self, step: int, batches: Iterator[Batch]) -> Values:
        """One optimizer step on the global batch; its figures."""
        backend = self.backend
        # Dropout's draws depend on seed, step and rank alone, so no random state is ever saved.
        key = np.random.SeedSequence((self.config.seed, step, backend.rank))
        torch.manual_seed(int(key.generate_state(1)[0]))
        began = time.perf_counter()
        lr = self.schedule.lr(step)
        backend.set_lr(lr)
        with self._undone_if_memory_is_short(step):
            total, waited = self._micro_steps(step, batches)
        if self._is_left_out(step):
            return {"train/loss": None, "train/lr": lr}
        # Before the update, so that one process does not wait for its end: the next step is queued
        # behind it. Several wait, as they tell each other of the step.
        own_loss = float(total)
        try:
            norm = backend.update()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                "memory does not suffice for the optimizer's step, whatever the micro-batch",
                where=self.config.out,
                fix="Set train.backend: zero2, with train.offload if need be, and go on by "
                "--resume auto.",
            ) from None
        sum_of_losses, *own_work = backend.sums([own_loss, *self.pace.shares(waited)])
        mean_loss = sum_of_losses / backend.world
        # In fp16 a step whose gradients overflow is skipped, and the loss scale lowered.
        overflow_is_fine = self.config.train.precision == "fp16"
        if not (math.isfinite(mean_loss) and (math.isfinite(norm) or overflow_is_fine)):
            losses = backend.gather(own_loss)
            odd = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
            raise BadStepError(step, mean_loss, norm, odd)
        self.ema.update(step)
        if step < self.first_step + self.config.train.check_steps:
            check_agreement(backend, {"the step": step})
            check_weights(backend)
        seconds = time.perf_counter() - began
        return {
            "train/loss": mean_loss,
            "train/lr": lr,
            "train/grad_norm": norm,
            "speed/clips_per_second": self.plan.clips_at(step) / seconds,
            "speed/data_wait": waited / seconds,
            **self.pace.judge(own_work),
        } | _memory(backend.device)

    def _micro_steps(self, step: int, batches: Iterator[Batch]) -> tuple[Tensor, float]:
        """Add up the gradients of a step's micro-batches.

        Returns:
            The mean loss of this rank's clips, and the seconds that it waited for them.
        """
        backend, accumulate = self.backend, self.micro.accumulate
        total, waited = torch.zeros((), device=backend.device), 0.0
        config = self.batches.config_at(step)
        for micro in range(accumulate):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            if self._is_left_out(step):
                continue
            with backend.micro_step(last=micro == accumulate - 1):
                logits, loss = self.micro_step(
                    as_input(batch.volumes, config),
                    batch.frames,
                    batch.labels,
                    self.plan.weight(step) / accumulate,
                )
            total += loss / accumulate
            self.outputs.add(logits, batch.labels)
        return total, waited

    @contextmanager
    def _undone_if_memory_is_short(self, step: int) -> Iterator[None]:
        """Around what changes no weights."""
        backend, outputs = self.backend, len(self.outputs)
        if backend.can_repeat:
            self.buffers.keep()
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if backend.can_repeat:
                backend.drop_gradients()
                self.buffers.put_back()
                self.outputs.cut(outputs)
            raise ShortMemoryError(
                f"out of memory at step {step + 1} ({first_line(error)})"
            ) from None

    def _is_left_out(self, step: int) -> bool:
        return self.bad_steps[step] > 1

    def _set_momentum(self, model: nn.Module) -> None:
        # So that a step moves running statistics as far, however many micro-batches it is cut into.
        set_momentum(model, 1 - (1 - self.config.norm.momentum) ** (1 / self.micro.accumulate))

    def _judge_epoch(self, held_out: Iterable[Batch]) -> Values:
        """Figures of the epoch that ends, within ``judged_weights``. A collective call."""
        assert self.last_batch is not None
        judge = self.judge
        values = judge.of_training(self.outputs)
        self.outputs.cut(0)
        return values | judge.of_held_out(held_out) | judge.norm_gap(self.last_batch, self.done - 1)

    def _training_batches(self) -> Iterator[Batch]:
        batches = on_device(self.batches.from_step(self.done), self.backend.device)
        return map(self._noted, batches)

    def _noted(self, batch: Batch) -> Batch:
        self.last_batch = batch
        return batch

    def snapshot_steps(self) -> set[int]:
        """Numbers of done steps after which the weights are kept for prediction."""
        at = self.config.snapshots.at
        if at == "minima":
            return {step + 1 for step in self.schedule.minima()}
        return {self.plan.first_step(epoch) for epoch in at}

    def _shares_statistics(self) -> bool:
        return self.config.norm.shared and self.backend.world > 1

    @contextmanager
    def _events(self) -> Iterator[None]:
        """Within it, rank 0 has ``events``. A collective call."""
        with ExitStack() as opened:

            def begin() -> None:
                writer = EventWriter(self.config.out, after=self.done)
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


def _memory(device: torch.device) -> Values:
    values: Values = {"memory/host_mb": None}
    # Without /proc it is not known.
    with suppress(psutil.Error, OSError):
        values["memory/host_mb"] = psutil.Process().memory_info().rss / 2**20
    if device.type == "cuda":
        values["memory/device_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
    return values
