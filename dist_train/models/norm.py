"""Batch normalisation over real frames, whose statistics can be shared by several processes.

What is set for a whole model is here too: who shares statistics (``share_statistics``), and how
fast running ones move (``set_momentum``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.errors import ModelError
from dist_train.models.frames import ValidFrames
from dist_train.models.passes import is_repeated
from dist_train.models.remake import remade
from dist_train.models.shared_norm import AllReduce, shared_batch_norm, shared_statistics

#: Told the mean, the biased variance ([C] each) and the count of values of each training batch.
Observer = Callable[[Tensor, Tensor, Tensor], None]


class BatchNorm3d(nn.BatchNorm3d):
    """Batch normalisation (Ioffe & Szegedy 2015) of clips padded in depth.

    On a batch without padding it is ``torch.nn.BatchNorm3d``. On one with padding, real frames are
    normalised, in training mode by statistics over real frames alone, and padded frames become
    zero. So what the next convolution sees behind a clip's last frame is what it would have padded
    the clip with itself, and not this layer's bias.

    Attributes:
        all_reduce: with it, statistics in training mode are over the real frames of all processes.
        observer: with it, running statistics stay as they are, and it is told those of the batch.
    """

    # Always there with the default arguments; the base class allows None.
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.all_reduce: AllReduce | None = None
        self.observer: Observer | None = None

    def forward(self, input: Tensor, valid: ValidFrames | None = None) -> Tensor:
        """Normalise [B, C, D, H, W]; keep its dtype and memory format.

        Raises:
            ModelError: in training mode, a channel has a single value, which has no variance.
        """
        if valid is None:
            return self._normalise(input)
        return valid.scatter(self._normalise(remade(valid.gather, input)), like=input)

    def _normalise(self, x: Tensor) -> Tensor:
        if not self.training:
            return self._batch_norm(x, self.running_mean, self.running_var)
        if self.all_reduce is not None:
            return self._normalise_by_shared(x, self.all_reduce)
        if x.numel() == x.shape[1]:
            raise ModelError(
                "batch statistics of a single value per channel",
                where=f"batch normalisation of {x.shape[1]} channels",
                fix="Train on larger clips, or on more clips in a batch",
            )
        if is_repeated():
            # The update goes to copies. Passing no statistics at all would change what autograd
            # saves, which checkpointing requires to be the same in both passes.
            return self._batch_norm(x, self.running_mean.clone(), self.running_var.clone())
        if self.observer is not None:
            mean, var = self.running_mean.clone(), self.running_var.clone()
            y = self._batch_norm(x, mean, var, momentum=1.0)
            count = x.numel() // x.shape[1]
            self.observer(mean, var * ((count - 1) / count), torch.tensor(count, device=x.device))
            return y
        self.num_batches_tracked.add_(1)
        return self._batch_norm(x, self.running_mean, self.running_var)

    def _batch_norm(
        self, x: Tensor, mean: Tensor, var: Tensor, momentum: float | None = None
    ) -> Tensor:
        momentum = self.momentum if momentum is None else momentum
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, momentum, self.eps)

    def _normalise_by_shared(self, x: Tensor, all_reduce: AllReduce) -> Tensor:
        statistics = shared_statistics(x, self.running_mean, all_reduce)
        if not is_repeated():
            mean, var, count = statistics
            if self.observer is not None:
                self.observer(mean, var, count)
            else:
                self.num_batches_tracked.add_(1)
                unbiased = var * (count / (count - 1).clamp(min=1))
                for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                    running.lerp_(new.to(running.dtype), self.momentum)
        return shared_batch_norm(x, self.weight, self.bias, statistics, self.eps, all_reduce)


def norms(model: nn.Module) -> Iterator[BatchNorm3d]:
    """All normalisation layers, in the order of registration."""
    return (module for module in model.modules() if isinstance(module, BatchNorm3d))


def share_statistics(model: nn.Module, all_reduce: AllReduce | None) -> None:
    """Normalise by statistics over the real frames of all processes, in training mode.

    What SyncBatchNorm does on CUDA, for clips padded in depth and on any device. Every process must
    run the same layers in the same order; shapes, lengths and modes of recomputing may differ.

    Args:
        all_reduce: sums a float64 tensor over the processes, in place. It is called once a layer in
            the forward pass and once in the backward pass. None: each process on its own again.
    """
    for norm in norms(model):
        norm.all_reduce = all_reduce


def set_momentum(model: nn.Module, momentum: float) -> None:
    """Set the weight of the newest batch in running statistics.

    Raises:
        ModelError: it is not above 0 and at most 1.
    """
    if not 0.0 < momentum <= 1.0:
        raise ModelError(f"momentum is {momentum}", fix="Give more than 0 and at most 1")
    for norm in norms(model):
        norm.momentum = momentum
