"""Training: walk the plan, step by step, and leave a run folder that can be resumed and judged."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from scipy.special import expit
from torch.nn.functional import binary_cross_entropy_with_logits

from dist_train.config import Config, dump_config
from dist_train.data.collate import Batch
from dist_train.data.loader import Loader
from dist_train.data.plan import Plan
from dist_train.data.sampler import HeldOutSampler, PlanSampler
from dist_train.engine.backend import Backend
from dist_train.engine.events import EventWriter
from dist_train.engine.metrics import binary_metrics
from dist_train.engine.optim import make_optimizer
from dist_train.engine.schedule import Schedule
from dist_train.epoch_weights import EpochWeights
from dist_train.errors import RunError
from dist_train.infer import held_out_logits
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

Resume = Literal["never", "auto"]
Progress = Callable[[int, int, str], None]
Values = dict[str, float | None]


def train(config: Config, *, resume: Resume = "never", progress: Progress | None = None) -> None:
    """Train one run to its end, in ``config.out``. Call it in every process of the launch.

    Args:
        resume: "auto" goes on from the newest whole checkpoint, or begins where there is none;
            "never" refuses a folder that holds a run already.
        progress: called on rank 0 with (steps done, steps in all, a line of figures).

    Raises:
        DistTrainError: the settings, store, selection or checkpoints do not allow it.
    """
    backend = Backend(config.train, clip_norm=config.optim.clip_norm)
    try:
        trainer = Trainer(config, backend)
        with _only_session(config.out, backend):
            trainer.begin(resume)
            trainer.fit(progress if backend.is_main else None)
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
        backend.wrap(model, make_optimizer(model, config.optim))
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
        self.epoch_outputs: list[tuple[np.ndarray, np.ndarray]] = []

    def begin(self, resume: Resume) -> None:
        """Take up a checkpoint, or begin a new run; note it in the run's folder."""
        out, backend = self.config.out, self.backend
        found = None
        if resume == "auto":
            found = self.state.restore()
        else:
            self.state.refuse_existing()
        if found is not None:
            self.done, *outputs = found
            self.epoch_outputs = [(outputs[0], outputs[1])]
        else:
            self.weights.forget()
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

    def fit(self, progress: Progress | None = None) -> None:
        """The loop: from where the run is to its end."""
        config, plan, snapshot_steps = self.config, self.plan, self.snapshot_steps()
        batches, held_out = self._training_batches(), self._held_out_batches()
        self.backend.model.train()
        with self._events() as events:
            for step in range(self.done, self.steps):
                values = self._step(step, batches)
                self.done = step + 1
                epoch_ends = self.done == plan.first_step(plan.epoch_of(step) + 1)
                if epoch_ends:
                    values |= self._train_metrics() | self._val_metrics(held_out)
                if events is not None:
                    events.write(self.done, plan.epoch_of(step), time.time(), values)
                if self.done in snapshot_steps:
                    self._save_snapshot()
                if self.done % config.checkpoint.every_steps == 0 or self.done == self.steps:
                    if events is not None:
                        events.flush()
                    self.state.save(self.done, *self._gathered_outputs())
                if progress is not None:
                    progress(self.done, self.steps, self._headline(values))
                if epoch_ends and config.plan.weights is not None:
                    batches = self._training_batches()

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
        for _ in range(accumulate):
            asked = time.perf_counter()
            batch = next(batches).to(backend.device)
            waited += time.perf_counter() - asked
            with backend.micro_step():
                logits = backend.model(as_input(batch.volumes, self.config), batch.frames)
                loss = binary_cross_entropy_with_logits(logits.float(), batch.labels)
                backend.backward(loss * self.plan.weight(step))
            total += loss.detach() / accumulate
            self.epoch_outputs.append(
                (logits.detach().float().cpu().numpy(), batch.labels.cpu().numpy())
            )
        norm = backend.update()
        mean_loss = backend.mean(total)
        self._refuse_divergence(step, mean_loss, norm)
        seconds = time.perf_counter() - began
        return {
            "train/loss": mean_loss,
            "train/lr": lr,
            "train/grad_norm": norm,
            "speed/clips_per_second": self.plan.clips_at(step) / seconds,
            "speed/data_wait": waited / seconds,
        } | _memory(backend.device)

    def _refuse_divergence(self, step: int, loss: float, norm: float) -> None:
        """At once, and on all ranks: no checkpoint may hold weights that cannot recover."""
        # In fp16 a step whose gradients overflow is skipped, and the loss scale lowered.
        fine = math.isfinite(loss) and (
            math.isfinite(norm) or self.config.train.precision == "fp16"
        )
        if not fine:
            raise RunError(
                f"training diverged: at step {step + 1} the loss is {loss:g} and the gradient "
                f"norm {norm:g}",
                where=self.config.out,
                fix="Lower optim.lr, and go on from the checkpoint before by --resume auto.",
            )

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
            mine = held_out_logits(backend.module, held_out, self.config, backend.device)
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
        if self.backend.is_main:
            weights = {k: v.detach().cpu() for k, v in self.backend.module.state_dict().items()}
            path = self.config.out / SNAPSHOTS / f"step-{self.done}.safetensors"
            contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
            save_snapshot(path, contiguous, {"step": self.done, "model": self.state.model})

    def _plan_at(self, step: int) -> Plan:
        """The plan that a step is made by."""
        if self.config.plan.weights is None:
            return self.plan
        return self.weights.plan(self.plan.first_step(self.plan.epoch_of(step)))

    def _training_batches(self) -> Iterator[Batch]:
        """From the next step to the end; of the epoch, if weights are read for each."""
        last, plan = self.steps, self.plan
        if self.config.plan.weights is not None and self.done < self.steps:
            last = plan.first_step(plan.epoch_of(self.done) + 1)
            plan = self._plan_at(self.done)
        sampler = PlanSampler(
            plan,
            rank=self.backend.rank,
            world=self.backend.world,
            accumulate=self.config.train.accumulate,
            first=self.done,
            last=last,
        )
        return iter(Loader(self.data.dataset(training=True), sampler, self.config.loader))

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
        empty = np.empty(0, np.float32)
        outputs = self.epoch_outputs or [(empty, empty)]
        mine = [np.concatenate(column) for column in zip(*outputs, strict=True)]
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
            f"epoch {epoch}/{self.config.train.epochs}  loss {values['train/loss']:.3f}  "
            f"{values['speed/clips_per_second']:.1f} clips/s"
        )
        mcc = values.get("val/mcc@0.5")
        return text if mcc is None else f"{text}  val MCC {mcc:.3f}"


def _memory(device: torch.device) -> Values:
    values: Values = {"memory/host_mb": psutil.Process().memory_info().rss / 2**20}
    if device.type == "cuda":
        values["memory/device_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
    return values
