"""Models by name, or by import path."""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any

from torch import nn

from dist_train import extensions
from dist_train.errors import ModelError
from dist_train.models.resnet3d import BLOCKS, ResNet3D

MODELS: dict[str, Callable[..., nn.Module]] = {
    f"resnet3d-{depth}": partial(ResNet3D, depth) for depth in BLOCKS
}


def build_model(name: str, **settings: Any) -> nn.Module:
    """Build a model with fresh weights, drawn from torch's global random state.

    Args:
        name: a key of ``MODELS``, such as "resnet3d-101", or the import path of a class.
        settings: arguments of that model.

    Raises:
        ModelError: there is no such model, it has no such setting, or it lacks one.
        ConfigError: an import path is not allowed or not importable.
    """
    model = find_model(name)
    signature = inspect.signature(model)
    parameters = signature.parameters
    known = [n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for setting in settings:
        if setting not in known and not takes_any:
            fix = _hint(setting, known)
            raise ModelError(f"there is no setting {setting!r}", where=name, fix=fix)
    try:
        signature.bind(**settings)
    except TypeError as error:
        raise ModelError(f"{error}", where=name, fix="Give it by model.args.") from None
    return model(**settings)


def find_model(name: str) -> Callable[..., nn.Module]:
    """The class or function that makes a model. Raises like ``build_model``."""
    if not extensions.is_import_path(name):
        if name not in MODELS:
            raise ModelError(f"there is no model {name!r}", fix=_hint(name, list(MODELS)))
        return MODELS[name]
    found = extensions.load(name, "model.name")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ModelError(
            f"{name} is no model", where="model.name", fix="Name a subclass of torch.nn.Module."
        )
    try:
        inspect.signature(found.forward).bind(None, None, None)
    except TypeError:
        raise ModelError(
            f"{name} is no model of clips: its forward does not take two arguments",
            where="model.name",
            fix="It takes volumes [B, C, D, H, W] and frames, the true depths [B] or None, and "
            "gives logits [B].",
        ) from None
    return found


def defaults_of(name: str) -> Mapping[str, Any]:
    """The arguments of a model that have a default, by name."""
    parameters = inspect.signature(find_model(name)).parameters
    return {n: p.default for n, p in parameters.items() if p.default is not p.empty}


def _hint(wrong: str, known: list[str]) -> str:
    if not known:
        return "There is none."
    nearest = get_close_matches(wrong, known, n=1)
    choices = f"There are: {', '.join(known)}"
    return f"Did you mean {nearest[0]!r}? {choices}" if nearest else choices
