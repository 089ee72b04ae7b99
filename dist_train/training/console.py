"""Lines that a training prints: at its beginning, when its speed is known, and at its end."""

from __future__ import annotations

import time
from shlex import quote

from dist_train.config import Config
from dist_train.data.plan.plan import Plan
from dist_train.distributed.backends.base import Backend
from dist_train.run.data import RunData

#: Speed is measured from the end of step ``WARM`` to the end of step ``MEASURED``.
WARM, MEASURED = 4, 20
#: Classes whose clips are counted in the lines at the beginning.
MOST_CLASSES = 12
UNITS = (("days", 86_400), ("hours", 3_600), ("minutes", 60), ("seconds", 1))


def visits_of(config: Config, plan: Plan) -> int:
    """Return the clips of all steps of the run; a clip counts each time."""
    if config.plan.max_voxels is None:
        return plan.first_step(config.train.epochs) * plan.batch
    # Steps differ in size, but an epoch has all clips of the anchor.
    anchors = config.train.epochs * len(plan.anchor)
    return sum(plan.ratio.of(number, anchors) for number in range(len(plan.ratio)))


def opening(config: Config, backend: Backend, data: RunData, plan: Plan, done: int) -> list[str]:
    """Return lines about a run that begins, or continues after ``done`` steps."""
    train, steps = config.train, plan.first_step(config.train.epochs)
    visits = visits_of(config, plan)
    per_anchor = visits * plan.ratio[0] / plan.ratio.group / len(plan.anchor)
    trained = sum(backend.numels[name] for name, _ in backend.trained())
    return [
        f"{config.model.name}, {trained:,} parameters, on {backend.world} x {backend.device.type}, "
        f"{train.backend}, {train.precision}",
        "clips: "
        + "; ".join(f"{split} {_counts(data, split)}" for split in ("train", "val", "test")),
        f"{train.epochs:,} epochs of {steps / train.epochs:,.0f} steps of {plan.batch} clips: "
        f"{visits:,} visits in all, {per_anchor:,.0f} to each of the {plan.anchor.name}",
        f"run: {config.out.resolve()}" + (f", from step {done:,} of {steps:,}" if done else ""),
    ]


def _counts(data: RunData, split: str) -> str:
    """The clips of a split: of both classes, the positive one first, or of ``MOST_CLASSES``."""
    names, counts = data.target_labels.classes, data.counts(split)
    named = [f"{count:,} {name}" for name, count in zip(names, counts, strict=True)]
    if len(named) == 2:
        named.reverse()
    if len(named) > MOST_CLASSES:
        named[MOST_CLASSES:] = [f"{len(named) - MOST_CLASSES} more classes"]
    return ", ".join(named)


def closing(config: Config) -> str:
    """Return the command to type next."""
    out = quote(str(config.out))
    if config.split.train_on_all:
        file = quote(f"{config.out.name}.safetensors")
        return f"next: dist-train export {out} --out {file}"
    return f"next: dist-train predict {out} && dist-train evaluate {out} && dist-train report {out}"


class Speed:
    """Estimates from a session's first steps how long a run of ``visits`` clips takes."""

    def __init__(self, visits: int) -> None:
        self._visits = visits
        self._steps = self._clips = 0
        self._began = 0.0

    def after_step(self, clips: int) -> str | None:
        """Count a step of ``clips`` clips, and return a line after step ``MEASURED``."""
        self._steps += 1
        if self._steps == WARM:
            self._began = time.monotonic()
        elif self._steps > WARM:
            self._clips += clips
        if self._steps != MEASURED:
            return None
        rate = self._clips / (time.monotonic() - self._began)
        return (
            f"{rate:,.1f} clips/s in steps {WARM + 1} to {MEASURED}: at that rate "
            f"{self._visits:,} visits take {duration(self._visits / rate)}"
        )


def duration(seconds: float) -> str:
    """Return a duration in its largest unit, such as "2.5 hours"."""
    name, size = next((unit for unit in UNITS if seconds >= unit[1]), UNITS[-1])
    return f"{seconds / size:,.1f} {name}"
