"""``dist-train``, ``python -m dist_train``, and ``accelerate launch -m dist_train``."""

import os
import signal
import sys
from types import FrameType


def interrupted(number: int, frame: FrameType | None) -> None:
    """End at once while modules are imported: a KeyboardInterrupt there comes out as whatever the
    module makes of it, or as a traceback through half of its code. Nothing is written meanwhile."""
    at = frame
    while at is not None:
        if at.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(130)
        at = at.f_back
    signal.default_int_handler(number, frame)


def run() -> None:
    """The command line, which a Ctrl-C ends without a word, however early it comes."""
    # A launcher may have told its processes to ignore it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)
    try:
        # Not before: it takes a while.
        from dist_train.cli import main

        main()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if signal.getsignal(signal.SIGINT) is interrupted:
            # A second one, while the interpreter ends and joins what is left.
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    run()
