"""Points of a sweep that Optuna chooses (https://optuna.org), by the results of earlier ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.class_metrics import higher_is_better
from dist_train.errors import DistTrainError, MachineError, RunError
from dist_train.progress import Progress
from dist_train.sweep.folder import folder_of, state_of
from dist_train.sweep.intervals import value_of
from dist_train.sweep.results import samples_of
from dist_train.sweep.settings import Range, Sweep
from dist_train.sweep.trials import Trial, texts_of, trials_of

JOURNAL = "optuna.journal"
#: An attribute of the study is this and the name of a trial: why the trial failed.
FAILED = "failed "


class Study:
    """The points so far, in ``optuna.journal`` of the sweep's folder.

    Points are asked for in rounds, as many as run at once. Those of a round that was killed are
    run to their end first. A point of which a trial failed counts as failed, and is not tried
    again; ``failed`` says why, in later calls too.

    Raises:
        MachineError: Optuna is not installed.
        RunError: the folder's study is over another space or metric.
    """

    def __init__(self, sweep: Sweep, file: Path, *, quick: bool = False) -> None:
        assert sweep.random is not None
        assert sweep.metric is not None
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise MachineError(
                "Optuna is not installed", fix="Run: pip install 'dist_train[search]'"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna: Any = optuna
        self._sweep, self._file, self._quick = sweep, file, quick
        self._space, self._metric = sweep.random, sweep.metric
        self._study: Any = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(sweep.out / JOURNAL))),
            study_name="sweep",
            direction="maximize" if higher_is_better(self._metric) else "minimize",
            load_if_exists=True,
        )
        asked = {"space": self._space.model_dump(mode="json")["space"], "metric": sweep.metric}
        before = self._study.user_attrs.get("asked")
        if before is None:
            self._study.set_user_attr("asked", asked)
        elif before != asked:
            raise RunError(
                "the folder holds a search of another space or metric",
                where=sweep.out,
                fix="Choose another 'out'.",
            )
        # A sampler for a call: the points of a killed one cannot be drawn again anyway.
        number = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = optuna.samplers.TPESampler(seed=number)

    @staticmethod
    def example(sweep: Sweep, file: Path, *, quick: bool = False) -> list[Trial]:
        """The trials of a point in the middle of the space."""
        assert sweep.random is not None
        middle = {
            key: choice.at(0.5) if isinstance(choice, Range) else choice[0]
            for key, choice in sweep.random.space.items()
        }
        return trials_of(sweep, file, {"example": texts_of(middle)}, quick=quick)

    def ask(self, at_once: int) -> list[Trial]:
        """The trials of the next points; none if there are enough."""
        state = self._optuna.trial.TrialState
        begun = self._study.get_trials(deepcopy=False, states=[state.RUNNING])
        ready = [(each.number, each.params) for each in begun if self._is_whole(each)]
        for each in begun:
            if not self._is_whole(each):
                self._study.tell(each.number, state=state.FAIL)
        number = len(self._study.get_trials(deepcopy=False))
        runs = len(self._sweep.seeds) * len(self._sweep.folds)
        want = 0 if ready else max(1, at_once // (1 if self._quick else runs))
        for _ in range(min(want, self._space.trials - number)):
            asked = self._study.ask()
            ready.append((asked.number, {k: _suggested(asked, k, c) for k, c in self._choices()}))
        return self._trials_of(dict(ready))

    def tell(self, trials: Sequence[Trial], failed: Mapping[str, str]) -> None:
        """Give Optuna the mean over the trials of each point."""
        for variant in dict.fromkeys(trial.variant for trial in trials):
            own = [trial for trial in trials if trial.variant == variant]
            number = int(variant.removeprefix("optuna"))
            value = np.nan
            if not any(trial.name in failed for trial in own):
                value = float(np.mean([self._value(trial) for trial in own]))
            for trial in own:
                if trial.name in failed:
                    self._study.set_user_attr(FAILED + trial.name, failed[trial.name])
            if np.isnan(value):
                self._study.tell(number, state=self._optuna.trial.TrialState.FAIL)
            else:
                self._study.tell(number, value)

    def trials(self) -> list[Trial]:
        """The trials of all points so far."""
        points = self._study.get_trials(deepcopy=False)
        return self._trials_of({p.number: p.params for p in points if self._is_whole(p)})

    def failed(self, trials: Sequence[Trial]) -> dict[str, str]:
        """Why trials failed, by name, in this call and in earlier ones."""
        told = self._study.user_attrs
        return {
            trial.name: told[FAILED + trial.name]
            for trial in trials
            if FAILED + trial.name in told and state_of(self._sweep.out, trial) != "done"
        }

    def progress(self, progress: Progress | None) -> Progress | None:
        """The progress of a round as that of the whole search."""
        if progress is None:
            return None
        state = self._optuna.trial.TrialState.RUNNING
        runs = 1 if self._quick else len(self._sweep.seeds) * len(self._sweep.folds)
        points = self._study.get_trials(deepcopy=False)
        before = sum(each.state != state for each in points) * runs

        def report(done: int, total: int, figures: str = "", /) -> None:
            progress(before + done, self._space.trials * runs, figures)

        return report

    def _is_whole(self, point: Any) -> bool:
        """Whether a point has all its values; a call may have been killed while it asked."""
        return bool(point.params.keys() == self._space.space.keys())

    def _choices(self) -> list[tuple[str, Range | tuple[Any, ...]]]:
        return sorted(self._space.space.items())

    def _trials_of(self, points: Mapping[int, Mapping[str, Any]]) -> list[Trial]:
        # Lists are no categories of Optuna; see ``_suggested``. Its texts are JSON in ASCII, whose
        # pairs of surrogates YAML does not join: they are read, and written anew.
        space = self._space.space
        variants = {
            f"optuna{number:04}": texts_of(
                {
                    key: json.loads(value) if isinstance(space[key], tuple) else value
                    for key, value in point.items()
                }
            )
            for number, point in points.items()
        }
        return trials_of(self._sweep, self._file, variants, quick=self._quick)

    def _value(self, trial: Trial) -> float:
        try:
            folder = folder_of(self._sweep.out, trial.name)
            sample = samples_of(folder, trial, [self._metric])[self._metric]
            return value_of(sample, self._metric)
        except DistTrainError:
            return np.nan


def _suggested(asked: Any, key: str, choice: Range | tuple[Any, ...]) -> Any:
    if not isinstance(choice, Range):
        return asked.suggest_categorical(key, [json.dumps(value) for value in choice])
    suggest = asked.suggest_int if choice.is_whole else asked.suggest_float
    return suggest(key, choice.low, choice.high, log=choice.log)
