"""End a run that hangs, with the stacks of all threads."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

from dist_train.distributed.signals import TRY_AGAIN

#: Most seconds from a hang until the process ends, and until the C library's timer ends it.
#: Launchers wait at least 30 s before they kill the rest of a run.
GRACE, C_GRACE = 5.0, 10.0
#: File descriptor for stacks: in a notebook, sys.stderr is no file.
STDERR = 2


class Watchdog:
    """Ends the process if nobody calls ``beat`` for a while, with the stacks of all its threads.

    If one rank hangs, the others wait for it, and each rank's watchdog prints where its own rank
    is. It ends its process ``GRACE`` later, after the others have printed too: they would fail as
    soon as this process is gone. A thread does this. If a library hangs with Python's lock held,
    the thread cannot run, and a timer of the C library prints the stacks and ends the process. A
    process that was stopped from outside prints nothing; its launcher ends it after the others.

    Args:
        seconds: the longest time between two beats; None watches nothing.
        rank: named in the message.
    """

    def __init__(self, seconds: float | None, rank: int) -> None:
        self.seconds, self.rank = seconds, rank
        self._last = time.monotonic()
        self._ended = threading.Event()

    def beat(self) -> None:
        """Note that the process makes progress."""
        self._last = time.monotonic()
        if self.seconds is not None:
            later = self.seconds + min(self.seconds, C_GRACE)
            faulthandler.dump_traceback_later(later, exit=True, file=STDERR)

    def __enter__(self) -> Watchdog:
        if self.seconds is not None:
            self.beat()
            watch = threading.Thread(target=self._watch, args=(self.seconds,), daemon=True)
            watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self.seconds is not None:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self, seconds: float) -> None:
        while not self._ended.wait(max(0.05, self._last + seconds - time.monotonic())):
            if time.monotonic() - self._last < seconds:
                continue
            print(
                f"error (process {self.rank}): no step was finished in {seconds:g} s "
                "(train.hang_timeout). A process of the run hangs, or their network is down. The "
                "stack of each thread follows here or in the log of its process. Go on by "
                "--resume auto.",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(file=STDERR, all_threads=True)
            time.sleep(min(seconds / 2, GRACE))
            os._exit(TRY_AGAIN)
