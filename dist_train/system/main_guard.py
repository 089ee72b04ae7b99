"""Detect scripts without ``if __name__ == "__main__"``, which each worker process runs again.

Such a worker ends at its first call here, with an exit code that tells its parent why.
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
    # The same check as multiprocessing's own, for processes started during import.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(UNGUARDED)


def were_unguarded(codes: Iterable[int | None]) -> bool:
    """Whether one of the exit codes comes from ``end_if_run_again``."""
    return UNGUARDED in codes
