"""Training: walk the plan, step by step, and leave a run folder that can be resumed and judged."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from scipy.special import expit
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dist_train.config import Config, dump_config
from dist_train.data.collate import Batch
from dist_train.data.loader import Loader
from dist_train.data.plan import Plan
from dist_train.data.sampler import HeldOutSampler, PlanSampler
from dist_train.engine.backends import make_backend
from dist_train.engine.backends.base import Backend
from dist_train.engine.events import EventWriter
from dist_train.engine.metrics import binary_metrics
from dist_train.engine.optim import make_optimizer
from dist_train.engine.sanity import check_agreement, weights_digest
from dist_train.engine.schedule import Schedule
from dist_train.engine.stop import INTERRUPTED, TRY_AGAIN, StopSignals
from dist_train.engine.watchdog import Watchdog
from dist_train.epoch_weights import EpochWeights
from dist_train.errors import RunError, StoppedError
from dist_train.infer import held_out_logits
from dist_train.models.norm import set_momentum, share_statistics
from dist_train.models.precise_norm import precise_statistics
from dist_train.run import (
    CHECKPOINTS,
    CONFIG,
    SNAPSHOTS,
    as_input,
    begin_session,
    make_model,
    model_facts,
    only_session,
    open_data,
)
from dist_train.state import RunState, drop_snapshots, save_snapshot

log = logging.getLogger(__name__)

Resume = Literal["never", "auto"]
Progress = Callable[[int, int, str], None]
BeforeStep = Callable[["Trainer", int], None]
Values = dict[str, float | None]


class BadStepError(Exception):
    """The loss or the gradient norm of a step is not finite, on all ranks."""

    def __init__(self, step: int, loss: float, norm: float) -> None:
        super().__init__(f"at step {step + 1} the loss is {loss:g} and the gradient norm {norm:g}")
        self.step = step


def train(
    config: Config,
    *,
    resume: Resume = "never",
    progress: Progress | None = None,
    before_step: BeforeStep | None = None,
) -> None:
    """Train one run to its end, in ``config.out``. Call it in every process of the launch.

    Args:
        resume: "auto" goes on from the newest whole checkpoint, or begins where there is none;
            "never" refuses a folder that holds a run already.
        progress: called on rank 0 with (steps done, steps in all, a line of figures).
        before_step: called on every rank with the trainer and the step that comes, 0 the first.

    Raises:
        StoppedError: SIGTERM or SIGINT came; a checkpoint was written.
        DistTrainError: the settings, store, selection or checkpoints do not allow it.
    """
    backend = make_backend(config.train, clip_norm=config.optim.clip_norm)
    try:
        trainer = Trainer(config, backend)
        with _only_session(config.out, backend):
            trainer.begin(resume)
            trainer.fit(progress if backend.is_main else None, before_step)
    finally:
        backend.close()


@contextmanager
def _only_session(out: Path, backend: Backend) -> Iterator[None]:
    """Rank 0 holds the folder; where it cannot, all ranks raise rather than wait for it."""
    with ExitStack() as held:
        refused = None
        if backend.is_main:
            try:
                held.enter_context(only_session(out))
            except (RunError, OSError) as error:
                refused = error
        refused = backend.from_main(refused)
        if refused is not None:
            raise refused
        yield


class Trainer:
    """One session of a run, in one of its processes."""

    def __init__(self, config: Config, backend: Backend) -> None:
        self.config, self.backend = config, backend
        self.data = open_data(config)
        # Only weights change it while it runs, and those do not change where epochs begin.
        self.plan = self.data.plan()
        self.weights = EpochWeights(config, self.data, backend)
        self.plan.check_cut(backend.world, config.train.accumulate)
        self.steps = self.plan.first_step(config.train.epochs)
        self.schedule = Schedule(config.schedule, config.optim.lr, self.steps, config.train.epochs)
        model = make_model(config)
        share_statistics(model, backend.all_reduce if self._shares_statistics() else None)
        # So that a step moves running statistics as far, however many micro-batches it is cut into.
        set_momentum(model, 1 - (1 - config.norm.momentum) ** (1 / config.train.accumulate))
        backend.wrap(model, lambda wrapped: make_optimizer(wrapped, config.optim))
        self.state = RunState(
            config.out / CHECKPOINTS,
            backend,
            self._plan_at,
            config.checkpoint,
            seed=config.seed,
            model=model_facts(config),
            store=self.data.store.fingerprint,
        )
        self.done = 0
        # Logits and labels, on the device: a copy to the host would wait for it.
        self.epoch_outputs: list[tuple[Tensor, Tensor]] = []
        self.bad_steps: Counter[int] = Counter()
        self.stop = StopSignals()
        self.watchdog = Watchdog(config.train.hang, backend.rank)

    def begin(self, resume: Resume) -> None:
        """Take up a checkpoint, or begin a new run; note it in the run's folder."""
        out, backend = self.config.out, self.backend
        found = None
        if resume == "auto":
            found = self.state.restore()
        else:
            self.state.refuse_existing()
        if found is not None:
            self._take_up(*found)
        else:
            self.weights.forget()
        check_agreement(
            backend,
            {
                "the step to begin with": self.done,
                "the plan": self.plan.fingerprint,
                "the store": self.data.store.fingerprint,
            },
        )
        if backend.is_main and self.done < self.steps:
            drop_snapshots(out / SNAPSHOTS, after=self.done)
            dump_config(self.config, out / CONFIG)
            p, q = self.config.plan.ratio
            begin_session(
                out,
                {
                    "model": self.config.model.name,
                    "parameters": sum(p.numel() for p in backend.module.parameters()),
                    "positive_rate": {
                        "train_batches": p / (p + q),
                        "natural": self.data.natural_rate(),
                    },
                    "steps": self.steps,
                },
                {
                    "resumed_from_step": self.done if found else None,
                    "world_size": backend.world,
                    "backend": self.config.train.backend,
                    "device": str(backend.device),
                },
            )

    def fit(self, progress: Progress | None = None, before_step: BeforeStep | None = None) -> None:
        """From where the run is to its end, going back and on again where a step was bad."""
        with self.stop, self.watchdog, self._checkpoint_completed():
            while self.done < self.steps:
                try:
                    self._walk(progress, before_step)
                except BadStepError as bad:
                    self._go_back(bad)

    @contextmanager
    def _checkpoint_completed(self) -> Iterator[None]:
        """At its end the checkpoint in flight is in place, after an error also, unless other ranks
        may not be there to complete it with."""
        try:
            yield
        except Exception:
            if self.backend.world == 1:
                self.state.writer.finish()
            raise
        self.state.writer.finish()

    def _walk(self, progress: Progress | None, before_step: BeforeStep | None) -> None:
        """The loop."""
        config, plan, snapshot_steps = self.config, self.plan, self.snapshot_steps()
        batches, held_out = self._training_batches(), self._held_out_batches()
        self.backend.model.train()
        with self._events() as events:
            for step in range(self.done, self.steps):
                if before_step is not None:
                    before_step(self, step)
                values = self._step(step, batches)
                self.done = step + 1
                self.watchdog.beat()
                epoch_ends = self.done == plan.first_step(plan.epoch_of(step) + 1)
                judged: Values = {}
                if epoch_ends:
                    judged = self._train_metrics() | self._val_metrics(held_out)
                if events is not None:
                    events.write(self.done, plan.epoch_of(step), time.time(), values | judged)
                if self.done in snapshot_steps:
                    self._save_snapshot()
                if self._is_saved_after(epoch_ends):
                    self._save(events, judged)
                if progress is not None:
                    progress(self.done, self.steps, self._headline(values | judged))
                self._heed_the_others(events)
                if epoch_ends and config.plan.weights is not None and self.done < self.steps:
                    batches = self._training_batches()

    def _heed_the_others(self, events: EventWriter | None) -> None:
        """What ranks tell each other once a step: signals, and shares of a checkpoint written."""
        ready = self.state.writer.ready
        terminate, interrupt, written = self.backend.sums(
            [self.stop.terminate, self.stop.interrupt, ready]
        )
        if written == self.backend.world:
            self.state.writer.commit()
        if (terminate or interrupt) and self.done < self.steps:
            if self.state.saved_at != self.done:
                self._save(events, {})
            self.state.writer.finish()
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
        self.state.writer.finish()
        found = self.state.restore()
        if found is not None:
            self._take_up(*found)
        else:
            self.state.begin_anew(make_model(self.config))
            self._take_up(0, *2 * [np.empty(0, np.float32)])
        if self.backend.is_main:
            then = "the step is left out" if self.bad_steps[bad.step] > 1 else "it is tried again"
            log.warning("%s; back to step %d, and %s", bad, self.done, then)

    def _take_up(self, done: int, logits: np.ndarray, labels: np.ndarray) -> None:
        self.done = done
        device = self.backend.device
        columns = torch.from_numpy(logits).to(device), torch.from_numpy(labels).to(device)
        self.epoch_outputs = [columns]

    def _is_saved_after(self, epoch_ends: bool) -> bool:
        settings = self.config.checkpoint
        return (
            self.done % settings.every_steps == 0
            or self.done == self.steps
            or (epoch_ends and settings.best is not None)
        )

    def _save(self, events: EventWriter | None, judged: Values) -> None:
        if events is not None:
            events.flush()
        self.state.save(self.done, *self._gathered_outputs(), judged)

    def _step(self, step: int, batches: Iterator[Batch]) -> Values:
        """One optimizer step on the global batch; its figures."""
        backend, accumulate = self.backend, self.config.train.accumulate
        # Dropout's draws depend on seed, step and rank alone, so no random state is ever saved.
        key = np.random.SeedSequence((self.config.seed, step, backend.rank))
        torch.manual_seed(int(key.generate_state(1)[0]))
        began, waited = time.perf_counter(), 0.0
        lr = self.schedule.lr(step)
        backend.set_lr(lr)
        total = torch.zeros((), device=backend.device)
        left_out = self.bad_steps[step] > 1
        for micro in range(accumulate):
            asked = time.perf_counter()
            batch = next(batches).to(backend.device)
            waited += time.perf_counter() - asked
            if left_out:
                continue
            with backend.micro_step(last=micro == accumulate - 1):
                logits = backend.model(as_input(batch.volumes, self.config), batch.frames)
                loss = binary_cross_entropy_with_logits(logits.float(), batch.labels)
                backend.backward(loss * (self.plan.weight(step) / accumulate))
            total += loss.detach() / accumulate
            self.epoch_outputs.append((logits.detach().float(), batch.labels))
        if left_out:
            return {"train/loss": None, "train/lr": lr}
        # Before the update, so that nothing waits for its end: the next step is queued behind it.
        own_loss = float(total)
        norm = backend.update()
        mean_loss = backend.sums([own_loss])[0] / backend.world
        # In fp16 a step whose gradients overflow is skipped, and the loss scale lowered.
        overflow_is_fine = self.config.train.precision == "fp16"
        if not (math.isfinite(mean_loss) and (math.isfinite(norm) or overflow_is_fine)):
            raise BadStepError(step, mean_loss, norm)
        if step < self.config.train.check_steps:
            check_agreement(
                backend, {"the step": step, "a digest of the weights": weights_digest(backend)}
            )
        seconds = time.perf_counter() - began
        return {
            "train/loss": mean_loss,
            "train/lr": lr,
            "train/grad_norm": norm,
            "speed/clips_per_second": self.plan.clips_at(step) / seconds,
            "speed/data_wait": waited / seconds,
        } | _memory(backend.device)

    def _train_metrics(self) -> Values:
        """Of the epoch that ends: its batches as they were trained on."""
        logits, labels = self._gathered_outputs()
        self.epoch_outputs.clear()
        return {f"train/{k}": v for k, v in binary_metrics(expit(logits), labels).items()}

    def _val_metrics(self, held_out: Iterable[Batch]) -> Values:
        """Of the val split, at its own natural class ratio."""
        backend = self.backend
        backend.sync_buffers()
        with backend.autocast():
            mine = held_out_logits(
                backend.module,
                held_out,
                self.config,
                backend.device,
                done=lambda _: self.watchdog.beat(),
            )
        clips, logits = self._gathered(mine)
        labels = self.data.store.table["label"].to_numpy(np.float32)[clips]
        loss = binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(labels))
        metrics = binary_metrics(expit(logits), labels)
        return {"val/loss": float(loss)} | {f"val/{k}": v for k, v in metrics.items()}

    def snapshot_steps(self) -> set[int]:
        """Numbers of done steps after which the weights are kept for prediction."""
        at = self.config.snapshots.at
        if at == "minima":
            return {step + 1 for step in self.schedule.minima()}
        return {self.plan.first_step(epoch) for epoch in at}

    def _save_snapshot(self) -> None:
        """A collective call."""
        with self._precise_statistics():
            weights = self.backend.state(
                lambda name: self.backend.is_main and name.startswith("model/")
            )
        if self.backend.is_main:
            path = self.config.out / SNAPSHOTS / f"step-{self.done}.safetensors"
            contiguous = {
                name.removeprefix("model/"): tensor.cpu().contiguous()
                for name, tensor in weights.items()
            }
            save_snapshot(path, contiguous, {"step": self.done, "model": self.state.model})

    @contextmanager
    def _precise_statistics(self) -> Iterator[None]:
        """Within it, statistics are those of the last steps' batches by the weights as they are."""
        steps, module = self.config.norm.precise_steps, self.backend.module
        if not steps:
            yield
            return
        running = {name: buffer.clone() for name, buffer in module.named_buffers()}
        batches = self._batches(max(0, self.done - steps), self.done)
        with torch.no_grad(), self.backend.autocast():
            with precise_statistics(module, self.backend.all_reduce):
                for batch in batches:
                    moved = batch.to(self.backend.device)
                    module(as_input(moved.volumes, self.config), moved.frames)
                    self.watchdog.beat()
            yield
            for name, buffer in module.named_buffers():
                buffer.copy_(running[name])

    def _shares_statistics(self) -> bool:
        return self.config.norm.shared and self.backend.world > 1

    def _plan_at(self, step: int) -> Plan:
        """The plan that a step is made by."""
        if self.config.plan.weights is None:
            return self.plan
        return self.weights.plan(self.plan.first_step(self.plan.epoch_of(step)))

    def _training_batches(self) -> Iterator[Batch]:
        """From the next step to the end; of the epoch, if weights are read for each."""
        last = self.steps
        if self.config.plan.weights is not None:
            last = self.plan.first_step(self.plan.epoch_of(self.done) + 1)
        return iter(self._batches(self.done, last))

    def _batches(self, first: int, last: int) -> Loader:
        """This rank's micro-batches of steps ``first`` to ``last`` (excluded), by the plan of the
        first."""
        sampler = PlanSampler(
            self._plan_at(first),
            rank=self.backend.rank,
            world=self.backend.world,
            accumulate=self.config.train.accumulate,
            first=first,
            last=last,
        )
        return Loader(self.data.dataset(training=True), sampler, self.config.loader)

    def _held_out_batches(self) -> Iterable[Batch]:
        world, accumulate = self.backend.world, self.config.train.accumulate
        clips = self.data.numbers("val")
        sampler = HeldOutSampler(
            clips.tolist(),
            self.data.store.table["frames"].to_numpy()[clips].tolist(),
            rank=self.backend.rank,
            world=world,
            batch=self.config.plan.batch // (world * accumulate),
        )
        return Loader(self.data.dataset(training=False), sampler, self.config.loader)

    def _gathered_outputs(self) -> tuple[np.ndarray, np.ndarray]:
        """Logits and labels of the epoch so far, float32 [N], of all ranks."""
        outputs = self.epoch_outputs or [(torch.empty(0), torch.empty(0))]
        mine = [torch.cat(column).cpu().numpy() for column in zip(*outputs, strict=True)]
        return self._gathered((mine[0], mine[1]))

    def _gathered(self, mine: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Two arrays from all ranks, joined in rank order."""
        first, second = zip(*self.backend.gather(mine), strict=True)
        return np.concatenate(first), np.concatenate(second)

    def _events(self) -> AbstractContextManager[EventWriter | None]:
        if not self.backend.is_main or self.done >= self.steps:
            return nullcontext()
        return EventWriter(self.config.out, after=self.done)

    def _headline(self, values: Values) -> str:
        epoch = self.plan.epoch_of(self.done - 1) + 1
        text = (
            f"epoch {epoch}/{self.config.train.epochs}  loss {values['train/loss'] or 0:.3f}  "
            f"{values.get('speed/clips_per_second') or 0:.1f} clips/s"
        )
        mcc = values.get("val/mcc@0.5")
        return text if mcc is None else f"{text}  val MCC {mcc:.3f}"


def _memory(device: torch.device) -> Values:
    values: Values = {"memory/host_mb": psutil.Process().memory_info().rss / 2**20}
    if device.type == "cuda":
        values["memory/device_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
    return values
