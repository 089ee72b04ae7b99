"""``dist-train``, ``python -m dist_train``, and ``accelerate launch -m dist_train``."""

import os
import signal
import sys
from types import FrameType


def interrupted(number: int, frame: FrameType | None) -> None:
    """End at once during imports, which write nothing: a KeyboardInterrupt in them would become
    another exception or a long traceback."""
    at = frame
    while at is not None:
        if at.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(130)
        at = at.f_back
    signal.default_int_handler(number, frame)


def run() -> None:
    """Run the command line; Ctrl-C ends it without a message at any time."""
    # A launcher may have set its processes to ignore the signal.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)
    try:
        # This import takes a while.
        from dist_train.cli import main

        main()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if signal.getsignal(signal.SIGINT) is interrupted:
            # A second Ctrl-C while the interpreter ends.
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    run()
