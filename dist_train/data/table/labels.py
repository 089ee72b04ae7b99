"""Labels as 0 and 1, or as names of classes of which the user says which are positive."""

from __future__ import annotations

import difflib
import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from dist_train.data.types import CLASSES
from dist_train.errors import ConfigError, ManifestError

log = logging.getLogger(__name__)

_WORDS = {"true": 1, "false": 0, "yes": 1, "no": 0, "1": 1, "0": 0}
# Texts that stand for no label, as programs write them.
_UNKNOWN = ("", "nan", "na", "n/a", "none", "null", "?", "-", "-1")


@dataclass(frozen=True)
class Naming:
    """What the user says of the labels.

    Attributes:
        positive: classes whose clips are positive. Empty: the labels are 0 and 1.
        names: what a label is to be called, by the label in the table.
        is_complete: no text stands for a missing label, as in names of folders.
    """

    positive: Sequence[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    is_complete: bool = False

    @classmethod
    def parse(cls, positive: Sequence[str], names: Sequence[str]) -> Naming:
        """Read ``--positive NAME`` and ``--label-names LABEL=NAME,LABEL=NAME``.

        Raises:
            ConfigError: a name is not of that form.
        """
        pairs = [pair.partition("=") for text in names for pair in text.split(",")]
        bad = next((pair for pair in pairs if not (pair[0] and pair[2])), None)
        if bad is not None:
            raise ConfigError(
                f"'{''.join(bad)}' names no label",
                where="--label-names",
                fix="Give it as 0=flowing.",
            )
        return cls(positive, {plain_text(label): plain_text(name) for label, _, name in pairs})

    def is_label(self, text: str) -> bool:
        """Whether a text of the table is a label."""
        label = _one_form(text).casefold()
        if not self.positive:
            return label in _WORDS
        return self.is_complete or label not in _UNKNOWN


@dataclass(frozen=True)
class Labels:
    """Labels of a table.

    Attributes:
        values: int8, 0 or 1.
        classes: names of 0 and 1.
        called: the class of each row by its own name, if there are more than two.
    """

    values: pd.Series
    classes: dict[int, str]
    called: pd.Series | None = None


def read_labels(text: pd.Series, naming: Naming, where: Path) -> Labels:
    """Read a column of labels, of which ``naming.is_label`` holds.

    Without ``naming.positive`` a label is 0, 1, true, false, yes or no. Otherwise every text is the
    name of a class, in any case, and all classes that are not named are negative, which is logged.

    Raises:
        ManifestError: a class of ``naming`` is not in the table, or all clips are positive.
    """
    if not naming.positive:
        _refuse_strangers(list(naming.names), ("0", "1"), "--label-names", where)
        words = {raw: _WORDS[_one_form(raw).casefold()] for raw in text.unique()}
        classes = {label: naming.names.get(str(label), CLASSES[label]) for label in (0, 1)}
        return Labels(text.map(words).astype("int8"), classes)
    spelled = rename_classes(text, naming.names, where)
    counts = spelled.value_counts()
    called = {label.casefold(): name for label, name in naming.names.items()}
    asked = [called.get(plain_text(name).casefold(), name) for name in naming.positive]
    _refuse_strangers(asked, counts.index, "--positive", where)
    wanted = {plain_text(name).casefold() for name in asked}
    sides: dict[int, list[str]] = {0: [], 1: []}
    for name in sorted(counts.index):
        sides[name.casefold() in wanted].append(name)
    if not sides[0]:
        raise ManifestError(
            f"there are no negative clips: all are {_shown(sides[1], counts)}",
            where=where,
            fix="At least one class must not be named by --positive.",
        )
    log.warning(
        "%s: positive clips are those of %s; negative clips are those of %s",
        where, _shown(sides[1], counts), _shown(sides[0], counts),
    )  # fmt: skip
    values = spelled.map({name: side for side, of in sides.items() for name in of})
    return Labels(
        values.astype("int8"),
        {side: " or ".join(of) for side, of in sides.items()},
        spelled if len(counts) > 2 else None,
    )


def rename_classes(text: pd.Series, names: Mapping[str, str], where: Path) -> pd.Series:
    """Names of classes: one spelling for each, and another name for those in ``names``.

    Raises:
        ManifestError: a class of ``names`` is not in the table.
    """
    spelled = _one_case(text.map({raw: _one_form(raw) for raw in text.unique()}))
    _refuse_strangers(list(names), spelled.unique(), "--label-names", where)
    called = {label.casefold(): name for label, name in names.items()}
    return spelled.map(lambda label: called.get(label.casefold(), label))


def plain_text(text: str) -> str:
    """Text on one line without blanks around it, its letters in one form (NFC)."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _one_form(text: str) -> str:
    """Plain text. A program that read whole numbers as decimal ones writes 1.0 for 1."""
    return re.sub(r"^(-?\d+)[.,]0+$", r"\1", plain_text(text))


def _one_case(names: pd.Series) -> pd.Series:
    """One spelling, the most frequent one, for names that differ in case alone."""
    first: dict[str, str] = {}
    for name in names.value_counts().index:
        other = first.setdefault(name.casefold(), name)
        if other != name:
            log.warning("labels '%s' and '%s' differ in case, and are one class", other, name)
    return names.map(lambda name: first[name.casefold()])


def _refuse_strangers(asked: Sequence[str], known: Iterable[str], option: str, where: Path) -> None:
    there = {name.casefold(): name for name in known}
    for name in asked:
        if plain_text(name).casefold() not in there:
            near = difflib.get_close_matches(name, there.values(), n=1)
            raise ManifestError(
                f"there is no class '{name}' ({option})",
                where=where,
                fix=f"Did you mean '{near[0]}'?"
                if near
                else f"There are: {', '.join(sorted(there.values())[:20]) or 'none'}.",
            )


def _shown(names: Sequence[str], counts: pd.Series) -> str:
    return ", ".join(f"{name} ({counts[name]})" for name in names)
