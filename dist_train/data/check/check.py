"""Look for all that may be wrong with the clips of a store."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pandas as pd

from dist_train.config import Config, TargetSettings
from dist_train.data.check.clips import describing, recorded
from dist_train.data.check.findings import copies, faults, identical_pairs, record_faults
from dist_train.data.check.measure import measure, near_copies
from dist_train.data.check.result import MOST_NAMED, CheckResult, Finding, Leak
from dist_train.data.check.shifts import find_shifts
from dist_train.data.duplicates import Copies, find_duplicates
from dist_train.data.splits import NAMES, choose_clips, given_splits
from dist_train.data.store.reader import Store
from dist_train.data.target_labels import TargetLabels, target_labels
from dist_train.errors import ConfigError, PlanError
from dist_train.progress import Progress

#: Clips whose pixels a quick check reads.
QUICK = 5_000
#: Most clips on which leaks are tried.
MOST_TRIED = 50_000
#: Most classes, labels or values that are told from columns.
MOST_LABELS = 20
#: The same two, and the most clips of a store, for ``check_records``.
MOST_TRIED_BRIEFLY, MOST_LABELS_BRIEFLY, MOST_BRIEFLY = 2_000, 5, 100_000


def check_store(
    store: Store,
    config: Config,
    *,
    quick: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> CheckResult:
    """Look for faults, copies, shifts of brightness, and leaks.

    Args:
        config: its ``target`` gives the labels; these, ``select``, ``split`` and ``seed`` give the
            splits, as in training.
        quick: read the pixels of ``QUICK`` random clips only, and look for no near copies.
        workers: processes; None takes one per available core.
        progress: called with (clips read, clips in all), and then with pairs of clips.

    Raises:
        StoreError: the store cannot be used. Single clips that cannot be read are a finding.
    """
    notes: list[str] = []
    clips = recorded(store)
    exact = find_duplicates(store)
    # The first clip with the same pixels.
    same = pd.Series(np.arange(len(clips)))
    same[exact.clips] = exact.first
    labels = _labels(store, config.target, notes)
    clips["split"] = _splits(store, config, labels, exact, notes)
    chosen = clips.iloc[_sample(len(clips), QUICK if quick else len(clips))]
    by_place = chosen.sort_values(["shard", "offset"]).index.tolist()
    statistics, unreadable = measure(store, by_place, workers, progress)
    findings = [
        Finding(kind="cannot be read", clips=len(unreadable), names=unreadable[:MOST_NAMED]),
        *faults(clips, statistics),
        *record_faults(clips),
        *copies("identical", identical_pairs(clips["label"], same), clips, store.classes),
    ]
    if len(chosen) == len(clips):
        first = ~same[statistics.index].duplicated()
        near, is_cut = near_copies(store, statistics["hash"][first], workers, progress)
        findings += copies("near-identical", near, clips, store.classes)
        if is_cut:
            notes.append("near-identical clips: only the most similar pairs were compared")
    else:
        notes.append(
            f"pixels: of {len(chosen)} random clips, by --quick; no near-identical clips were "
            "looked for"
        )
    own, grey = clips.loc[statistics.index], _grey(store, statistics)
    return CheckResult(
        content=store.content,
        clips=len(clips),
        sampled=len(chosen),
        findings=findings,
        shifts=find_shifts(grey, own["group"], own["split"]),
        leaks=_leaks(own, labels, grey, notes),
        notes=notes,
    )


def check_records(store: Store) -> list[str]:
    """What the records say without a look at the pixels, in seconds: a line per finding.

    Empty for a store of more than ``MOST_BRIEFLY`` clips.
    """
    if store.info["clips"] > MOST_BRIEFLY:
        return []
    clips = recorded(store)
    lines = [f"{one.clips} clips: {one.kind}" for one in record_faults(clips) if one.clips]
    labels = _labels(store, TargetSettings(), [])
    leaks = _leaks(
        clips, labels, None, [],
        most=MOST_TRIED_BRIEFLY, most_labels=MOST_LABELS_BRIEFLY, alone=False,
    )  # fmt: skip
    return lines + [
        f"{leak.of or 'the label'} can be told from {', '.join(leak.columns)}: {leak.metric} "
        f"{leak.score:.2f} ({leak.low:.2f} to {leak.high:.2f})"
        for leak in leaks
        if leak.is_leak
    ]


def _labels(store: Store, settings: TargetSettings, notes: list[str]) -> TargetLabels | None:
    try:
        return target_labels(settings, store.table, store.classes)
    except ConfigError as error:
        notes += [f"splits: none ({error.what})", f"leaks: not looked for ({error.what})"]
        return None


def _leaks(
    clips: pd.DataFrame,
    labels: TargetLabels | None,
    grey: pd.DataFrame | None,
    notes: list[str],
    *,
    most: int = MOST_TRIED,
    most_labels: int = MOST_LABELS,
    alone: bool = True,
) -> list[Leak]:
    """``find_leaks`` for at most ``most`` random clips.

    Args:
        clips: rows of ``recorded``.
        labels: of all clips of the store; None looks for no leaks.
        grey: further columns of these clips; None adds none.
        notes: what was left out is added to them.
        most_labels: of classes and labels, those with the most clips; of values, the first.
    """
    if labels is None:
        return []
    if find_spec("sklearn") is None:
        notes.append("leaks: not looked for; pip install 'dist_train[check]'")
        return []
    from dist_train.data.check.leaks import FEWEST, GROUP, can_be_tried, find_leaks

    labelled = clips[labels.known[clips.index]]
    count = len(labelled)
    if count > most:
        labelled = labelled.iloc[_sample(count, most)]
        notes.append(f"leaks: looked for among {most} random clips of {count}")
    too_few = f"fewer than {FEWEST} {'of these clips' if count > most else 'clips'}"
    asked = _asked(labels, labelled.index.to_numpy(), most_labels)
    few = [name for name, label in asked.items() if not can_be_tried(label)]
    if len(few) == len(asked):
        is_value = labels.target.kind == "regression"
        what = "values do not differ, or there are" if is_value else "a class or label has"
        notes.append(f"leaks: not looked for, as {what} {too_few}")
        return []
    if few:
        notes.append(f"leaks: not tried for {', '.join(few)}: {too_few}, or no differences")
    if len(asked) == most_labels < len(labels.target.classes):
        notes.append(f"leaks: tried for {most_labels} of {len(labels.target.classes)} classes, "
                     "labels or values")  # fmt: skip
    columns = describing(labelled, besides=labels.columns)
    if grey is not None:
        columns = columns.join(grey, rsuffix=" (pixels)")
    leaks = find_leaks(columns, asked, alone=alone)
    if GROUP in columns and not any(leak.apart for leak in leaks):
        notes.append("leaks: groups are too few, or too uneven, to be kept apart by folds")
    if any("bytes (stored)" in leak.columns for leak in leaks):
        notes.append("leaks: the store lacks sizes of raw files, so those of its clips are tried")
    return leaks


def _asked(
    labels: TargetLabels, clips: np.ndarray[Any, Any], most: int
) -> dict[str, np.ndarray[Any, Any]]:
    """What is to be told of these clips, for ``find_leaks``: each class against the rest (of two
    the second), each label, or each value; of classes and labels the ``most`` frequent."""
    target, values = labels.target, labels.values[clips]
    first = int(target.is_coded and len(target.classes) == 2)
    places = np.arange(first, len(target.classes))
    if target.kind != "regression" and len(places) > most:
        counts = values.sum(axis=0)
        if target.is_coded:
            counts = np.bincount(values, minlength=len(target.classes))
        places = np.sort(np.argsort(-counts, kind="stable")[:most])
    own = [values == place if target.is_coded else values[:, place] for place in places[:most]]
    dtype = np.float64 if target.kind == "regression" else np.int64
    names = [target.classes[place] for place in places[:most]]
    return {name: label.astype(dtype) for name, label in zip(names, own, strict=True)}


def _sample(count: int, most: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """At most ``most`` random numbers below ``count``, ascending; the same ones every time."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, most, replace=False))


def _splits(
    store: Store, config: Config, labels: TargetLabels | None, exact: Copies, notes: list[str]
) -> np.ndarray[Any, Any]:
    """The split of each clip in a run with these settings, "" for clips that take no part."""
    none = np.full(len(store.table), "", object)
    if labels is None:
        return none
    together = exact if config.split.duplicates == "together" else None
    settings = config.select, config.split, config.seed
    try:
        codes = choose_clips(store.table, *settings, together, labels=labels)
    except (PlanError, ConfigError) as error:
        notes.append(f"splits: none ({error.what})")
        return none
    if not given_splits(store.table).all() and not config.split.train_on_all:
        notes.append(
            f"splits: as training cuts them with seed {config.seed}, fold {config.split.fold} of "
            f"{config.split.folds}; other settings are given as for 'dist-train train'"
        )
    return np.array(NAMES, object)[codes]


def _grey(store: Store, statistics: pd.DataFrame) -> pd.DataFrame:
    """Mean and spread of the grey values of each channel."""
    columns = {}
    for channel, name in enumerate(store.channels):
        columns[f"mean {name}"] = statistics["means"].str[channel].astype(np.float64)
        columns[f"spread of {name}"] = statistics["spreads"].str[channel].astype(np.float64)
    return pd.DataFrame(columns)
