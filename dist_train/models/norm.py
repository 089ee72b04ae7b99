"""Batch normalisation over real frames, whose running statistics can be held still."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.errors import ModelError
from dist_train.models.frames import ValidFrames

_hold_statistics = ContextVar("_hold_statistics", default=False)


@contextmanager
def held_statistics() -> Iterator[None]:
    """Within it, a layer in training mode normalises as ever and leaves its buffers alone."""
    token = _hold_statistics.set(True)
    try:
        yield
    finally:
        _hold_statistics.reset(token)


class BatchNorm3d(nn.BatchNorm3d):
    """Batch normalisation (Ioffe & Szegedy 2015) of clips padded in depth.

    On a batch without padding it is ``torch.nn.BatchNorm3d``. On one with padding, real frames are
    normalised, in training mode by statistics over real frames alone, and padded frames become
    zero. So what the next convolution sees behind a clip's last frame is what it would have padded
    the clip with itself, and not this layer's bias.
    """

    # Always there with the default arguments; the base class allows None.
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, channels: int) -> None:
        super().__init__(channels)

    def forward(self, input: Tensor, valid: ValidFrames | None = None) -> Tensor:
        """Normalise [B, C, D, H, W]; keep its dtype and memory format.

        Raises:
            ModelError: in training mode, a channel has a single value, which has no variance.
        """
        if valid is None:
            return self._normalise(input)
        return valid.scatter(self._normalise(valid.gather(input)), like=input)

    def _normalise(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            if x.numel() == x.shape[1]:
                raise ModelError(
                    "batch statistics of a single value per channel",
                    where=f"batch normalisation of {x.shape[1]} channels",
                    fix="Train on larger clips, or on more clips in a batch",
                )
            if _hold_statistics.get():
                # The update goes to copies. Passing no statistics at all would change what
                # autograd saves, which checkpointing requires to be the same in both passes.
                mean, var = mean.clone(), var.clone()
            else:
                self.num_batches_tracked.add_(1)
        return F.batch_norm(
            x, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
