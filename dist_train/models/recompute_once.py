"""Side effects that happen once although activation checkpointing runs the forward pass twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from typing import Any, TypeVar

T = TypeVar("T")

# The result lists of the open first passes, and the results that the open second pass replays.
_recording: ContextVar[tuple[list[Any], ...]] = ContextVar("_recording", default=())
_replaying: ContextVar[Iterator[Any] | None] = ContextVar("_replaying", default=None)


class TwoPasses:
    """The forward pass of a part of the network, and its recomputation in the backward pass.

    A call through ``once`` runs in the first pass only. Each second pass gets the same results in
    the same order. First passes may be nested.
    """

    def __init__(self) -> None:
        self._results: list[Any] = []

    def first(self) -> AbstractContextManager[None]:
        """The context of the forward pass."""
        return _Context(_recording, lambda: (*_recording.get(), self._results))

    def second(self) -> AbstractContextManager[None]:
        """The context of a recomputation, which can be entered again: a graph that is kept for
        several backward passes has several."""
        return _Context(_replaying, lambda: iter(self._results))


def once(compute: Callable[[], T]) -> T:
    """``compute()``; in a second pass, its result from the first pass."""
    replayed = _replaying.get()
    if replayed is not None:
        repeated: T = next(replayed)
        return repeated
    result = compute()
    for results in _recording.get():
        results.append(result)
    return result


def is_repeated() -> bool:
    """Whether this is a second pass, in which buffers must not change."""
    return _replaying.get() is not None


class _Context(AbstractContextManager[None]):
    """Sets a context variable. Unlike a ``contextmanager``, it can be entered again."""

    def __init__(self, variable: ContextVar[Any], value: Callable[[], Any]) -> None:
        self._variable, self._value = variable, value
        self._tokens: list[Token[Any]] = []

    def __enter__(self) -> None:
        self._tokens.append(self._variable.set(self._value()))

    def __exit__(self, *_: object) -> None:
        self._variable.reset(self._tokens.pop())
