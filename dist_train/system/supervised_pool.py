"""Map a function over items in processes that may crash or hang.

Decoders are C code that reads untrusted files. If one crashes or hangs, its process is lost. The
parent then starts another process, and repeats the item without the step that failed.
"""

from __future__ import annotations

import math
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

from dist_train.errors import StoreError
from dist_train.system.cgroup import processes_at_once
from dist_train.system.main_guard import FIX, WHAT, end_if_run_again, were_unguarded
from dist_train.system.processes import end_with_parent, worker_context
from dist_train.system.shared_memory import within_open_files

Item = TypeVar("Item")
Result = TypeVar("Result")

# Files that this process has open for each worker.
OPEN_FILES = 3
# A crash may have a passing cause, so a step is left out after its second crash only.
CRASHES = 2


@dataclass(frozen=True)
class Limits:
    """Limits of one step.

    Attributes:
        seconds: the longest time.
        bytes: the most memory beyond that of the idle process. On Linux, a larger allocation fails;
            elsewhere memory is not limited. None: no limit.
    """

    seconds: float
    bytes: int | None


class Steps:
    """Reports to the parent which step of its item a process works on."""

    def __init__(self, connection: Connection | None) -> None:
        self._connection = connection

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Context of step ``step``, to which the limits apply and which may crash."""
        self._tell(step)
        try:
            yield
        finally:
            self._tell(None)

    def _tell(self, step: int | None) -> None:
        if self._connection is not None:
            self._connection.send(("step", step))


# For functions that run in their caller's process.
UNWATCHED = Steps(None)


def supervised(
    function: Callable[[Item, Steps], Result],
    items: Iterable[Item],
    without: Callable[[Item, int, str], Item],
    limits: Limits,
    workers: int | None = None,
) -> Iterator[Result]:
    """Results of ``function`` over ``items``, in order of completion.

    Args:
        function: a function of a module's top level; it reports its steps by ``Steps.at``.
        items: consumed one by one, as processes become free.
        without: (item, step, reason) -> the item without a step that crashed twice or exceeded its
            time.
        limits: of each step.
        workers: number of processes; None takes one per usable CPU.

    Raises:
        StoreError: a process died outside of its steps, or was killed from outside.
        Exception: an error of ``function``. The other processes are ended.
    """
    end_if_run_again()
    pending = iter(items)
    idle: list[_Worker[Item, Result]] = []
    busy: list[_Worker[Item, Result]] = []
    size = within_open_files(workers or processes_at_once(), OPEN_FILES)
    try:
        while True:
            for item in islice(pending, size - len(busy)):
                busy.append(idle.pop() if idle else _Worker(function, limits))
                busy[-1].give(item, Counter())
            if not busy:
                return
            left = min(worker.time_left() for worker in busy)
            wait([worker.connection for worker in busy], None if left == math.inf else left)
            for worker in list(busy):
                try:
                    results = worker.hear()
                except _FailedStepError as failed:
                    busy.remove(worker)
                    worker.end()
                    busy.append(_Worker(function, limits))
                    busy[-1].give(worker.item_after(failed, without), worker.crashes)
                    continue
                if results:
                    busy.remove(worker)
                    idle.append(worker)
                    yield results[0]
    finally:
        # After an error, the next run repeats the unfinished items.
        for worker in busy + idle:
            worker.end()


def each_done(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None
) -> Iterator[Result]:
    """``supervised`` for a function without steps; one worker or item stays in this process.

    Raises:
        StoreError: a process died.
    """
    end_if_run_again()
    pending = iter(items)
    first = list(islice(pending, 2))
    if len(first) < 2 or (workers or processes_at_once()) < 2:
        return map(function, chain(first, pending))
    no_limits = Limits(math.inf, None)
    return supervised(
        partial(_unwatched, function), chain(first, pending), _unchanged, no_limits, workers
    )


def _unwatched(function: Callable[[Item], Result], item: Item, steps: Steps) -> Result:
    return function(item)


def _unchanged(item: Item, step: int, reason: str) -> Item:
    return item


class _FailedStepError(Exception):
    """A process ended in ``step`` of its item. ``final``: do not retry the step."""

    def __init__(self, step: int, reason: str, *, final: bool) -> None:
        super().__init__(reason)
        self.step, self.reason, self.final = step, reason, final


class _Worker(Generic[Item, Result]):
    """A process, its item, the crashes of the item by step, and the step reported last."""

    item: Item
    crashes: Counter[int]

    def __init__(self, function: Callable[[Item, Steps], Result], limits: Limits) -> None:
        # The function of ``each_done`` is the argument of a partial one.
        imported = function.args[0] if isinstance(function, partial) else function
        context = worker_context(imported.__module__)
        self.limits = limits
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function, limits), daemon=True)
        self.process.start()
        # The process has its own copy. When that closes at its end, reading here raises EOFError.
        theirs.close()
        self.step: int | None = None
        self.since = 0.0

    def give(self, item: Item, crashes: Counter[int]) -> None:
        self.item, self.crashes, self.step = item, crashes, None
        with suppress(BrokenPipeError):
            self.connection.send(item)

    def item_after(
        self, failed: _FailedStepError, without: Callable[[Item, int, str], Item]
    ) -> Item:
        """The item to repeat after ``failed``."""
        self.crashes[failed.step] += 1
        if failed.final or self.crashes[failed.step] >= CRASHES:
            return without(self.item, failed.step, failed.reason)
        return self.item

    def time_left(self) -> float:
        if self.step is None:
            return math.inf
        return max(0.0, self.since + self.limits.seconds - time.monotonic())

    def hear(self) -> list[Result]:
        """[result] if the item is done, else [].

        Raises:
            _FailedStepError: the process crashed in a step, or exceeded the time of the step.
            StoreError: the process died outside of its steps.
            Exception: an error of the function.
        """
        try:
            while self.connection.poll():
                kind, value = self.connection.recv()
                if kind == "step":
                    self.step, self.since = value, time.monotonic()
                elif kind == "done":
                    return [value]
                else:
                    raise value
        except (EOFError, ConnectionResetError):
            raise self._death() from None
        if self.step is not None and not self.time_left():
            reason = f"takes longer than {self.limits.seconds:g} s to decode"
            raise _FailedStepError(self.step, reason, final=True)
        return []

    def _death(self) -> Exception:
        self.process.join()
        code = self.process.exitcode or 0
        if were_unguarded([code]):
            return StoreError(WHAT, fix=FIX)
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        # SIGKILL comes from the system or from a person, never from a decoder.
        if self.step is None or code == -signal.SIGKILL:
            return StoreError(
                f"a worker process died ({how})",
                fix="Run the command again, with fewer --workers if memory ran out: "
                "finished shards are kept.",
            )
        return _FailedStepError(self.step, f"crashes the decoder ({how})", final=False)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()


def _serve(
    connection: Connection, function: Callable[[Any, Steps], object], limits: Limits
) -> None:
    end_with_parent()
    # Ctrl-C reaches the whole group, but the parent ends its processes itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # No core file in the user's folder: the list of rejected files reports the crash.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limits.bytes is not None:
        _limit_memory(limits.bytes)
    steps = Steps(connection)
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("done", function(item, steps)))
        except Exception as error:
            error.add_note(traceback.format_exc())
            connection.send(("failed", error))


def _limit_memory(more: int) -> None:
    """Limit this process to ``more`` bytes of private memory beyond its present size."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return
    limit = int(statm.read_text().split()[5]) * resource.getpagesize() + more
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    if most == resource.RLIM_INFINITY or limit < most:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
