"""Networks of other libraries, made to ignore padding in depth.

A network that maps clips [B, C, D, H, W] to logits [B, outputs], and knows of no padding, keeps its
structure, its parameters and their names. Its layers are told the real frames of their input:
convolutions and pooling with an extent in depth see zeros (or, where a maximum is taken, nothing)
behind a clip's last frame; batch normalisation becomes ours; the pooling of whole clips averages
over real voxels. Each clip has as many frames at any place as it has alone, but at least one.

Real frames are found by the depth of a tensor, which each layer that changes it notes. A layer that
mixes frames in another way is refused by its name, and a trial shows whether the network itself
mixes them between its layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dist_train.errors import ModelError
from dist_train.models.layers import Conv3d, global_average_pool
from dist_train.models.norm import BatchNorm3d
from dist_train.models.padding import ValidFrames, clear_padding, valid_frames
from dist_train.models.running import batched_updates
from dist_train.models.trunk import check_clips

#: Names that constructors have for the channels of clips and for the number of logits.
CHANNELS = ("in_channels", "n_input_channels", "in_chans")
OUTPUTS = ("out_channels", "num_classes", "outputs")
#: Layers that leave each frame by itself, or come behind the pooling of whole clips.
PER_FRAME = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid),
    *(nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout3d),
    *(nn.Flatten, nn.Linear),
)
#: Networks that have passed the trial in this process, by maker and arguments.
_passed: set[str] = set()


class Adapted(nn.Module):
    """A network of another library with padding, ``frames`` and one or more outputs.

    Args:
        make: the class of the network.
        in_channels: channels of a clip.
        outputs: logits of a clip.
        args: further arguments of ``make``.

    Raises:
        ModelError: its constructor does not fit, or a layer mixes frames in an unknown way.
    """

    def __init__(
        self, make: Callable[..., nn.Module], *, in_channels: int = 1, outputs: int = 1, **args: Any
    ) -> None:
        super().__init__()
        self.in_channels, self.outputs = in_channels, outputs
        self.name = getattr(make, "__name__", str(make))
        given = self._names(make, in_channels, outputs) | args
        try:
            self.net = make(**given)
        except (TypeError, ValueError, RuntimeError, ImportError, AssertionError) as error:
            raise ModelError(f"{error}", where=self.name, fix="Give it by model.args.") from None
        self._depths = _Depths()
        for name, module in self.net.named_modules():
            self._adapt(name, module)
        if (trial := f"{make}{given}") not in _passed and self._has_numbers():
            try:
                self._try()
            except RuntimeError as error:
                raise ModelError(
                    f"{self.name} does not take clips of 11 and 19 frames of 32 x 32 ({error})",
                    where="model.name",
                    fix="Take a network for clips of any size.",
                ) from None
            _passed.add(trial)

    def forward(self, x: Tensor, frames: Tensor | None = None) -> Tensor:
        """As of ``trunk.Trunk``."""
        check_clips(x, self.in_channels)
        valid = valid_frames(frames, x)
        lengths = None if valid is None else valid.mask.sum(dim=1)
        self._depths.start(x.shape[2], lengths, valid)
        x = clear_padding(x, valid)
        if self.training:
            with batched_updates():
                logits = self.net(x)
        else:
            logits = self.net(x)
        if not isinstance(logits, Tensor) or logits.shape != (x.shape[0], self.outputs):
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ModelError(
                f"{self.name} gives {shape} for {x.shape[0]} clips",
                fix=f"It must give [B, {self.outputs}].",
            )
        # That of the parameters, also under autocast.
        dtype = next((parameter.dtype for parameter in self.net.parameters()), x.dtype)
        return logits.to(dtype).squeeze(1)

    def _names(self, make: Callable[..., Any], channels: int, outputs: int) -> dict[str, Any]:
        parameters = inspect.signature(make).parameters
        named: dict[str, Any] = {"spatial_dims": 3} if "spatial_dims" in parameters else {}
        for names, value in ((CHANNELS, channels), (OUTPUTS, outputs)):
            name = next((n for n in names if n in parameters), None)
            if name is None:
                raise ModelError(
                    f"the constructor of {self.name} has none of {', '.join(names)}",
                    where="model.name",
                    fix="Name a class that says what its clips and its logits are.",
                )
            named[name] = value
        return named

    def _adapt(self, name: str, module: nn.Module) -> None:
        """Let a layer know the real frames of its input."""
        kind = type(module)
        if kind in LAYERS:
            reason = _unfit(module)
            if reason is None:
                # The layer keeps its parameters, hooks and place; only its forward is another.
                module.__class__ = LAYERS[kind]
                layer = cast(_Layer, module)
                layer.depths, layer.label = self._depths, f"{self.name}.{name}"
                if isinstance(module, BatchNorm3d):
                    module.all_reduce = module.observer = None
                    module.fused = module.frozen = False
                return
        elif isinstance(module, PER_FRAME):
            return
        else:
            is_container = next(module.children(), None) is not None
            if is_container and next(module.parameters(recurse=False), None) is None:
                return
            reason = "may mix frames, and nothing here tells it which of them are padding"
        raise ModelError(
            f"{self.name}.{name} ({kind.__name__}) {reason}",
            where="model.name",
            fix="Take another network, or write it with dist_train.models.trunk.Trunk.",
        )

    def _has_numbers(self) -> bool:
        return not any(p.is_meta or isinstance(p, FakeTensor) for p in self.net.parameters())

    @torch.no_grad()
    def _try(self) -> None:
        """Compare a clip's logits alone and padded; in float64, relative to another clip's."""
        draw = torch.Generator().manual_seed(0)
        shape = 2, self.in_channels, 19, 32, 32
        clips = torch.rand(shape, generator=draw, dtype=torch.float64, device="cpu")
        self.net.double().eval()
        # A last layer of zeros would hide all differences.
        before = [parameter.clone() for parameter in self.net.parameters()]
        for parameter in self.net.parameters():
            if not parameter.any():
                parameter.copy_(torch.rand(parameter.shape, generator=draw))
        lengths = torch.tensor([11, 19], device="cpu")
        alone = torch.cat([self._double(clips[i : i + 1, :, :n]) for i, n in enumerate(lengths)])
        padded = self._double(clips, lengths)
        # At an even depth, too, layers may give the same depth and other real frames.
        self._double(F.pad(clips, (0, 0, 0, 0, 0, 13)), lengths)
        for parameter, value in zip(self.net.parameters(), before, strict=True):
            parameter.copy_(value)
        self.net.float().train()
        # Not NaN either.
        if not (alone - padded).abs().max() <= 1e-6 * (alone[0] - alone[1]).abs().max():
            raise ModelError(
                f"padded frames change what {self.name} predicts: it mixes frames outside of its "
                "layers",
                where="model.name",
                fix="Take another network, or write it with dist_train.models.trunk.Trunk.",
            )

    def _double(self, clips: Tensor, lengths: Tensor | None = None) -> Tensor:
        valid = valid_frames(lengths, clips)
        self._depths.start(clips.shape[2], lengths, valid)
        logits: Tensor = self.net(clear_padding(clips, valid))
        return logits


class _Depths:
    """The real frames of the tensors of one forward pass, by their depth."""

    def __init__(self) -> None:
        self._lengths: dict[int, Tensor] = {}
        self._valid: dict[int, ValidFrames] = {}
        self._padded = False

    def start(self, depth: int, lengths: Tensor | None, valid: ValidFrames | None) -> None:
        """Begin with clips of ``lengths`` real frames, [B]; None: all have ``depth``."""
        self._padded = valid is not None
        self._lengths, self._valid = {}, {}
        if valid is not None and lengths is not None:
            self._lengths, self._valid = {depth: lengths}, {depth: valid}

    def of(self, x: Tensor, label: str) -> ValidFrames | None:
        """The real frames of [B, C, D, H, W]."""
        if not self._padded:
            return None
        depth = x.shape[2]
        if depth not in self._lengths:
            raise ModelError(
                f"{label} gets {depth} frames, which no layer before it made",
                where="model.name",
                fix="Take another network, or write it with dist_train.models.trunk.Trunk.",
            )
        if depth not in self._valid:
            lengths = self._lengths[depth]
            mask = torch.arange(depth, device=lengths.device) < lengths[:, None]
            self._valid[depth] = ValidFrames(mask, x.device)
        return self._valid[depth]

    def made(
        self, before: int, after: int, window: tuple[int, int, int] | None, label: str
    ) -> None:
        """Note the lengths behind a layer with an extent, stride and padding in depth; None: it
        pools whole clips."""
        if not self._padded:
            return
        lengths = self._lengths[before]
        if window is None:
            made = torch.ones_like(lengths)
        else:
            extent, stride, padding = window
            room = lengths + (2 * padding - extent)
            made = (room.div(stride, rounding_mode="floor") + 1).clamp(min=1)
        known = self._lengths.setdefault(after, made)
        # On a GPU the host would have to wait for this.
        if made.device.type == "cpu" and not torch.equal(known, made):
            raise ModelError(
                f"{label} makes {after} frames of {before}, and so does another layer, of which "
                "other ones are real",
                where="model.name",
                fix="Take another network, or clips of other depths.",
            )


class _Layer(nn.Module):
    """What the layers below have besides torch's."""

    depths: _Depths
    label: str


def _one(value: Any) -> int:
    """The value for depth of an argument of a layer."""
    first: int = value if isinstance(value, int) else value[0]
    return first


def _window(layer: Any) -> tuple[int, int, int]:
    """Extent, stride and padding in depth."""
    extent = (_one(layer.kernel_size) - 1) * _one(getattr(layer, "dilation", 1)) + 1
    return extent, _one(layer.stride), _one(layer.padding)


def _reach(x: Tensor, depth: int, fill: float = 0.0) -> Tensor:
    """Lengthen clips of fewer frames."""
    missing = depth - x.shape[2]
    return F.pad(x, (0, 0, 0, 0, 0, missing), value=fill) if missing > 0 else x


def _length(depth: int, window: tuple[int, int, int]) -> int:
    """Frames that a layer makes of ``depth`` frames: at least one."""
    extent, stride, padding = window
    return max(1, (depth + 2 * padding - extent) // stride + 1)


class _Conv(Conv3d, _Layer):
    def forward(self, input: Tensor) -> Tensor:
        window = _window(self)
        if window == (1, 1, 0):
            return super().forward(input)
        x = clear_padding(input, self.depths.of(input, self.label))
        extent, _, padding = window
        y = super().forward(_reach(x, extent - 2 * padding))
        self.depths.made(input.shape[2], y.shape[2], window, self.label)
        return y


class _Norm(BatchNorm3d, _Layer):
    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input, self.depths.of(input, self.label))


class _MaxPool(nn.MaxPool3d, _Layer):
    def forward(self, input: Tensor) -> Tensor:
        window, valid = _window(self), self.depths.of(input, self.label)
        x = input
        if valid is not None:
            x = torch.where(valid.on_device[:, None, :, None, None], x, -torch.inf)
        # Unlike convolutions, torch's pooling must not reach beyond a clip and its padding.
        y: Tensor = super().forward(_reach(x, window[0], -torch.inf))
        y = y[:, :, : _length(input.shape[2], window)]
        self.depths.made(input.shape[2], y.shape[2], window, self.label)
        return clear_padding(y, self.depths.of(y, self.label))


class _AvgPool(nn.AvgPool3d, _Layer):
    def forward(self, input: Tensor) -> Tensor:
        window, valid = _window(self), self.depths.of(input, self.label)
        extent, stride, padding = window
        y = super().forward(_reach(clear_padding(input, valid), extent))
        if input.is_contiguous(memory_format=torch.channels_last_3d):
            # torch's own pooling gives the contiguous layout.
            y = y.contiguous(memory_format=torch.channels_last_3d)
        length = _length(input.shape[2], window)
        self.depths.made(input.shape[2], length, window, self.label)
        if padding == 0 or not self.count_include_pad:
            # The average over those frames of a window that the clip has.
            real = input.new_ones(1, 1, input.shape[2])
            if valid is not None:
                real = valid.on_device[:, None].to(input.dtype)
            real = F.pad(real, (0, max(0, extent - real.shape[2])))
            share = F.avg_pool1d(real, extent, stride, padding, count_include_pad=False)
            y = y / share.clamp(min=1 / extent)[..., None, None]
        return y[:, :, :length]


class _MeanOfClip(nn.AdaptiveAvgPool3d, _Layer):
    def forward(self, input: Tensor) -> Tensor:
        mean = global_average_pool(input, self.depths.of(input, self.label))
        self.depths.made(input.shape[2], 1, None, self.label)
        return mean.to(input.dtype)[:, :, None, None, None]


class _MaxOfClip(nn.AdaptiveMaxPool3d, _Layer):
    def forward(self, input: Tensor) -> Tensor:
        valid = self.depths.of(input, self.label)
        if valid is not None:
            input = torch.where(valid.on_device[:, None, :, None, None], input, -torch.inf)
        self.depths.made(input.shape[2], 1, None, self.label)
        return input.amax(dim=(2, 3, 4), keepdim=True)


LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv3d: _Conv,
    nn.BatchNorm3d: _Norm,
    nn.MaxPool3d: _MaxPool,
    nn.AvgPool3d: _AvgPool,
    nn.AdaptiveAvgPool3d: _MeanOfClip,
    nn.AdaptiveMaxPool3d: _MaxOfClip,
}


def _unfit(module: Any) -> str | None:
    """Why a layer of ``LAYERS`` cannot be told the real frames; None if it can."""
    if isinstance(module, nn.Conv3d):
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return f"pads by {module.padding_mode} {module.padding}, and only zeros are known"
    elif isinstance(module, nn.BatchNorm3d):
        if not (module.affine and module.track_running_stats and module.momentum):
            return "has no weights or no running statistics"
    elif isinstance(module, nn.AdaptiveAvgPool3d | nn.AdaptiveMaxPool3d):
        if module.output_size not in (1, (1, 1, 1)) or getattr(module, "return_indices", False):
            return f"pools to {module.output_size}, and not whole clips"
    elif module.ceil_mode or getattr(module, "return_indices", False):
        return "has ceil_mode or return_indices"
    elif getattr(module, "divisor_override", None) is not None:
        return "has a divisor of its own"
    return None


def monai_network(name: str) -> Callable[..., nn.Module]:
    """A class of ``monai.networks.nets``.

    Raises:
        ModelError: MONAI is not installed, or has no such network.
    """
    try:
        nets = import_module("monai.networks.nets")
    except ImportError as error:
        raise ModelError(
            f"this network is MONAI's, which is not installed ({error})",
            where="model.name",
            fix="Run pip install 'dist_train[monai]'.",
        ) from None
    found = getattr(nets, name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ModelError(
            f"MONAI has no network {name}", where="model.name", fix="Name a class of its nets."
        )
    return found


def densenet121(*, in_channels: int = 1, outputs: int = 1, dropout: float = 0.0) -> Adapted:
    """MONAI's 3D DenseNet-121 (Huang et al. 2017).

    Args:
        in_channels: channels of a clip.
        outputs: logits of a clip.
        dropout: probability of dropping a voxel of a dense layer's output.
    """
    make = monai_network("DenseNet121")
    return Adapted(make, in_channels=in_channels, outputs=outputs, dropout_prob=dropout)
