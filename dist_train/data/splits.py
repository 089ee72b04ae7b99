"""Which clips take part, and in which split each of them falls."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd

from dist_train.config import SelectSettings, SplitSettings
from dist_train.data.table.manifest import SPLITS, plain_group
from dist_train.errors import PlanError


def choose_clips(
    table: pd.DataFrame,
    select: SelectSettings,
    split: SplitSettings,
    seed: int,
    same: pd.Series | None = None,
) -> pd.DataFrame:
    """The rows that take part in a run, with ``split`` filled in; their index, which is the clip
    number in the store, is kept.

    Args:
        same: a name for each clip that copies share, which then fall into one fold.

    Raises:
        PlanError: a class is missing from the selection, there are too few groups, or no clip is
            left to train on or to validate with.
    """
    chosen = select_clips(table, tier2_crowd_score=select.tier2_crowd_score)
    if split.train_on_all:
        held_out = chosen["split"].isin(("val", "test")).sum()
        if held_out:
            raise PlanError(
                f"split.train_on_all would train on {held_out} clips that the manifest's split "
                "column holds out",
                fix="Leave it out, or prepare a store from a manifest without that column.",
            )
        return chosen.assign(split="train")
    splits = assign_splits(
        chosen,
        folds=split.folds,
        fold=split.fold,
        groups=split.groups,
        seed=seed,
        ungrouped=split.ungrouped,
        same=None if same is None else same[chosen.index],
    )
    for name in ("train", "val"):
        if not (splits == name).any():
            raise PlanError(
                f"no clip is in split '{name}' ({len(chosen)} clips selected)",
                fix="Give it clips in the manifest's split column, or leave that column out.",
            )
    return chosen.assign(split=splits)


def check_splits(clips: pd.DataFrame, split: SplitSettings, *, given: bool) -> None:
    """Refuse splits that a run cannot be trained, or judged, on.

    Args:
        clips: what ``choose_clips`` gave.
        given: the splits are the manifest's; otherwise they are folds.

    Raises:
        PlanError: a split lacks a class, a class has fewer clips than there are folds, or two
            disjoint groups look like one.
    """
    if split.groups == "disjoint":
        _check_groups(clips)
    counts = {
        name: [int((clips["label"][clips["split"] == name] == label).sum()) for label in (1, 0)]
        for name in SPLITS
        if (clips["split"] == name).any()
    }
    told = "; ".join(f"{name}: {p} positives, {n} negatives" for name, (p, n) in counts.items())
    of_fold = {"test": split.fold, "val": (split.fold + 1) % split.folds}
    for name, numbers in counts.items():
        for number, of_class in zip(numbers, ("positives", "negatives"), strict=True):
            if number:
                continue
            fold = "" if given or name == "train" else f" (fold {of_fold[name]} of {split.folds})"
            raise PlanError(
                f"split '{name}'{fold} holds no {of_class} ({told})",
                where=None if given else f"split.fold={split.fold}",
                fix="Give it some in the manifest's split column."
                if given
                else "Lower split.folds, choose another seed, or prepare more clips of that class.",
            )
    for label, of_class in ((1, "positives"), (0, "negatives")):
        total = int((clips["label"] == label).sum())
        if not given and not split.train_on_all and total < split.folds:
            raise PlanError(
                f"{total} {of_class} cannot be in each of {split.folds} folds: some would "
                f"hold none ({told})",
                where="split.folds",
                fix="Lower it (3 is the least), or prepare more clips of that class.",
            )


def _check_groups(clips: pd.DataFrame) -> None:
    """Refuse disjoint groups whose names differ in blanks or in the form of their letters only.

    ``prepare`` makes such names one; a store that was written before it did may hold both.

    Raises:
        PlanError: it names the first such pair.
    """
    seen: dict[str, str] = {}
    for group in clips["group"].unique():
        other = seen.setdefault(plain_group(group), group)
        if other != group:
            raise PlanError(
                f"groups {other!r} and {group!r} look like one group under two names",
                fix="Prepare the store anew, which makes them one.",
            )


def select_clips(table: pd.DataFrame, *, tier2_crowd_score: float | None) -> pd.DataFrame:
    """The rows of a clip table that take part in a run.

    Args:
        table: columns ``label``, ``tier1``, ``crowd_score`` (see ``manifest.Manifest``).
        tier2_crowd_score: None keeps every labelled clip. Otherwise the original recipe: all of
            tier 1, plus the tier-2 positives whose crowd score is above this number.

    Raises:
        PlanError: no clip, or no positive, or no negative is left.
    """
    chosen = table["label"] >= 0
    if tier2_crowd_score is not None:
        confident = (table["label"] == 1) & (table["crowd_score"] > tier2_crowd_score)
        chosen &= table["tier1"] | confident
    selected = table[chosen]
    for label, name in ((1, "positives"), (0, "negatives")):
        if not (selected["label"] == label).any():
            raise PlanError(
                f"the selection holds no {name} ({len(selected)} clips of {len(table)} selected)",
                fix="Check the labels with 'dist-train info', or loosen the select settings.",
            )
    return selected


def assign_splits(
    table: pd.DataFrame,
    *,
    folds: int,
    fold: int,
    groups: str,
    seed: int,
    ungrouped: str = "refuse",
    same: pd.Series | None = None,
) -> pd.Series:
    """The split of every row: "train", "val" or "test".

    A split that the manifest gives is kept. Otherwise fold ``fold`` is test, the next fold is val
    and the rest is train. ``groups="stratify"`` deals the clips of each (group, label) cell over
    the folds in turn, so that every fold has nearly the same share of each; ``"disjoint"`` keeps
    each group whole, and gives the next group, largest first, to the fold that is furthest from its
    share of positives and negatives. ``ungrouped``: see ``SplitSettings``. ``same``: a name for
    each row, which rows of one name share; they then fall into one fold, and so do their groups if
    groups are disjoint.

    Raises:
        PlanError: for disjoint groups: fewer groups than folds, a clip without a group, or a group
            in two of the manifest's splits.
    """
    if groups == "disjoint":
        table = table.assign(group=_disjoint_groups(table, ungrouped))
    if (table["split"] != "").all():
        if groups == "disjoint":
            _refuse_crossed_groups(table)
        return table["split"]
    if groups == "stratify":
        dealt = table
        if same is not None:
            # The first of each set of copies; the others follow it.
            dealt = table.sort_values("key")
            dealt = dealt[~same[dealt.index].duplicated()]
        number = pd.Series(_stratified(dealt, folds, seed), index=dealt.index)
        if same is not None:
            number = same.map(dict(zip(same[dealt.index], number, strict=True)))
    else:
        if same is not None:
            table = table.assign(group=_joined(table["group"], same))
        number = pd.Series(_disjoint(table, folds, seed), index=table.index)
    after = (fold + 1) % folds
    return number.map(lambda k: "test" if k == fold else "val" if k == after else "train")


def _disjoint_groups(table: pd.DataFrame, ungrouped: str) -> pd.Series:
    """The group of each row, where rows without one are treated as ``ungrouped`` says."""
    blank = table["group"].str.strip() == ""
    if not blank.any():
        return table["group"]
    if ungrouped == "refuse":
        raise PlanError(
            f"{blank.sum()} of {len(table)} clips have no group, the first is "
            f"'{table['key'][blank].iloc[0]}', and split.groups=disjoint keeps groups apart",
            fix="Fill the group column, or say what they are: split.ungrouped=own takes each for a "
            "group of its own, split.ungrouped=together all for one group.",
        )
    # No group that a manifest gives begins with a slash and a blank.
    own = "/ " + table["key"] if ungrouped == "own" else "/ "
    return table["group"].mask(blank, own)


def _joined(groups: pd.Series, same: pd.Series) -> pd.Series:
    """Groups of which those that hold copies of one clip are made one."""
    first: dict[str, str] = {group: group for group in groups.unique()}

    def root(group: str) -> str:
        while first[group] != group:
            group = first[group]
        return group

    for _, linked in groups[same.duplicated(keep=False)].groupby(same):
        roots = {root(group) for group in linked}
        first |= dict.fromkeys(roots, min(roots))
    return groups.map({group: root(group) for group in first})


def _refuse_crossed_groups(table: pd.DataFrame) -> None:
    splits = table.groupby("group")["split"].unique()
    crossed = splits[splits.map(len) > 1]
    if len(crossed):
        raise PlanError(
            f"group '{crossed.index[0]}' lies in splits {' and '.join(sorted(crossed.iloc[0]))} of "
            f"the manifest ({len(crossed)} such groups), and split.groups=disjoint keeps each in "
            f"one",
            fix="Mend the manifest's split column, or set split.groups=stratify.",
        )


def _hash_order(keys: pd.Series, seed: int) -> list[str]:
    """A sort key that is random, yet depends on nothing but the seed and the clip's own key."""
    return [hashlib.sha256(f"{seed}/{key}".encode()).hexdigest() for key in keys]


def _stratified(table: pd.DataFrame, folds: int, seed: int) -> np.ndarray:
    order = pd.DataFrame(
        {
            "label": table["label"].to_numpy(),
            "group": table["group"].to_numpy(),
            "hash": _hash_order(table["key"], seed),
        }
    ).sort_values(["label", "group", "hash"])
    # One deal runs on through all groups of a class, so that groups smaller than the number of
    # folds do not all begin with fold 0.
    number = np.empty(len(table), dtype=np.int64)
    number[order.index.to_numpy()] = order.groupby("label").cumcount().to_numpy() % folds
    return number


def _disjoint(table: pd.DataFrame, folds: int, seed: int) -> np.ndarray:
    counts = pd.crosstab(table["group"], table["label"]).reindex(columns=[0, 1], fill_value=0)
    if len(counts) < folds:
        raise PlanError(
            f"{len(counts)} groups cannot fill {folds} folds without crossing one",
            fix="Lower split.folds, or set split.groups=stratify.",
        )
    counts["hash"] = _hash_order(pd.Series(counts.index.astype(str)), seed)
    counts["size"] = counts[0] + counts[1]
    counts = counts.sort_values(["size", "hash"], ascending=[False, True])
    share = np.maximum(counts[[0, 1]].to_numpy().sum(axis=0) / folds, 1.0)
    filled = np.zeros((folds, 2))
    fold_of: dict[str, int] = {}
    for group, row in zip(counts.index, counts[[0, 1]].to_numpy(), strict=True):
        overfull = (((filled + row) / share) ** 2 - (filled / share) ** 2).sum(axis=1)
        # Every fold gets a group before any fold gets a second one.
        overfull[filled.sum(axis=1) > 0] += 1e9 if (filled.sum(axis=1) == 0).any() else 0.0
        chosen = int(overfull.argmin())
        filled[chosen] += row
        fold_of[group] = chosen
    return table["group"].map(fold_of).to_numpy()
