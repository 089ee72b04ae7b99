"""Faults and copies of clips, with their thresholds and the clips' names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd

from dist_train.data.check.measure import Pairs
from dist_train.data.check.result import MOST_NAMED, Finding
from dist_train.data.types import CLASSES, FEW_LEVELS, MOST_SATURATED

#: Brightest grey value of a black clip.
BLACK = 10
#: Standard deviation of the grey values below which a clip is constant.
CONSTANT = 1.0
#: Share of frames that equal the frame before.
FROZEN = 0.1
#: See ``tear_of``.
TORN = 2.5


def faults(clips: pd.DataFrame, statistics: pd.DataFrame) -> Iterator[Finding]:
    """Faults of pixels. A black or constant clip does not count as one of few levels, too.

    Args:
        clips: ``recorded``.
        statistics: ``measure``.
    """
    black = statistics["brightest"] <= BLACK
    constant = ~black & (statistics["spreads"].map(max) < CONSTANT)
    few = ~black & ~constant & (statistics["levels"] < FEW_LEVELS)
    for kind, is_so in {
        f"black: no pixel above {BLACK} of 255": black,
        f"constant: spread below {CONSTANT:g} grey level": constant,
        f"fewer than {FEW_LEVELS} grey levels": few,
        f"saturated: over {MOST_SATURATED:.0%} of pixels": statistics["saturated"] > MOST_SATURATED,
        f"frozen: over {FROZEN:.0%} of frames repeat": statistics["repeated"] > FROZEN,
        "torn: part of a frame is of another picture": statistics["tear"] >= TORN,
    }.items():
        yield _finding(kind, is_so, clips)


def record_faults(clips: pd.DataFrame) -> Iterator[Finding]:
    """Faults that ``prepare`` has recorded, of clips that it was told to keep."""
    declared = clips["declared"]
    for kind, is_so in {
        "other number of frames than declared": (declared > 0) & (declared != clips["depth"]),
        "decoded with damaged frames": clips["damaged"] > 0,
    }.items():
        yield _finding(kind, is_so, clips)


def _finding(kind: str, is_so: pd.Series, clips: pd.DataFrame) -> Finding:
    found = is_so.index[is_so.astype(bool)]
    names = clips["filename"][found[:MOST_NAMED]].tolist()
    return Finding(kind=kind, clips=len(found), names=names)


def copies(
    kind: str, pairs: Pairs, clips: pd.DataFrame, classes: Mapping[int, str] = CLASSES
) -> Iterator[Finding]:
    """Three findings of pairs of copies: all, those in two splits, and those of two labels.

    Args:
        classes: names of the labels.
    """
    filename, label, split = (clips[name].to_numpy() for name in ("filename", "label", "split"))

    def told(clip: int) -> str:
        place = f"{split[clip]}, " if split[clip] else ""
        return f"'{filename[clip]}' ({place}{classes[label[clip]]})"

    for which, chosen in {
        "": pairs,
        " in different splits": [(a, b) for a, b in pairs if "" != split[a] != split[b] != ""],
        " with unequal labels": [(a, b) for a, b in pairs if -1 != label[a] != label[b] != -1],
    }.items():
        yield Finding(
            kind=f"{kind} clips{which}",
            clips=len({clip for pair in chosen for clip in pair}),
            names=[f"{told(a)} and {told(b)}" for a, b in chosen[:MOST_NAMED]],
        )


def identical_pairs(labels: pd.Series, same: pd.Series) -> Pairs:
    """Pairs of one clip of each set of copies, a labelled one if any is, with each other one.

    Args:
        same: the first clip with the same pixels, of each clip.
    """
    copied = same[same.duplicated(keep=False)]
    pairs: Pairs = []
    for _, members in copied.groupby(copied):
        first, *others = sorted(members.index, key=lambda clip: (labels[clip] < 0, clip))
        pairs += [(first, other) for other in others]
    return pairs
