"""Models by name, or by import path, and what each of them can."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal

from torch import nn

from dist_train import extensions
from dist_train.errors import ModelError
from dist_train.models.adapted import Adapted, densenet121, monai_network
from dist_train.models.convnext3d import ConvNeXt3D
from dist_train.models.frame_sequence import READERS, FrameSequence, cannot_of
from dist_train.models.mobilenet3d import MobileNet3D
from dist_train.models.r2plus1d import DEPTHS, R2Plus1D
from dist_train.models.resnet3d import BLOCKS, ResNet3D
from dist_train.models.trunk import Trunk
from dist_train.models.x3d import DEPTH_FACTORS, X3D

#: What may be asked of a model: to recompute activations in the backward pass, to be captured by
#: CUDA graphs, to be written as ONNX, to have its weights sharded over processes (ZeRO-3, FSDP2),
#: and to run channels last.
Ability = Literal["recompute", "cuda_graphs", "onnx", "sharded", "channels_last"]


@dataclass(frozen=True)
class ModelSpec:
    """How a model is made, and what it cannot do.

    Attributes:
        build: makes the model. Its arguments are the model's settings; with ``in_channels`` it is
            for clips of several channels, with ``outputs`` for several logits a clip.
        cannot: reasons, in words that go on from the model's name: "has no parts ...".
        settings: arguments that are fields of their own in the section ``model`` of a config.
        library: the package whose network it is.
    """

    build: Callable[..., nn.Module]
    cannot: Mapping[Ability, str] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    library: str | None = None

    @property
    def arguments(self) -> Mapping[str, inspect.Parameter]:
        """The arguments of ``build``, by name."""
        return inspect.signature(self.build).parameters


#: Settings of ``model`` that are arguments of resnet3d.
OF_RESNET3D = ("width", "stem_stride", "stem_pool", "stem_border", "stem_folded", "dropout")

MODELS: dict[str, ModelSpec] = {
    f"resnet3d-{depth}": ModelSpec(partial(ResNet3D, depth), settings=OF_RESNET3D)
    for depth in BLOCKS
}
MODELS |= {f"r2plus1d-{depth}": ModelSpec(partial(R2Plus1D, depth)) for depth in DEPTHS}
MODELS |= {f"x3d-{size}": ModelSpec(partial(X3D, size)) for size in DEPTH_FACTORS}
MODELS["mobilenet3d"] = ModelSpec(MobileNet3D)
MODELS["convnext3d-tiny"] = ModelSpec(ConvNeXt3D)

#: Of a network of another library behind ``Adapted``.
OF_ADAPTED: Mapping[Ability, str] = {
    "recompute": "is another library's network, whose parts are not known here",
    "onnx": "is another library's network, adapted to unequal depths while it runs",
}
MODELS["densenet3d-121"] = ModelSpec(densenet121, OF_ADAPTED, library="monai")
MODELS |= {
    f"frames-{reader}": ModelSpec(partial(FrameSequence, reader), cannot_of(reader), library="timm")
    for reader in READERS
}
#: Parameters that may be given by place.
BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
#: Before the name of any class of ``monai.networks.nets``.
MONAI = "monai."


def build_model(name: str, **settings: Any) -> nn.Module:
    """Build a model with fresh weights, drawn from torch's global random state.

    Args:
        name: a key of ``MODELS``, such as "resnet3d-101", or the import path of a class.
        settings: arguments of that model.

    Raises:
        ModelError: there is no such model, it has no such setting, or it lacks one.
        ConfigError: an import path is not allowed or not importable.
    """
    spec = find_model(name)
    parameters = spec.arguments
    known = [n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for setting in settings:
        if setting not in known and not takes_any:
            fix = _hint(setting, known)
            raise ModelError(f"there is no setting {setting!r}", where=name, fix=fix)
    try:
        inspect.signature(spec.build).bind(**settings)
    except TypeError as error:
        raise ModelError(f"{error}", where=name, fix="Give it by model.args.") from None
    return spec.build(**settings)


def find_model(name: str) -> ModelSpec:
    """How the model of a name or import path is made.

    A class of an import path is given the true depths if the second argument of its forward is
    named ``frames``. Otherwise it is a network of clips alone, behind ``Adapted``; all arguments
    but the first are left to their defaults. Raises like ``build_model``.
    """
    if name.startswith(MONAI) and not extensions.is_import_path(name):
        return ModelSpec(partial(Adapted, monai_network(name.removeprefix(MONAI))), OF_ADAPTED)
    if not extensions.is_import_path(name):
        if name not in MODELS:
            raise ModelError(f"there is no model {name!r}", fix=_hint(name, list(MODELS)))
        return MODELS[name]
    found = extensions.load(name, "model.name")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ModelError(
            f"{name} is no model", where="model.name", fix="Name a subclass of torch.nn.Module."
        )
    forward = inspect.signature(found.forward)
    by_place = [p.name for p in forward.parameters.values() if p.kind in BY_PLACE]
    # Frames are given by place, behind the model itself and the clips.
    takes_frames = by_place[2:3] == ["frames"]
    if takes_frames == ("frames" in forward.parameters):
        with suppress(TypeError):
            forward.bind(*[None] * (3 if takes_frames else 2))
            if takes_frames:
                return ModelSpec(found, {} if issubclass(found, Trunk) else UNKNOWN)
            return ModelSpec(partial(Adapted, found), OF_ADAPTED)
    raise ModelError(
        f"{name} is no model of clips: its forward{forward} does not take volumes and frames, or "
        "volumes alone",
        where="model.name",
        fix="It takes volumes [B, C, D, H, W] and, as the second, frames: the true depths [B] or "
        "None. Other arguments need defaults. It gives logits [B].",
    )


#: Of a model from outside that is no ``Trunk``.
UNKNOWN: Mapping[Ability, str] = {
    "recompute": "has no parts that can be recomputed: it is no dist_train.models.trunk.Trunk",
    "onnx": "cannot be written as ONNX: it is no dist_train.models.trunk.Trunk",
}


def library_of(name: str) -> str | None:
    """The package whose network a model by name is; None: it is ours, or from an import path."""
    if name.startswith(MONAI) and not extensions.is_import_path(name):
        return "monai"
    return MODELS[name].library if name in MODELS else None


def require(name: str, ability: Ability, setting: str) -> None:
    """Refuse what a model cannot do.

    Raises:
        ModelError: it cannot, and why; ``setting`` asked for it.
        ModelError, ConfigError: as ``find_model``.
    """
    reason = find_model(name).cannot.get(ability)
    if reason is not None:
        fix = "Set it otherwise, or take another model."
        raise ModelError(f"{name} {reason}", where=setting, fix=fix)


def defaults_of(name: str) -> Mapping[str, Any]:
    """The arguments of a model that have a default, by name."""
    arguments = find_model(name).arguments
    return {n: p.default for n, p in arguments.items() if p.default is not p.empty}


def _hint(wrong: str, known: list[str]) -> str:
    if not known:
        return "There is none."
    nearest = get_close_matches(wrong, known, n=1)
    choices = f"There are: {', '.join(known)}"
    return f"Did you mean {nearest[0]!r}? {choices}" if nearest else choices
