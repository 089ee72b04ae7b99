"""Choose the clips of a run, and the split of each."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dist_train.config import SelectSettings, SplitSettings
from dist_train.data.duplicates import Copies
from dist_train.data.plan.shuffle import Ints
from dist_train.data.store.clip_table import ClipTable
from dist_train.data.table.manifest import SPLITS, plain_group
from dist_train.data.target_labels import TargetLabels
from dist_train.data.types import clips_of_class
from dist_train.errors import ConfigError, PlanError
from dist_train.system.supervised_pool import each_done

#: The code of each split; 0 is a clip that takes no part.
CODES = {name: number for number, name in enumerate(SPLITS, start=1)}
#: Split of a code.
NAMES = ("", *SPLITS)
#: Of what ``choose_clips`` gives: another number for other splits by the same settings.
VERSION = 1
#: Keys that are hashed at a time, by one process.
PIECE = 1 << 20
#: The code of each clip of a store: uint8 [clips].
Splits = np.ndarray[Any, np.dtype[np.uint8]]


def choose_clips(
    table: ClipTable,
    select: SelectSettings,
    split: SplitSettings,
    seed: int,
    copies: Copies | None = None,
    *,
    labels: TargetLabels,
) -> Splits:
    """The split of each clip of a store.

    Args:
        copies: clips that get one fold with their copies.

    Raises:
        PlanError: a class is missing, there are too few groups, or train or val is empty.
    """
    chosen = select_clips(table, labels, tier2_crowd_score=select.tier2_crowd_score)
    if split.train_on_all:
        held_out = int(np.count_nonzero((given_splits(table) > CODES["train"]) & chosen))
        if held_out:
            raise PlanError(
                f"split.train_on_all would train on {held_out} clips that the manifest's split "
                "column holds out",
                fix="Leave it out, or prepare a store from a manifest without that column.",
            )
        return _with_share(chosen.astype(np.uint8), table, labels.strata, select.share, seed)
    splits = assign_splits(table, labels.strata, chosen, split, seed, copies)
    for name in ("train", "val"):
        if not (splits == CODES[name]).any():
            raise PlanError(
                f"no clip is in split '{name}' ({np.count_nonzero(chosen)} clips selected)",
                fix="Give it clips in the manifest's split column, or leave that column out.",
            )
    return _with_share(splits, table, labels.strata, select.share, seed)


def _with_share(
    splits: Splits, table: ClipTable, strata: np.ndarray, share: float, seed: int
) -> Splits:
    """The splits with a share of each stratum's train clips, rounded up; the others take no part.

    Clips are chosen by digests of their keys, so that a smaller share is a part of a larger one.
    """
    if share == 1:
        return splits
    train = np.flatnonzero(splits == CODES["train"])
    # Other digests than those that deal the folds.
    order = np.argsort(_first_digests(table, train, f"share/{seed}"), kind="stable")
    own, kept = strata[train][order], splits.copy()
    for stratum in np.unique(own):
        clips = train[order[own == stratum]]
        # The product may be above a whole number by rounding: 0.07 x 100.
        kept[clips[math.ceil(round(share * len(clips), 6)) :]] = 0
    return kept


def given_splits(table: ClipTable) -> Splits:
    """The manifest's split of each clip; 0 where it names none."""
    codes = np.array([CODES.get(name, 0) for name in table.names("split")], np.uint8)
    return codes[table.codes("split")]


def counts_by_class(splits: Splits, labels: TargetLabels) -> dict[str, list[int]]:
    """The clips of each of ``labels.classes`` in each split that has clips."""
    there = {name: splits == code for name, code in CODES.items()}
    return {name: labels.counts(are_in) for name, are_in in there.items() if are_in.any()}


def check_splits(
    counts: Mapping[str, Sequence[int]],
    split: SplitSettings,
    *,
    given: bool,
    classes: Sequence[str],
) -> None:
    """Refuse splits that cannot be trained with or evaluated.

    Args:
        counts: the result of ``counts_by_class``.
        given: the manifest gives the splits; otherwise they are folds.
        classes: names of what is counted.

    Raises:
        PlanError: a split lacks a class, or a class has fewer clips than there are folds.
    """
    folds = {"test": split.fold, "val": (split.fold + 1) % split.folds}
    # Of two classes the positive one is named first.
    for label in reversed(range(len(classes))):
        class_name = clips_of_class(classes[label])
        shown = (1, 0) if len(classes) == 2 else (label,)
        summary = "; ".join(
            f"{name}: " + ", ".join(f"{clips[k]} {clips_of_class(classes[k])}" for k in shown)
            for name, clips in counts.items()
        )
        for name, clips in counts.items():
            if clips[label]:
                continue
            fold = f"fold {folds[name]} of {split.folds}; " if name in folds and not given else ""
            raise PlanError(
                f"split '{name}' holds no {class_name} ({fold}{summary})",
                where=None if given else f"split.fold={split.fold}",
                fix="Give it some in the manifest's split column."
                if given
                else "Lower split.folds, choose another seed, or prepare more clips of that class.",
            )
        total = sum(clips[label] for clips in counts.values())
        if not given and not split.train_on_all and total < split.folds:
            raise PlanError(
                f"{total} {class_name} cannot be in each of {split.folds} folds ({summary})",
                where="split.folds",
                fix="Lower it (3 is the least), or prepare more clips of that class.",
            )


def select_clips(
    table: ClipTable, labels: TargetLabels, *, tier2_crowd_score: float | None
) -> np.ndarray:
    """Which clips are in a run, by their label: bool [clips].

    Args:
        tier2_crowd_score: keep all of tier 1, and the positives of tier 2 with a greater crowd
            score. None keeps all labelled clips.

    Raises:
        PlanError: a class has no clip.
        ConfigError: there are no positives to keep.
    """
    chosen = labels.known
    if tier2_crowd_score is not None:
        if labels.target.kind != "binary":
            raise ConfigError(
                f"kind {labels.target.kind} has no positives to choose by their crowd score",
                where="select.tier2_crowd_score",
                fix="Leave it out.",
            )
        confident = (labels.values == 1) & (table["crowd_score"] > tier2_crowd_score)
        chosen = chosen & (table["tier1"] | confident)
    for name, clips in reversed([*zip(labels.classes, labels.counts(chosen), strict=True)]):
        if not clips:
            raise PlanError(
                f"the selection holds no {clips_of_class(name)} "
                f"({np.count_nonzero(chosen)} clips of {len(table)} selected)",
                fix="Check the labels with 'dist-train info', or loosen the select settings.",
            )
    return chosen


def assign_splits(
    table: ClipTable,
    strata: np.ndarray,
    chosen: np.ndarray,
    split: SplitSettings,
    seed: int,
    copies: Copies | None = None,
) -> Splits:
    """The split of each chosen clip; 0 for the others.

    The manifest's split is kept if there is one. Otherwise fold ``split.fold`` is test, the next
    fold is val, and the rest is train.

    Args:
        strata: what each fold gets its share of, such as the class: integer [clips].
        chosen: bool [clips].
        copies: as for ``choose_clips``. If groups are disjoint, the groups of copies get one fold
            too.

    Raises:
        PlanError: for disjoint groups: there are fewer groups than folds, a clip has no group, or a
            group is in two of the manifest's splits.
    """
    clips = np.flatnonzero(chosen)
    sets = [] if copies is None else _sets(copies.among(chosen), clips)
    given = np.where(chosen, given_splits(table), 0).astype(np.uint8)
    is_given = bool(given[clips].all())
    if split.groups == "disjoint":
        groups, names = _disjoint_groups(table, clips, split.ungrouped)
        if is_given:
            _refuse_crossed_groups(groups, names, given[clips])
            return given
        groups = _joined(names, [groups[places] for places in sets])[groups]
        cells = groups * (int(strata.max()) + 1) + strata[clips]
        counts = np.bincount(cells, minlength=len(names) * (int(strata.max()) + 1))
        fold = _folds_of_groups(names, counts.reshape(len(names), -1), split.folds, seed)[groups]
    elif is_given:
        return given
    else:
        # Deal the first of each set of copies; the others follow it.
        followers = np.zeros(len(clips), np.bool_)
        for places in sets:
            followers[places[1:]] = True
        fold = np.empty(len(clips), np.int16)
        fold[~followers] = _stratified(table, strata, clips[~followers], split.folds, seed)
        for places in sets:
            fold[places] = fold[places[0]]
    code_of_fold = np.full(split.folds, CODES["train"], np.uint8)
    code_of_fold[[split.fold, (split.fold + 1) % split.folds]] = CODES["test"], CODES["val"]
    splits = np.zeros(len(table), np.uint8)
    splits[clips] = code_of_fold[fold]
    return splits


def _sets(copies: Copies, clips: Ints) -> list[Ints]:
    """The places in ``clips`` of each set of copies, ascending."""
    order = np.argsort(copies.first, kind="stable")
    _, starts = np.unique(copies.first[order], return_index=True)
    places = np.searchsorted(clips, copies.clips[order])
    return np.split(places, starts[1:]) if len(places) else []


def _disjoint_groups(table: ClipTable, clips: Ints, ungrouped: str) -> tuple[Ints, list[str]]:
    """The group of each clip as a position in a list of names. Names that look the same are one,
    also in a store that holds both."""
    plain = [plain_group(name) for name in table.names("group")]
    place = {name: number for number, name in enumerate(dict.fromkeys(plain))}
    groups = np.array([place[name] for name in plain])[table.codes("group")[clips]]
    names = list(place)
    blank = np.flatnonzero(groups == place.get("", -1))
    if not len(blank):
        return groups, names
    if ungrouped == "refuse":
        raise PlanError(
            f"{len(blank)} of {len(clips)} clips have no group, the first is "
            f"'{table.text('key', int(clips[blank[0]]))}', and split.groups=disjoint keeps groups "
            "apart",
            fix="Fill the group column, or set split.ungrouped: own makes each clip a group, "
            "together makes them one group.",
        )
    # Names that hardly any manifest has.
    if ungrouped == "own":
        groups[blank] = len(names) + np.arange(len(blank))
        return groups, [*names, *(f"/ {key}" for key in table.texts("key", clips[blank]))]
    groups[blank] = len(names)
    return groups, [*names, "/ "]


def _joined(names: Sequence[str], linked_groups: Iterable[Ints]) -> Ints:
    """The group that each group becomes, where groups that share copies of a clip are one
    (union-find)."""
    parent = list(range(len(names)))

    def root(group: int) -> int:
        while parent[group] != group:
            group = parent[group]
        return group

    linked = [np.unique(groups).tolist() for groups in linked_groups]
    for groups in linked:
        roots = {root(group) for group in groups}
        first = min(roots, key=names.__getitem__)
        for other in roots:
            parent[other] = first
    for groups in linked:
        for group in groups:
            parent[group] = root(group)
    return np.array(parent, np.int64)


def crossed_groups(table: ClipTable, splits: Splits) -> dict[str, str]:
    """Groups that are in more than one split, by name, and these splits; blank is no group."""
    clips = np.flatnonzero(splits)
    crossed = _crossed(table.codes("group")[clips], table.names("group"), splits[clips])
    crossed.pop("", None)
    return crossed


def _crossed(groups: Ints, names: Sequence[str], splits: Splits) -> dict[str, str]:
    are_in = np.zeros((len(names), len(NAMES)), np.bool_)
    are_in[groups, splits] = True
    crossed = np.flatnonzero(are_in.sum(axis=1) > 1).tolist()
    return {
        names[group]: " and ".join(sorted(NAMES[n] for n in np.flatnonzero(are_in[group])))
        for group in sorted(crossed, key=names.__getitem__)
    }


def _refuse_crossed_groups(groups: Ints, names: Sequence[str], splits: Splits) -> None:
    crossed = _crossed(groups, names, splits)
    if crossed:
        name, found = next(iter(crossed.items()))
        raise PlanError(
            f"group '{name}' is in splits {found} of the manifest "
            f"({len(crossed)} such groups), and split.groups=disjoint keeps each in one",
            fix="Correct the manifest's split column, or set split.groups=stratify.",
        )


def _digest(seed: int, key: bytes) -> bytes:
    """A random sort key that depends on nothing but the seed and the key."""
    return hashlib.sha256(f"{seed}/".encode() + key).digest()


def _stratified(
    table: ClipTable, strata: np.ndarray, clips: Ints, folds: int, seed: int
) -> np.ndarray:
    """A fold for each clip: each (group, stratum) cell is spread evenly over the folds."""
    own, groups = strata[clips], len(table.names("group"))
    number = (int(own.max()) + 1) * groups
    wide = np.int32 if number < 1 << 31 else np.int64
    cells = own.astype(wide) * groups + table.codes("group")[clips]
    # By the first 8 bytes of their digests; numpy sorts small integers in a time like their number.
    digests = _first_digests(table, clips, seed)
    order = np.argsort(cells.astype(np.uint16) if number < 1 << 16 else cells, kind="stable")
    counts = np.bincount(cells)
    ends = np.cumsum(counts)
    for cell in np.flatnonzero(counts > 1).tolist():
        members = order[ends[cell] - counts[cell] : ends[cell]]
        ranks = digests[members]
        by_digest = np.argsort(ranks)
        ranks = ranks[by_digest]
        members[:] = members[by_digest]
        for place in np.flatnonzero(ranks[1:] == ranks[:-1]).tolist():
            # By all of their digests, also where three are equal: neighbours are swapped in turn.
            equal = members[np.searchsorted(ranks, ranks[place]) : place + 2]
            equal[:] = sorted(equal, key=lambda at: _digest(seed, table.key(int(clips[at]))))
    # The count goes on through the groups of a stratum. Otherwise each group smaller than the
    # number of folds would begin with fold 0.
    dealt = np.empty(len(clips), np.int16)
    for part in np.split(order, np.cumsum(np.bincount(own))[:-1]):
        dealt[part] = np.resize(np.arange(folds, dtype=np.int16), len(part))
    return dealt


def _first_digests(table: ClipTable, clips: Ints, seed: int | str) -> np.ndarray:
    """The first 8 bytes of each clip's ``_digest`` as a number, uint64 [n], by all cores if there
    are many clips."""
    pieces = ((table, clips[at : at + PIECE], seed) for at in range(0, len(clips), PIECE))
    digests, end = np.empty(len(clips), np.uint64), 0
    for first, found in each_done(_digests_of, pieces):
        at = int(np.searchsorted(clips, first))
        digests[at : at + len(found)] = found
        end += len(found)
    assert end == len(clips)
    return digests


def _digests_of(piece: tuple[ClipTable, Ints, int | str]) -> tuple[int, np.ndarray]:
    table, clips, seed = piece
    first, last = int(clips[0]), int(clips[-1]) + 1
    keys, prefix, sha256 = table.keys(first, last), f"{seed}/".encode(), hashlib.sha256
    # As ``_digest``, in half the time.
    content = b"".join([sha256(prefix + keys[n]).digest()[:8] for n in (clips - first).tolist()])
    return first, np.frombuffer(content, ">u8").astype(np.uint64)


def _folds_of_groups(names: Sequence[str], counts: Ints, folds: int, seed: int) -> np.ndarray:
    """A fold for each group: the largest first, to the fold that has least of its share.

    Args:
        counts: clips of each group by stratum, int64 [groups, strata].
    """
    sizes = counts.sum(axis=1)
    there = np.flatnonzero(sizes).tolist()
    if len(there) < folds:
        raise PlanError(
            f"{len(there)} groups cannot fill {folds} folds without crossing one",
            fix="Lower split.folds, or set split.groups=stratify.",
        )
    there.sort(key=lambda group: (-sizes[group], _digest(seed, names[group].encode())))
    share = np.maximum(counts.sum(axis=0) / folds, 1.0)
    filled = np.zeros((folds, counts.shape[1]))
    fold_of = np.zeros(len(names), np.int16)
    for group in there:
        row = counts[group]
        overfull = (((filled + row) / share) ** 2 - (filled / share) ** 2).sum(axis=1)
        # Each fold gets a group before any fold gets a second one.
        is_empty = filled.sum(axis=1) == 0
        if is_empty.any():
            overfull[~is_empty] = np.inf
        fold = int(overfull.argmin())
        filled[fold] += row
        fold_of[group] = fold
    return fold_of
