"""Start worker processes that end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext


def worker_context(*preload: str) -> ForkServerContext:
    """Start a fork server, and return the context that starts workers from it.

    This process itself must not be forked, as it may hold threads and locks (progress bars, Arrow,
    OpenMP). Server and workers block SIGINT: Ctrl-C reaches the whole process group, and a process
    that is still importing would print a traceback. This process ends them instead.

    Args:
        preload: modules that the first server imports, so that later workers start in
            milliseconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    # Start the tracker first, as its start lifts the block (CPython 3.11).
    resource_tracker.ensure_running()
    # New processes inherit blocked signals. This process gets a blocked SIGINT afterwards.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def end_with_parent() -> None:
    """In a worker process: end it when its parent is killed.

    Otherwise a worker of ``prepare`` would go on writing beside the next run, which finds the lock
    free, and a worker of a data loader would wait for ever. The parent of a worker is the fork
    server.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
