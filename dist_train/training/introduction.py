"""What a training says of itself: at its beginning, once its speed is known, and at its end."""

from __future__ import annotations

import os
import time
from shlex import quote

from dist_train.config import Config
from dist_train.data.plan.plan import Plan
from dist_train.distributed.backends.base import Backend
from dist_train.run.data import RunData
from dist_train.system.cgroup import processes_at_once

#: The speed is measured from the end of the one step to the end of the other.
WARM, MEASURED = 4, 20


def visits_of(config: Config, plan: Plan) -> int:
    """Clips that the whole run trains on, each as often as it comes."""
    steps = plan.first_step(config.train.epochs)
    if config.plan.max_voxels is None:
        return steps * plan.batch
    # The blocks of all epochs, however many of them a step takes.
    positives = config.train.epochs * len(plan.positives)
    return positives + plan.ratio.negatives_of(positives)


def opening(config: Config, backend: Backend, data: RunData, plan: Plan, done: int) -> list[str]:
    """Lines about the run that begins, or goes on after ``done`` steps."""
    train, steps = config.train, plan.first_step(config.train.epochs)
    visits = visits_of(config, plan)
    of_a_positive = visits * plan.ratio.positive_rate / len(plan.positives)
    trained = sum(backend.numels[name] for name, _ in backend.trained())
    return [
        f"{config.model.name}, {trained:,} parameters, on {backend.world} x {backend.device.type}, "
        f"{train.backend}, {train.precision}",
        "clips: "
        + "; ".join(
            f"{split} {len(data.numbers(split, 1)):,} positive, "
            f"{len(data.numbers(split, 0)):,} negative"
            for split in ("train", "val", "test")
        ),
        f"{train.epochs:,} epochs of {steps / train.epochs:,.0f} steps of {plan.batch} clips: "
        f"{visits:,} visits in all, {of_a_positive:,.0f} of each positive",
        f"run: {config.out.resolve()}" + (f", from step {done:,} of {steps:,}" if done else ""),
    ]


def idle_workers(config: Config) -> str | None:
    """A warning where loader workers are many more than this machine's CPUs."""
    processes, cpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), processes_at_once()
    workers = config.loader.workers * processes
    if workers <= 2 * cpus:
        return None
    return (
        f"{workers} loader workers on this machine share {cpus} CPUs and need memory each: "
        f"loader.workers={max(1, cpus // processes)} is enough"
    )


def closing(config: Config) -> str:
    """What to type next."""
    out = quote(str(config.out))
    if config.split.train_on_all:
        file = quote(f"{config.out.name}.safetensors")
        return f"next: dist-train export {out} --out {file}"
    return f"next: dist-train predict {out} && dist-train evaluate {out} && dist-train report {out}"


class Speed:
    """How long the run takes at the speed of a session's first steps.

    Args:
        visits: clips of the whole run.
    """

    def __init__(self, visits: int) -> None:
        self._visits = visits
        self._steps = self._clips = 0
        self._began = 0.0

    def after_step(self, clips: int) -> str | None:
        """A line, once ``MEASURED`` steps are done."""
        self._steps += 1
        if self._steps == WARM:
            self._began = time.monotonic()
        elif self._steps > WARM:
            self._clips += clips
        if self._steps != MEASURED:
            return None
        rate = self._clips / (time.monotonic() - self._began)
        days = self._visits / rate / 86_400
        lasts = f"{days:,.2g} days" if days >= 1 else f"{24 * days:.2f} hours ({days:.2g} days)"
        return (
            f"{rate:,.1f} clips/s in steps {WARM + 1} to {MEASURED}: at that rate "
            f"{self._visits:,} visits take {lasts}"
        )
