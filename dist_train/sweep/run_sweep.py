"""Run all trials of a sweep, and go on after a kill."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

from dist_train.data.store.reader import Store
from dist_train.distributed.signals import INTERRUPTED, TRY_AGAIN, StopSignals
from dist_train.errors import StoppedError
from dist_train.places import Location
from dist_train.progress import Progress
from dist_train.run.folder import only_session
from dist_train.safe_text import printable
from dist_train.sweep.folder import begin_trial, check_trials, state_of
from dist_train.sweep.goal import Goal, goal_of
from dist_train.sweep.plot import draw
from dist_train.sweep.processes import Local, OnRay, Workers
from dist_train.sweep.results import PLOT, Results, collect
from dist_train.sweep.search import Study
from dist_train.sweep.settings import Ray, Sweep, load_sweep
from dist_train.sweep.trials import Trial, trials_of, variants_of

#: Called with a line about a trial that failed.
Say = Callable[[str], None]


def read_sweep(
    file: Path,
    *,
    out: Path | None = None,
    at_once: int | None = None,
    ray: str | None = None,
    quick: bool = False,
) -> Sweep:
    """The sweep of a file, with what the command line says instead; see ``load_sweep``.

    Args:
        ray: address of a Ray cluster.
        quick: results go to another folder, "OUT-quick".
    """
    sweep = load_sweep(file)
    folder = out or sweep.out
    if quick:
        folder = folder.with_name(f"{folder.name}-quick")
    update: dict[str, object] = {"out": folder, "at_once": at_once or sweep.at_once}
    if ray is not None:
        update["ray"] = (sweep.ray or Ray()).model_copy(update={"address": ray})
    return sweep.model_copy(update=update)


def planned(
    sweep: Sweep, file: Path, *, quick: bool = False
) -> tuple[list[Trial], dict[Location, str], Goal]:
    """The trials of a sweep, without those that Optuna will choose, the content of each store, and
    what the trials are compared by.

    Raises:
        DistTrainError: a setting, a store, or what the sweep's folder holds does not fit.
    """
    if sweep.search == "optuna":
        # A point in the middle shows wrong settings before any trial.
        trials = Study.example(sweep, file, quick=quick)
    else:
        trials = trials_of(sweep, file, variants_of(sweep, file), quick=quick)
    stores = check_trials(sweep.out, trials)
    goal = goal_of(sweep, trials, stores)
    return [] if sweep.search == "optuna" else trials, _content(stores), goal


def run_sweep(
    sweep: Sweep,
    file: Path,
    *,
    quick: bool = False,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Results:
    """Run the trials that are not done, and write ``results.csv``, ``table.csv`` and ``sweep.png``.

    A trial that fails is told, and the others go on. The next call tries it again, unless Optuna
    chose it.

    Raises:
        DistTrainError: as ``planned``; or another sweep is at work in the folder.
        StoppedError: SIGTERM or SIGINT came; trials on this machine saved a checkpoint.
    """
    trials, content, goal = planned(sweep, file, quick=quick)
    with only_session(sweep.out, "sweep"):
        workers = _workers(sweep)
        failed: dict[str, str] = {}
        try:
            if sweep.search == "optuna":
                study = Study(sweep, file, quick=quick)
                while chosen := study.ask(workers.at_once):
                    content |= _content(check_trials(sweep.out, chosen))
                    shown = study.progress(progress)
                    study.tell(chosen, _run(sweep.out, chosen, content, workers, shown, say))
                trials = study.trials()
                failed = study.failed(trials)
            else:
                failed = _run(sweep.out, trials, content, workers, progress, say)
        finally:
            workers.stop()
        results = collect(sweep.out, trials, goal, failed, sweep.reference)
        draw(results, sweep.out / PLOT)
    return results


def _content(stores: Mapping[Location, Store]) -> dict[Location, str]:
    return {place: store.content for place, store in stores.items()}


def _workers(sweep: Sweep) -> Workers:
    return Local(sweep.at_once or 1) if sweep.ray is None else OnRay(sweep.ray, sweep.at_once)


def _run(
    out: Path,
    trials: Sequence[Trial],
    content: Mapping[Location, str],
    workers: Workers,
    progress: Progress | None,
    say: Say | None,
) -> dict[str, str]:
    """Run trials that are not done, each after those that it needs. Returns why trials failed."""
    pending = {trial.name: trial for trial in trials if state_of(out, trial) != "done"}
    running: dict[Future[str | None], Trial] = {}
    failed: dict[str, str] = {}

    def note_failure(name: str, reason: str) -> None:
        failed[name] = reason
        if say is not None:
            say(f"{name} failed: {reason}")

    with StopSignals() as stop:
        while pending or running:
            under_way = {trial.name for trial in running.values()}
            for trial in list(pending.values()):
                lost = next((name for name in trial.needs if name in failed), None)
                if lost is not None:
                    note_failure(pending.pop(trial.name).name, f"it needs {lost}, which failed")
                elif len(running) < workers.at_once and not any(
                    name in pending or name in under_way for name in trial.needs
                ):
                    folder = begin_trial(out, trial, content[trial.config.store])
                    running[workers.submit(folder)] = pending.pop(trial.name)
            if progress is not None:
                progress(len(trials) - len(pending) - len(running), len(trials),
                         ", ".join(trial.name for trial in running.values()))  # fmt: skip
            finished, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            if stop.terminate or stop.interrupt:
                raise StoppedError(
                    "stopped before all trials were done",
                    exit_code=INTERRUPTED if stop.interrupt else TRY_AGAIN,
                    where=out,
                    fix="The same command goes on.",
                )
            for future in finished:
                trial = running.pop(future)
                try:
                    reason = future.result()
                except Exception as error:  # a full disk, or what Ray raises
                    reason = printable(f"{type(error).__name__}: {error}")
                if reason is not None:
                    note_failure(trial.name, reason)
    if progress is not None:
        progress(len(trials), len(trials))
    return failed
