"""Progress: a bar on a terminal, occasional lines in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from dist_train.safe_text import printable


class _Console(Console):
    """Escapes terminal commands in texts."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)


# Only rank 0 prints. Markup is off, because paths and groups may contain brackets and colons.
console = _Console(
    highlight=False, markup=False, emoji=False, quiet=os.environ.get("RANK", "0") != "0"
)


class Progress(Protocol):
    """Called with (done, total) and, optionally, a line of metrics."""

    def __call__(self, done: int, total: int, figures: str = "", /) -> None: ...


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """A progress bar for one long step."""
    if not console.is_terminal:
        yield _lines(title)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Bars(*columns, console=console) as bar:
        task = bar.add_task(title, total=None, figures="")

        def report(done: int, total: int, figures: str = "", /) -> None:
            bar.update(task, completed=done, total=total, figures=figures)

        yield report


def _lines(title: str) -> Progress:
    """Print a line at each tenth of the total, and at least every half minute."""
    shown, tenth = time.monotonic(), -1

    def report(done: int, total: int, figures: str = "", /) -> None:
        nonlocal shown, tenth
        now, reached = time.monotonic(), 10 * done // max(total, 1)
        if reached > tenth or now - shown >= 30:
            shown, tenth = now, reached
            try:
                print(f"{title}: {done}/{total}  {figures}".rstrip(), file=sys.stdout, flush=True)
            except OSError as error:
                _go_on_without_output(title, error)

    return report


def _go_on_without_output(title: str, error: OSError) -> None:
    """Discard further output: a closed pipe (``| head -1``) must not end a run of days."""
    warning = f"WARNING: standard output is closed ({error.strerror}); {title} goes on without it"
    with suppress(OSError):
        print(warning, file=sys.stderr, flush=True)
    # The buffer and all later output go to /dev/null.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
