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
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
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
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """End this worker when its parent is killed: the lock is free then, and the next run may write
    the same shard."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
