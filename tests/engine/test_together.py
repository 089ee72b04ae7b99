"""A failure of one rank is heard of by all."""

from __future__ import annotations

import pytest
from thread_group import Threads, on_each_rank

from dist_train.engine.together import OfSomeRankError, on_main, together
from dist_train.errors import CheckpointError


def test_all_know_what_each_has_done() -> None:
    def act(group: Threads) -> None:
        assert together(group, lambda: group.rank**2) == [0, 1, 4]
        assert on_main(group, lambda: f"of rank {group.rank}") == "of rank 0"

    assert on_each_rank(3, act) == []


def test_where_one_fails_all_raise() -> None:
    def act(group: Threads) -> None:
        with pytest.raises(OfSomeRankError, match=r"process 1: ValueError.*bad") as raised:
            together(group, lambda: int("bad") if group.rank else 0)
        assert isinstance(raised.value.__cause__, ValueError) == (group.rank == 1)

    assert on_each_rank(2, act) == []


@pytest.mark.parametrize(
    "error", [CheckpointError("torn", where="here", fix="Mend it."), OSError(28, "No space", "/f")]
)
def test_users_errors_of_rank_0_are_raised_as_they_are(error: Exception) -> None:
    def act(group: Threads) -> None:
        def fail() -> None:
            raise error

        with pytest.raises(type(error)) as raised:
            on_main(group, fail)
        assert str(raised.value) == str(error)

    assert on_each_rank(2, act) == []


def test_a_bug_on_rank_0_ends_the_others_too() -> None:
    def act(group: Threads) -> None:
        expected = ZeroDivisionError if group.rank == 0 else RuntimeError
        with pytest.raises(expected, match="division by zero"):
            on_main(group, lambda: 1 / 0)

    assert on_each_rank(2, act) == []
