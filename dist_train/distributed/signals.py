"""Being told to stop: finish the step, save, and leave with a code that says why."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn

#: "Temporary failure, try again" (sysexits.h): a scheduler may put the job back into its queue.
TRY_AGAIN = os.EX_TEMPFAIL
#: What shells report for a program that Ctrl-C ended.
INTERRUPTED = 130


def exit_process(message: str, rank: int, code: int) -> NoReturn:
    """End this process at once, without a word to the others of its group, and say why."""
    print(f"error (process {rank}): {message}", file=sys.stderr, flush=True)
    os._exit(code)


class StopSignals:
    """Within it, SIGTERM and the first SIGINT are noted; a second SIGINT ends the process at once.

    Python's handlers wait while the main thread is inside a library, as it is when another process
    hangs, so the second SIGINT is heard by a thread of its own. To be used in the main thread.

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
        self._before = {
            number: signal.signal(number, handler)
            for number, handler in (
                (signal.SIGTERM, self._on_terminate),
                (signal.SIGINT, self._on_interrupt),
            )
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        # It ends the thread, which closes the other end.
        os.close(self._pipe[1])

    def _listen(self) -> None:
        interrupts = 0
        while numbers := os.read(self._pipe[0], 1024):
            interrupts += numbers.count(signal.SIGINT)
            if interrupts > 1:
                os.write(2, b"error: interrupted twice: ended at once. Go on by --resume auto.\n")
                os._exit(INTERRUPTED)
        os.close(self._pipe[0])

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        self.terminate = True

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupt = True
