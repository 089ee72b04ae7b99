"""Signals to stop: note them, so that the run finishes its step, saves, and exits with a code."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

#: "Temporary failure, try again" (sysexits.h): a scheduler may put the job back into its queue.
TRY_AGAIN = os.EX_TEMPFAIL
#: The exit code that shells report for a program that Ctrl-C ended.
INTERRUPTED = 130


def exit_process(message: str, rank: int, code: int) -> NoReturn:
    """Print the message and end this process at once, without leaving its process group."""
    print(f"error (process {rank}): {message}", file=sys.stderr, flush=True)
    os._exit(code)


class StopSignals:
    """Context in which SIGTERM and the first SIGINT are noted; a second SIGINT ends the process.

    A thread waits for the second SIGINT: Python's handlers do not run while the main thread is
    inside a library, for example while another process hangs. To be used in the main thread.

    Attributes:
        terminate: SIGTERM came, as from a scheduler before a time limit.
        interrupt: SIGINT came.
    """

    def __init__(self) -> None:
        self.terminate = self.interrupt = False
        self._before: dict[int, Any] = {}
        self._pipe = (-1, -1)

    def __enter__(self) -> StopSignals:
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        # This ends the thread, which closes the other end.
        os.close(self._pipe[1])

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.terminate |= number == signal.SIGTERM
        self.interrupt |= number == signal.SIGINT

    def _listen(self) -> None:
        interrupts = 0
        while numbers := os.read(self._pipe[0], 1024):
            interrupts += numbers.count(signal.SIGINT)
            if interrupts > 1:
                os.write(2, b"error: interrupted twice: ended at once. Go on by --resume auto.\n")
                os._exit(INTERRUPTED)
        os.close(self._pipe[0])
