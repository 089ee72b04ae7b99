"""The parts of a network, from its input to its head, and which of them are trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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

    The parts are the model's children in order of registration, and of a list of children its
    elements. Where ``model.repeats`` says how many of ``model.blocks`` make each layer, these are
    layer1, layer2 and so on. A stem is one part. A module with one child has the child's parts.
    """
    children = list(model.named_children())
    if len(children) == 1 and not list(model.parameters(recurse=False)):
        ((outer, child),) = children
        inner = parts_of(child)
        return {part: [f"{outer}.{name}" for name in names] for part, names in inner.items()}
    repeats, blocks = getattr(model, "repeats", ()), getattr(model, "blocks", ())
    layers: list[str] = []
    if isinstance(repeats, tuple) and sum(repeats) == len(blocks):
        layers = [f"layer{k}" for k, repeat in enumerate(repeats, 1) for _ in range(repeat)]
    parts: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        first, _, rest = name.partition(".")
        number, part = rest.partition(".")[0], first
        if first == "blocks" and layers:
            part = layers[int(number)]
        elif first != "stem" and isinstance(getattr(model, first), nn.ModuleList | nn.Sequential):
            part = f"{first}.{number}"
        parts.setdefault(part, []).append(name)
    return parts


def head_of(model: nn.Module) -> str:
    """The name of the part that gives the logits: "head", or else the last if it is a linear layer.

    Raises:
        ModelError: there is no such part.
    """
    parts = parts_of(model)
    if HEAD in parts:
        return HEAD
    last = next(reversed(parts), None)
    by_name = dict(model.named_parameters())
    if last is None or [by_name[name].ndim for name in parts[last]] not in ([2], [2, 1]):
        raise ModelError(
            f"{type(model).__name__} has no part called head, and its last is no linear layer",
            where="finetune",
            fix=f"Call its last layer 'head'. Its parts are {', '.join(parts)}.",
        )
    return last


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
