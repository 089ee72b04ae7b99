"""The result of a check, as it is printed, kept as JSON, and shown in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dist_train.errors import FileError
from dist_train.files import MIB, read_plain

#: Most clips, or pairs of clips, that a finding names.
MOST_NAMED = 100


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Finding(_Part):
    """One kind of fault that was looked for.

    ``kind``: what was looked for, and its threshold. ``clips``: number of clips that have it; 0 if
    none. ``names``: clips, or pairs of them, ``MOST_NAMED`` at most.
    """

    kind: str
    clips: int
    names: list[str]


class Shift(_Part):
    """A group or split whose clips differ from all others in a statistic of their grey values.

    ``of``: "group" or "split". ``value``: the mean over its clips, in grey levels of 255;
    ``others``: that of the other clips. ``difference``: standardised (Cohen's d).
    """

    of: Literal["group", "split"]
    name: str
    statistic: str
    clips: int
    value: float
    others: float
    difference: float


class Leak(_Part):
    """How well columns that are no pixels predict the label.

    ``of``: of several classes, labels or values the one that they tell best; "" if there is one
    alone, as of two classes or of one value. ``mcc``: of predictions out of fold, of the class
    against the rest; ``rank_correlation``: of predicted values with the true ones, in its place.
    ``low`` to ``high``: 95 % bootstrap interval, which holds for all classes at once. ``apart``:
    folds keep groups apart, and the bootstrap draws groups; otherwise clips. ``is_leak``: better
    than chance, by more than a trifle (see ``find_leaks``).
    """

    columns: list[str]
    of: str = ""
    mcc: float | None = None
    rank_correlation: float | None = None
    low: float
    high: float
    clips: int
    apart: bool
    is_leak: bool

    @property
    def score(self) -> float:
        """The MCC, or the rank correlation."""
        score = self.rank_correlation if self.mcc is None else self.mcc
        assert score is not None
        return score

    @property
    def metric(self) -> str:
        """What ``score`` is, for people."""
        return "rank correlation" if self.mcc is None else "MCC"


class CheckResult(_Part):
    """All that a check found. ``content``: the content digest of the store. ``sampled``: number of
    clips whose pixels were read. ``notes``: what was not looked for, or only in part, and why."""

    format: Literal["dist_train check 1"] = "dist_train check 1"
    content: str
    clips: int
    sampled: int
    findings: list[Finding]
    shifts: list[Shift]
    leaks: list[Leak]
    notes: list[str]

    @property
    def is_clean(self) -> bool:
        leaks = any(leak.is_leak for leak in self.leaks)
        return not (leaks or self.shifts or any(finding.clips for finding in self.findings))


def read_result(path: Path) -> CheckResult:
    """Read the JSON file of a check.

    Raises:
        FileError: it is no such file.
    """
    try:
        return CheckResult.model_validate_json(read_plain(path, most_bytes=16 * MIB))
    except ValidationError:
        raise FileError(
            "is not the result of a check", where=path, fix="Run 'dist-train check --json' again."
        ) from None
