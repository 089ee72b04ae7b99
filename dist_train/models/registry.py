"""Models by name."""

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any

from torch import nn

from dist_train.errors import ModelError
from dist_train.models.resnet3d import BLOCKS, ResNet3D

MODELS: dict[str, Callable[..., nn.Module]] = {
    f"resnet3d-{depth}": partial(ResNet3D, depth) for depth in BLOCKS
}


def build_model(name: str, **settings: Any) -> nn.Module:
    """Build a model with fresh weights, drawn from torch's global random state.

    Args:
        name: a key of ``MODELS``, such as "resnet3d-101".
        settings: arguments of that model.

    Raises:
        ModelError: there is no such model, it has no such setting, or a value is out of range.
    """
    if name not in MODELS:
        raise ModelError(f"there is no model {name!r}", fix=_hint(name, list(MODELS)))
    known = list(inspect.signature(MODELS[name]).parameters)
    for setting in settings:
        if setting not in known:
            raise ModelError(
                f"there is no setting {setting!r}", where=name, fix=_hint(setting, known)
            )
    return MODELS[name](**settings)


def _hint(wrong: str, known: list[str]) -> str:
    nearest = get_close_matches(wrong, known, n=1)
    choices = f"There are: {', '.join(known)}"
    return f"Did you mean {nearest[0]!r}? {choices}" if nearest else choices
