"""Labels as 0 and 1, as names of classes of which the user says which are positive, or as more than
two classes."""

from __future__ import annotations

import difflib
import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from dist_train.data.table.numbers import parse_numbers
from dist_train.data.types import CLASSES, MOST_CLASSES
from dist_train.errors import ConfigError, ManifestError

log = logging.getLogger(__name__)

_WORDS = {"true": 1, "false": 0, "yes": 1, "no": 0, "1": 1, "0": 0}
# Spellings of two classes; a third label beside them is probably a typing error.
_PAIRS = ({"true", "false"}, {"yes", "no"})
# Texts that stand for no label, as programs write them.
_UNKNOWN = ("", "nan", "na", "n/a", "none", "null", "?", "-", "-1")


@dataclass(frozen=True)
class Naming:
    """What the user says of the labels.

    Attributes:
        positive: classes whose clips are positive. Empty: the labels are 0 and 1, or more than two
            classes.
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

    def labels_among(self, texts: Iterable[str]) -> set[str]:
        """Those of a column's texts that are labels."""
        texts = set(texts)
        if not (self.positive or self.is_of_many(texts)):
            return {text for text in texts if _folded(text) in _WORDS}
        return {text for text in texts if self.is_complete or _folded(text) not in _UNKNOWN}

    def is_of_many(self, texts: Iterable[str]) -> bool:
        """Whether a column's texts are more than two classes, each with its own code."""
        labels = {_folded(text) for text in texts}
        labels -= set() if self.is_complete else set(_UNKNOWN)
        if self.positive or len(labels) < 3 or labels <= _WORDS.keys():
            return False
        if all(label.isdecimal() for label in labels):
            return True
        is_mixed = labels & {"0", "1"} or any(pair <= labels for pair in _PAIRS)
        return not is_mixed and not _are_numbers(labels).any()


@dataclass(frozen=True)
class Labels:
    """Labels of a table.

    Attributes:
        values: int16, codes of classes from 0.
        classes: names of the codes.
        called: the class of each row by its own name, if ``positive`` puts several into one.
    """

    values: pd.Series
    classes: dict[int, str]
    called: pd.Series | None = None


def read_labels(text: pd.Series, naming: Naming, where: Path) -> Labels:
    """Read a column of labels, of which ``naming.is_label`` holds.

    Without ``naming.positive`` a label is 0, 1, true, false, yes or no, or one of more than two
    classes. With it every text is the name of a class, in any case, and all classes that are not
    named are negative. Both are logged.

    Raises:
        ManifestError: a class of ``naming`` is not in the table, all clips are positive, or there
            are too many classes.
    """
    if naming.is_of_many(text.unique()):
        return _of_many(text, naming, where)
    if not naming.positive:
        _refuse_strangers(list(naming.names), ("0", "1"), "--label-names", where)
        words = {raw: _WORDS[_one_form(raw).casefold()] for raw in text.unique()}
        classes = {label: naming.names.get(str(label), CLASSES[label]) for label in (0, 1)}
        return Labels(text.map(words).astype("int16"), classes)
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
        values.astype("int16"),
        {side: " or ".join(of) for side, of in sides.items()},
        spelled if len(counts) > 2 else None,
    )


def _of_many(text: pd.Series, naming: Naming, where: Path) -> Labels:
    """Labels of more than two classes. Numbers 0 to K-1 are codes. Other labels get theirs in the
    order of ``naming.names``, and then of their own names, in which 9 comes before 10."""
    spelled = rename_classes(text, naming.names, where)
    counts = spelled.value_counts()
    names = class_order(counts.index)
    if len(names) < 3:
        raise ManifestError(
            f"there are two classes: {_shown(names, counts)}",
            where=where,
            fix="Say by --positive NAME which is positive.",
        )
    if len(names) > MOST_CLASSES:
        raise ManifestError(
            f"there are {len(names)} classes, more than {MOST_CLASSES}",
            where=where,
            fix="If the labels are values, prepare it with --unlabelled: docs/tables.md.",
        )
    number = {_one_form(raw): name for raw, name in zip(text, spelled, strict=True)}
    codes = [str(code) for code in range(len(names))]
    if sorted(number) == sorted(codes):
        names = [number[code] for code in codes]
    else:
        first = [name for name in dict.fromkeys(naming.names.values()) if name in counts.index]
        names = [*first, *(name for name in names if name not in first)]
    log.warning("%s: %d classes, from code 0: %s", where, len(names), _shown(names, counts))
    place = {name: code for code, name in enumerate(names)}
    return Labels(spelled.map(place).astype("int16"), dict(enumerate(names)))


def class_order(names: Iterable[str]) -> list[str]:
    """Names of classes in the order of people, in which 9 comes before 10."""

    def key(name: str) -> tuple[list[tuple[bool, int, str]], str]:
        parts = re.split(r"([0-9]+)", name.casefold())
        return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts], name

    return sorted(names, key=key)


def truths(text: pd.Series) -> pd.Series:
    """A column of 0, 1, true, false, yes or no as float64; NaN for any other text."""
    words = {raw: _WORDS.get(_folded(raw)) for raw in text.unique()}
    return text.map(words).astype("float64")


def are_values(text: pd.Series) -> bool:
    """Whether a column of labels holds numbers other than 0 and 1, as for regression."""
    labels = {_folded(label) for label in text.unique()} - set(_UNKNOWN)
    return len(labels) > 1 and not labels <= _WORDS.keys() and bool(_are_numbers(labels).all())


def _are_numbers(labels: set[str]) -> pd.Series:
    return parse_numbers(pd.Series(sorted(labels), dtype="str")).notna()


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


def _folded(text: str) -> str:
    return _one_form(text).casefold()


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
