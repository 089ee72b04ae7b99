"""How worker processes are started, and that they end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext


def worker_context(*preload: str) -> ForkServerContext:
    """How worker processes are started: by a server that is started here, and forks.

    Not by a fork of this process, which may hold threads and locks (progress bars, Arrow, OpenMP).
    Ctrl-C reaches the whole process group, and a server or worker that is still importing would
    print where. So they never hear it: this process ends them.

    Args:
        preload: modules that the first server imports, so that another worker is there in
            milliseconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    # Before: to start it lifts the block (CPython 3.11).
    resource_tracker.ensure_running()
    # New processes inherit what is blocked. Here it comes as soon as that is over.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def end_with_parent() -> None:
    """Called in a worker process: end it when the process that started it is killed.

    Else a worker of ``prepare`` would write on, beside the next run, which finds the lock free; and
    a worker of a data loader would wait for ever. It watches the fork server for its parent.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
