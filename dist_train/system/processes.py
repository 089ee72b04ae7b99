"""A function over many items in a pool of processes that ends with its parent."""

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

# That this process has open for each worker.
OPEN_FILES = 3

Item = TypeVar("Item")
Result = TypeVar("Result")


def each_done(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None
) -> Iterator[Result]:
    """Results of ``function`` over ``items``, each as soon as it is there, in no order.

    Args:
        items: taken as they are needed.
        workers: processes; None takes one per CPU that it may use. With 1, or for one item, all
            stays in this process.

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
            # One more than the processes take waits for each of them.
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
            # Ctrl-C, or a failed item: what the others are at is done again by the next run.
            for worker in multiprocessing.active_children():
                worker.terminate()
            pool.shutdown(cancel_futures=True)
            raise


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
