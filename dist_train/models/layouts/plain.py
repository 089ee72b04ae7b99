"""Weights of the model itself: the names are its own, perhaps without those of a wrapper.

The head may have another number of outputs, and the first kernel another number of channels.
"""

from collections.abc import Sequence

import torch
from torch import nn

from dist_train.errors import ModelError
from dist_train.models.parts import head_of, parts_of
from dist_train.models.transfer import Given, Transfer

TITLE = "this model itself"


def recognises(given: Given, model: nn.Module) -> bool:
    return _prefix(given, model) is not None


def _prefix(given: Given, model: nn.Module) -> str | None:
    """What the model's names have before those of the file, which are at least half of them."""
    own = set(model.state_dict())
    firsts = {name.partition(".")[0] for name in own}
    for prefix in ["", *sorted(f"{first}." for first in firsts)]:
        if 2 * len({prefix + name for name in given.tensors} & own) > len(own):
            return prefix
    return None


def move(move: Transfer, given: Given) -> None:
    prefix = _prefix(given, move.model) or ""
    move.rename(lambda name: prefix + name)
    move_known(move)


def move_known(move: Transfer, there: Sequence[str] | None = None) -> None:
    """Take weights that have the model's names.

    Args:
        there: names of the channels that they are for, if they are known.
    """
    first = next((n for n, p in move.model.named_parameters() if p.ndim == 5), None)
    head = _head_names(move.model)
    for name, tensor in move.given.items():
        own = move.own.get(name)
        if name in head and own is not None and own.shape[:1] != tensor.shape[:1]:
            move.leave([name], f"it has {len(tensor)} outputs, and the model {len(own)}")
        elif name == first and tensor.ndim == 5:
            # A last channel of ones is not of the clip.
            ones = int(getattr(move.model, "stem_border", False))
            own_channels = tensor.shape[1] - ones
            value, done = move.for_channels(tensor[:, :own_channels], there)
            value = torch.cat([value, tensor[:, own_channels:]], 1)
            move.take(name, name, "; ".join(done), value=value if done else None)
        else:
            move.take(name, name)
    move.finish(random=head)


def _head_names(model: nn.Module) -> list[str]:
    try:
        return parts_of(model)[head_of(model)]
    except ModelError:
        # Then all must fit.
        return []
