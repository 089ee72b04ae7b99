"""Batch normalisation over real frames, with statistics of one process or of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.errors import ModelError
from dist_train.models.fused_norm import fused_norm
from dist_train.models.padding import ValidFrames, clear_padding
from dist_train.models.recompute_once import is_repeated
from dist_train.models.rematerialize import recomputable
from dist_train.models.running import count_batch, update_running
from dist_train.models.sync_norm import AllReduce, Statistics, shared_batch_norm, shared_statistics

#: Called with the mean [C], biased variance [C] and count [] of values of each training batch.
Observer = Callable[[Tensor, Tensor, Tensor], None]


class BatchNorm3d(nn.BatchNorm3d):
    """Batch normalisation (Ioffe & Szegedy 2015) of clips padded in depth.

    Without padding it equals ``torch.nn.BatchNorm3d``. With padding, statistics cover real frames
    only, and padded frames become zero. So behind a clip's last frame the next convolution sees its
    own zero padding, not this layer's bias.

    Attributes:
        all_reduce: see ``share_statistics``.
        observer: if set, it receives the batch statistics, and running statistics do not change.
        fused: see ``fuse``.
        frozen: normalise by the running statistics in training mode too, and leave them as they
            are. ``training`` then stays False.
    """

    # Never None with the default arguments, though the base class allows it.
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.all_reduce: AllReduce | None = None
        self.observer: Observer | None = None
        self.fused = False
        self.frozen = False

    def train(self, mode: bool = True) -> BatchNorm3d:
        super().train(mode and not self.frozen)
        return self

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
            valid: real frames of ``input``.
            shortcut: added after normalisation, of the input's shape, zero in padded frames.
            relu: apply a ReLU last.

        Raises:
            ModelError: in training mode, a channel has a single value, which has no variance.
        """
        if self.fused and self.training:
            return self._fused(input, valid, shortcut, relu)
        if not self.training:
            # Nothing is counted, so padded frames may be normalised too, and are then cleared.
            y = clear_padding(self._normalise(_joined_frames(input)).view(input.shape), valid)
        elif valid is None:
            y = self._normalise(recomputable(_joined_frames, input)).view(input.shape)
        else:
            y = valid.scatter(self._normalise(recomputable(valid.gather, input)), like=input)
        if shortcut is not None:
            y = y + shortcut
        return F.relu(y) if relu else y

    def _fused(
        self, x: Tensor, valid: ValidFrames | None, shortcut: Tensor | None, relu: bool
    ) -> Tensor:
        if self.all_reduce is None and (valid is None or x.shape[0] == 1):
            # Several padded clips have a real frame each, so more than one value; counting them
            # may make the host wait.
            frames = x.shape[0] * x.shape[2] if valid is None else len(valid.index)
            self._check_count(frames * x.shape[3] * x.shape[4])
        y, statistics = fused_norm(
            x, self.weight, self.bias, self.running_mean, valid, shortcut=shortcut, relu=relu,
            eps=self.eps, all_reduce=self.all_reduce,
        )  # fmt: skip
        self._update(statistics)
        return y

    def _check_count(self, values: int) -> None:
        if values == 1:
            raise ModelError(
                "batch statistics of a single value per channel",
                where=f"batch normalisation of {self.num_features} channels",
                fix="Train on larger clips, or on more clips in a batch",
            )

    def _normalise(self, x: Tensor) -> Tensor:
        """Normalise images [N, C, H, W]."""
        if not self.training:
            return self._batch_norm(x, self.running_mean, self.running_var)
        if self.all_reduce is not None:
            statistics = shared_statistics(x, self.running_mean, self.all_reduce)
            self._update(statistics)
            shared = statistics, self.eps, self.all_reduce
            return shared_batch_norm(x, self.weight, self.bias, *shared)
        count = x.numel() // x.shape[1]
        self._check_count(count)
        if is_repeated():
            # Update copies. With None, autograd would save other tensors than in the first pass,
            # which checkpointing does not allow.
            return self._batch_norm(x, self.running_mean.clone(), self.running_var.clone())
        if self.observer is not None:
            mean, var = self.running_mean.clone(), self.running_var.clone()
            y = self._batch_norm(x, mean, var, momentum=1.0)
            self.observer(mean, var * ((count - 1) / count), torch.full((), count, device=x.device))
            return y
        count_batch(self.num_batches_tracked)
        return self._batch_norm(x, self.running_mean, self.running_var)

    def _batch_norm(
        self, x: Tensor, mean: Tensor, var: Tensor, momentum: float | None = None
    ) -> Tensor:
        momentum = self.momentum if momentum is None else momentum
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, momentum, self.eps)

    def _update(self, statistics: Statistics) -> None:
        """Pass the batch statistics to the observer, or update the running ones."""
        if is_repeated():
            return
        if self.observer is not None:
            self.observer(*statistics)
            return
        count_batch(self.num_batches_tracked)
        update_running(self.running_mean, self.running_var, statistics, self.momentum)


def _joined_frames(x: Tensor) -> Tensor:
    """View [B, C, D, H, W] as images [B, C, D * H, W], in either memory format.

    CUDA's fast channels-last kernels take 4-D tensors only. CPUs compute the same bits.
    """
    return x.flatten(2, 3)


def norms(model: nn.Module) -> Iterator[BatchNorm3d]:
    """All normalisation layers, in order of registration."""
    return (module for module in model.modules() if isinstance(module, BatchNorm3d))


def share_statistics(model: nn.Module, all_reduce: AllReduce | None) -> None:
    """In training mode, normalise by statistics over the real frames of all processes.

    All processes must run the same layers in the same order. Shapes, lengths and recompute modes
    may differ.

    Args:
        all_reduce: called by each layer once in the forward and once in the backward pass. None:
            statistics per process.
    """
    for norm in norms(model):
        norm.all_reduce = all_reduce


def fuse(model: nn.Module) -> None:
    """In training mode, use the compiled loops of fused_norm.py. Only rounding changes."""
    for norm in norms(model):
        norm.fused = True


def set_momentum(model: nn.Module, momentum: float) -> None:
    """Set the weight of the newest batch in running statistics."""
    for norm in norms(model):
        norm.momentum = momentum
