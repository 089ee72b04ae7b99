"""What became of the tensors of ``model.init``, for the terminal and the run's record."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from dist_train.models.transfer import Row

#: Columns of the terminal, and letters of the names that are shown.
WIDTH, NAMES = 100, 32
ORDER = ("taken", "adapted", "left out", "random")


class Source(NamedTuple):
    """Where weights were read, for the run's record.

    Attributes:
        path: absolute path.
        step: step of the run that they come from; None if they are of another library.
        sha256: hex digest of names and values of all weights and statistics that the run begins
            with.
        layout: whose names the tensors have; "dist_train" for an own run or export.
        tensors: what became of them, by kind and reason, as JSON types.
        notes: how the networks differ, in sentences.
    """

    path: str
    step: int | None
    sha256: str
    layout: str
    tensors: list[dict[str, Any]]
    notes: list[str]


class Group(NamedTuple):
    """Tensors with the same fate: how many, their elements, and their names."""

    how: str
    reason: str
    tensors: int
    values: int
    names: list[str]


def grouped(rows: Iterable[Row]) -> list[Group]:
    """Rows by kind and reason, in the order of the kinds."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.how, row.reason), []).append(row)
    groups = [
        Group(how, reason, len(same), sum(row.numel for row in same), [row.name for row in same])
        for (how, reason), same in found.items()
    ]
    return sorted(groups, key=lambda group: ORDER.index(group.how))


def lines(source: Source) -> list[str]:
    """The table as lines of text, with a line for each way in which the networks differ."""
    title = f"weights of {Path(source.path).name}, layout {source.layout}"
    table = Table(title=title, title_justify="left")
    for name in ("", "tensors", "values", "which", "why"):
        table.add_column(name, justify="right" if name in ("tensors", "values") else "left")
    for group in source.tensors:
        names = textwrap.shorten(", ".join(group["names"]), NAMES, placeholder=" ...")
        table.add_row(
            group["how"], str(group["tensors"]), f"{group['values']:,}", names, group["reason"]
        )
    text = io.StringIO()
    console = Console(file=text, width=WIDTH, markup=False, highlight=False, emoji=False)
    console.print(table)
    return [*text.getvalue().rstrip().split("\n"), *(f"note: {note}" for note in source.notes)]
