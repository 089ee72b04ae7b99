"""Being told to stop: finish the step, save, and leave with a code that says why."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

#: "Temporary failure, try again" (sysexits.h): a scheduler may put the job back into its queue.
TRY_AGAIN = 75
#: What shells report for a program that Ctrl-C ended.
INTERRUPTED = 130


class StopSignals:
    """Within it, SIGTERM and the first SIGINT are noted; a second SIGINT ends at once.

    Attributes:
        terminate: SIGTERM came, as from a scheduler before a time limit.
        interrupt: SIGINT came.
    """

    def __init__(self) -> None:
        self.terminate = self.interrupt = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
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

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        self.terminate = True

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupt:
            raise KeyboardInterrupt
        self.interrupt = True
