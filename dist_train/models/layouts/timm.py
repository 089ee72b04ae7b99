"""2D networks of timm, as encoders of the frames of ``FrameSequence``.

Names, kernels and the normalisation of pixels are timm's, so features are those of the network
itself. Grey clips are given to it as three equal channels.
"""

from collections.abc import Iterable

from torch import nn

from dist_train.errors import ModelError
from dist_train.models.frame_sequence import FrameSequence
from dist_train.models.transfer import Given, Transfer

TITLE = "2D networks of timm, for frames-..."
ENCODER = "encoder.network."


def recognises(given: Given, model: nn.Module) -> bool:
    if not isinstance(model, FrameSequence):
        return False
    own = model.encoder.network.state_dict().keys()
    return 2 * len(own & given.tensors.keys()) > len(own)


def move(move: Transfer, given: Given) -> None:
    model = move.model
    if not isinstance(model, FrameSequence):
        raise ModelError(
            f"the weights are of a 2D network, and {type(model).__name__} encodes no frames",
            fix="Set model.name to frames-lstm or another, or leave out model.init_layout.",
        )
    network = model.encoder.network
    own, facts = network.state_dict(), network.pretrained_cfg
    classifiers = tuple(f"{name}." for name in _several(facts.get("classifier")))
    first = [f"{name}.weight" for name in _several(facts.get("first_conv"))]
    for name, tensor in move.given.items():
        if name not in own and classifiers and name.startswith(classifiers):
            move.leave([name], "the encoder has no classifier")
        elif name in first and model.in_channels > 1:
            kernel, done = move.for_channels(tensor)
            move.take(name, ENCODER + name, "; ".join(done), value=kernel if done else None)
        else:
            move.take(name, ENCODER + name)
    for name in ("encoder.mean", "encoder.std"):
        move.make(name, move.own[name], "of the encoder's settings")
    move.finish(random=("reader.", "adapter.", "head."))


def _several(names: str | Iterable[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())
