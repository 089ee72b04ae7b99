"""A run that hangs ends, and says where."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType

from dist_train.distributed.signals import TRY_AGAIN

#: Seconds, at most, after which a hung process ends when it has told where it is, and after which
#: the C library tells. Launchers wait at least 30 s before they kill what is left of a run.
OTHERS_TELL, C_TELLS = 5.0, 10.0
#: Stacks go to the system's own: in a notebook, sys.stderr is no file.
STDERR = 2


class Watchdog:
    """Ends the process if nobody calls ``beat`` for a while, with the stacks of all its threads.

    Where one rank hangs, the others wait for it, so every rank's own watchdog tells where it is. It
    ends its process a little later, when those of the others, which would break off when this one
    is gone, have told too. A thread does it, and says why; where that cannot run, because a library
    hangs without releasing Python's lock, a timer of the C library does it a little later still. A
    process that was stopped from outside tells nothing, but its launcher ends it when the others
    are gone.

    Args:
        seconds: the longest time between two beats; None watches nothing.
        rank: named in the message.
    """

    def __init__(self, seconds: float | None, rank: int) -> None:
        self.seconds, self.rank = seconds, rank
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Something was done."""
        self._last = time.monotonic()
        if self.seconds is not None:
            later = self.seconds + min(self.seconds, C_TELLS)
            faulthandler.dump_traceback_later(later, exit=True, file=STDERR)

    def __enter__(self) -> Watchdog:
        if self.seconds is not None:
            self.beat()
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self.seconds is not None:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        assert self.seconds is not None
        while not self._ended.wait(max(0.05, self._last + self.seconds - time.monotonic())):
            if time.monotonic() - self._last < self.seconds:
                continue
            print(
                f"error (process {self.rank}): no step was finished in {self.seconds:g} s "
                "(train.hang_timeout). A process hangs, or the network between them is gone. The "
                "stack of each thread follows here or in the log of its process. Go on by "
                "--resume auto.",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(file=STDERR, all_threads=True)
            time.sleep(min(self.seconds / 2, OTHERS_TELL))
            os._exit(TRY_AGAIN)
