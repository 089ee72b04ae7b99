"""A failure of one rank is heard of by all."""

from __future__ import annotations

import pytest
from thread_group import Threads, on_each_rank
from torch.distributed import DistNetworkError, DistStoreError

from dist_train.distributed.collectives import OfSomeRankError, on_main, run_on_all_ranks
from dist_train.distributed.peer_loss import translate_peer_loss
from dist_train.errors import CheckpointError, LostProcessError


def test_all_know_what_each_has_done() -> None:
    def act(group: Threads) -> None:
        assert run_on_all_ranks(group, lambda: group.rank**2) == [0, 1, 4]
        assert on_main(group, lambda: f"of rank {group.rank}") == "of rank 0"

    assert on_each_rank(3, act) == []


def test_where_one_fails_all_raise() -> None:
    def act(group: Threads) -> None:
        with pytest.raises(OfSomeRankError, match=r"process 1: ValueError.*bad") as raised:
            run_on_all_ranks(group, lambda: int("bad") if group.rank else 0)
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


# What torch says where another process is gone, told as a user's error; what a bug says, not.


# As torch 2.13 says them.
CLOSED = (
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by "
    "peer [127.0.0.1]:8906. This is typically caused by a remote worker crashing."
)
UNCONNECTED = (
    "Gloo connectFullMesh failed with [/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/"
    "pair.cc:152] timed out connecting: SO_ERROR: Connection refused, remote=[127.0.0.1]:38283$1"
)


@pytest.mark.parametrize(
    ("error", "core"),
    [
        (RuntimeError(CLOSED), "(Connection closed by peer [127.0.0.1]:8906)"),
        (RuntimeError(UNCONNECTED), "failed with timed out connecting: SO_ERROR"),
        (RuntimeError("Application timeout caused pair closure"), "(Application timeout caused"),
        (DistStoreError("Timed out after 31 seconds\nException raised from"), "after 31 seconds)"),
        (DistNetworkError("The client socket has failed"), "(The client socket has failed)"),
    ],
)
def test_losses(error: Exception, core: str) -> None:
    with pytest.raises(LostProcessError) as raised, translate_peer_loss():
        raise error
    assert core in str(raised.value)
    assert "Go on by --resume auto" in str(raised.value)
    assert raised.value.exit_code == 75
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("/gloo/")]
)
def test_others_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, translate_peer_loss():
        raise error
    assert raised.value is error
