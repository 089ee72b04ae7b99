"""Which clips are explained: the most wrong and the most sure ones of ``predictions.csv``."""

from __future__ import annotations

from itertools import zip_longest
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from dist_train.evaluation.target_table import VALUE, scores_of
from dist_train.targets import Target, by_class

Why = Literal["most wrong", "most sure", "asked"]


Order = list[tuple[int, int]]


class Chosen(NamedTuple):
    """A clip to explain."""

    key: str
    why: Why
    of: int | None
    """Place in ``Target.classes`` of what is explained; None: the class that the model says."""


def choose_clips(
    table: pd.DataFrame, target: Target, truth: np.ndarray, count: int, of: int | None = None
) -> list[Chosen]:
    """At most ``count`` most wrong clips, and as many that the model is most sure of.

    - Classes: wrong clips have another class than the one with the highest probability; the most
      wrong are those with the least probability of their own class. The sure ones are not wrong,
      and are taken from each class in turn, because the surest of a rare class are what one wants
      to see, too. What is explained is the class that the model says.
    - Labels of multilabel: the same with each label of each clip; sure are those that it has.
    - Values of regression: the most wrong are those farthest from the truth, in parts of
      ``target.scale``. None is sure.

    Args:
        table: as ``read_predictions`` gives it.
        truth: of its rows, as ``TargetLabels.values``.
        of: the class, label or value to explain. Of labels and values only those of it count.
    """
    if target.kind == "binary":
        scores = by_class(table["probability"].to_numpy())
    else:
        scores = scores_of(table, target, VALUE if target.kind == "regression" else "probability")
    rows = np.arange(len(table))
    if target.is_coded:
        called = scores.argmax(axis=1)
        own = scores[rows, np.maximum(truth, 0)]
        wrong = np.where((truth >= 0) & (called != truth), 1 - own, np.nan)[:, None]
        sure = scores[rows, called][:, None]
        explained = called[:, None]
    else:
        away = np.abs(scores - truth)
        explained = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
        if target.kind == "regression":
            wrong, sure = away / np.asarray(target.scale or 1.0), away * np.nan
        else:
            wrong = np.where(away > 0.5, away, np.nan)
            sure = np.where(scores > 0.5, scores, np.nan)
        if of is not None:
            wrong, sure, explained = (each[:, of : of + 1] for each in (wrong, sure, explained))
    sure = np.where(np.isnan(wrong), sure, np.nan)
    orders: list[tuple[Why, Order]] = [
        ("most wrong", _falling(wrong)),
        ("most sure", _in_turn(_falling(sure), explained)),
    ]
    taken = set[int]()
    return [
        Chosen(str(table["key"].iloc[row]), why, int(explained[row, column]) if of is None else of)
        for why, order in orders
        for row, column in _first(order, count, taken)
    ]


def _falling(size: np.ndarray) -> Order:
    """Row and column of all values but NaN, the largest first."""
    order = np.argsort(-size, axis=None, kind="stable")
    return [
        (int(row), int(column))
        for row, column in zip(*np.unravel_index(order, size.shape), strict=True)
        if not np.isnan(size[row, column])
    ]


def _in_turn(order: Order, explained: np.ndarray) -> Order:
    """The same, one of each class in turn."""
    of_class: dict[int, Order] = {}
    for place in order:
        of_class.setdefault(int(explained[place]), []).append(place)
    return [place for each in zip_longest(*of_class.values()) for place in each if place]


def _first(order: Order, count: int, taken: set[int]) -> Order:
    """The first ``count`` places in rows that are not taken yet, and then are."""
    found: Order = []
    for row, column in order:
        if len(found) < count and row not in taken:
            taken.add(row)
            found.append((row, column))
    return found
