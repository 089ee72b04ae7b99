"""A function over many items in a pool of processes that ends with its parent."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from dist_train.errors import StoreError

Item = TypeVar("Item")
Result = TypeVar("Result")


def each_done(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int | None = None
) -> Iterator[Result]:
    """Results of ``function`` over ``items``, each as soon as it is there, in no order.

    Args:
        workers: processes; None takes one per available core, 1 stays in this process.

    Raises:
        StoreError: a worker died.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(items))
    if workers < 2:
        yield from map(function, items)
        return
    # Not fork: the parent may hold threads and locks (progress bars, Arrow, OpenMP).
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
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
