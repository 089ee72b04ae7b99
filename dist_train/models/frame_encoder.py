"""2D networks of timm (Wightman 2019) that map single frames to features."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.errors import ModelError
from dist_train.models.norm import BatchNorm3d

WHERE = "model.args.encoder"


class FrameNorm(BatchNorm3d):
    """``BatchNorm3d`` over images [N, C, H, W], which takes the place of a layer of timm.

    Args:
        of: the layer. timm's ``BatchNormAct2d`` also has an activation and a dropout.
    """

    def __init__(self, of: nn.BatchNorm2d) -> None:
        super().__init__(of.num_features)
        self.load_state_dict(of.state_dict())
        self.eps = of.eps
        self.drop, self.act = (getattr(of, name, nn.Identity()) for name in ("drop", "act"))

    def forward(self, input: Tensor, *_: Any, **__: Any) -> Tensor:
        """Normalise [N, C, H, W]; keep its dtype and memory format."""
        output: Tensor = self.act(self.drop(super().forward(input.unsqueeze(2)).squeeze(2)))
        return output


class FrameEncoder(nn.Module):
    """A network of timm without its classifier: frames [N, C, H, W] of 0 to 1 to features [N, F].

    Frames are normalised as those that timm's weights were trained on. Grey frames are given as
    three equal channels, so that weights of photographs fit as they are.

    Attributes:
        network: timm's network. Its batch normalisation is ``FrameNorm``.
        features: F.

    Raises:
        ModelError: timm is not installed, or has no such network, or the network no such argument.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, in_channels: int, args: Mapping[str, Any]) -> None:
        super().__init__()
        self.name, self.channels = name, 3 if in_channels == 1 else in_channels
        self.network = _create(name, self.channels, args)
        self.features = int(getattr(self.network, "head_hidden_size", self.network.num_features))
        for path, module in list(self.network.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                parent, _, child = path.rpartition(".")
                setattr(self.network.get_submodule(parent), child, FrameNorm(module))
        for key in ("mean", "std"):
            values = torch.tensor(self.network.pretrained_cfg[key])
            if len(values) != self.channels:
                values = values.mean().expand(self.channels).clone()
            self.register_buffer(key, values.view(1, -1, 1, 1))

    def forward(self, frames: Tensor) -> Tensor:
        """Features [N, F] of frames [N, C, H, W].

        Raises:
            ModelError: the network takes no frames of this size.
        """
        frames = (frames.expand(-1, self.channels, -1, -1) - self.mean) / self.std
        try:
            features: Tensor = self.network(frames)
        except AssertionError as error:
            raise ModelError(
                f"{self.name} takes no frames of {frames.shape[2]} x {frames.shape[3]} ({error})",
                where="clip.size",
                fix="Set another size, or give the network's img_size by model.args.encoder_args.",
            ) from None
        return features


def _create(name: str, channels: int, args: Mapping[str, Any]) -> Any:
    try:
        import timm
    except ImportError as error:
        raise ModelError(
            f"encoders of frames need timm, which cannot be imported here ({error})",
            where=WHERE,
            fix="Run pip install 'dist_train[timm]'.",
        ) from None
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3)
        raise ModelError(
            f"timm has no network {name!r}",
            where=WHERE,
            fix=f"Did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them.",
        )
    settings: dict[str, Any] = {"pretrained": False, "in_chans": channels, "num_classes": 0}
    if taken := settings.keys() & args.keys():
        raise ModelError(
            f"{min(taken)} is not to be set", where="model.args.encoder_args", fix="Leave it out."
        )
    try:
        with torch.device("meta"):
            kind = type(timm.create_model(name, **settings))
        # Vision transformers are made for one size of frames, unless they are told otherwise.
        free: dict[str, Any] = {"dynamic_img_size": True, "dynamic_img_pad": True}
        free = free if free.keys() <= inspect.signature(kind.__init__).parameters.keys() else {}
        return timm.create_model(name, **settings, **(free | dict(args)))
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ModelError(
            f"timm cannot make {name} so ({error})",
            where="model.args.encoder_args" if args else WHERE,
            fix="Give the arguments of this network of timm.",
        ) from None
