"""torchrun, with exit codes for schedulers.

torchrun itself exits with 1 after every failure. This takes the same arguments and exits with

- 0: the workers finished;
- 75 (EX_TEMPFAIL): SIGTERM ended it, the first worker that failed exited with 75, as a training
  that was asked to stop does, or the launchers did not find each other. Start it again, and it
  resumes from its checkpoint;
- 128 + N: another signal N ended it or a worker;
- any other code: that of the first worker that failed.

On a signal torchrun passes it to its workers, waits TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (30
unless set) for them to save a checkpoint, and kills the others.

Of a failure only the worker's message is shown; DIST_TRAIN_VERBOSE=1 also shows torchrun's report,
log and warnings.
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
    # torch reads it on import. It would show a C++ stack for each failed connection.
    os.environ[LEVEL] = "FATAL"

# ruff: noqa: E402
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import main

if QUIET_CPP:
    # The workers keep their own level.
    del os.environ[LEVEL]

# Restarted workers would share the store of earlier workers, and may read their outdated addresses
# (https://github.com/pytorch/pytorch/issues/135712).
os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


def run(launch: Callable[[], None] = main) -> int:
    """Run torchrun with this process's arguments, and return the exit code.

    Args:
        launch: starts the workers and waits for them.
    """
    if not VERBOSE:
        # In this process only.
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
        # A negative code is the signal that killed the worker.
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__


def _how(code: int) -> str:
    return f"code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


if __name__ == "__main__":
    sys.exit(run())
