"""Work whose outcome all ranks learn, and errors of communication: no rank waits for a dead one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from torch.distributed import DistError

from dist_train.distributed.process_group import ProcessGroup
from dist_train.errors import DistTrainError, LostProcessError
from dist_train.system.advice import advice

Result = TypeVar("Result")

#: gloo's errors have no type of their own. All but the second name a source file of gloo.
OF_GLOO = ("/gloo/", "Application timeout caused pair closure")


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


@contextmanager
def translate_peer_loss(then: str = "Go on by --resume auto.") -> Iterator[None]:
    """Turn torch's errors about processes that do not answer into errors for the user.

    Args:
        then: what the user does once the cause is removed.

    Raises:
        LostProcessError: in place of such an error.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, DistError) or any(part in str(error) for part in OF_GLOO)):
            raise
        raise LostProcessError(
            f"another process of the run has ended, or cannot be reached ({first_sentence(error)})",
            fix=f"What it said is above or in its own log. {then}",
        ) from error


def first_sentence(error: Exception) -> str:
    """The first sentence of the error's message, without torch's source file and line."""
    first_line = str(error).partition("\n")[0]
    return re.sub(r"\[\S*\.cc:\d+\] ", "", first_line).partition(". ")[0]
