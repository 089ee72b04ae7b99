"""Work whose outcome all ranks learn, so that no rank waits for one that failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from dist_train.distributed.process_group import ProcessGroup
from dist_train.errors import DistTrainError
from dist_train.system.advice import advice

Result = TypeVar("Result")


class OfSomeRankError(Exception):
    """A rank failed; only that rank has the error as ``__cause__``.

    Attributes:
        fix: what the user can do; None if the operating system's error does not tell.
    """

    def __init__(self, reason: str, fix: str | None) -> None:
        super().__init__(reason)
        self.fix = fix


class _Failure(NamedTuple):
    reason: str
    fix: str | None


def run_on_all_ranks(group: ProcessGroup, act: Callable[[], Result]) -> list[Result]:
    """The results of ``act`` on each rank, on every rank; a collective call.

    Raises:
        OfSomeRankError: naming the first rank where it failed, and why.
    """
    cause: Exception | None = None
    outcome: Result | _Failure
    try:
        outcome = act()
    except Exception as error:
        cause = error
        outcome = _Failure(f"process {group.rank}: {_reason(error)}", advice(error))
    outcomes = group.gather(outcome)
    for failed in outcomes:
        if isinstance(failed, _Failure):
            raise OfSomeRankError(*failed) from cause
    return outcomes


def on_main(group: ProcessGroup, act: Callable[[], Result]) -> Result:
    """The result of ``act`` on rank 0, which alone calls it, on every rank; a collective call.

    An error is raised on every rank; on the other ranks a bug is a ``RuntimeError``.
    """
    result: Result | None = None
    cause: Exception | None = None
    if group.rank == 0:
        try:
            result = act()
        except Exception as error:
            cause = error
    # Other errors may not be picklable.
    sent = (
        cause if isinstance(cause, DistTrainError | OSError | None) else RuntimeError(repr(cause))
    )
    result, failed = group.gather((result, sent))[0]
    if cause is not None:
        raise cause
    if failed is not None:
        raise failed
    return result


def _reason(error: Exception) -> str:
    if isinstance(error, DistTrainError):
        return str(error)
    return error.strerror or str(error) if isinstance(error, OSError) else repr(error)
