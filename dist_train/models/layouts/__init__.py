"""Layouts of weights: each module knows how one family of networks names and shapes its tensors.

A module has

- ``TITLE``: whose weights they are, for messages;
- ``recognises(given, model)``: whether weights have this layout, by names and shapes;
- ``move(move, given)``: take them into the model; ModelError where they do not fit.

A new module in this folder is found by itself. Its name is the value of ``model.init_layout``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Protocol, cast

from torch import nn

from dist_train.errors import ModelError
from dist_train.models.transfer import Given, Transfer

AUTO = "auto"


class Layout(Protocol):
    """The interface of the modules in this folder."""

    TITLE: str

    def recognises(self, given: Given, model: nn.Module) -> bool: ...

    def move(self, move: Transfer, given: Given) -> None: ...


@cache
def layouts() -> dict[str, Layout]:
    """All modules of this folder, by name."""
    names = sorted(module.name for module in iter_modules(__path__))
    return {name: cast(Layout, import_module(f"{__name__}.{name}")) for name in names}


def transferred(
    given: Given, model: nn.Module, channels: Sequence[str], layout: str = AUTO
) -> tuple[str, Transfer]:
    """Find the model's weights in those of a file.

    Args:
        channels: names of the channels of the model's clips.
        layout: its name, or "auto".

    Returns:
        The layout's name, and a transfer whose ``state`` is complete. The model is as before.

    Raises:
        ModelError: no layout, or several, fit; or the weights are of another network.
    """
    name = _recognised(given, model) if layout == AUTO else layout
    if name not in layouts():
        raise ModelError(
            f"there is no layout {name!r}",
            where="model.init_layout",
            fix=f"There are: {', '.join([AUTO, *layouts()])}.",
        )
    move = Transfer(given.tensors, model, channels)
    layouts()[name].move(move, given)
    return name, move


def _recognised(given: Given, model: nn.Module) -> str:
    found = [name for name, each in layouts().items() if each.recognises(given, model)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelError(
            f"the weights may be of several layouts: {', '.join(found)}",
            fix="Name one by model.init_layout.",
        )
    first = next(iter(given.tensors))
    raise ModelError(
        f"no layout has tensors such as {first} {list(given.tensors[first].shape)}",
        fix="Layouts are: "
        + "; ".join(f"{name} ({each.TITLE})" for name, each in layouts().items())
        + ".",
    )
