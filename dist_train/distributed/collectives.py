"""Work of which all ranks hear how it went: where one fails all raise, rather than wait for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch.distributed import DistError

from dist_train.errors import DistTrainError, LostProcessError
from dist_train.system.advice import advice

Result = TypeVar("Result")


class Group(Protocol):
    """What it needs of the process group."""

    rank: int
    world: int

    def gather(self, value: Any) -> list[Any]: ...


class OfSomeRankError(Exception):
    """A rank failed; its cause is known on that rank alone.

    Attributes:
        fix: what the user can do, where the operating system's error tells.
    """

    def __init__(self, reason: str, fix: str | None) -> None:
        super().__init__(reason)
        self.fix = fix


@dataclass(frozen=True)
class _Failure:
    reason: str
    fix: str | None


def run_on_all_ranks(group: Group, act: Callable[[], Result]) -> list[Result]:
    """What ``act`` returns on each rank, on every rank; a collective call.

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
            raise OfSomeRankError(failed.reason, failed.fix) from cause
    return outcomes


def on_main(group: Group, act: Callable[[], Result]) -> Result:
    """What ``act`` returns on rank 0, where alone it is called, on every rank; a collective call.

    What it raises there is raised everywhere; an error that the user has no part in, as a
    ``RuntimeError``.
    """
    result: Result | None = None
    cause: Exception | None = None
    if group.rank == 0:
        try:
            result = act()
        except Exception as error:
            cause = error
    # Other errors may be of a kind that cannot be sent.
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


# Errors of communication, translated for the user.


#: gloo's errors have no type of their own. All but this one name the line of gloo they are from.
OF_GLOO = ("/gloo/", "Application timeout caused pair closure")


@contextmanager
def translate_peer_loss(then: str = "Go on by --resume auto.") -> Iterator[None]:
    """Within it, what torch raises where another process does not answer is a user's error.

    Args:
        then: what the user does once the cause is mended.

    Raises:
        LostProcessError: in place of that.
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
    """The first sentence of its message, without the line of torch's code that it is from."""
    first_line = str(error).partition("\n")[0]
    return re.sub(r"\[\S*\.cc:\d+\] ", "", first_line).partition(". ")[0]
