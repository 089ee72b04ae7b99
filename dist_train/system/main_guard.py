"""A script without ``if __name__ == "__main__"``: each process that it starts runs it again.

Such a process ends at its first call here, with a code by which the first one knows why.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable

UNGUARDED = 99
WHAT = "the script starts worker processes at its top level, and each of them runs it again"
FIX = "Put its calls under: if __name__ == '__main__':"


def end_if_run_again() -> None:
    """End this process if it is a worker that is still importing the script of its parent."""
    # As multiprocessing itself does, where a process is started too soon.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(UNGUARDED)


def were_unguarded(codes: Iterable[int | None]) -> bool:
    """Whether the exit codes of processes say that they ended here."""
    return UNGUARDED in codes
