"""The result of a check: one line of the doctor's table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rich.table import Table

State = Literal["ok", "warn", "bad"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        what: the subject of the check.
        state: "warn": training works, but slower or less safely. "bad": training will fail.
        found: the value, with its unit.
        fix: what to do; empty if ``state`` is "ok".
    """

    what: str
    state: State
    found: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert (self.state == "ok") == (not self.fix), "a fix belongs to 'warn' and 'bad' only"


def graded(
    what: str, value: float, found: str, fix: str, *, bad: float | None = None, warn: float
) -> Finding:
    """The finding for a value: "bad" below ``bad``, "warn" below ``warn``, else "ok"."""
    if bad is not None and value < bad:
        return Finding(what, "bad", found, fix)
    if value < warn:
        return Finding(what, "warn", found, fix)
    return Finding(what, "ok", found)


def table(findings: Iterable[Finding]) -> Table:
    """A table for the terminal. Findings to act on come last, where they are seen."""
    view = Table(title="doctor", title_justify="left")
    view.add_column("")
    view.add_column("checked")
    view.add_column("found", overflow="fold")
    view.add_column("what to do", overflow="fold")
    for finding in sorted(findings, key=lambda finding: ("ok", "warn", "bad").index(finding.state)):
        view.add_row(finding.state, finding.what, finding.found, finding.fix)
    return view
