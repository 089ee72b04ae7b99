"""What the trials of a sweep predict, and the metric that they are compared by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dist_train.class_metrics import higher_is_better, main_metric
from dist_train.data.store.reader import Store
from dist_train.data.target_labels import target_labels
from dist_train.errors import ConfigError
from dist_train.places import Location
from dist_train.sweep.settings import FITTED, Sweep, trial_metrics
from dist_train.sweep.trials import Trial
from dist_train.targets import Kind, Target

#: Metrics without both bounds.
_UNBOUNDED = ("mae", "rmse", "r2")


class Goal(NamedTuple):
    """What trials are compared by."""

    kind: Kind = "binary"
    metric: str = FITTED

    @property
    def is_higher_better(self) -> bool:
        return higher_is_better(f"val/{self.metric.partition('/')[2]}")


def goal_of(sweep: Sweep, trials: Sequence[Trial], stores: Mapping[Location, Store]) -> Goal:
    """The kind of target of all trials, and the sweep's metric, or the main one of the test clips.

    Args:
        stores: of all trials.

    Raises:
        ConfigError: trials have different targets, or a metric or reference is not of the kind.
    """
    kind = _target_of(trials, stores).kind
    default = FITTED if kind == "binary" else f"test/{main_metric(kind)[0]}"
    goal, known = Goal(kind, sweep.metric or default), trial_metrics(kind)
    if goal.metric not in known:
        raise ConfigError(
            f"trials of kind {kind} have no {goal.metric}",
            where="metric",
            fix=f"There are {', '.join(known)}.",
        )
    name = goal.metric.partition("/")[2]
    least = -1 if name.startswith("mcc") or name in ("kappa", "qwk") else 0
    for variant, value in sweep.reference.items():
        if name not in _UNBOUNDED and not least <= value <= 1:
            raise ConfigError(
                f"{value:g} is no {name}, which is in {least}..1",
                where=f"reference.{variant}",
                fix=f"Give one in {least}..1.",
            )
    return goal


def _target_of(trials: Sequence[Trial], stores: Mapping[Location, Store]) -> Target:
    found: dict[object, Target] = {}
    for trial in trials:
        place, settings = trial.config.store, trial.config.target
        key = place, settings.model_dump_json()
        if key not in found:
            store = stores[place]
            found[key] = target_labels(settings, store.table, store.classes).target
        first = next(iter(found.values()))
        if found[key] != first:
            raise ConfigError(
                f"its target is {_told(found[key])}, and that of '{trials[0].variant}' is "
                f"{_told(first)}",
                where=f"variant {trial.variant}",
                fix="Give each target a sweep of its own.",
            )
    return next(iter(found.values()), Target())


def _told(target: Target) -> str:
    return f"{target.kind} of {', '.join(target.classes[:20])}"
