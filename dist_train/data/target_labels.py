"""The label of each clip of a store for a run's target: from the label column, or from metadata."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import pandas as pd

from dist_train.config import TargetSettings
from dist_train.data.store.clip_table import ClipTable
from dist_train.data.table.labels import class_order, truths
from dist_train.data.table.numbers import parse_numbers
from dist_train.data.types import METADATA
from dist_train.errors import ConfigError
from dist_train.targets import Target

Array = np.ndarray[Any, np.dtype[Any]]

log = logging.getLogger(__name__)

#: Parts of equal numbers of clips that each value of regression is cut into for folds.
QUANTILES = 10


@dataclass(frozen=True)
class TargetLabels:
    """The labels of a store's clips.

    Attributes:
        target: without center and scale.
        values: class codes, integer [clips], -1 for a clip that takes no part; or float32
            [clips, V], 0 and 1 or values in their own unit, NaN for a clip that takes no part.
        in_store: whether ``values`` are the store's own column of labels.
        columns: of metadata, that ``values`` are made of.
    """

    target: Target
    values: Array
    in_store: bool = False
    columns: tuple[str, ...] = ()

    @property
    def known(self) -> Array:
        """Which clips have a label: bool [clips]."""
        known: Array = self.values >= 0 if self.codes is not None else ~np.isnan(self.values[:, 0])
        return known

    @property
    def codes(self) -> Array | None:
        """The class code of each clip; None if a clip has not one class."""
        return self.values if self.target.is_coded else None

    @cached_property
    def strata(self) -> Array:
        """The part that a clip belongs to in folds, integer [clips], -1 for none: its class, its
        combination of labels, or its place among ``QUANTILES`` of the first value."""
        if self.codes is not None:
            return self.codes
        strata, known = np.full(len(self.values), -1), self.known
        chosen = self.values[known]
        if self.target.kind == "multilabel":
            strata[known] = np.unique(chosen, axis=0, return_inverse=True)[1].reshape(-1)
        else:
            ranks = np.argsort(np.argsort(chosen[:, 0], kind="stable"))
            strata[known] = ranks * QUANTILES // max(len(chosen), 1)
        return strata

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of what ``counts`` counts; of regression, all clips."""
        return ("labelled",) if self.target.kind == "regression" else self.target.classes

    def counts(self, chosen: Array) -> list[int]:
        """How many of the ``chosen`` clips, bool [clips], each of ``classes`` has."""
        if self.target.kind == "regression":
            return [int(np.count_nonzero(chosen))]
        counts: list[int]
        if self.codes is None:
            counts = self.values[chosen].sum(axis=0).astype(int).tolist()
            return counts
        codes = self.codes[chosen]
        counts = np.bincount(codes[codes >= 0], minlength=len(self.classes)).tolist()
        return counts


def target_labels(
    settings: TargetSettings, table: ClipTable, classes: Mapping[int, str]
) -> TargetLabels:
    """Read the labels that the settings name.

    Args:
        classes: names of the store's labels.

    Raises:
        ConfigError: the store has no such column or class, a value is not one of the kind, or the
            labels do not fit the kind.
    """
    names = [name for label, name in sorted(classes.items()) if label >= 0]
    kind = settings.kind
    if settings.columns is not None:
        return _of_columns(settings, table, settings.columns)
    if kind == "auto":
        kind = "binary" if len(settings.classes or names) == 2 else "multiclass"
    if kind == "regression":
        values = _numbers(pd.Series([*names, ""], dtype="str"), "label", None)
        return TargetLabels(Target(kind, ("label",)), values[table["label"]][:, None])
    if kind == "multilabel":
        raise ConfigError("multilabel needs columns", where="target.columns")
    chosen = list(settings.classes or names)
    _refuse_strangers(chosen, names, "target.classes")
    target = Target(kind, tuple(chosen))
    _check_count(target)
    if chosen == names:
        return TargetLabels(target, table["label"], in_store=True)
    # The last place is that of -1.
    code = np.full(len(names) + 1, -1, np.int16)
    code[[names.index(name) for name in chosen]] = np.arange(len(chosen))
    return TargetLabels(target, code[table["label"]])


def _of_columns(settings: TargetSettings, table: ClipTable, columns: Sequence[str]) -> TargetLabels:
    kind = settings.kind
    assert kind != "auto"
    there = [name.removeprefix(METADATA) for name in table.metadata]
    _refuse_strangers(columns, there, "target.columns")
    texts = [pd.Series(table.texts(f"{METADATA}{name}"), dtype="str") for name in columns]
    empty = np.logical_or.reduce([(text == "").to_numpy() for text in texts])
    if empty.any() and os.environ.get("RANK", "0") == "0":
        log.warning(
            "%d of %d clips have no %s, and take no part",
            np.count_nonzero(empty), len(table), " or ".join(columns),
        )  # fmt: skip
    if kind in ("multilabel", "regression"):
        read = truths if kind == "multilabel" else parse_numbers
        values = np.stack(
            [_numbers(text, name, table, read) for text, name in zip(texts, columns, strict=True)],
            axis=1,
        )
        values[empty] = np.nan
        return TargetLabels(Target(kind, tuple(columns)), values, columns=tuple(columns))
    names = class_order(set(texts[0]) - {""})
    chosen = list(settings.classes or names)
    _refuse_strangers(chosen, names, "target.classes")
    if kind == "binary" and settings.classes is None:
        raise ConfigError(
            f"which value of {columns[0]} is positive is not said",
            where="target.classes",
            fix=f"Give [negative, positive] of: {', '.join(names[:20])}.",
        )
    target = Target(kind, tuple(chosen))
    _check_count(target)
    place = {name: code for code, name in enumerate(chosen)}
    codes = texts[0].map(place).fillna(-1).to_numpy().astype(np.int16)
    return TargetLabels(target, codes, columns=tuple(columns))


def _numbers(
    text: pd.Series, name: str, table: ClipTable | None, read: Any = parse_numbers
) -> Array:
    """A column as float32 [clips], NaN where it is empty."""
    numbers = read(text)
    wrong = np.flatnonzero((~np.isfinite(numbers) & (text != "")).to_numpy())
    if len(wrong):
        expected = "0 or 1" if read is truths else "a number"
        whose = "class" if table is None else f"{name} of '{table.text('key', int(wrong[0]))}'"
        raise ConfigError(
            f"{whose} is '{text.iloc[wrong[0]]}', not {expected} ({len(wrong)} such)",
            where="target.columns",
            fix="Name another column, or another target.kind.",
        )
    values: Array = numbers.to_numpy().astype(np.float32)
    return values


def _check_count(target: Target) -> None:
    count, least = len(target.classes), {"binary": 2, "multiclass": 2}.get(target.kind, 3)
    if count < least or (target.kind == "binary" and count > 2):
        raise ConfigError(
            f"kind {target.kind} has {'two' if least == 2 else 'three or more'} classes, and there "
            f"are {count}: {', '.join(target.classes[:20])}",
            where="target.kind",
            fix="Choose another kind, or classes by target.classes.",
        )


def _refuse_strangers(asked: Sequence[str], known: Sequence[str], setting: str) -> None:
    for name in asked:
        if name not in known:
            _refuse(name, known, setting)


def _refuse(name: str, known: Sequence[str], setting: str) -> NoReturn:
    near = get_close_matches(name, known, n=1)
    what = "column" if setting.endswith("columns") else "class"
    raise ConfigError(
        f"the store has no {what} '{name}'",
        where=setting,
        fix=f"Did you mean '{near[0]}'?"
        if near
        else f"There are: {', '.join(known[:20]) or 'none'}.",
    )
