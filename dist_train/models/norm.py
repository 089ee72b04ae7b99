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
from dist_train.models.fused_norm import fused_norm
from dist_train.models.padding import ValidFrames
from dist_train.models.recompute_once import is_repeated
from dist_train.models.rematerialize import recomputable
from dist_train.models.running import count_batch, move
from dist_train.models.sync_norm import AllReduce, Statistics, shared_batch_norm, shared_statistics

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
        fused: in training mode, all is done by the compiled loops of fused_norm.py.
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
        self.fused = False

    def forward(
        self,
        input: Tensor,
        valid: ValidFrames | None = None,
        *,
        shortcut: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        """Normalise [B, C, D, H, W]; keep its dtype and memory format.

        Args:
            valid: its real frames.
            shortcut: is added to what is normalised; zero in padded frames.
            relu: rectify the sum.

        Raises:
            ModelError: in training mode, a channel has a single value, which has no variance.
        """
        if self.fused and self.training:
            return self._fused(input, valid, shortcut, relu)
        if valid is None:
            images = recomputable(_joined_frames, input)
            y = self._normalise(images).view(input.shape)
        else:
            y = valid.scatter(self._normalise(recomputable(valid.gather, input)), like=input)
        if shortcut is not None:
            y = y + shortcut
        return F.relu(y) if relu else y

    def _fused(
        self, x: Tensor, valid: ValidFrames | None, shortcut: Tensor | None, relu: bool
    ) -> Tensor:
        if self.all_reduce is None and (valid is None or x.shape[0] == 1):
            # Of several padded clips each has a real frame, and to count them all may make the
            # host wait.
            frames = x.shape[0] * x.shape[2] if valid is None else len(valid.index)
            self._check_number(frames * x.shape[3] * x.shape[4])
        y, statistics = fused_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            valid,
            shortcut=shortcut,
            relu=relu,
            eps=self.eps,
            all_reduce=self.all_reduce,
        )
        self._note(statistics)
        return y

    def _check_number(self, of_values: int) -> None:
        if of_values == 1:
            raise ModelError(
                "batch statistics of a single value per channel",
                where=f"batch normalisation of {self.num_features} channels",
                fix="Train on larger clips, or on more clips in a batch",
            )

    def _normalise(self, x: Tensor) -> Tensor:
        """Of images [N, C, H, W]."""
        if not self.training:
            return self._batch_norm(x, self.running_mean, self.running_var)
        if self.all_reduce is not None:
            return self._normalise_by_shared(x, self.all_reduce)
        self._check_number(x.numel() // x.shape[1])
        if is_repeated():
            # The update goes to copies. Passing no statistics at all would change what autograd
            # saves, which checkpointing requires to be the same in both passes.
            return self._batch_norm(x, self.running_mean.clone(), self.running_var.clone())
        if self.observer is not None:
            mean, var = self.running_mean.clone(), self.running_var.clone()
            y = self._batch_norm(x, mean, var, momentum=1.0)
            count = x.numel() // x.shape[1]
            self.observer(mean, var * ((count - 1) / count), torch.full((), count, device=x.device))
            return y
        count_batch(self.num_batches_tracked)
        return self._batch_norm(x, self.running_mean, self.running_var)

    def _batch_norm(
        self, x: Tensor, mean: Tensor, var: Tensor, momentum: float | None = None
    ) -> Tensor:
        momentum = self.momentum if momentum is None else momentum
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, momentum, self.eps)

    def _normalise_by_shared(self, x: Tensor, all_reduce: AllReduce) -> Tensor:
        statistics = shared_statistics(x, self.running_mean, all_reduce)
        self._note(statistics)
        return shared_batch_norm(x, self.weight, self.bias, statistics, self.eps, all_reduce)

    def _note(self, statistics: Statistics) -> None:
        """Let the observer know, or move the running statistics."""
        if is_repeated():
            return
        if self.observer is not None:
            self.observer(*statistics)
            return
        count_batch(self.num_batches_tracked)
        move(self.running_mean, self.running_var, statistics, self.momentum)


def _joined_frames(x: Tensor) -> Tensor:
    """[B, C, D, H, W] as images [B, C, D * H, W]: a view, in either memory format.

    Statistics of a channel are the same. CUDA has fast kernels for channels last in 4-D only, and
    takes its general ones, without cuDNN, for 5-D. CPUs compute the same bits in the same time.
    """
    return x.flatten(2, 3)


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


def fuse(model: nn.Module) -> None:
    """Normalise by compiled loops in training mode, with the sum and the ReLU behind it. Rounding
    differs; ``fused_norm.check_compiler`` tells whether it can be done on a device."""
    for norm in norms(model):
        norm.fused = True


def set_momentum(model: nn.Module, momentum: float) -> None:
    """Set the weight of the newest batch in running statistics.

    Raises:
        ModelError: it is not above 0 and at most 1.
    """
    if not 0.0 < momentum <= 1.0:
        raise ModelError(f"momentum is {momentum}", fix="Give more than 0 and at most 1")
    for norm in norms(model):
        norm.momentum = momentum
