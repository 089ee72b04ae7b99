"""``supervised`` on a Ray cluster (https://docs.ray.io): each item is a task on any node.

Tasks of a lost node are run again on another node.
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
    """``supervised`` on the cluster that ``RAY_ADDRESS`` names or that this machine is part of.

    If there is no cluster, one of this machine alone is started, which ends with the process.

    Args:
        workers: tasks at a time; None takes one per core that the cluster has at the moment.

    Raises:
        StoreError: Ray is not installed, or the cluster cannot be reached; or as ``supervised``.
    """
    try:
        import ray
    except ImportError:
        raise StoreError("Ray is not installed", fix="Run: pip install 'dist_train[ray]'") from None

    # A cluster that is started here must not send usage reports.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options = {"logging_level": logging.ERROR, "log_to_driver": False, "include_dashboard": False}
    try:
        ray.init(ignore_reinit_error=True, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StoreError(
            f"the Ray cluster cannot be reached ({error})", fix="Check RAY_ADDRESS."
        ) from None
    # Retry a task whose node or process is lost, but not one that raises.
    task: Any = ray.remote(num_cpus=1, max_retries=-1)(_run)
    pending = iter(items)
    running: list[Any] = []
    try:
        while True:
            size = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
            running += [
                task.remote(function, item, without, limits)
                for item in islice(pending, max(0, size - len(running)))
            ]
            if not running:
                return
            done, running = ray.wait(running)
            yield ray.get(done[0])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    finally:
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
