"""The folders of a sweep and of its trials: what is there, and what was asked for when it began."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from dist_train.config import Config, changes
from dist_train.data.splits import given_splits
from dist_train.data.store.reader import Store
from dist_train.errors import ConfigError, FileError, RunError
from dist_train.files import read_json, write_whole
from dist_train.places import Location
from dist_train.run.folder import CONFIG, EVALUATION
from dist_train.run.record import FREE
from dist_train.sweep.trials import TRIALS, Trial

TRIAL = "trial.json"
LOG = "trial.log"

State = Literal["done", "begun", "new"]


@dataclass(frozen=True)
class TrialRecord:
    """Content of ``trial.json``: what a trial was asked to do."""

    kind: str
    tta: str
    run: str | None
    """Folder of the run that it predicts with, relative to its own; None trains its own."""
    settings: dict[str, Any]
    """Those that were given; the others have their defaults."""
    content: str
    """``Store.content`` of its store."""

    @property
    def config(self) -> Config:
        return Config.model_validate_json(json.dumps(self.settings), strict=True)


def record_of(trial: Trial, content: str) -> TrialRecord:
    """What a trial is asked to do now, with the content of its store."""
    # Given and default values differ in meaning, as for plan.ratio.
    settings = trial.config.model_dump(mode="json", exclude_unset=True)
    return TrialRecord(
        trial.kind, trial.tta, None if trial.of is None else f"../{trial.of}", settings, content
    )


def read_trial(folder: Path) -> TrialRecord:
    """The content of ``trial.json``.

    Raises:
        RunError: it cannot be read.
    """
    try:
        record = TrialRecord(**read_json(folder / TRIAL))
        record.config  # noqa: B018
    except (FileError, TypeError, ValidationError):
        raise RunError(
            "it does not say what the trial is", where=folder / TRIAL, fix="Move the folder away."
        ) from None
    return record


def folder_of(out: Path, name: str) -> Path:
    return out / TRIALS / name


def begin_trial(out: Path, trial: Trial, content: str) -> Path:
    """Make the trial's folder, and return it.

    Args:
        content: ``Store.content`` of its store.
    """
    folder = folder_of(out, trial.name)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / TRIAL, json.dumps(asdict(record_of(trial, content)), indent=1))
    return folder


def state_of(out: Path, trial: Trial) -> State:
    folder = folder_of(out, trial.name)
    if os.path.lexists(folder / EVALUATION):
        return "done"
    return "begun" if os.path.lexists(folder / CONFIG) else "new"


def check_trials(out: Path, trials: Sequence[Trial]) -> dict[Location, Store]:
    """Refuse to mix results of other settings, or other data, with those of these trials.

    Returns:
        Their stores.

    Raises:
        RunError: a trial was begun with other settings, or its store has changed since.
        ConfigError: several folds are asked for, and the manifest gives the split.
        StoreError: a store cannot be opened.
    """
    stores: dict[Location, Store] = {}
    folds: dict[Location, set[int]] = {}
    for trial in trials:
        place = trial.config.store
        if place not in stores:
            stores[place] = Store(place, trial.config.cache)
        folds.setdefault(place, set()).add(trial.config.split.fold)
    for place, of_place in folds.items():
        if len(of_place) > 1 and given_splits(stores[place].table).all():
            raise ConfigError(
                "the manifest gives each clip's split, so folds do not differ",
                where=place,
                fix="Name one fold, or prepare the store without that column.",
            )
    for trial in trials:
        store = stores[trial.config.store]
        folder = folder_of(out, trial.name)
        if not os.path.lexists(folder / TRIAL):
            if os.path.lexists(folder / CONFIG):
                raise RunError(
                    "a run that is no trial of a sweep is there", where=folder,
                    fix="Move it away, or choose another 'out'.",
                )  # fmt: skip
            continue
        was, now = read_trial(folder), record_of(trial, store.content)
        differing = [
            f"{name}: {before} before, {after} now"
            for name, before, after in (
                ("trial.kind", was.kind, now.kind),
                ("trial.tta", was.tta, now.tta),
                ("trial.of", was.run, now.run),
            )
            if before != after
        ]
        differing += [c for c in changes(was.config, now.config) if not c.startswith(FREE)]
        if differing:
            raise RunError(
                f"the trial was begun with other settings ({'; '.join(differing)})",
                where=folder,
                fix="Name the variant otherwise, choose another 'out', or move the folder away.",
            )
        if was.content != now.content:
            raise RunError(
                f"the trial was begun with other clips than {store.name} has now",
                where=folder,
                fix="Restore the store, choose another 'out', or move the folder away.",
            )
    return stores
