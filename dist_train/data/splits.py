"""Choose the clips of a run, and the split of each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from dist_train.config import SelectSettings, SplitSettings
from dist_train.data.table.manifest import SPLITS, plain_group
from dist_train.data.types import CLASSES, clips_of_class
from dist_train.errors import PlanError


def choose_clips(
    table: pd.DataFrame,
    select: SelectSettings,
    split: SplitSettings,
    seed: int,
    same: pd.Series | None = None,
    classes: Mapping[int, str] = CLASSES,
) -> pd.DataFrame:
    """The rows of the clips in a run, with ``split`` filled in; the index is the clip number.

    Args:
        table: a store's clip table.
        same: a name for each clip that only its copies share. Copies get one fold.
        classes: names of the labels.

    Raises:
        PlanError: a class is missing, there are too few groups, or train or val is empty.
    """
    chosen = select_clips(table, tier2_crowd_score=select.tier2_crowd_score, classes=classes)
    if split.train_on_all:
        held_out = chosen["split"].isin(("val", "test")).sum()
        if held_out:
            raise PlanError(
                f"split.train_on_all would train on {held_out} clips that the manifest's split "
                "column holds out",
                fix="Leave it out, or prepare a store from a manifest without that column.",
            )
        return chosen.assign(split="train")
    splits = assign_splits(chosen, split, seed, None if same is None else same[chosen.index])
    for name in ("train", "val"):
        if not (splits == name).any():
            raise PlanError(
                f"no clip is in split '{name}' ({len(chosen)} clips selected)",
                fix="Give it clips in the manifest's split column, or leave that column out.",
            )
    return chosen.assign(split=splits)


def check_splits(
    clips: pd.DataFrame,
    split: SplitSettings,
    *,
    given: bool,
    classes: Mapping[int, str] = CLASSES,
) -> None:
    """Refuse splits that cannot be trained with or evaluated.

    Args:
        clips: the result of ``choose_clips``.
        given: the manifest gives the splits; otherwise they are folds.
        classes: names of the labels.

    Raises:
        PlanError: a split lacks a class, or a class has fewer clips than there are folds.
    """
    counts = pd.crosstab(clips["split"], clips["label"]).reindex(columns=[1, 0], fill_value=0)
    counts = counts.loc[[name for name in SPLITS if name in counts.index]]
    named = {label: clips_of_class(classes[label]) for label in (1, 0)}
    summary = "; ".join(
        f"{name}: {p} {named[1]}, {n} {named[0]}" for name, p, n in counts.itertuples()
    )
    folds = {"test": split.fold, "val": (split.fold + 1) % split.folds}
    for label, class_name in named.items():
        for name in counts.index[counts[label] == 0]:
            fold = f"fold {folds[name]} of {split.folds}; " if name in folds and not given else ""
            raise PlanError(
                f"split '{name}' holds no {class_name} ({fold}{summary})",
                where=None if given else f"split.fold={split.fold}",
                fix="Give it some in the manifest's split column."
                if given
                else "Lower split.folds, choose another seed, or prepare more clips of that class.",
            )
        total = counts[label].sum()
        if not given and not split.train_on_all and total < split.folds:
            raise PlanError(
                f"{total} {class_name} cannot be in each of {split.folds} folds ({summary})",
                where="split.folds",
                fix="Lower it (3 is the least), or prepare more clips of that class.",
            )


def select_clips(
    table: pd.DataFrame,
    *,
    tier2_crowd_score: float | None,
    classes: Mapping[int, str] = CLASSES,
) -> pd.DataFrame:
    """The rows of the labelled clips in a run.

    Args:
        tier2_crowd_score: keep all of tier 1, and the positives of tier 2 with a greater crowd
            score. None keeps all labelled clips.
        classes: names of the labels.

    Raises:
        PlanError: no positive or no negative is left.
    """
    chosen = table["label"] >= 0
    if tier2_crowd_score is not None:
        confident = (table["label"] == 1) & (table["crowd_score"] > tier2_crowd_score)
        chosen &= table["tier1"] | confident
    selected = table[chosen]
    for label in (1, 0):
        if not (selected["label"] == label).any():
            raise PlanError(
                f"the selection holds no {clips_of_class(classes[label])} ({len(selected)} clips "
                f"of {len(table)} selected)",
                fix="Check the labels with 'dist-train info', or loosen the select settings.",
            )
    return selected


def assign_splits(
    table: pd.DataFrame, split: SplitSettings, seed: int, same: pd.Series | None = None
) -> pd.Series:
    """The split of each row: "train", "val" or "test".

    The manifest's split is kept if there is one. Otherwise fold ``split.fold`` is test, the next
    fold is val, and the rest is train.

    Args:
        same: as for ``choose_clips``, for these rows. If groups are disjoint, the groups of copies
            get one fold too.

    Raises:
        PlanError: for disjoint groups: there are fewer groups than folds, a clip has no group, or a
            group is in two of the manifest's splits.
    """
    is_disjoint = split.groups == "disjoint"
    if is_disjoint:
        table = table.assign(group=_disjoint_groups(table, split.ungrouped))
    if (table["split"] != "").all():
        if is_disjoint:
            _refuse_crossed_groups(table)
        return table["split"]
    if is_disjoint:
        if same is not None:
            table = table.assign(group=_joined(table["group"], same))
        fold = table["group"].map(_folds_of_groups(table, split.folds, seed))
    elif same is None:
        fold = _stratified(table, split.folds, seed)
    else:
        # Deal the first of each set of copies; the others follow it.
        first = table.sort_values("key")
        first = first[~same[first.index].duplicated()]
        dealt = _stratified(first, split.folds, seed)
        fold = same.map(dict(zip(same[first.index], dealt, strict=True)))
    names = {split.fold: "test", (split.fold + 1) % split.folds: "val"}
    return fold.map(names).fillna("train")


def _disjoint_groups(table: pd.DataFrame, ungrouped: str) -> pd.Series:
    """The group of each row. Names that look the same are one, also in a store that holds both."""
    groups = table["group"].map({name: plain_group(name) for name in table["group"].unique()})
    blank = groups == ""
    if not blank.any():
        return groups
    if ungrouped == "refuse":
        raise PlanError(
            f"{blank.sum()} of {len(table)} clips have no group, the first is "
            f"'{table['key'][blank].iloc[0]}', and split.groups=disjoint keeps groups apart",
            fix="Fill the group column, or set split.ungrouped: own makes each clip a group, "
            "together makes them one group.",
        )
    # Names that hardly any manifest has.
    return groups.mask(blank, "/ " + table["key"] if ungrouped == "own" else "/ ")


def _joined(groups: pd.Series, same: pd.Series) -> pd.Series:
    """The groups, where groups that share copies of a clip are one (union-find)."""
    parent: dict[str, str] = {group: group for group in groups.unique()}

    def root(group: str) -> str:
        while parent[group] != group:
            group = parent[group]
        return group

    for _, linked in groups[same.duplicated(keep=False)].groupby(same):
        roots = {root(group) for group in linked}
        parent |= dict.fromkeys(roots, min(roots))
    return groups.map({group: root(group) for group in parent})


def crossed_groups(table: pd.DataFrame) -> pd.Series:
    """The splits of each group that is in more than one of them; blank is no group."""
    splits = table[table["group"] != ""].groupby("group")["split"].unique()
    return splits[splits.map(len) > 1]


def _refuse_crossed_groups(table: pd.DataFrame) -> None:
    crossed = crossed_groups(table)
    if len(crossed):
        raise PlanError(
            f"group '{crossed.index[0]}' is in splits {' and '.join(sorted(crossed.iloc[0]))} of "
            f"the manifest ({len(crossed)} such groups), and split.groups=disjoint keeps each in "
            f"one",
            fix="Correct the manifest's split column, or set split.groups=stratify.",
        )


def _hash_order(keys: Iterable[str], seed: int) -> list[str]:
    """Random sort keys that depend on nothing but the seed and each key."""
    return [hashlib.sha256(f"{seed}/{key}".encode()).hexdigest() for key in keys]


def _stratified(table: pd.DataFrame, folds: int, seed: int) -> pd.Series:
    """A fold for each row: each (group, label) cell is spread evenly over the folds."""
    order = table.assign(hash=_hash_order(table["key"], seed))
    order = order.sort_values(["label", "group", "hash"])
    # The count goes on through the groups of a class. Otherwise each group smaller than the number
    # of folds would begin with fold 0.
    return (order.groupby("label").cumcount() % folds)[table.index]


def _folds_of_groups(table: pd.DataFrame, folds: int, seed: int) -> dict[str, int]:
    """A fold for each group: the largest first, to the fold that has least of its share."""
    counts = pd.crosstab(table["group"], table["label"]).reindex(columns=[0, 1], fill_value=0)
    if len(counts) < folds:
        raise PlanError(
            f"{len(counts)} groups cannot fill {folds} folds without crossing one",
            fix="Lower split.folds, or set split.groups=stratify.",
        )
    counts["hash"] = _hash_order(counts.index, seed)
    counts["size"] = counts[0] + counts[1]
    counts = counts.sort_values(["size", "hash"], ascending=[False, True])
    share = np.maximum(counts[[0, 1]].to_numpy().sum(axis=0) / folds, 1.0)
    filled = np.zeros((folds, 2))
    fold_of: dict[str, int] = {}
    for group, row in zip(counts.index, counts[[0, 1]].to_numpy(), strict=True):
        overfull = (((filled + row) / share) ** 2 - (filled / share) ** 2).sum(axis=1)
        # Each fold gets a group before any fold gets a second one.
        is_empty = filled.sum(axis=1) == 0
        if is_empty.any():
            overfull[~is_empty] = np.inf
        fold = int(overfull.argmin())
        filled[fold] += row
        fold_of[group] = fold
    return fold_of
