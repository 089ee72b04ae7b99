"""The result of a check as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from dist_train.data.check.result import CheckResult, Leak, Shift

#: Most rows of a table.
MOST_ROWS = 20
SHIFT_HEAD = ["brightness or contrast", "clips", "mean", "of others", "difference"]


def tables(result: CheckResult) -> list[Table]:
    """Findings, shifts if there are any, and leaks if they were looked for."""
    shown = [_table(f"{result.clips} clips", ["look for", "clips", "such as"])]
    for finding in result.findings:
        shown[0].add_row(finding.kind, str(finding.clips or "-"), "".join(finding.names[:1]))
    if result.shifts:
        shown.append(_table("groups and splits that differ", SHIFT_HEAD))
        for row in map(shift_cells, result.shifts[:MOST_ROWS]):
            shown[-1].add_row(*row)
        if len(result.shifts) > MOST_ROWS:
            shown[-1].add_row(f"{len(result.shifts) - MOST_ROWS} more, see --json")
    if result.leaks:
        shown.append(_table("labels without a look at the pixels", leak_head(result.leaks)))
        for leak in result.leaks:
            shown[-1].add_row(*leak_cells(leak))
    return shown


def _table(title: str, head: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in head:
        table.add_column(name)
    return table


def shift_cells(shift: Shift) -> list[str]:
    return [
        f"{shift.statistic} of {shift.of} {shift.name}",
        str(shift.clips),
        f"{shift.value:.1f}",
        f"{shift.others:.1f}",
        f"{shift.difference:+.2f} SD",
    ]


def leak_head(leaks: Sequence[Leak]) -> list[str]:
    """Names of the columns of ``leak_cells``. All leaks of a check have one metric."""
    return ["what the label is told from", leaks[0].metric, "95 % interval", "folds", "leak"]


def leak_cells(leak: Leak) -> list[str]:
    alone = len(leak.columns) == 1
    told = leak.columns[0] if alone else f"these {len(leak.columns)} together"
    return [
        f"{told} ({leak.of})" if leak.of else told,
        f"{leak.score:.3f}",
        f"{leak.low:.3f} to {leak.high:.3f}",
        "groups apart" if leak.apart else "mixed",
        "yes" if leak.is_leak else "no",
    ]
