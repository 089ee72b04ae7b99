"""One process of tools/bench_scaling.py: trains, and takes the same step apart.

Its one argument is JSON: settings of the run, the core to stay on (or null), how many of its first
steps are not counted, and where rank 0 writes what it measured.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scaling_model import BUCKET, LARGE, SMALL
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dist_train.config import load_config
from dist_train.data.loading.collate import Batch
from dist_train.data.loading.loader import Loader
from dist_train.data.loading.sampler import PlanSampler
from dist_train.distributed.backends import make_backend
from dist_train.distributed.backends.base import Backend
from dist_train.models.norm import share_statistics
from dist_train.run.folder import METRICS
from dist_train.run.model import as_input
from dist_train.training.train import begin
from dist_train.training.trainer import Trainer

#: Times that an all-reduce is measured.
REPEATS = 15


def main() -> None:
    task = json.loads(sys.argv[1])
    if task["core"] is not None:
        os.sched_setaffinity(0, {task["core"]})
    config = load_config(None, task["settings"])
    backend = make_backend(config.train, clip_norm=config.optim.clip_norm)
    try:
        trainer = Trainer(config, backend)
        begin(trainer, "never")
        trainer.fit()
        parts = in_parts(trainer, trainer.steps - task["warm_up"]) | all_reduces(backend)
        if backend.is_main:
            lines = (config.out / METRICS).read_text(encoding="utf-8").splitlines()
            counted = [json.loads(line) for line in lines[task["warm_up"] :]]
            parts = with_whole_step(parts, counted, config.plan.batch)
            Path(task["out"]).write_text(json.dumps(parts), encoding="utf-8")
    finally:
        backend.close()


def with_whole_step(parts: dict[str, Any], lines: list[Any], batch: int) -> dict[str, Any]:
    """Add the step as the run's own record has it, and what of it none of the parts explains."""
    seconds = [batch / line["speed/clips_per_second"] for line in lines]
    waited = [s * line["speed/data_wait"] for s, line in zip(seconds, lines, strict=True)]
    step, data = statistics.median(seconds), statistics.median(waited)
    names = ("compute", "wait", "statistics", "gradients")
    known = sum(parts[f"{part}_s"] for part in names)
    noises = parts["noise_s"] | {"data": noise(waited)}
    # What is left of the step has the noise of all that it is left of.
    noises["rest"] = math.hypot(noise(seconds), *(noises[name] for name in ("data", *names)))
    whole = {"step_s": step, "data_s": data, "rest_s": step - data - known}
    return parts | whole | {"noise_s": noises}


def noise(samples: Sequence[float]) -> float:
    """How far a median of so many steps may be off by chance: two standard errors, for samples of
    a normal distribution (1.2533 is the square root of pi / 2)."""
    return 2 * 1.2533 * float(np.std(samples, ddof=1)) / math.sqrt(len(samples))


class Times(NamedTuple):
    """Seconds of one step, on one rank, in three ways.

    Attributes:
        backward: forward and backward pass, with no exchange at all.
        wait: until all other ranks had done theirs.
        exchange: of the gradients, after that.
        update: clipping and the optimizer's step.
        shared: forward and backward pass with shared statistics, still without gradients.
        whole: forward and backward pass with all exchange, and the update.
    """

    backward: float
    wait: float
    exchange: float
    update: float
    shared: float
    whole: float


def in_parts(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Take ``steps`` steps apart, on one batch; medians over the steps, of means over the ranks."""
    backend, config = trainer.backend, trainer.config
    sampler = PlanSampler(
        trainer.plan, rank=backend.rank, world=backend.world, accumulate=1, first=0, last=1
    )
    batch = next(iter(Loader(trainer.data.dataset(training=True), sampler, config.loader)))
    taken_apart = Apart(trainer, batch.to(backend.device))
    taken_apart.take()
    mine = [taken_apart.take() for _ in range(steps)]
    times = np.array(backend.gather(mine))  # [ranks, steps, fields of Times]
    backward, wait, exchange, update, shared, whole = np.moveaxis(times, -1, 0)
    alone = backend.world == 1

    of_steps = {
        "compute": (backward + update).mean(0),
        "wait": wait.mean(0),
        # With shared statistics all ranks go at the pace of the slowest.
        "statistics": shared.mean(0) - backward.max(0),
        "gradients": (whole - shared - update).mean(0),
        "exchange": exchange.mean(0),
    }
    if alone:
        of_steps |= {name: 0 * of_steps[name] for name in of_steps if name != "compute"}
    return {
        "world": backend.world,
        "clips": config.plan.batch // backend.world,
        **{f"{name}_s": float(np.median(values)) for name, values in of_steps.items()},
        "noise_s": {name: noise(values.tolist()) for name, values in of_steps.items()},
        "samples_s": (backward + update).ravel().tolist(),
        # Of its collectives; gloo has rings only.
        "trees": backend.device.type == "cuda",
        "gradient_bytes": sum(p.numel() * p.element_size() for _, p in backend.trained()),
        "statistics_bytes": taken_apart.statistics_bytes,
    }


class Apart:
    """Takes the steps of a trainer on one batch.

    Weights stay the same on all ranks: no update goes by gradients that were not exchanged.
    """

    def __init__(self, trainer: Trainer, batch: Batch) -> None:
        self.trainer, self.batch, self.backend = trainer, batch, trainer.backend
        self.shares = trainer.config.norm.shared and self.backend.world > 1
        self.statistics_bytes = self._statistics_bytes()

    def take(self) -> Times:
        backend, module = self.backend, self.backend.module
        share_statistics(module, None)
        backward = self._timed(lambda: self._backward(module))
        wait = timed(lambda: meet(backend), backend)
        exchange = timed(lambda: average_gradients(backend), backend)
        update = timed(backend.update, backend)
        share_statistics(module, backend.all_reduce if self.shares else None)
        shared = self._timed(lambda: self._backward(module))
        backend.drop_gradients()
        whole = self._timed(self._whole)
        return Times(backward, wait, exchange, update, shared, whole)

    def _timed(self, act: Callable[[], object]) -> float:
        """All ranks begin together."""
        meet(self.backend)
        return timed(act, self.backend)

    def _backward(self, model: Any) -> None:
        """``model``: the backend's, or the bare module, whose gradients are not exchanged."""
        backend, batch, config = self.backend, self.batch, self.trainer.config
        with backend.autocast():
            logits = model(as_input(batch.volumes, config), batch.frames)
        loss = binary_cross_entropy_with_logits(logits.float(), batch.labels)
        backend.backward(loss)

    def _whole(self) -> None:
        with self.backend.micro_step(last=True):
            self._backward(self.backend.model)
        self.backend.update()

    def _statistics_bytes(self) -> list[int]:
        """Of each exchange of statistics in a step."""
        sizes: list[int] = []

        def noted(tensor: Tensor) -> None:
            sizes.append(tensor.nbytes)
            self.backend.all_reduce(tensor)

        if self.shares:
            share_statistics(self.backend.module, noted)
            self._backward(self.backend.module)
            self.backend.drop_gradients()
        return sizes


def average_gradients(backend: Backend) -> None:
    """As DDP does, but after the backward pass: copied into buckets, summed, and copied back."""
    if backend.world == 1:
        return
    waiting: list[Tensor] = []
    for _, parameter in reversed(list(backend.trained())):
        assert parameter.grad is not None
        waiting.append(parameter.grad)
        if sum(gradient.nbytes for gradient in waiting) >= BUCKET:
            average(backend, waiting)
            waiting = []
    if waiting:
        average(backend, waiting)


def average(backend: Backend, gradients: list[Tensor]) -> None:
    # Each in its own memory layout, so that the copies are straight.
    sizes = [gradient.numel() for gradient in gradients]
    bucket = torch.empty(sum(sizes), device=backend.device)
    places = torch.split(bucket, sizes)
    for place, gradient in zip(places, gradients, strict=True):
        place.as_strided(gradient.shape, gradient.stride(), place.storage_offset()).copy_(gradient)
    backend.all_reduce(bucket.div_(backend.world))
    for place, gradient in zip(places, gradients, strict=True):
        gradient.copy_(place.as_strided(gradient.shape, gradient.stride(), place.storage_offset()))


def all_reduces(backend: Backend) -> dict[str, Any]:
    """Median seconds of a small and of a large one."""
    if backend.world == 1:
        return {}
    found = {}
    for name, size in (("small", SMALL), ("large", LARGE)):
        values = torch.zeros(size // 4, device=backend.device)
        times = []
        for _ in range(REPEATS):
            meet(backend)
            times.append(timed(lambda: backend.all_reduce(values), backend))  # noqa: B023
        found[name] = statistics.median(times)
    return {"all_reduce_s": found}


def meet(backend: Backend) -> None:
    """A barrier, for the host too."""
    backend.sums([0.0])


def timed(act: Callable[[], object], backend: Backend) -> float:
    began = time.perf_counter()
    act()
    if backend.device.type == "cuda":
        torch.cuda.synchronize(backend.device)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
    # gloo's threads outlive its group, and may abort a process that ends by itself under them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
