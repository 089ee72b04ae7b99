"""Which clips take part, and in which split each of them falls."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd

from dist_train.config import SelectSettings, SplitSettings
from dist_train.errors import PlanError


def choose_clips(
    table: pd.DataFrame, select: SelectSettings, split: SplitSettings, seed: int
) -> pd.DataFrame:
    """The rows that take part in a run, with ``split`` filled in; their index, which is the clip
    number in the store, is kept.

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
        chosen, folds=split.folds, fold=split.fold, groups=split.groups, seed=seed
    )
    for name in ("train", "val"):
        if not (splits == name).any():
            raise PlanError(
                f"no clip is in split '{name}' ({len(chosen)} clips selected)",
                fix="Give it clips in the manifest's split column, or leave that column out.",
            )
    return chosen.assign(split=splits)


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
    table: pd.DataFrame, *, folds: int, fold: int, groups: str, seed: int
) -> pd.Series:
    """The split of every row: "train", "val" or "test".

    A split that the manifest gives is kept. Otherwise fold ``fold`` is test, the next fold is val
    and the rest is train. ``groups="stratify"`` deals the clips of each (group, label) cell over
    the folds in turn, so that every fold has nearly the same share of each; ``"disjoint"`` keeps
    each group whole, and gives the next group, largest first, to the fold that is furthest from its
    share of positives and negatives.

    Raises:
        PlanError: fewer groups than folds, for disjoint groups.
    """
    if (table["split"] != "").all():
        return table["split"]
    deal = _stratified if groups == "stratify" else _disjoint
    number = pd.Series(deal(table, folds, seed), index=table.index)
    after = (fold + 1) % folds
    return number.map(lambda k: "test" if k == fold else "val" if k == after else "train")


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
