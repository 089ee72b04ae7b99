"""torchrun, ending with a code that a scheduler can act on.

torchrun itself ends with 1 whatever happened. This takes the same arguments and ends with

- 0: the workers finished;
- 75 (EX_TEMPFAIL): it was told to end by SIGTERM, or the first worker that failed ended with 75,
  which a training does that was told so: start it again, and it goes on from its checkpoint;
- 128 + N: it was told to end by another signal N, or a worker died by it;
- any other: what the first worker that failed ended with.

Launchers that do not find each other end with 75 too.

On a signal torchrun passes it to its workers, waits TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (30
unless set) for them to save a checkpoint, and kills what is left.

What a worker said is all that is shown of a failure; DIST_TRAIN_VERBOSE=1 shows torchrun's own
report, log and warnings too.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable

VERBOSE = os.environ.get("DIST_TRAIN_VERBOSE", "0") not in ("", "0")
LEVEL = "TORCH_CPP_LOG_LEVEL"
if QUIET_CPP := not VERBOSE and LEVEL not in os.environ:
    # torch reads it when it is loaded. Else each failed connection is told with its C++ stack.
    os.environ[LEVEL] = "FATAL"

# ruff: noqa: E402
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import main

if QUIET_CPP:
    # Not of the workers.
    del os.environ[LEVEL]

# Else workers that are started again meet in the store that those before them used, and may read
# there where one of those was to be reached (https://github.com/pytorch/pytorch/issues/135712).
os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


def run(launch: Callable[[], None] = main) -> int:
    """Run torchrun with this process's arguments; the code to end with.

    Args:
        launch: what starts the workers and waits for them.
    """
    if not VERBOSE:
        # Of this process alone.
        logging.disable(logging.ERROR)
    try:
        launch()
    except SignalException as told:
        return os.EX_TEMPFAIL if told.sigval == signal.SIGTERM else 128 + told.sigval
    except (DistError, RendezvousError) as error:
        if VERBOSE:
            raise
        print(
            f"error: the launchers of all machines did not find each other ({_line(error)}). Start "
            "one on each machine, each with a rank of its own from 0 on, and all with the address "
            "of the first; for longer waiting give --rdzv_conf timeout=SECONDS.",
            file=sys.stderr,
        )
        return os.EX_TEMPFAIL
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        if VERBOSE:
            print(failed, file=sys.stderr)
        else:
            print(
                f"launcher: a process failed ({_how(first.exitcode)}); what it said is above. "
                "DIST_TRAIN_VERBOSE=1 shows the launcher's report.",
                file=sys.stderr,
            )
        # A negative one is the signal that the worker died by.
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__


def _how(code: int) -> str:
    return f"code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


if __name__ == "__main__":
    sys.exit(run())
