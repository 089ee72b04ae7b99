"""What torch says where another process is gone, told as a user's error; what a bug says, not."""

from __future__ import annotations

import pytest
from torch.distributed import DistNetworkError, DistStoreError

from dist_train.engine.lost_process import losses_explained
from dist_train.errors import LostProcessError

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
    with pytest.raises(LostProcessError) as raised, losses_explained():
        raise error
    assert core in str(raised.value)
    assert "Go on by --resume auto" in str(raised.value)
    assert raised.value.exit_code == 75
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("/gloo/")]
)
def test_others_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, losses_explained():
        raise error
    assert raised.value is error
