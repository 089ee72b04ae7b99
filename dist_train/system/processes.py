"""Map a function over items in a pool of processes that end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import TypeVar

from dist_train.errors import StoreError
from dist_train.system.cgroup import processes_at_once
from dist_train.system.main_guard import FIX, WHAT, end_if_run_again, were_unguarded
from dist_train.system.shared_memory import within_open_files, workers_started

# Files that this process has open for each worker.
OPEN_FILES = 3

Item = TypeVar("Item")
Result = TypeVar("Result")


def each_done(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None
) -> Iterator[Result]:
    """Results of ``function`` over ``items``, in order of completion.

    Args:
        function: picklable, as it runs in worker processes.
        items: consumed as workers need them.
        workers: number of processes; None takes one per usable CPU. With 1, or for one item,
            everything runs in this process.

    Raises:
        StoreError: a worker died.
    """
    end_if_run_again()
    workers = within_open_files(workers or processes_at_once(), OPEN_FILES)
    todo = iter(items)
    first = list(islice(todo, 2))
    todo = chain(first, todo)
    if workers < 2 or len(first) < 2:
        yield from map(function, todo)
        return
    with workers_started("give --workers 1"):
        context = worker_context()
        executor = ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)
    with executor as pool:
        running: set[Future[Result]] = set()
        started: list[BaseProcess] = []
        try:
            # One item waits for each worker, beside the one that it works on.
            while running := running | {
                pool.submit(function, item) for item in islice(todo, 2 * workers - len(running))
            }:
                started = multiprocessing.active_children()
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            if were_unguarded(process.exitcode for process in started):
                raise StoreError(WHAT, fix=FIX) from None
            raise StoreError(
                "a worker process died (out of memory, killed, or a decoder crashed)",
                fix="Run the command again, with fewer --workers if memory ran out: "
                "finished shards are kept.",
            ) from None
        except BaseException:
            # Ctrl-C or a failed item: the next run repeats the unfinished items.
            for worker in multiprocessing.active_children():
                worker.terminate()
            pool.shutdown(cancel_futures=True)
            raise


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
