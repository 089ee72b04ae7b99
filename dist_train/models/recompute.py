"""Activation checkpointing (Chen et al. 2016) of a part of the network, in four modes.

    none    keep every tensor that the backward pass needs
    cheap   recompute cheap tensors: normalised and rectified ones, expanding 1x1x1 convolutions,
            the pooling's indices
    block   keep the input of each block; run each block again
    stage   keep the input of the part; run the whole part again

docs/activations.md lists the memory and the time of each mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dist_train.models.recompute_once import TwoPasses
from dist_train.models.rematerialize import rematerializing

Recompute = Literal["none", "cheap", "block", "stage"]
Step = Callable[[Tensor], Tensor]


def run_part(mode: Recompute, blocks: Sequence[Step], x: Tensor) -> Tensor:
    """Run blocks in order.

    Loss, gradients, buffers and the random state are bit-identical in all modes: a second run draws
    the same random numbers and does not update running statistics. Without gradients every mode
    is "none".
    """
    if not torch.is_grad_enabled():
        mode = "none"
    if mode == "stage":
        return _recomputed(lambda x: run_part("none", blocks, x), x)
    for block in blocks:
        if mode == "block":
            x = _recomputed(block, x)
        elif mode == "cheap":
            with rematerializing():
                x = block(x)
        else:
            x = block(x)
    return x


def _recomputed(step: Step, x: Tensor) -> Tensor:
    output: Tensor = checkpoint(step, x, use_reentrant=False, context_fn=_two_passes)
    return output


def _two_passes() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    passes = TwoPasses()
    return passes.first(), passes.second()
