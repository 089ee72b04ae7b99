"""Activation checkpointing (Chen et al. 2016) of a part of the network, in four modes.

    none    keep all that the backward pass needs
    cheap   make again what costs little: normalised and rectified tensors, expanding 1x1x1
            convolutions, the pooling's indices
    block   keep only what goes into each block, and run each again
    stage   keep only what goes into the part, and run it again as one

docs/activations.md has what each of them keeps and costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dist_train.models.recompute_once import TwoPasses
from dist_train.models.rematerialize import remaking

Recompute = Literal["none", "cheap", "block", "stage"]
Step = Callable[[Tensor], Tensor]


def run_part(mode: Recompute, blocks: Sequence[Step], x: Tensor) -> Tensor:
    """Run blocks one after the other.

    Loss, gradients, buffers and the random state are those of mode "none", to the bit: what runs
    again draws the same random numbers and leaves running statistics alone. Where no gradient is
    recorded, every mode is "none".
    """
    if mode == "none" or not torch.is_grad_enabled():
        return _chain(blocks, x)
    if mode == "stage":
        return _recomputed(lambda x: _chain(blocks, x), x)
    for block in blocks:
        if mode == "block":
            x = _recomputed(block, x)
        else:
            with remaking():
                x = block(x)
    return x


def _chain(blocks: Sequence[Step], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def _recomputed(step: Step, x: Tensor) -> Tensor:
    output: Tensor = checkpoint(step, x, use_reentrant=False, context_fn=_two_passes)
    return output


def _two_passes() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    passes = TwoPasses()
    return passes.first(), passes.second()
