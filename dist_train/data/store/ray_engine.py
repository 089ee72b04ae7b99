"""``supervised`` on a Ray cluster (https://docs.ray.io): each item is a task, on any node.

A task of a node that is lost is run again on another one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from dist_train.errors import StoreError
from dist_train.system.supervised_pool import Limits, Steps, supervised

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_ray(
    function: Callable[[Item, Steps], Result],
    items: Iterable[Item],
    without: Callable[[Item, int, str], Item],
    limits: Limits,
    workers: int | None = None,
) -> Iterator[Result]:
    """As ``supervised``, on the cluster that ``RAY_ADDRESS`` names or this machine is part of; one
    of this machine alone is started if there is none.

    Args:
        workers: tasks at a time; None takes one per core of the cluster, as it is at each moment.

    Raises:
        StoreError: Ray is not installed, or the cluster cannot be reached; or as ``supervised``.
    """
    try:
        import ray
    except ImportError:
        raise StoreError("Ray is not installed", fix="Run: pip install 'dist_train[ray]'") from None

    # A cluster of its own must not report to anybody.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ours = not ray.is_initialized()
    try:
        if ours:
            ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StoreError(
            f"the Ray cluster cannot be reached ({error})", fix="Check RAY_ADDRESS."
        ) from None
    # What a task raises is final; a lost node or process is not the task's.
    task: Any = ray.remote(num_cpus=1, max_retries=-1)(_run)
    todo = iter(items)
    running: list[Any] = []
    try:
        while True:
            size = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
            running += [
                task.remote(function, item, without, limits)
                for item in islice(todo, max(0, size - len(running)))
            ]
            if not running:
                return
            done, running = ray.wait(running)
            yield ray.get(done[0])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    finally:
        if ours:
            ray.shutdown()
        else:
            for left in running:
                ray.cancel(left, force=True)


def _run(
    function: Callable[[Item, Steps], Result],
    item: Item,
    without: Callable[[Item, int, str], Item],
    limits: Limits,
) -> Result:
    (result,) = supervised(function, [item], without, limits, workers=1)
    return result
