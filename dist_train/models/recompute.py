"""Activation checkpointing (Chen et al. 2016): keep a block's inputs, compute the rest twice."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_train.models.norm import held_statistics


def run_recomputed(block: nn.Module, *inputs: Any) -> Tensor:
    """Run ``block(*inputs)``, and run it again in the backward pass for its activations.

    Loss, gradients, buffers and the random state are those of a plain run: the second run draws
    the same random numbers and leaves running statistics alone. Outside training, where no
    activation is kept, it is a plain run.
    """
    output: Tensor
    if block.training and torch.is_grad_enabled():
        output = checkpoint(block, *inputs, use_reentrant=False, context_fn=_two_passes)
    else:
        output = block(*inputs)
    return output


def _two_passes() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of the forward pass and of its repetition."""
    return nullcontext(), held_statistics()
