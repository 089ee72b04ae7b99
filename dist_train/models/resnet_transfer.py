"""ResNets of other libraries, by the names that torchvision gave their tensors.

conv1, bn1                       stem
layer1.0.conv1, layer1.0.bn1     first convolution and normalisation of the first block
layer2.0.downsample.0 and .1     projection shortcut (type B) and its normalisation
fc                               head
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dist_train.errors import ModelError
from dist_train.models.resnet3d import BLOCKS, BasicBlock, Bottleneck, ResNet3D
from dist_train.models.transfer import Normalised, Transfer

STEM, FIRST = "conv1.weight", "layer1.0.conv1.weight"
#: Of a stem over D, H and W; None where it is unknown.
Stride = tuple[int | None, int | None, int | None]
_IN_BLOCK = re.compile(r"layer(\d+)\.(\d+)\.")


def is_resnet(tensors: Mapping[str, Tensor], ndim: int) -> bool:
    """Whether these are the weights of a ResNet with kernels of ``ndim`` axes."""
    return all(name in tensors and tensors[name].ndim == ndim for name in (STEM, FIRST))


def has_shortcut_bias(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.endswith("downsample.0.bias") for name in tensors)


def move_resnet(
    move: Transfer,
    *,
    stem_stride: Stride,
    stem_pool: bool | None,
    normalised: Normalised | None = None,
) -> None:
    """Take all weights of a ResNet but for the head.

    Args:
        stem_stride, stem_pool: settings of the network that the weights are of; None if unknown.

    Raises:
        ModelError: the model is none, or has other layers or another width.
    """
    model = _checked(move)
    _tell_of_stem(move, model, stem_stride, stem_pool)
    _move_stem(move, model, normalised)
    places = [f"layer{k}.{n}" for k, repeat in enumerate(model.repeats, 1) for n in range(repeat)]
    for number, place in enumerate(places):
        block = model.blocks[number]
        for conv in ("1", "2", "3") if isinstance(block, Bottleneck) else ("1", "2"):
            source, name = f"{place}.conv{conv}.weight", f"blocks.{number}.conv{conv}.conv.weight"
            kernel, done = move.fitted(move.tensor(source), name)
            move.take(source, name, "; ".join(done), value=kernel if done else None)
            move.take_norm(f"{place}.bn{conv}", f"blocks.{number}.conv{conv}.norm")
        if block.shortcut is not None:
            _move_shortcut(move, place, f"blocks.{number}.shortcut")


def _checked(move: Transfer) -> ResNet3D:
    model, given = move.model, move.given
    found = sorted({(int(m[1]), int(m[2])) for name in given if (m := _IN_BLOCK.match(name))})
    repeats = tuple(sum(layer == wanted for layer, _ in found) for wanted in range(1, 5))
    block = Bottleneck if "layer1.0.conv3.weight" in given else BasicBlock
    names = [f"resnet3d-{depth}" for depth, each in BLOCKS.items() if each == (block, repeats)]
    if not names:
        raise ModelError(
            f"the weights are of a ResNet of {' + '.join(map(str, repeats))} blocks, which no "
            "model here has",
            fix="Use the weights of another network.",
        )
    own = type(model.blocks[0]) if isinstance(model, ResNet3D) else None
    if not isinstance(model, ResNet3D) or (own, model.repeats) != (block, repeats):
        raise ModelError(
            f"the weights are of {names[0].replace('resnet3d', 'a ResNet')}, and the model is none",
            fix=f"Set model.name={names[0]}.",
        )
    width, here = len(given[STEM]), model.stem.conv.out_channels
    if width != here:
        raise ModelError(
            f"the weights are of a stem of {width} channels, and the model's has {here}",
            fix=f"Set model.width={width}.",
        )
    return model


def _tell_of_stem(move: Transfer, model: ResNet3D, stride: Stride, pool: bool | None) -> None:
    here = model.stem.conv.stride
    same = [own if there is None else there for there, own in zip(stride, here, strict=True)]
    if not any(stride):
        move.notes.append(
            f"the file does not say the stride of its stem; model.stem_stride is {list(here)}"
        )
    if same != list(here):
        move.notes.append(
            f"its stem has another stride: for the same network set model.stem_stride={same}"
        )
    if pool is not None and pool != (model.pool is not None):
        move.notes.append(
            f"it has {'a' if pool else 'no'} max pooling behind the stem: for the same network "
            f"set model.stem_pool={str(pool).lower()}"
        )


def _move_stem(move: Transfer, model: ResNet3D, normalised: Normalised | None) -> None:
    name, kernel, done = "stem.conv.weight", move.tensor(STEM), []
    shift: Tensor | None = None
    # What the channel of ones gives: what the kernel gives less without the mean.
    border = torch.zeros_like(kernel[:, :1])
    if normalised is not None:
        kernel, border = move.normalised(kernel, normalised)
        done.append("for pixels of 0 to 1")
        if not model.stem_border:
            shift = border.flatten(1).sum(1)
            move.notes.append(
                "around a clip it saw the mean colour, and here is black: for the same network set "
                "model.stem_border=true"
            )
    kernel, channels = move.for_channels(kernel)
    if model.stem_border:
        kernel = torch.cat([kernel, border], 1)
        channels.append("with a border")
    kernel, size = move.fitted(kernel, name)
    done += channels + size
    move.take(STEM, name, "; ".join(done), value=kernel if done else None)
    move.take_norm("bn1", "stem.norm", shift=shift, why="for pixels of 0 to 1")


def _move_shortcut(move: Transfer, place: str, name: str) -> None:
    source = f"{place}.downsample"
    conv, bias = f"{source}.0.weight", f"{source}.0.bias"
    if conv not in move.given and not any(".downsample." in each for each in move.given):
        _identity(move, name)
        return
    kernel, done = move.fitted(move.tensor(conv), f"{name}.conv.weight")
    # Repeating over one frame changes nothing but the shape.
    move.take(conv, f"{name}.conv.weight", "; ".join(done), value=kernel if done else None)
    shift = move.given.get(bias)
    move.take_norm(f"{source}.1", f"{name}.norm", shift=shift, why="less the shortcut's bias")
    if shift is not None:
        move.leave([bias], "taken from the running mean behind it")


def _identity(move: Transfer, name: str) -> None:
    """A shortcut of type A (He et al. 2016): the input, and zeros for further channels."""
    shape = move.own[f"{name}.conv.weight"].shape
    kernel = torch.eye(shape[0], shape[1]).view(shape)
    norm = move.model.get_submodule(f"{name}.norm")
    assert isinstance(norm, nn.BatchNorm3d)
    scale = torch.full((shape[0],), 1 + norm.eps, dtype=torch.float64).sqrt()
    why = "begins as shortcut A, the identity"
    for tensor, value in (
        ("conv.weight", kernel),
        ("norm.weight", scale),
        ("norm.bias", torch.zeros(shape[0])),
        ("norm.running_mean", torch.zeros(shape[0])),
        ("norm.running_var", torch.ones(shape[0])),
    ):
        move.make(f"{name}.{tensor}", value, why)
