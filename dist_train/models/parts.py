"""The parts of a network, from its input to its head, and which of them are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train.errors import ModelError
from dist_train.models.norm import BatchNorm3d

HEAD = "head"
ALL_BUT_HEAD = "all but head"
#: Layers of batch normalisation that keep their statistics: those of frozen parts, all, or none.
FrozenNorms = Literal["parts", "all", "none"]


def parts_of(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters of each part, by the part's name, in order from the input.

    A model says what its parts are by ``parameter_parts``, which gives the same. Of another model
    each child is a part, in order of registration, and so is each element of a list of children.
    """
    told: Callable[[], dict[str, list[str]]] | None = getattr(model, "parameter_parts", None)
    if told is not None:
        return told()
    parts: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        first, _, rest = name.partition(".")
        is_list = isinstance(getattr(model, first), nn.ModuleList | nn.Sequential)
        part = f"{first}.{rest.partition('.')[0]}" if is_list else first
        parts.setdefault(part, []).append(name)
    return parts


def head_of(model: nn.Module) -> str:
    """The name of the last part, which gives the logits.

    Raises:
        ModelError: the model has parts, but none is called "head".
    """
    parts = parts_of(model)
    if HEAD not in parts:
        raise ModelError(
            f"{type(model).__name__} has no part called head",
            where="finetune",
            fix=f"Call its last layer 'head'. Its parts are {', '.join(parts)}.",
        )
    return HEAD


def freeze(model: nn.Module, patterns: Sequence[str], norms: FrozenNorms = "parts") -> None:
    """Leave parameters out of training, and let batch normalisation keep its statistics.

    Args:
        patterns: names of parts, patterns of names of parameters (``blocks.0.*``), or "all but
            head".
        norms: see ``FrozenNorms``. A layer is of a frozen part if its parameters are frozen.

    Raises:
        ModelError: a pattern names nothing, nothing is left to train, or a layer cannot keep its
            statistics.
    """
    frozen = {name for pattern in patterns for name in _named(model, pattern)}
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if frozen and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(
            "no parameter is left to train", where="finetune.freeze", fix="Freeze fewer parts."
        )
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and norms != "none":
            own = {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
            if norms == "all" or (own and own <= frozen):
                _keep_statistics(name, module)


def _named(model: nn.Module, pattern: str) -> Iterable[str]:
    parts = parts_of(model)
    if pattern == ALL_BUT_HEAD:
        head = head_of(model)
        return [name for part, names in parts.items() if part != head for name in names]
    found = parts.get(pattern) or [
        name for name, _ in model.named_parameters() if fnmatchcase(name, pattern)
    ]
    if not found:
        raise ModelError(
            f"{pattern!r} is no part, and no parameter has such a name",
            where="finetune.freeze",
            fix=f"Give {ALL_BUT_HEAD!r}, a pattern such as '{next(iter(parts))}.*', or parts: "
            f"{', '.join(parts)}.",
        )
    return found


def _keep_statistics(name: str, module: nn.Module) -> None:
    if not isinstance(module, BatchNorm3d):
        raise ModelError(
            f"{name} is torch's {type(module).__name__}, whose statistics cannot be kept in "
            "training",
            where="finetune.freeze_norm",
            fix="Use dist_train.models.norm.BatchNorm3d, or set it to none.",
        )
    module.frozen = True
    module.eval()
