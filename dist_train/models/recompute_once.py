"""A piece of the network that runs twice, of which some things must happen only once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from typing import Any, TypeVar

T = TypeVar("T")

# The lists that open first passes note in, and what the open second pass takes from.
_notes: ContextVar[tuple[list[Any], ...]] = ContextVar("_notes", default=())
_noted: ContextVar[Iterator[Any] | None] = ContextVar("_noted", default=None)


class TwoPasses:
    """The forward pass of a piece of the network, and its repetition in the backward pass.

    What the piece does through ``once`` is done in the first pass alone; each second pass, of which
    there are several when a graph is kept for more than one backward pass, gets the same results in
    the same order. A first pass may hold others.
    """

    def __init__(self) -> None:
        self._results: list[Any] = []

    def first(self) -> AbstractContextManager[None]:
        """The context of the forward pass."""
        return _Context(_notes, lambda: (*_notes.get(), self._results))

    def second(self) -> AbstractContextManager[None]:
        """The context of a repetition; can be entered again."""
        return _Context(_noted, lambda: iter(self._results))


def once(compute: Callable[[], T]) -> T:
    """``compute()``; in a second pass, what it gave in the first one."""
    noted = _noted.get()
    if noted is not None:
        repeated: T = next(noted)
        return repeated
    result = compute()
    for notes in _notes.get():
        notes.append(result)
    return result


def is_repeated() -> bool:
    """Whether this is a second pass, which leaves buffers alone."""
    return _noted.get() is not None


class _Context(AbstractContextManager[None]):
    """A context variable set for a while. Other than a generator's, it can be entered again."""

    def __init__(self, variable: ContextVar[Any], value: Callable[[], Any]) -> None:
        self._variable, self._value = variable, value
        self._tokens: list[Token[Any]] = []

    def __enter__(self) -> None:
        self._tokens.append(self._variable.set(self._value()))

    def __exit__(self, *_: object) -> None:
        self._variable.reset(self._tokens.pop())
